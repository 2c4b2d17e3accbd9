"""Pretrained and intermediate models for losses: exposed layers, frozen models, files of them."""

import base64
import contextlib
import copy
import os
import pathlib
import re
import shutil
import tempfile
import weakref
import zipfile

import h5py
import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.models import Functional
from keras.src.saving.serialization_lib import SafeModeScope


def expose(model, layers):
    """The same model with the outputs of named layers as further outputs, for losses on them.

    It shares its layers with `model`, trains them as `model` does, and saves like any other. The
    recipe of keeping a layer's output in a variable, for a loss to read, is a trap: it holds a
    symbol of another graph, or the features of another batch.

    Args:
      model: a functional or built sequential model.
      layers: names of its layers, or one name.
    Returns:
      A `keras.Model` of the inputs of `model`, with a dict of outputs: its own under
      `model.output_names` (a dict under its own keys), the layers' under their names.
    Raises:
      ValueError: a model without a graph of layers; a name that no layer has, that several calls of
        a layer share, or that is that of another output.

    The distance to the first example's features, beside a cross-entropy:

    ```python
    model = fusedloss.models.expose(model, ["features"])
    first = fusedloss.losses.FeatureDistance(reference="first")
    model.compile(
        "adam",
        loss={"probabilities": "categorical_crossentropy", "features": first},
        loss_weights={"probabilities": 0.5, "features": 0.5},
    )
    model.fit(images, {"probabilities": targets, "features": targets})  # The latter is not read.
    ```
    """
    graph = _graph(model)
    own = graph._outputs_struct
    if not isinstance(own, dict):
        own = dict(zip(graph.output_names, graph.outputs, strict=True))
        if len(own) < len(graph.outputs):
            raise ValueError(
                f"The model {model.name!r} has several outputs of one name: {graph.output_names}. "
                "Give it a dict of outputs."
            )
    named = _layer_outputs(model, layers)
    for name in own.keys() & named.keys():
        if own[name] is not named[name]:
            raise ValueError(
                f"{name!r} is both a layer and another output of the model {model.name!r}: rename "
                "one of them."
            )
    return keras.Model(graph._inputs_struct, {**own, **named}, name=model.name)


def _graph(model):
    """The functional model that `model` is or that a sequential one holds."""
    if isinstance(model, Functional):
        return model
    if isinstance(model, keras.Sequential):
        if model._functional is not None:
            return model._functional
        remedy = "is not built yet: give it a `keras.Input`, or call it once"
    else:
        remedy = (
            "has no graph of layers to find names in: make it with the functional API, or return "
            "the features from its `call` beside its outputs"
        )
    raise ValueError(f"The model {getattr(model, 'name', model)!r} {remedy}.")


def _layer_outputs(model, layers):
    """The outputs of the layers of these names inside of `model`, by name."""
    graph = _graph(model)
    nodes = [node for same_depth in graph._nodes_by_depth.values() for node in same_depth]
    outputs = {operation.name: [] for operation in graph.operations}
    for node in nodes:
        outputs[node.operation.name].append(node.output_tensors)
    found = {}
    for name in _names(layers):
        calls = outputs.get(name, [])
        if len(calls) > 1:
            raise ValueError(
                f"The model {model.name!r} calls its layer {name!r} {len(calls)} times: which of "
                "the outputs is meant cannot be told by the name."
            )
        if not calls:
            raise ValueError(_no_layer(model, graph, name, outputs))
        found[name] = calls[0][0] if len(calls[0]) == 1 else list(calls[0])
    return found


def _names(layers):
    names = [layers] if isinstance(layers, str) else layers
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`layers` must be names of layers. Got {layers!r}.")
    return names


def _no_layer(model, graph, name, existing):
    for layer in graph.layers:
        if any(inner.name == name for inner in layer._flatten_layers(include_self=False)):
            owner = f"model.get_layer({layer.name!r}){'.model' * isinstance(layer, Frozen)}"
            return (
                f"{name!r} is no layer of the model {model.name!r}, but one inside of its layer "
                f"{layer.name!r}, whose own graph it belongs to. Expose it there, "
                f"`expose({owner}, [{name!r}])`, and make the outer model with the result in its "
                "place."
            )
    return f"The model {model.name!r} has no layer {name!r}. Its layers: {', '.join(existing)}."


