"""Frozen models inside of losses and models: values, gradients, training, files, bad input."""

import shutil
import warnings
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import fusedloss
from fusedloss import losses, models
from fusedloss._compiled import should_record_backprop
from test_keras import MODES, RUN, assert_same

pytestmark = pytest.mark.usefixtures("device")

SIDE, CLASSES, ROWS = 8, 4, 24
Frozen = models.Frozen


def images(rows=ROWS, seed=0):
    """Images of one channel, and one-hot targets that depend on them."""
    x = np.random.default_rng(seed).random((rows, SIDE, SIDE, 1), "float32")
    labels = (x.mean((1, 2, 3)) * 1000).astype(int) % CLASSES
    return x, np.eye(CLASSES, dtype="float32")[labels]


def convnet(name="convnet", seed=7, dropout=0.5):
    """Images to probabilities, through batch norm with statistics of its own and dropout."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((SIDE, SIDE, 1)),
            keras.layers.Conv2D(6, 3, activation="relu", name="low"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Conv2D(5, 3, activation="relu", name="high"),
            keras.layers.Dropout(dropout),
            keras.layers.Flatten(),
            keras.layers.Dense(CLASSES, activation="softmax", name="probabilities"),
        ],
        name=name,
    )
    rng = np.random.default_rng(seed)
    norm = model.get_layer("norm")
    norm.moving_mean.assign(rng.normal(size=6))
    norm.moving_variance.assign(rng.random(6) + 0.5)
    return model


def mixer(name="mixer", seed=3):
    """Probabilities to probabilities, through batch norm and dropout."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((CLASSES,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(CLASSES, activation="softmax"),
        ],
        name=name,
    )


def classifier(seed=1):
    """A model to be trained, from images to probabilities."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((SIDE, SIDE, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(CLASSES, activation="softmax"),
        ]
    )


def painter(seed=1):
    """A model to be trained, from images to images."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [keras.Input((SIDE, SIDE, 1)), keras.layers.Conv2D(1, 3, padding="same", name="paint")]
    )


def weights_of(layer):
    return [weight.numpy() for weight in layer.weights]


def assert_unmoved(layer, before):
    for now, then in zip(weights_of(layer), before, strict=True):
        np.testing.assert_array_equal(now, then)


