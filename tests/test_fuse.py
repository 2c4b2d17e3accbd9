"""Keras's losses exchanged for ours, one by one and in compiled models, and the names of ours."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.losses import ALL_OBJECTS_DICT
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.trainers.compile_utils import get_loss
from keras.src.utils.naming import to_snake_case

import fusedloss
from fusedloss import fuse, losses

pytestmark = pytest.mark.usefixtures("device")
# What is not the default of each loss that Keras has too.
ARGUMENTS = {
    "BinaryCrossentropy": {"from_logits": True, "label_smoothing": 0.1, "axis": 1},
    "CategoricalCrossentropy": {"from_logits": True, "label_smoothing": 0.1, "axis": 1},
    "CategoricalFocalCrossentropy": {
        "alpha": [0.2, 0.5, 0.3], "gamma": 3.0, "from_logits": True, "label_smoothing": 0.1,
    },
    "Huber": {"delta": 0.3},
    "LogCosh": {},
    "MeanAbsoluteError": {},
    "MeanSquaredError": {},
    "SparseCategoricalCrossentropy": {"from_logits": True, "ignore_class": 1},
}  # fmt: skip
# Every name that Keras has for them.
NAMES = sorted(
    name
    for name, theirs in ALL_OBJECTS_DICT.items()
    if to_snake_case(theirs.__name__) in map(to_snake_case, ARGUMENTS)
)


def sample(name, shape=(4, 3, 3)):
    """Targets and predictions that every loss of the name takes."""
    rng = np.random.default_rng(0)
    predictions = rng.normal(size=shape).astype("float32")
    if name == "SparseCategoricalCrossentropy":
        return rng.integers(0, shape[-1], shape[:-1]), predictions
    targets = rng.random(shape).astype("float32")
    return targets / targets.sum(-1, keepdims=True), predictions


def fused_silently(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fuse(x)


def test_the_losses_that_keras_has_too_are_these():
    assert {name for name in losses.__all__ if hasattr(keras.losses, name)} == set(ARGUMENTS)


@pytest.mark.parametrize("name,arguments", ARGUMENTS.items(), ids=ARGUMENTS)
def test_a_loss_keeps_its_configuration_and_its_value(name, arguments):
    theirs = getattr(keras.losses, name)(
        reduction="sum", name="mine", dtype=keras.DTypePolicy("mixed_bfloat16"), **arguments
    )
    ours = fused_silently(theirs)
    assert type(ours) is getattr(losses, name)
    assert (ours.name, ours.reduction, ours.dtype) == ("mine", "sum", "bfloat16")
    config = ours.get_config()
    assert {key: config[key] for key in arguments} == arguments
    theirs = getattr(keras.losses, name)(**arguments)
    targets, predictions = sample(name)
    np.testing.assert_allclose(
        fused_silently(theirs)(targets, predictions), theirs(targets, predictions), rtol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_name_gives_the_loss_that_compile_makes_of_it(name):
    ours = fused_silently(name)
    targets, predictions = sample(type(ours).__name__)
    predictions = tf.nn.softmax(predictions).numpy()
    theirs = get_loss(name, targets, predictions)
    assert type(ours) is getattr(losses, type(ours).__name__)
    assert ours.name == theirs.name
    np.testing.assert_allclose(ours(targets, predictions), theirs(targets, predictions), rtol=1e-5)


def test_functions_classes_and_structures_of_losses():
    assert fused_silently(keras.losses.Huber) is losses.Huber
    function = fused_silently(keras.losses.mean_squared_error)
    assert type(function) is losses.MeanSquaredError and function.name == "mean_squared_error"
    wrapped = fused_silently(LossFunctionWrapper(keras.losses.huber, name="half", delta=0.5))
    assert (wrapped.name, wrapped.get_config()["delta"]) == ("half", 0.5)
    already = losses.Quantile()
    nested = {"a": ["mse", None, (keras.losses.huber,)], "b": already, "c": losses.LogCosh}
    fused = fused_silently(nested)
    assert list(fused) == ["a", "b", "c"]
    mse, none, (huber,) = fused["a"]
    assert type(mse) is losses.MeanSquaredError and type(huber) is losses.Huber and none is None
    assert fused["b"] is already and fused["c"] is losses.LogCosh
    assert fused_silently(None) is None


class Halved(keras.losses.MeanSquaredError):
    """A subclass that only looks like its base."""

    def call(self, y_true, y_pred):
        return super().call(y_true, y_pred) / 2


class Ours(losses.Huber):
    """A subclass of a fused loss."""


def by_hand(y_true, y_pred):
    return tf.reduce_mean((y_true - y_pred) ** 2, axis=-1)


def test_what_has_no_equivalent_is_left_and_named_once():
    given = [
        Halved(), keras.losses.BinaryFocalCrossentropy(), "kld", "crossentropy", by_hand,
        LossFunctionWrapper(by_hand), keras.losses.KLDivergence,
        keras.losses.CosineSimilarity(), keras.losses.Huber(delta=tf.Variable(1.0)),
        keras.losses.Huber(delta=-1.0), "ce", Ours(), "mse",
    ]  # fmt: skip
    with pytest.warns(UserWarning) as caught:
        fused = fuse(given)
    (warning,) = caught
    assert warning.filename == __file__
    assert str(warning.message) == (
        "No fused equivalent; left as they are: Halved, BinaryFocalCrossentropy, kl_divergence, "
        "'crossentropy', by_hand, KLDivergence, CosineSimilarity, huber_loss (`delta` is a "
        "variable), huber_loss (`delta` must be finite and greater than 0. Got -1.0.), 'ce'."
    )
    assert all(ours is theirs for ours, theirs in zip(fused[:-1], given[:-1], strict=True))
    assert type(fused[-1]) is losses.MeanSquaredError


def test_what_is_no_loss_is_an_error():
    with pytest.raises(ValueError, match="Could not interpret loss identifier: msee"):
        fuse("msee")
    with pytest.raises(TypeError, match="takes Keras losses, their names.* Got 3"):
        fuse(["mse", 3])
    with pytest.raises(TypeError, match="takes Keras losses"):
        fuse(np.ones(3))
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)], name="mine")
    with pytest.raises(ValueError, match="'mine' is not compiled.*compile it first"):
        fuse(model)


# Models.

POINTS = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
LABELS = np.random.default_rng(1).integers(0, 3, 64)
TARGETS = {"kind": LABELS, "size": POINTS[:, :2] ** 2}
WEIGHTS = {name: np.linspace(0, 2, 64) for name in TARGETS}


def two_outputs(jit_compile=False, run_eagerly=False):
    """A compiled model, trained for a while, that uses all that `compile` takes."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input([6])
    hidden = keras.layers.Dense(8, "relu")(inputs)
    kind = keras.layers.Dense(3, "softmax", name="kind")(hidden)
    size = keras.layers.Dense(2, name="size")(hidden)
    model = keras.Model(inputs, {"kind": kind, "size": size})
    model.compile(
        keras.optimizers.Adam(0.01),
        {"kind": "sparse_categorical_crossentropy", "size": keras.losses.Huber(0.5)},
        loss_weights={"kind": 0.3, "size": 2.0},
        metrics={"kind": ["accuracy"]},
        weighted_metrics={"kind": ["accuracy"], "size": ["mae"]},
        steps_per_execution=2,
        jit_compile=jit_compile,
        run_eagerly=run_eagerly,
    )
    fit(model)
    return model