@keras.saving.register_keras_serializable(package="fusedloss")
class Frozen(keras.layers.Layer):
    """A layer around a model that does not train, whatever becomes of the model it is put into.

    The model runs in inference mode: batch norm uses its statistics and keeps them, dropout drops
    nothing. Its weights are saved with the layer and are not among the trainable ones, also after
    `trainable = True` on the layer or on an outer model. The gradient flows through it to its
    inputs. Making the layer freezes the model itself, not a copy, and with it what shares its
    layers: a model that is to be trained elsewhere has to be cloned before. Only who sets
    `trainable` of the model inside, or of a layer in it, thaws it. Calling a model with
    `training=False` while an outer one is put together is a trap: `fit` overrides it.

    Args:
      model: a Keras model or layer.
      outputs: None, or names of the entries to keep where the model returns a dict.
      name, dtype: as of `keras.layers.Layer`.
    Raises:
      TypeError: something else than a model or layer.
      ValueError: when called, inputs of a shape that the model does not take; an output that it
        does not have.
    """

    def __init__(self, model, outputs=None, name=None, dtype=None):
        if not isinstance(model, keras.layers.Layer):
            raise TypeError(
                f"A frozen model must be a Keras model or layer, such as `load_frozen` reads from "
                f"a file. Got {model!r}."
            )
        # The model casts its inputs itself, if it wants to.
        super().__init__(trainable=False, name=name, dtype=dtype, autocast=False)
        self.model = model
        self.outputs = outputs
        self.built = model.built
        self._freeze()

    @property
    def trainable(self):
        """False. What it is set to is ignored."""
        return False

    @trainable.setter
    def trainable(self, _):
        pass

    def build(self, input_shape):
        self.model.build(input_shape)
        self._freeze()  # What it has just made.

    def _freeze(self):
        # One by one: a layer that is not trainable already takes no notice for those inside of it.
        for part in [*self.model._flatten_layers(), *self.model.variables]:
            part.trainable = False

    def call(self, inputs):
        try:
            values = self.model(inputs, training=False)
        except (TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
            got = keras.tree.map_structure(lambda x: tuple(x.shape), inputs)
            taken = getattr(self.model, "input_shape", None)  # Only a graph of layers knows.
            raise ValueError(
                f"The frozen model {self.model.name!r} does not accept inputs of shape {got}"
                f"{f', but of {taken}' if taken else ''}: {_first_line(error)}"
            ) from error
        if self.outputs is None:
            return values
        existing = sorted(values) if isinstance(values, dict) else []
        for name in self.outputs:
            if name not in existing:
                raise ValueError(
                    f"The frozen model {self.model.name!r} has no output {name!r}. Its named "
                    f"outputs: {', '.join(existing) or 'none'}."
                )
        return {name: values[name] for name in self.outputs}

    def get_config(self):
        model = keras.saving.serialize_keras_object(self.model)
        model.pop("compile_config", None)  # Losses and optimizer: nothing that inference needs.
        return {**super().get_config(), "model": model, "outputs": self.outputs}

    @classmethod
    def from_config(cls, config):
        config = {**config, "model": keras.saving.deserialize_keras_object(config["model"])}
        config.pop("trainable", None)
        return cls(**config)


def _first_line(error):
    """What an exception says, without Keras's list of arguments and its escape codes."""
    text = re.sub(r"\x1b\[\d+m|Exception encountered when calling .*", "", str(error))
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def frozen_extractor(model, layers=None):
    """`model` as a `Frozen`, reduced to the layers of these names if there are any."""
    if isinstance(model, Frozen):
        if layers is None:
            return model
        model = model.model
    if layers is None:
        return Frozen(model)
    layers = _names(layers)
    if not layers:
        raise ValueError("`layers` must name at least one layer, or be None.")
    if not isinstance(model, Functional | keras.Sequential):
        return Frozen(model, outputs=layers)
    outputs = _layer_outputs(model, layers)
    return Frozen(keras.Model(_graph(model)._inputs_struct, outputs, name=model.name))


def single_output(values, what):
    """The one tensor of a model's outputs; ValueError if there are several."""
    flat = keras.tree.flatten(values)
    if len(flat) != 1:
        raise ValueError(f"{what} must have one output. It has {len(flat)}.")
    return flat[0]


def with_frozen_features(model, frozen, head, adapt=None):
    """A model whose head reads the outputs of `model` and what a frozen model makes of them.

    `head(concatenate(ŷ, frozen(adapt(ŷ))))`, with ŷ the outputs of `model` and all features
    flattened. `model` and `head` are trained together; the gradient also flows through the frozen
    model to ŷ. The recipe of calling a new Dense layer inside of a loss is a trap: it is made anew
    at each trace, never trained and never saved. Here the head is made once, by the caller.

    Args:
      model: a functional or built sequential model with one output.
      frozen: a Keras model or layer, or what `load_frozen` returns.
      head: a Keras layer or model of the features `[rows, features]`.
      adapt: None, or a layer (a `Reshape`) or function of Keras ops from ŷ to what `frozen` takes.
    Returns:
      A `keras.Model`, to be compiled, trained and saved like any other.
    Raises:
      TypeError: `frozen` is no model.
      ValueError: a model without a graph of layers or with several outputs; a `head` or `adapt` of
        another kind; a shape that `frozen` does not take.

    ```python
    g = fusedloss.models.load_frozen("g.keras")
    head = keras.layers.Dense(10, activation="softmax")
    full = fusedloss.models.with_frozen_features(
        model, g, head, adapt=keras.layers.Reshape((8, 8, 1))
    )
    ```
    """
    if not isinstance(head, keras.layers.Layer):
        raise ValueError(f"`head` must be a Keras layer or model. Got {head!r}.")
    check_function("adapt", adapt)
    graph = _graph(model)
    prediction = single_output(graph._outputs_struct, f"The model {model.name!r}")
    features = frozen_extractor(frozen)(prediction if adapt is None else adapt(prediction))
    parts = [keras.layers.Flatten()(x) for x in [prediction, *keras.tree.flatten(features)]]
    return keras.Model(graph._inputs_struct, head(keras.layers.Concatenate()(parts)))


@keras.saving.register_keras_serializable(package="fusedloss")
class SavedModel(keras.layers.TFSMLayer):
    """A `keras.layers.TFSMLayer` whose config holds the folder itself, not its path.

    Args:
      filepath: of the folder; None with `archive`.
      archive: the folder as a ZIP archive in base64.
      others: as of `keras.layers.TFSMLayer`.
    """

    def __init__(self, filepath=None, archive=None, **others):
        # A copy, to be saved again as it was read, whatever becomes of the folder.
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        if archive is None:
            shutil.copytree(filepath, folder, dirs_exist_ok=True)
        else:
            with tempfile.TemporaryDirectory() as beside:
                packed = os.path.join(beside, "saved_model.zip")
                pathlib.Path(packed).write_bytes(base64.b64decode(archive))
                shutil.unpack_archive(packed, folder)
        # The program takes what it was saved for, whatever the policy of a model around it.
        super().__init__(folder, **{"dtype": "float32", **others})

    def outputs(self):
        """The names in the dict that the program returns; none if it returns something else."""
        endpoint = self.call_endpoint_fn
        returned = getattr(endpoint, "concrete_functions", [endpoint])[0].structured_outputs
        return sorted(returned) if isinstance(returned, dict) else []

    def get_config(self):
        with tempfile.TemporaryDirectory() as beside:
            packed = shutil.make_archive(os.path.join(beside, "saved_model"), "zip", self.filepath)
            archive = base64.b64encode(pathlib.Path(packed).read_bytes()).decode()
        return {**super().get_config(), "filepath": None, "archive": archive}


def load_frozen(path, layers=None):
    """Reads a pretrained model from a file and freezes it.

    A file is someone's file: Keras's safe mode is on, and one that would have to run its own Python
    code is refused. A SavedModel is a program of TensorFlow's, which can read and write files: take
    it only from where you trust.

    Args:
      path: a `.keras` archive, a whole model in `.h5` (or `.hdf5`), or the folder of a SavedModel,
        whose endpoint "serve", as `keras.Model.export` writes it, or "serving_default" is used.
      layers: None for the model as it is; else names of layers, whose outputs are then the outputs.
        Those of a SavedModel are entries of the dict that its endpoint returns.
    Returns:
      A `Frozen`, which returns a dict where layers are named. Its `model` is what was read.
    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: a file that is truncated or corrupt, of another format, or without a model in it;
        one that needs code to be run, or classes that are not registered; a layer that it has not.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no pretrained model at {path!r}: check the path.")
    if os.path.isdir(path):
        return _load_saved_model(path, layers)
    _check_file(path)
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Corrupt files raise whatever their readers stumble over.
        raise ValueError(_why_not_loaded(path, error)) from error
    return frozen_extractor(model, layers)


def _check_file(path):
    """Raises ValueError for a file that is not a whole model that Keras has written."""
    again = "copy or download it again, or save it again with `model.save`"
    with open(path, "rb") as file:
        signature = file.read(8)
    keras_suffixes = {b"PK": (".keras",), b"\x89H": (".h5", ".hdf5")}
    suffixes = keras_suffixes.get(signature[:2], ())
    suffix = os.path.splitext(path)[1].lower()
    try:
        if suffixes == (".keras",):
            with zipfile.ZipFile(path) as archive:
                is_model = "config.json" in archive.namelist()
        elif suffixes:
            with h5py.File(path) as file:
                is_model = "model_config" in file.attrs
                if not is_model:
                    raise ValueError(
                        f"{path!r} holds weights without a model: make the model, call "
                        "`model.load_weights` on the file, and use the model in its place."
                    )
        else:
            is_model = False
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path!r} is truncated or corrupt ({error}): {again}.") from error
    if not is_model:
        if suffix in (".keras", ".h5", ".hdf5"):
            raise ValueError(
                f"{path!r} is truncated, corrupt or of another format than its name says: {again}."
            )
        raise ValueError(
            f"{path!r} is of a format that Keras does not read: neither a `.keras` archive nor a "
            "whole model in `.h5`, nor the folder of a SavedModel. A model of another framework "
            "has to be converted, or made in Keras and its weights copied."
        )
    if suffix not in suffixes:
        raise ValueError(f"{path!r} holds a Keras model, but Keras wants the suffix {suffixes[0]}.")


def _why_not_loaded(path, error):
    text = str(error)
    if "safe_mode=False" in text:
        return (
            f"{path!r} needs code to be run that the file itself holds, such as that of a `Lambda` "
            "layer, and is refused. If you trust where it comes from, load it deliberately and use "
            f"the model in its place: `keras.saving.load_model({path!r}, safe_mode=False)`."
        )
    missing = re.search(r"(?:Could not locate \w+|Unknown [\w ]+:) '([^']+)'", text)
    if missing:
        return (
            f"{path!r} needs {missing[1]!r}, which Keras does not know: import the module that "
            "defines it, where it is decorated with `@keras.saving.register_keras_serializable()`, "
            "or load inside of `keras.saving.custom_object_scope`."
        )
    return (
        f"{path!r} cannot be read, and may be truncated or corrupt ({type(error).__name__}: "
        f"{_first_line(error)}): copy or download it again, or save it again with Keras."
    )


def _load_saved_model(path, layers):
    if not os.path.exists(os.path.join(path, "saved_model.pb")):
        raise ValueError(
            f"{path!r} is a folder without a `saved_model.pb`, and so no SavedModel: give the "
            "folder that `model.export` has written, or a `.keras` file."
        )
    try:
        loaded = tf.saved_model.load(path)
        endpoint = "serve" if hasattr(loaded, "serve") else "serving_default"
        model = SavedModel(path, call_endpoint=endpoint)
    except Exception as error:  # As of corrupt files.
        raise ValueError(_why_not_loaded(path, error)) from error
    for name in _names(layers or []):
        if name not in model.outputs():
            raise ValueError(
                f"The SavedModel {path!r} has no output {name!r}. Its named outputs: "
                f"{', '.join(model.outputs()) or 'none'}."
            )
    return frozen_extractor(model, layers)


@contextlib.contextmanager
def _outer_sharing():
    """Keeps what Keras knows of the objects that an outer file shares; an inner file resets it."""
    names = ("shared_objects/id_to_obj_map", "shared_objects/id_to_config_map")
    outer = {name: global_state.get_global_attribute(name) for name in names}
    try:
        yield
    finally:
        for name, value in outer.items():
            global_state.set_global_attribute(name, value)


def to_archive(frozen):
    """A `Frozen`, weights and all, as text for the config of a loss, which has no weights saved."""
    with _outer_sharing(), tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "frozen.keras")
        keras.saving.save_model(frozen, path)
        return base64.b64encode(path.read_bytes()).decode()


def from_archive(text):
    """What `to_archive` has made text of. The safe mode is that of the file around it."""
    with _outer_sharing(), tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "frozen.keras")
        path.write_bytes(base64.b64decode(text))
        return keras.saving.load_model(path, compile=False)


def check_function(argument, function):
    """Raises ValueError for what is neither None nor a layer or function."""
    if function is not None and not callable(function):
        raise ValueError(
            f"`{argument}` must be None, a Keras layer or a function. Got {function!r}."
        )


def applied(argument, function, x):
    """`function(x)`, or `x` without one; ValueError for a layer with weights."""
    if function is None:
        return x
    value = function(x)
    if isinstance(function, keras.layers.Layer) and function.weights:
        raise ValueError(
            f"`{argument}` has weights, which a loss neither trains nor saves: put the layer "
            f"{function.name!r} at the front of the frozen model."
        )
    return value


def to_config(argument, function):
    """The config of a layer or function that a loss holds; ValueError if it cannot be read back."""
    if function is None:
        return None
    is_layer = isinstance(function, keras.layers.Layer)
    try:
        config = keras.saving.serialize_keras_object(function)
        with SafeModeScope(False):  # It is the caller's own code, if it is any.
            # Of a copy: a `Lambda` changes the config that it is read from.
            read = keras.saving.deserialize_keras_object(copy.deepcopy(config))
    except (AttributeError, TypeError, ValueError):
        read = None
    if read is not function and not (is_layer and type(read) is type(function)):
        raise ValueError(
            f"`{argument}` cannot be saved: {function!r} is not Keras's own, nor registered. "
            "Register it: `keras.saving.register_keras_serializable()(function)`."
        )
    return config