def value_and_gradient(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return value, tape.gradient(value, x)


def trained(model, loss, targets, mode, rate=0.1):
    """The losses of two epochs and the weights after them."""
    model.compile(keras.optimizers.SGD(rate), loss, **mode)
    history = model.fit(images()[0], targets, 8, 2, shuffle=False, verbose=0)
    return [history.history["loss"], *model.get_weights()]


def assert_trained_alike(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their, rtol=2e-5, atol=2e-6)


# A frozen layer.


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_frozen_model_keeps_weights_and_statistics_in_training(mode):
    inner = convnet()
    before = weights_of(inner)
    full = keras.Sequential([painter(), Frozen(inner)])
    trained(full, "categorical_crossentropy", images()[1], mode)
    assert_unmoved(inner, before)
    assert len(full.trainable_variables) == 2  # Those of the painter, which have moved.
    assert np.abs(full.get_weights()[0] - painter().get_weights()[0]).max() > 0


def test_trainable_thaws_nothing_that_is_frozen():
    inner = convnet()
    frozen = Frozen(inner)
    full = keras.Sequential([painter(), frozen])
    full.trainable = True
    for layer in full.layers:
        layer.trainable = True
    frozen.trainable = True
    assert not frozen.trainable and not inner.trainable
    assert frozen.trainable_variables == frozen.trainable_weights == []
    assert len(frozen.non_trainable_variables) == len(inner.variables)
    assert len(full.trainable_variables) == 2
    before = weights_of(inner)
    trained(full, "categorical_crossentropy", images()[1], {})
    assert_unmoved(inner, before)


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
def test_the_gradient_flows_through_a_frozen_model(run):
    inner = convnet()
    x = tf.constant(images()[0])
    expected = value_and_gradient(lambda x: tf.reduce_sum(inner(x, training=False) ** 2), x)
    frozen = Frozen(inner)

    def loss(x):
        return tf.reduce_sum(frozen(x, training=True) ** 2)

    actual = run(lambda x: value_and_gradient(loss, x))(x)
    assert_same(actual, expected)
    assert np.abs(actual[1]).max() > 0


class Block(keras.layers.Layer):
    """Layers that are made when it is built, and a call without `training`."""

    def build(self, _):
        self.dense = keras.layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


def test_what_a_frozen_layer_makes_when_it_is_built_is_frozen():
    full = keras.Sequential([keras.Input((5,)), Frozen(Block()), keras.layers.Dense(2)])
    assert len(full.variables) > 2
    full.trainable = True
    assert [weight.path.split("/")[-1] for weight in full.trainable_variables] == ["kernel", "bias"]


def test_a_frozen_model_is_saved_with_its_weights(tmp_path):
    inner = convnet()
    inner.compile("adam", "mse")  # It needs neither where it is frozen.
    full = keras.Sequential([painter(), Frozen(inner, name="judge")])
    full.save(tmp_path / "full.keras")
    loaded = keras.saving.load_model(tmp_path / "full.keras")
    np.testing.assert_array_equal(loaded(images()[0]), full(images()[0]))
    assert len(loaded.trainable_variables) == 2
    assert not loaded.get_layer("judge").model.compiled


def test_a_frozen_model_refuses_what_is_no_model_and_shapes_it_does_not_take():
    with pytest.raises(TypeError, match="must be a Keras model or layer"):
        Frozen(lambda x: x)
    with pytest.raises(ValueError, match=r"\(2, 9, 9, 1\), but of \(None, 8, 8, 1\)"):
        Frozen(convnet())(tf.zeros([2, 9, 9, 1]))


# Exposed layers.


def functional(name="functional"):
    inputs = keras.Input((SIDE, SIDE, 1))
    features = keras.layers.Conv2D(3, 3, name="features")(inputs)
    flat = keras.layers.Flatten()(features)
    heads = [keras.layers.Dense(2, name=head)(flat) for head in ("a", "b")]
    return keras.Model(inputs, heads, name=name)


def test_exposed_layers_join_the_outputs_and_share_their_weights():
    model = functional()
    exposed = models.expose(model, ["features"])
    x = images()[0]
    outputs = exposed(x)
    assert set(outputs) == {"a", "b", "features"}
    assert_same([outputs["a"], outputs["b"]], model(x))
    assert_same(outputs["features"], model.get_layer("features")(x))
    assert {id(v) for v in exposed.variables} == {id(v) for v in model.variables}
    assert len(exposed.trainable_variables) == len(model.trainable_variables)


def test_exposing_takes_one_name_sequential_models_and_dicts_of_outputs():
    assert set(models.expose(convnet(), "high")(images()[0])) == {"probabilities", "high"}
    once = models.expose(functional(), ["features"])
    assert set(models.expose(once, ["a"]).output) == {"a", "b", "features"}


def test_a_layer_that_another_graph_calls_too_is_called_once_here():
    model = functional()
    model.get_layer("features")(keras.Input((SIDE, SIDE, 1)))
    assert "features" in models.expose(model, ["features"]).output


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_an_exposed_model_trains_as_the_model_does(mode):
    y = images()[1]
    exposed = models.expose(convnet(dropout=0.0), ["low"])
    loss = {
        "probabilities": "categorical_crossentropy",
        "low": lambda _, low: 0 * keras.ops.mean(low, (1, 2, 3)),
    }
    assert_trained_alike(
        trained(exposed, loss, {"probabilities": y, "low": y}, mode),
        trained(convnet(dropout=0.0), "categorical_crossentropy", y, MODES["graph"]),
    )


def test_an_exposed_model_is_saved_and_loaded(tmp_path):
    exposed = models.expose(convnet(), ["low", "high"])
    exposed.save(tmp_path / "exposed.keras")
    loaded = keras.saving.load_model(tmp_path / "exposed.keras")
    actual, expected = loaded(images()[0]), exposed(images()[0])
    for name in ("low", "high", "probabilities"):
        np.testing.assert_array_equal(actual[name], expected[name])


def twice():
    inputs = keras.Input((3,))
    dense = keras.layers.Dense(3, name="dense")
    return keras.Model(inputs, dense(dense(inputs)), name="twice")


def same_names():
    inputs = keras.Input((3,))
    dense = keras.layers.Dense(3, name="dense")
    return keras.Model(inputs, [dense(inputs), dense(dense(inputs))], name="names")


def key_and_layer():
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(3, name="hidden")(inputs)
    return keras.Model(inputs, {"hidden": keras.layers.Dense(2)(hidden)}, name="clash")


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


@pytest.mark.parametrize(
    "make,name,message",
    [
        (convnet, "middle", "no layer 'middle'. Its layers: .*low, norm, high"),
        (
            lambda: keras.Sequential([painter(), convnet("inner")], name="outer"),
            "low",
            r"'low' is no layer of the model 'outer', but one inside of its layer 'inner'.*"
            r"expose\(model.get_layer\('inner'\), \['low'\]\)",
        ),
        (
            lambda: keras.Sequential([painter(), Frozen(convnet(), name="judge")]),
            "low",
            r"model.get_layer\('judge'\).model",
        ),
        (twice, "dense", "'twice' calls its layer 'dense' 2 times"),
        (same_names, "dense", "several outputs of one name"),
        (key_and_layer, "hidden", "'hidden' is both a layer and another output"),
        (Subclassed, "dense", "no graph of layers"),
        (lambda: keras.Sequential([keras.layers.Dense(2)]), "dense", "not built yet"),
    ],
)
def test_exposing_says_what_cannot_be_exposed(make, name, message):
    with pytest.raises(ValueError, match=message):
        models.expose(make(), [name])


# Files.


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of the convnet in every format."""
    folder = tmp_path_factory.mktemp("files")
    model = convnet()
    model.compile("adam", "mse")
    model.save(folder / "model.keras")
    model.save(folder / "model.h5")
    model.save_weights(folder / "model.weights.h5")
    model.export(folder / "exported", verbose=False)
    module = tf.Module()
    module.low, module.model = model.get_layer("low"), model
    signature = tf.TensorSpec([None, SIDE, SIDE, 1])
    serve = tf.function(lambda x: {"low": module.low(x), "all": model(x)}, [signature])
    tf.saved_model.save(module, str(folder / "signed"), {"serving_default": serve})
    return folder


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "exported"])
def test_a_model_of_every_format_gives_its_numbers_and_is_frozen(files, name):
    frozen = models.load_frozen(files / name)
    np.testing.assert_array_equal(frozen(images()[0]), convnet()(images()[0]))
    frozen.trainable = True
    assert frozen.trainable_variables == []
    assert models.load_frozen(str(files / name)).weights


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_a_loaded_model_returns_the_named_layers(files, name):
    features = models.load_frozen(files / name, ["low", "high"])(images()[0])
    expected = models.expose(convnet(), ["low", "high"])(images()[0])
    assert set(features) == {"low", "high"}
    for layer, values in features.items():
        np.testing.assert_array_equal(values, expected[layer])


def test_a_saved_model_returns_the_named_entries_of_its_dict(files):
    features = models.load_frozen(files / "signed", ["low"])(images()[0])
    assert set(features) == {"low"}
    np.testing.assert_array_equal(features["low"], convnet().get_layer("low")(images()[0]))
    with pytest.raises(ValueError, match="no output 'high'. Its named outputs: all, low"):
        models.load_frozen(files / "signed", ["high"])(images()[0])


def test_a_saved_model_is_saved_as_it_was_read_whatever_becomes_of_its_folder(tmp_path):
    folder = str(tmp_path / "exported")
    convnet().export(folder, verbose=False)
    full = keras.Sequential([keras.Input((SIDE, SIDE, 1)), models.load_frozen(folder)])
    shutil.rmtree(folder)
    full.save(tmp_path / "full.keras")
    loaded = keras.saving.load_model(tmp_path / "full.keras", safe_mode=False)
    np.testing.assert_array_equal(loaded(images()[0]), convnet()(images()[0]))


def missing(_, folder):
    return folder / "none.keras"


def truncated(suffix):
    def make(files, folder):
        whole = (files / f"model{suffix}").read_bytes()
        path = folder / f"half{suffix}"
        path.write_bytes(whole[: len(whole) // 2])
        return path

    return make


def damaged(files, folder):
    whole = bytearray((files / "model.keras").read_bytes())
    whole[2000:2400] = bytes(400)
    path = folder / "damaged.keras"
    path.write_bytes(whole)
    return path


def holding(name, content=b""):
    def make(_, folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


def torch_like(name):
    def make(_, folder):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data.pkl", b"")
        return folder / name

    return make


def renamed(name, new):
    def make(files, folder):
        (folder / new).write_bytes((files / name).read_bytes())
        return folder / new

    return make


def with_code(name, nested=False):
    def make(_, folder):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: 2 * x)])
        if nested:
            model = keras.Sequential([keras.Input((4,)), model])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save(folder / name)
        return folder / name

    return make


class Unregistered(keras.layers.Layer):
    def call(self, inputs):
        return inputs


def unregistered(name):
    def make(_, folder):
        keras.Sequential([keras.Input((4,)), Unregistered()]).save(folder / name)
        return folder / name

    return make


def empty_folder(_, folder):
    return folder


def damaged_saved_model(_, folder):
    (folder / "saved_model.pb").write_bytes(b"garbage")
    return folder


DELIBERATELY = r"refused.*keras.saving.load_model\('{path}', safe_mode=False\)"


@pytest.mark.parametrize(
    "make,message",
    [
        (missing, "no pretrained model"),
        (truncated(".keras"), "truncated or corrupt"),
        (truncated(".h5"), "truncated or corrupt"),
        (damaged, "truncated or corrupt"),
        (holding("empty.keras"), "truncated, corrupt or of another format"),
        (holding("other.h5", b"no HDF5"), "truncated, corrupt or of another format"),
        (torch_like("torch.keras"), "of another format"),
        (torch_like("torch.pt"), "format that Keras does not read.*converted"),
        (holding("model.onnx", b"\x08\x07"), "format that Keras does not read.*converted"),
        (renamed("model.h5", "model.keras"), "wants the suffix .h5"),
        (renamed("model.keras", "model.zip"), "wants the suffix .keras"),
        (renamed("model.weights.h5", "w.h5"), "holds weights without a model.*load_weights"),
        (with_code("code.keras"), DELIBERATELY),
        (with_code("code.h5"), DELIBERATELY),
        (with_code("code.keras", nested=True), DELIBERATELY),
        (with_code("code.h5", nested=True), DELIBERATELY),
        (unregistered("class.keras"), "needs 'Unregistered'.*register_keras_serializable"),
        (unregistered("class.h5"), "needs 'Unregistered'.*register_keras_serializable"),
        (empty_folder, "without a `saved_model.pb`"),
        (damaged_saved_model, "truncated or corrupt"),
    ],
)
def test_a_file_that_is_no_model_is_refused_by_name(files, tmp_path, make, message):
    path = make(files, tmp_path)
    expected = FileNotFoundError if make is missing else ValueError
    with pytest.raises(expected, match=message.format(path=path)) as caught:
        models.load_frozen(path)
    assert repr(str(path)) in str(caught.value)


def test_layers_that_a_file_has_not_are_refused(files):
    with pytest.raises(ValueError, match="no layer 'middle'. Its layers: .*low, norm, high"):
        models.load_frozen(files / "model.keras", ["low", "middle"])
    with pytest.raises(ValueError, match="at least one layer"):
        models.load_frozen(files / "model.keras", [])


# A head on frozen features: P12 and P13.


class NaiveHead(keras.Model):
    """The same in plain Keras, without a layer of ours."""

    def __init__(self, model, frozen, head, adapt):
        super().__init__()
        frozen.trainable = False
        self.model, self.frozen, self.head, self.adapt = model, frozen, head, adapt

    def call(self, inputs):
        prediction = self.model(inputs)
        features = self.frozen(self.adapt(prediction), training=False)
        return self.head(keras.ops.concatenate([prediction, features], -1))


HEADS = {
    "p12": (lambda: keras.layers.Dense(CLASSES, "softmax"), "categorical_crossentropy", CLASSES),
    "p13": (lambda: keras.layers.Dense(1), "mse", 1),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("head,loss,outputs", HEADS.values(), ids=HEADS)
def test_a_head_on_frozen_features_trains_with_the_model(
    files, tmp_path, head, loss, outputs, mode
):
    targets = images()[1][:, :outputs]
    results = []
    for make, how in ((models.with_frozen_features, mode), (NaiveHead, MODES["graph"])):
        frozen = models.load_frozen(files / "model.keras")
        if make is NaiveHead:
            frozen = frozen.model
        before = weights_of(frozen)
        model = keras.Sequential([keras.Input((SIDE, SIDE, 1)), keras.layers.Flatten()])
        keras.utils.set_random_seed(5)
        model.add(keras.layers.Dense(SIDE * SIDE))
        full = make(model, frozen, head(), keras.layers.Reshape((SIDE, SIDE, 1)))
        first = model.layers[-1].kernel.numpy()
        history, *_ = trained(full, loss, targets, how, rate=0.01)
        results.append([history, *(w.numpy() for w in full.trainable_variables)])
        assert_unmoved(frozen, before)
        assert len(full.trainable_variables) == 4
        assert np.abs(model.layers[-1].kernel - first).max() > 0
        if make is models.with_frozen_features:
            full.trainable = True
            assert len(full.trainable_variables) == 4
            full.save(tmp_path / "full.keras")
            loaded = keras.saving.load_model(tmp_path / "full.keras")
            np.testing.assert_array_equal(
                loaded.predict(images()[0], verbose=0), full.predict(images()[0], verbose=0)
            )
            assert len(loaded.trainable_variables) == 4
    assert_trained_alike(*results)


def test_a_head_reads_several_frozen_layers(files):
    frozen = models.load_frozen(files / "model.keras", ["low", "high"])
    full = models.with_frozen_features(painter(), frozen, keras.layers.Dense(2))
    sizes = SIDE * SIDE + 6 * 6 * 6 + 5 * 4 * 4
    assert full.layers[-1].kernel.shape == (sizes, 2)


def test_a_head_refuses_models_without_one_output_and_shapes_that_do_not_fit(files):
    frozen = models.load_frozen(files / "model.keras")
    with pytest.raises(ValueError, match="'functional' must have one output. It has 2"):
        models.with_frozen_features(functional(), frozen, keras.layers.Dense(2))
    with pytest.raises(ValueError, match=r"does not accept inputs of shape \(None, 4\)"):
        models.with_frozen_features(classifier(), frozen, keras.layers.Dense(2))


def test_a_head_on_a_saved_model_needs_unsafe_loading(files, tmp_path):
    frozen = models.load_frozen(files / "exported")
    full = models.with_frozen_features(painter(), frozen, keras.layers.Dense(CLASSES))
    trained(full, "mse", images()[1], MODES["xla"])
    full.save(tmp_path / "full.keras")
    with pytest.raises(ValueError, match="safe_mode=False"):
        keras.saving.load_model(tmp_path / "full.keras")
    loaded = keras.saving.load_model(tmp_path / "full.keras", safe_mode=False)
    loaded.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras", safe_mode=False)
    for copy in (loaded, again):
        np.testing.assert_array_equal(copy(images()[0]), full(images()[0]))
        assert len(copy.trainable_variables) == 4


# Transfer learning: P14.


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_p14_a_frozen_base_then_its_last_layer_at_a_small_rate(tmp_path, mode):
    convnet(dropout=0.0).save(tmp_path / "base.keras")
    results = []
    for loss, how in (
        (losses.CategoricalCrossentropy(), mode),
        (keras.losses.CategoricalCrossentropy(), MODES["graph"]),
    ):
        base = models.load_frozen(tmp_path / "base.keras").model
        keras.utils.set_random_seed(5)
        model = keras.Sequential([base, keras.layers.Dense(CLASSES, activation="softmax")])
        before = weights_of(base)
        result = trained(model, loss, images()[1], how)
        assert_unmoved(base, before)
        assert len(model.trainable_variables) == 2
        base.get_layer("probabilities").trainable = True
        assert len(model.trainable_variables) == 4
        model.compile(keras.optimizers.SGD(1e-3), loss, **how)
        model.fit(images()[0], images()[1], 8, 2, shuffle=False, verbose=0)
        moved = [not np.array_equal(a, b) for a, b in zip(weights_of(base), before, strict=True)]
        paths = [weight.path for weight in base.weights]
        assert [p for p, m in zip(paths, moved, strict=True) if m] == [
            p for p in paths if "probabilities" in p
        ]
        results.append([*result, *model.get_weights()])
    assert_trained_alike(*results)


# Perceptual losses: P10.

LAYERS = ["low", "high"]
LAYER_WEIGHTS = [0.5, 2.0]
CHANNEL_WEIGHTS = {"low": [1, 0, 2, 1, 1, 0.5], "high": None}


def naive_distance(metric, a, b, weights=1.0):
    """Of each example, as it is published."""
    positions = (1, 2)
    if metric == "gram":
        a, b = (tf.einsum("npqc,npqd->ncd", x, x) / (x.shape[1] * x.shape[2]) for x in (a, b))
        return tf.reduce_mean((a - b) ** 2, positions)
    if metric == "lpips":
        a, b = (x / tf.sqrt(tf.reduce_sum(x**2, -1, keepdims=True) + 1e-10) for x in (a, b))
        return tf.reduce_mean(tf.reduce_sum(weights * (a - b) ** 2, -1), positions)
    return tf.reduce_mean(weights * (a - b) ** 2, (*positions, 3))


def naive_perceptual(metric, extractor, channel_weights=None):
    """Of each example, by tapping the layers of the extractor."""
    low, norm, high = (extractor.get_layer(name) for name in ("low", "norm", "high"))

    def features(x):
        first = low(x)
        return {"low": first, "high": high(norm(first, training=False))}

    def loss(y_true, y_pred):
        targets, predictions = features(y_true), features(y_pred)
        total = 0.0
        for name, weight in zip(LAYERS, LAYER_WEIGHTS, strict=True):
            weights = (channel_weights or {}).get(name)
            a, b = predictions[name], tf.stop_gradient(targets[name])
            weights = 1.0 if weights is None else tf.constant(weights, a.dtype)
            total += weight * naive_distance(metric, a, b, weights)
        return total

    return loss


@pytest.mark.parametrize("metric", ["mse", "lpips", "gram"])
@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
def test_a_perceptual_loss_is_the_distance_of_the_layers(metric, run):
    extractor = convnet()
    channel_weights = None if metric == "gram" else CHANNEL_WEIGHTS
    naive = naive_perceptual(metric, extractor, channel_weights)
    ours = losses.PerceptualLoss(
        extractor, LAYERS, LAYER_WEIGHTS, metric, channel_weights=channel_weights
    )
    x, target = images(6)[0], images(6, seed=1)[0]
    assert_same(
        run(lambda x: value_and_gradient(lambda x: ours(target, x), x))(tf.constant(x)),
        value_and_gradient(lambda x: tf.reduce_mean(naive(target, x)), tf.constant(x)),
        rtol=1e-4,
        atol=1e-7,
    )
    np.testing.assert_allclose(ours.call(target, x), naive(target, x), rtol=2e-5)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_p10_a_perceptual_loss_trains_and_is_saved(files, tmp_path, mode):
    frozen = models.load_frozen(files / "model.keras")
    before = weights_of(frozen)
    loss = losses.PerceptualLoss(frozen, LAYERS, LAYER_WEIGHTS)
    target = images(seed=1)[0]
    model = painter()
    ours = trained(model, loss, target, mode)
    naive = naive_perceptual("lpips", frozen.model)
    assert_trained_alike(ours, trained(painter(), naive, target, MODES["graph"]))
    assert_unmoved(frozen, before)
    assert len(model.trainable_variables) == 2
    model.save(tmp_path / "model.keras")
    loaded = fusedloss.load_model(tmp_path / "model.keras")
    x = images()[0]
    assert loaded.evaluate(x, target, verbose=0) == model.evaluate(x, target, verbose=0)
    assert loaded.loss.get_config()["layer_weights"] == loss.get_config()["layer_weights"]


def test_features_made_before_give_the_same_loss():
    x, target = images()[0], images(seed=1)[0]
    for layers in (LAYERS, "low", None):
        loss = losses.PerceptualLoss(convnet(), layers, metric="mse")
        if layers is None:
            loss = losses.PerceptualLoss(painter(), metric="mse", channel_weights=[0.5])
        cached = loss.features(target)
        assert isinstance(cached, dict if layers else list)
        np.testing.assert_array_equal(loss(cached, x), loss(target, x))
        one = loss.features(target[:1])
        np.testing.assert_array_equal(loss(one, x), loss(target[:1], x))
        np.testing.assert_allclose(loss(one, x), loss(np.repeat(target[:1], ROWS, 0), x), rtol=1e-6)


def test_targets_of_a_perceptual_loss_have_no_gradient():
    loss = losses.PerceptualLoss(convnet(), LAYERS)
    target, x = tf.constant(images(seed=1)[0]), tf.constant(images()[0])
    with tf.GradientTape() as tape:
        tape.watch([target, x])
        value = loss(target, x)
    of_target, of_x = tape.gradient(value, [target, x])
    assert of_target is None
    assert np.abs(of_x).max() > 0


@pytest.mark.parametrize("run", [RUN["eager"], RUN["graph"]], ids=["eager", "graph"])
def test_features_of_targets_do_not_count_as_recorded(run):
    loss = losses.PerceptualLoss(convnet(), LAYERS)
    recorded = []

    def step(target, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            rows = loss._converted(target, x)
            recorded.extend(map(should_record_backprop, (rows.predictions, rows.targets)))
        return x

    run(step)(tf.constant(images(seed=1)[0]), tf.constant(images()[0]))
    assert recorded == [True, False]


@pytest.mark.parametrize(
    "preprocess", [keras.layers.Rescaling(2.0), keras.activations.tanh], ids=["layer", "function"]
)
def test_a_preprocessing_is_applied_to_both_and_saved(tmp_path, preprocess):
    extractor = convnet()
    loss = losses.PerceptualLoss(extractor, LAYERS, preprocess=preprocess)
    x, target = images()[0], images(seed=1)[0]
    expected = losses.PerceptualLoss(extractor, LAYERS)(preprocess(target), preprocess(x))
    np.testing.assert_array_equal(loss(target, x), expected)
    config = keras.saving.serialize_keras_object(loss)
    loaded = keras.saving.deserialize_keras_object(config)
    np.testing.assert_array_equal(loaded(target, x), expected)


def test_a_perceptual_loss_takes_integer_targets():
    loss = losses.PerceptualLoss(convnet(), LAYERS)
    bright = np.round(255 * images(seed=1)[0])
    np.testing.assert_array_equal(
        loss(bright.astype("uint8"), images()[0]), loss(bright.astype("float32"), images()[0])
    )


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"layers": ["low", "middle"]}, "no layer 'middle'. Its layers: .*low, norm, high"),
        ({"layers": []}, "at least one layer"),
        ({"layer_weights": [1.0]}, "`layer_weights` must have one entry a layer. Got 1 for 2"),
        ({"layer_weights": [1.0, -1.0]}, "layer_weights"),
        ({"channel_weights": [None]}, "`channel_weights` must have one entry a layer. Got 1 for 2"),
        ({"channel_weights": {"low": [-1.0] * 6, "high": None}}, r"channel_weights\['low'\]"),
        ({"metric": "l2"}, "metric"),
    ],
    ids=str,
)
def test_a_perceptual_loss_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        losses.PerceptualLoss(**{"extractor": convnet(), "layers": LAYERS, **arguments})


def test_a_perceptual_loss_names_what_disagrees():
    loss = losses.PerceptualLoss(convnet(), LAYERS)
    with pytest.raises(ValueError, match=r"\(2, 9, 9, 1\), but of \(None, 8, 8, 1\)"):
        loss(np.zeros([2, 9, 9, 1]), tf.zeros([2, 9, 9, 1]))
    with pytest.raises(ValueError, match="must be for the layers"):
        loss({"low": np.zeros([2, 6, 6, 6])}, images(2)[0])
    with pytest.raises(ValueError, match="must be for the layers"):
        losses.PerceptualLoss(convnet(), LAYERS, {"low": 1.0})(images()[0], images()[0])


# Blended losses: P11.

BLEND = (0.7, 0.3)
INNER = {
    "ours": (losses.CategoricalCrossentropy, False),
    "ours, sparse": (losses.SparseCategoricalCrossentropy, True),
    "ours, of a subset": (
        lambda: losses.CategoricalCrossentropy(subset=[0, 2], subset_weight=0.8, full_weight=0.2),
        False,
    ),
    "ours, of another family": (losses.MeanSquaredError, False),
    "Keras's": (keras.losses.CategoricalCrossentropy, False),
    "Keras's, by name": (lambda: "sparse_categorical_crossentropy", True),
    "a function": (lambda: keras.losses.mean_absolute_error, False),
}


def reduced(loss):
    """A `keras.losses.Loss` of what a loss may be."""
    if isinstance(loss, keras.losses.Loss):
        return loss
    names = {"sparse_categorical_crossentropy": keras.losses.SparseCategoricalCrossentropy()}
    return names.get(loss) or keras.losses.MeanAbsoluteError()


def naive_blend(loss, frozen, adapt=lambda x: x):
    def blended(y_true, y_pred, sample_weight=None):
        other = frozen(adapt(y_pred), training=False)
        return reduced(loss)(y_true, BLEND[0] * y_pred + BLEND[1] * other, sample_weight)

    return blended


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("inner,sparse", INNER.values(), ids=INNER)
def test_a_blended_loss_is_the_loss_of_the_blend(inner, sparse, run):
    probabilities = np.random.default_rng(0).dirichlet(np.ones(CLASSES), ROWS).astype("float32")
    targets = images()[1]
    targets = targets.argmax(-1) if sparse else targets
    weight = np.random.default_rng(1).random(ROWS).astype("float32")
    frozen = mixer()
    ours, naive = losses.BlendedLoss(inner(), frozen), naive_blend(inner(), frozen)
    x = tf.constant(probabilities)
    assert_same(
        run(lambda x: value_and_gradient(lambda x: ours(targets, x, weight), x))(x),
        value_and_gradient(lambda x: naive(targets, x, weight), x),
    )
    assert_same(run(lambda x: ours(targets, x))(x), naive(targets, x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_blend_of_any_type(dtype):
    probabilities = np.random.default_rng(0).dirichlet(np.ones(CLASSES), ROWS)
    x = tf.constant(probabilities, dtype)
    frozen = mixer()
    actual = value_and_gradient(lambda x: losses.BlendedLoss("mse", frozen)(images()[1], x), x)
    expected = value_and_gradient(
        lambda x: naive_blend(keras.losses.MeanSquaredError(), frozen)(images()[1], x),
        tf.cast(x, "float32"),
    )
    assert actual[1].dtype == x.dtype
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2}.get(dtype, 1e-6)
    for our, their in zip(actual, expected, strict=True):
        np.testing.assert_allclose(
            tf.cast(our, "float32"), their, rtol=tolerance, atol=tolerance * np.abs(their).max()
        )


def test_a_softmax_is_not_walked_back_through_a_blend():
    frozen = mixer()

    @tf.function
    def step(logits):
        return losses.BlendedLoss(losses.CategoricalCrossentropy(), frozen)(
            targets, tf.nn.softmax(logits)
        )

    targets = images()[1]
    logits = np.random.default_rng(0).normal(size=(ROWS, CLASSES)).astype("float32")
    naive = naive_blend(keras.losses.CategoricalCrossentropy(), frozen)
    assert_same(step(logits), naive(targets, tf.constant(keras.ops.softmax(logits))))


def test_a_blend_keeps_the_mask_of_the_predictions():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(CLASSES), ROWS).astype("float32")
    mask, frozen, targets = np.arange(ROWS) % 3 > 0, mixer(), images()[1]
    for inner in (losses.CategoricalCrossentropy(), keras.losses.CategoricalCrossentropy()):
        x = tf.constant(probabilities)
        x._keras_mask = tf.constant(mask)
        expected = naive_blend(inner, frozen)(targets[mask], probabilities[mask])
        assert_same(losses.BlendedLoss(inner, frozen)(targets, x), expected)


@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight", "none"])
def test_a_blended_loss_has_the_reduction_of_the_inner_one(reduction):
    loss = losses.BlendedLoss(losses.CategoricalCrossentropy(reduction=reduction), mixer())
    value = loss(images()[1], np.full((ROWS, CLASSES), 0.25, "float32"))
    assert loss.reduction == reduction
    assert value.shape == ([ROWS] if reduction == "none" else [])
    unreduced = loss.call(images()[1], np.full((ROWS, CLASSES), 0.25, "float32"))
    assert unreduced.shape == [ROWS]


@pytest.mark.parametrize(
    "name,mode",
    [
        *(("model.keras", mode) for mode in MODES.values()),
        ("model.h5", MODES["graph"]),
        ("exported", MODES["graph"]),
    ],
    ids=[*MODES, "h5", "SavedModel"],
)
def test_p11_a_blend_with_a_pretrained_model_trains_and_is_saved(files, tmp_path, name, mode):
    targets = images()[1]
    adapt = keras.Sequential([keras.Input((CLASSES,)), keras.layers.Reshape((2, 2, 1))])
    adapt.add(keras.layers.UpSampling2D(SIDE // 2))
    frozen = models.load_frozen(files / name)
    before = weights_of(frozen)
    loss = losses.BlendedLoss(losses.CategoricalCrossentropy(), frozen, adapt=adapt)
    model = classifier()
    ours = trained(model, loss, targets, mode)
    plain = convnet()
    plain.trainable = False
    naive = naive_blend(keras.losses.CategoricalCrossentropy(), plain, adapt)
    assert_trained_alike(ours, trained(classifier(), naive, targets, MODES["graph"]))
    assert_unmoved(frozen, before)
    assert len(model.trainable_variables) == 2
    model.save(tmp_path / "model.keras")
    if name == "exported":
        with pytest.raises(ValueError, match="safe_mode=False"):
            fusedloss.load_model(tmp_path / "model.keras")
    loaded = fusedloss.load_model(tmp_path / "model.keras", safe_mode=name != "exported")
    assert loaded.evaluate(images()[0], targets, verbose=0) == model.evaluate(
        images()[0], targets, verbose=0
    )
    again = loaded.fit(images()[0], targets, 8, shuffle=False, verbose=0).history["loss"]
    assert again == model.fit(images()[0], targets, 8, shuffle=False, verbose=0).history["loss"]


@keras.saving.register_keras_serializable(package="test_models")
def upsampled(x):
    return keras.ops.repeat(keras.ops.reshape(x, (-1, CLASSES, 1)), 2, axis=-1)


def not_registered(x):
    return upsampled(x)


def summing():
    """[.., CLASSES, 2] to [.., CLASSES]."""
    layers = [keras.Input((CLASSES, 2)), keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
    return keras.Sequential(layers)


def test_functions_of_a_loss_are_saved_if_they_can_be_read_again(tmp_path):
    model = classifier()
    model.compile("sgd", losses.BlendedLoss("mse", summing(), adapt=upsampled))
    model.save(tmp_path / "model.keras")
    loaded = fusedloss.load_model(tmp_path / "model.keras")
    assert loaded.loss.adapt is upsampled
    for adapt in (not_registered, Unregistered(), lambda x: upsampled(x)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras's, of lambdas.
            with pytest.raises(ValueError, match="`adapt` cannot be saved.*register_keras"):
                losses.BlendedLoss("mse", summing(), adapt=adapt).get_config()


def test_layers_with_weights_and_what_is_no_function_are_refused():
    x, y = images()
    dense = losses.BlendedLoss("mse", mixer(), adapt=keras.layers.Dense(CLASSES))
    with pytest.raises(ValueError, match="`adapt` has weights"):
        dense(y, classifier()(x))
    convolution = losses.PerceptualLoss(convnet(), preprocess=keras.layers.Conv2D(1, 1))
    with pytest.raises(ValueError, match="`preprocess` has weights"):
        convolution(x, x)
    with pytest.raises(ValueError, match=r"`adapt` must be .* Got \(5,\)"):
        losses.BlendedLoss("mse", mixer(), adapt=(5,))
    with pytest.raises(ValueError, match="`preprocess` must be .* Got 3"):
        losses.PerceptualLoss(convnet(), preprocess=3)
    with pytest.raises(ValueError, match="`head` must be a Keras layer or model. Got 10"):
        models.with_frozen_features(classifier(), mixer(), 10)
    with pytest.raises(ValueError, match="`layers` must be names of layers. Got None"):
        models.expose(convnet(), None)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_saved_model_runs_in_its_own_precision(files, policy):
    x = images()[0]
    expected = models.load_frozen(files / "signed")(x)
    keras.config.set_dtype_policy(policy)
    try:
        frozen = models.load_frozen(files / "signed")
        half = keras.config.dtype_policy().compute_dtype
        found = frozen(tf.cast(x, half))
    finally:
        keras.config.set_dtype_policy("float32")
    assert {value.dtype.name for value in keras.tree.flatten(found)} == {"float32"}
    for ours, theirs in zip(*map(keras.tree.flatten, (found, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.02)


def test_code_inside_of_a_loss_is_refused_as_elsewhere(tmp_path):
    code = keras.Sequential([keras.Input((CLASSES,)), keras.layers.Lambda(lambda x: 2 * x)])
    model = classifier()
    model.compile("sgd", losses.BlendedLoss("mse", code))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="safe_mode=False"):
        keras.saving.load_model(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    x, y = images()
    assert loaded.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)


def test_an_adapt_with_code_is_saved_and_needs_unsafe_loading(tmp_path):
    x, y = images()
    model = classifier()
    adapt = keras.layers.Lambda(lambda x: x[:, ::-1])
    model.compile("sgd", losses.BlendedLoss("mse", mixer(), adapt=adapt))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="safe_mode=False"):
        keras.saving.load_model(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    assert loaded.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)


def test_objects_that_a_file_shares_stay_shared_around_a_frozen_model(tmp_path):
    inputs = keras.Input((SIDE, SIDE, 1))
    flat = keras.layers.Flatten()(inputs)
    outputs = {name: keras.layers.Dense(CLASSES, name=name)(flat) for name in "abc"}
    model = keras.Model(inputs, outputs)
    shared = losses.BlendedLoss(losses.Huber(), mixer())
    model.compile("sgd", {"a": losses.BlendedLoss("mse", mixer()), "b": shared, "c": shared})
    model.save(tmp_path / "model.keras")
    loaded = fusedloss.load_model(tmp_path / "model.keras").loss
    assert loaded["b"] is loaded["c"] and loaded["a"] is not loaded["b"]


def test_a_penalty_of_the_inner_loss_counts_once_and_is_bound_on_loading(tmp_path):
    x, y = images()
    model = classifier()
    penalty = fusedloss.Penalty(model.layers[-1].kernel, l2=0.1)
    loss = losses.BlendedLoss(losses.CategoricalCrossentropy(penalty=penalty), mixer())
    assert loss.penalty is penalty
    model.compile("sgd", loss)
    model.save(tmp_path / "model.keras")
    without = losses.BlendedLoss(losses.CategoricalCrossentropy(), mixer())(y, model(x))
    loaded = fusedloss.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        value = each.evaluate(x, y, len(x), verbose=0)
        np.testing.assert_allclose(value, without + penalty(), rtol=1e-5)
    two = keras.Model(model.inputs, dict.fromkeys("ab", model.outputs[0]))
    two.compile("sgd", {"a": loss, "b": loss})
    with pytest.raises(ValueError, match="losses of 2 outputs of the model carry the same one"):
        two.evaluate(x, {"a": y, "b": y}, verbose=0)


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        ({"weights": (0.7,)}, ValueError, "two finite numbers"),
        ({"weights": (0.7, float("nan"))}, ValueError, "two finite numbers"),
        ({"weights": 0.5}, ValueError, "weights"),
        ({"weights": ("a", "b")}, ValueError, "weights"),
        ({"loss": "no such loss"}, ValueError, "no such loss"),
        ({"loss": None}, ValueError, "`loss` must be"),
        ({"model": lambda x: x}, TypeError, "Keras model or layer"),
    ],
    ids=str,
)
def test_a_blended_loss_refuses_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        losses.BlendedLoss(**{"loss": "mse", "model": mixer(), **arguments})


def test_a_blended_loss_names_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"\(3, 7\), but of \(None, 4\)"):
        losses.BlendedLoss("mse", mixer())(np.zeros([3, 7]), tf.zeros([3, 7]))
    narrow = keras.Sequential([keras.Input((CLASSES,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"\(3, 2\) for predictions of shape \(3, 4\)"):
        losses.BlendedLoss("mse", narrow)(np.zeros([3, CLASSES]), tf.zeros([3, CLASSES]))
    with pytest.raises(ValueError, match="must have one output. It has 2"):
        losses.BlendedLoss("mse", functional())(np.zeros([3, 4]), tf.zeros([3, SIDE, SIDE, 1]))