def fit(model):
    history = model.fit(
        POINTS, TARGETS, batch_size=16, sample_weight=WEIGHTS, shuffle=False, verbose=0
    )
    return history.history


def assert_one_curve(ours, theirs):
    assert list(ours) == list(theirs)
    for key, values in theirs.items():
        np.testing.assert_allclose(ours[key], values, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("mode", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=str)
def test_a_model_trains_on_as_it_would_have(mode):
    stock, model = two_outputs(**mode), two_outputs(**mode)
    optimizer, slots = model.optimizer, [x.numpy() for x in model.optimizer.variables]
    weights, measured = model.get_weights(), model.get_metrics_result()
    assert fused_silently(model) is model
    assert {name: type(loss) for name, loss in model.loss.items()} == {
        "kind": losses.SparseCategoricalCrossentropy,
        "size": losses.Huber,
    }
    assert model.optimizer is optimizer and int(optimizer.iterations) == 4
    for before, after in zip(slots, optimizer.variables, strict=True):
        np.testing.assert_array_equal(before, after)
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    kept = model.get_metrics_result()
    assert {key for key in measured if not key.endswith("_loss")} == set(kept)
    assert all(kept[key] == measured[key] for key in kept)
    for setting in ("jit_compile", "run_eagerly", "steps_per_execution"):
        assert getattr(model, setting) == getattr(stock, setting)
    assert_one_curve(fit(model), fit(stock))
    assert_one_curve(
        model.evaluate(POINTS, TARGETS, verbose=0, return_dict=True),
        stock.evaluate(POINTS, TARGETS, verbose=0, return_dict=True),
    )
    for ours, theirs in zip(model.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_fused_model_is_saved_and_loaded_with_its_losses(tmp_path):
    model = fused_silently(two_outputs())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.loss["size"].get_config() == model.loss["size"].get_config()
    assert_one_curve(fit(loaded), fit(model))
    before = loaded.train_function
    assert fused_silently(loaded) is loaded
    assert loaded.train_function is before  # There was nothing to do.


def test_a_loaded_model_is_fused(tmp_path):
    two_outputs().save(tmp_path / "model.keras")
    # Two loaded ones: Keras forgets Huber's delta in a file.
    stock, model = (keras.models.load_model(tmp_path / "model.keras") for _ in range(2))
    fused_silently(model)
    assert type(model.loss["size"]) is losses.Huber
    assert_one_curve(fit(model), fit(stock))


class Unnamed(keras.Model):
    """A model whose outputs have no names, with a `compile` of its own."""

    def __init__(self):
        super().__init__()
        self.parts = [keras.layers.Dense(3), keras.layers.Dense(2)]

    def call(self, inputs):
        return [part(inputs) for part in self.parts]

    def compile(self, loss):
        super().compile("sgd", loss)


@pytest.mark.parametrize("loss", [["mse", keras.losses.huber], "MSE"], ids=str)
def test_outputs_without_names_are_logged_by_the_names_of_the_losses(loss):
    curves = []
    for change in (fused_silently, lambda model: model):
        keras.utils.set_random_seed(0)
        model = Unnamed()
        model.compile(loss)
        change(model)
        targets = [POINTS[:, :3], POINTS[:, 3:5]]
        curves.append(model.fit(POINTS, targets, epochs=2, shuffle=False, verbose=0).history)
    assert_one_curve(*curves)


@pytest.mark.parametrize("scales", [True, False], ids=["loss scale", "no loss scale"])
def test_mixed_precision_keeps_its_loss_scale(scales):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = keras.Sequential([keras.Input([6]), keras.layers.Dense(2, dtype="float32")])
        model.compile("sgd", "mse", auto_scale_loss=scales)
        model.fit(POINTS, TARGETS["size"], verbose=0)
        optimizer = model.optimizer
        assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer) == scales
        fused_silently(model).fit(POINTS, TARGETS["size"], verbose=0)
        assert model.optimizer is optimizer and int(optimizer.iterations) == 4
    finally:
        keras.config.set_dtype_policy("float32")


def test_a_model_whose_losses_have_no_equivalent_is_left():
    model = keras.Sequential([keras.Input([6]), keras.layers.Dense(2)])
    model.compile("sgd", by_hand)
    with pytest.warns(UserWarning, match=r"left as they are: by_hand\.$"):
        assert fuse(model) is model
    assert model.loss is by_hand
    model = keras.Sequential([keras.Input([6]), keras.layers.Dense(2)])
    model.compile("sgd")
    assert fused_silently(model) is model and model.loss is None


# Names.


@pytest.fixture
def registered():
    before = dict(ALL_OBJECTS_DICT)
    fusedloss.register()
    yield
    ALL_OBJECTS_DICT.clear()
    ALL_OBJECTS_DICT.update(before)


def test_names_are_unknown_before_they_are_registered():
    with pytest.raises(ValueError, match="fusedloss.huber"):
        keras.losses.get("fusedloss.huber")


@pytest.mark.usefixtures("registered")
def test_names_of_keras_with_a_prefix_are_ours():
    for name in NAMES:
        ours = keras.losses.get(f"fusedloss.{name}")
        assert type(ours) is type(fused_silently(name))
        assert not isinstance(keras.losses.get(name), type(ours))
    assert type(keras.losses.get("fusedloss.Quantile")) is losses.Quantile
    with pytest.raises(ValueError, match="kl_divergence"):
        keras.losses.get("fusedloss.kl_divergence")
    assert fused_silently("fusedloss.mse") == "fusedloss.mse"
    known = dict(ALL_OBJECTS_DICT)
    fusedloss.register()
    assert known == ALL_OBJECTS_DICT


@pytest.mark.usefixtures("registered")
def test_a_model_compiled_with_a_name_trains_and_is_saved(tmp_path):
    curves = []
    for loss in ("fusedloss.mse", "mse"):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input([6]), keras.layers.Dense(2)])
        model.compile("sgd", loss, metrics=["mae"])
        curves.append(
            model.fit(POINTS, TARGETS["size"], epochs=2, shuffle=False, verbose=0).history
        )
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert loaded.loss == loss
        evaluated = [x.evaluate(POINTS, TARGETS["size"], verbose=0) for x in (model, loaded)]
        assert evaluated[0] == evaluated[1]
    assert_one_curve(*curves)


@pytest.mark.parametrize("other", [keras.layers.Dense(1), keras.metrics.MeanSquaredError(), 3])
def test_what_is_no_loss_is_refused(other):
    with pytest.raises(TypeError, match="`fuse` takes Keras losses"):
        fusedloss.fuse(other)
