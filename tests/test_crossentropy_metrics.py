"""Metrics that come out of the pass of the loss: right numbers, and no second pass."""

import collections
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import fusedloss
import truth
from fusedloss import _lib, losses, metrics

CLASSES = 12
MEASURES = ["accuracy", "top_3_accuracy", "entropy", "log_sum_exp"]
compiled = pytest.mark.skipif(_lib.ops() is None, reason="the compiled ops are counted")


def labels_and_logits(rows=40, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows).astype(np.int32)
    # Of few values, so that there are ties.
    logits = rng.integers(-3, 4, (rows, CLASSES)).astype(np.float32)
    return labels, logits


def dense(labels, seed=1):
    """Soft targets whose greatest is the label's, and twins of it."""
    rng = np.random.default_rng(seed)
    targets = rng.random((len(labels), CLASSES), dtype=np.float32)
    targets[np.arange(len(labels)), labels] = 1
    targets[:, -1] = np.where(labels % 2, 1, targets[:, -1])
    return targets / targets.sum(-1, keepdims=True)


def softmaxed(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def listed(labels, seed=2):
    """y_true of `candidates_in_targets`: the label, then candidates with pads among them."""
    rng = np.random.default_rng(seed)
    candidates = rng.integers(-1, CLASSES, (len(labels), 6)).astype(np.int32)
    candidates[:, 3] = labels
    candidates[::5] = -1
    return np.concatenate([labels[:, None], candidates], axis=-1)


def case(name):
    """A loss, its y_true and y_pred, and the arguments of the truth with the targets it takes."""
    labels, logits = labels_and_logits()
    subset = [1, 3, 4, 8]
    if name == "labels":
        return losses.SparseCategoricalCrossentropy(from_logits=True), labels, logits, labels, {}
    if name == "labels of a subset, some ignored":
        arguments = {"subset": subset, "ignore_class": 3, "normalize": "full"}
        loss = losses.SparseCategoricalCrossentropy(from_logits=True, **arguments)
        return loss, labels, logits, labels, arguments
    if name == "probabilities":
        arguments = {"subset": subset, "from_logits": False}
        loss = losses.CategoricalCrossentropy(subset=subset)
        return loss, dense(labels), softmaxed(logits), dense(labels), arguments
    if name == "probabilities and labels":
        probabilities = softmaxed(logits)
        loss = losses.SparseCategoricalCrossentropy()
        return loss, labels, probabilities, labels, {"from_logits": False}
    if name == "marked illegal":
        targets = np.where(np.random.default_rng(3).random(logits.shape) < 0.4, dense(labels), -1)
        targets[7] = -1
        arguments = {"mask_negative_targets": True, "temperature": 0.7, "softcap": 5.0}
        loss = losses.CategoricalCrossentropy(from_logits=True, **arguments)
        return loss, targets, logits, targets, arguments
    assert name == "candidates"
    loss = losses.SparseCategoricalCrossentropy(from_logits=True, candidates_in_targets=True)
    y_true = listed(labels)
    return loss, y_true, logits, labels, {"candidates": y_true[:, 1:]}


CASES = [
    "labels", "labels of a subset, some ignored", "probabilities", "probabilities and labels",
    "marked illegal", "candidates",
]  # fmt: skip


def means(numbers, weights):
    """What the metrics are to be, of rank, entropy and log-sum-exp `[rows, 3]`."""
    weights = np.where(numbers[:, 0] >= 0, weights, 0)
    values = [numbers[:, 0] == 0, numbers[:, 0] < 3, numbers[:, 1], numbers[:, 2]]
    return [float((weights * value).sum() / weights.sum()) for value in values]


@pytest.mark.parametrize("run", ["eager", "graph", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_metrics_are_those_of_the_formula(name, run, device):
    loss, y_true, y_pred, targets, arguments = case(name)
    weights = np.random.default_rng(4).random(len(y_pred)).astype(np.float32)
    ours = metrics.crossentropy_metrics(loss, top_k=3)
    assert [metric.name for metric in ours] == MEASURES

    def update(y_true, y_pred, weights):
        value = loss(y_true, y_pred, weights)
        for metric in ours:
            metric.update_state(y_true, y_pred, weights)
        return value

    if run != "eager":
        update = tf.function(update, jit_compile=run == "xla")
    found = update(*map(tf.constant, (y_true, y_pred, weights)))
    np.testing.assert_allclose(found, loss(y_true, y_pred, weights), rtol=1e-5)
    numbers = truth.softmax_xent_metrics(y_pred, targets, **arguments)
    expected = means(numbers, weights)
    np.testing.assert_allclose([m.result() for m in ours], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [3, 40, 1858])
@pytest.mark.parametrize("normalize", ["subset", "full"])
def test_numbers_of_every_row_are_those_of_the_formula(classes, normalize, dtype, device):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 30)
    logits = tf.cast(rng.integers(-12, 13, (30, classes)) / 4, dtype)
    x = tf.cast(logits, "float64").numpy()
    mask = rng.random((30, classes)) < 0.4
    mask[1] = False
    targets = np.where(mask, rng.integers(0, 4, mask.shape), -1).astype(np.float32)
    sparse = losses.SparseCategoricalCrossentropy(from_logits=True, softcap=4.0)
    ids = list(range(0, classes, 2))
    arguments = {"subset": ids, "normalize": normalize}
    dense_of_ids = losses.CategoricalCrossentropy(from_logits=True, **arguments)
    arguments_of_marks = {"mask_negative_targets": True, "normalize": normalize}
    marked = losses.CategoricalCrossentropy(from_logits=True, **arguments_of_marks)
    for loss, y_true, known in (
        (sparse.masked(tf.constant(mask)), labels, {"softcap": 4.0, "mask": mask}),
        (dense_of_ids, np.maximum(targets, 0), arguments),
        (marked, targets, arguments_of_marks),
    ):
        found = loss.row_metrics(y_true, logits).numpy()
        expected = truth.softmax_xent_metrics(x, y_true, **known)
        np.testing.assert_array_equal(found[:, 0], expected[:, 0].astype(np.float64))
        np.testing.assert_allclose(found, expected.astype(np.float64), rtol=1e-5, atol=1e-5)


def test_accuracy_is_kerass_where_there_are_no_ties():
    labels, _ = labels_and_logits(200)
    logits = np.random.default_rng(5).standard_normal((200, CLASSES)).astype(np.float32)
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    ours = metrics.crossentropy_metrics(loss, top_k=[2, 5])
    theirs = [
        keras.metrics.SparseCategoricalAccuracy(),
        keras.metrics.SparseTopKCategoricalAccuracy(2),
        keras.metrics.SparseTopKCategoricalAccuracy(5),
    ]
    for our, their in zip(ours, theirs, strict=False):
        np.testing.assert_allclose(our(labels, logits), their(labels, logits), rtol=1e-6)


def test_sequences_are_weighted_and_masked():
    rng = np.random.default_rng(6)
    labels = rng.integers(0, CLASSES, (4, 5))
    logits = rng.standard_normal((4, 5, CLASSES)).astype(np.float32)
    mask = np.arange(5) < np.array([[5], [2], [0], [3]])
    weights = np.array([1, 2, 3, 0], np.float32)
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    ours = metrics.crossentropy_metrics(loss, top_k=3)
    y_pred = tf.constant(logits)
    y_pred._keras_mask = tf.constant(mask)
    for metric in ours:
        metric.update_state(labels, y_pred, weights)
    numbers = truth.softmax_xent_metrics(logits, labels).reshape(-1, 3)
    expected = means(numbers, (mask * weights[:, None]).ravel())
    np.testing.assert_allclose([m.result() for m in ours], expected, rtol=1e-5)


def test_no_rows_are_0():
    loss = losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2)
    for metric in metrics.crossentropy_metrics(loss):
        for rows in (0, 3):
            metric.update_state(np.full(rows, 2), np.zeros((rows, 4), np.float32))
        assert metric.result() == 0


def model_of(loss, top_k=3, metrics_of=None, layer=None, **compiled):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, **layer or {})(inputs))
    measures = metrics.crossentropy_metrics(metrics_of or loss, top_k=top_k)
    model.compile("sgd", loss=loss, metrics=measures, **compiled)
    return model


def examples(rows=32):
    rng = np.random.default_rng(7)
    return rng.standard_normal((rows, 8)).astype(np.float32), labels_and_logits(rows)[0]


def traced_ops(model, data):
    """How often each type of op is in the steps of `fit` and `evaluate`."""
    found = []
    for step in (model.train_step, model.test_step):
        graph = tf.function(step).get_concrete_function(data).graph
        found.append(collections.Counter(op.type for op in graph.get_operations()))
    return found


def loss_ops(counted):
    return {op: n for op, n in counted.items() if op.startswith("Fusedloss>") or "oftmax" in op}


@compiled
@pytest.mark.parametrize(
    "layer,trains_by",
    [
        ({}, ["SoftmaxXentReduced"]),
        ({"activation": "softmax"}, ["SoftmaxXentReduced"]),
        ({"dtype": "mixed_float16"}, ["SoftmaxXent", "SoftmaxXentGrad"]),
    ],
    ids=["logits", "probabilities", "half precision"],
)
def test_a_step_reads_the_predictions_once(layer, trains_by):
    x, y = examples()
    of_model = {"Softmax": 1} if "activation" in layer else {}
    model = model_of(losses.SparseCategoricalCrossentropy(from_logits=not of_model), layer=layer)
    train, test = traced_ops(model, (tf.constant(x), tf.constant(y)))
    assert loss_ops(train) == {**of_model, **{f"Fusedloss>{op}": 1 for op in trains_by}}
    assert loss_ops(test) == {**of_model, "Fusedloss>SoftmaxXent": 1}


@compiled
def test_a_metric_of_another_loss_has_its_own_pass():
    x, y = examples()
    loss, other = (
        losses.SparseCategoricalCrossentropy(from_logits=True, subset=subset)
        for subset in (None, [0, 1, 2])
    )
    model = model_of(loss, metrics_of=other)
    train, _ = traced_ops(model, (tf.constant(x), tf.constant(y)))
    assert loss_ops(train) == {"Fusedloss>SoftmaxXentReduced": 1, "Fusedloss>SoftmaxXent": 1}


@pytest.mark.parametrize("mode", ["graph", "xla", "eager"])
def test_fit_and_evaluate_report_what_predict_says(mode):
    x, y = examples()
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    model = model_of(loss, jit_compile=mode == "xla", run_eagerly=mode == "eager")
    numbers = truth.softmax_xent_metrics(model.predict(x, verbose=0), y)
    expected = dict(zip(MEASURES, means(numbers, np.ones(len(y))), strict=True))
    history = model.fit(x, y, batch_size=len(y), verbose=0, validation_data=(x, y)).history
    for measure, value in expected.items():
        np.testing.assert_allclose(history[measure], [value], rtol=1e-4, atol=1e-5)
    numbers = truth.softmax_xent_metrics(model.predict(x, verbose=0), y)
    expected = means(numbers, np.ones(len(y)))
    found = model.evaluate(x, y, batch_size=10, verbose=0)
    np.testing.assert_allclose(found[1:], expected, rtol=1e-4, atol=1e-5)
    for measure, value in zip(MEASURES, expected, strict=True):
        np.testing.assert_allclose(history[f"val_{measure}"], [value], rtol=1e-4, atol=1e-5)


@compiled
def test_an_eager_step_runs_the_op_once(monkeypatch):
    x, y = examples()
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    model = model_of(loss, run_eagerly=True)
    calls = collections.Counter()
    for name in ("rows", "reduced"):
        original = getattr(loss._compiled, name)
        monkeypatch.setattr(
            loss._compiled,
            name,
            lambda *args, name=name, original=original, **kwargs: (
                calls.update([name]), original(*args, **kwargs)
            )[1],
        )  # fmt: skip
    model.fit(x, y, batch_size=len(y), verbose=0)
    assert calls == {"reduced": 1}
    model.evaluate(x, y, batch_size=len(y), verbose=0)
    assert calls == {"reduced": 1, "rows": 1}


def test_outputs_of_one_model_keep_their_names_apart(tmp_path):
    x, y = examples()
    inputs = keras.Input((8,))
    heads = {name: keras.layers.Dense(CLASSES, name=name)(inputs) for name in ("policy", "value")}
    model = keras.Model(inputs, heads)
    of = {name: losses.SparseCategoricalCrossentropy(from_logits=True) for name in heads}
    model.compile(
        "sgd",
        loss=of,
        metrics={name: metrics.crossentropy_metrics(loss) for name, loss in of.items()},
    )
    history = model.fit(x, {"policy": y, "value": y[::-1].copy()}, verbose=0).history
    for name in heads:
        assert {f"{name}_accuracy", f"{name}_entropy", f"{name}_log_sum_exp"} <= set(history)


def test_early_stopping_knows_the_direction_of_accuracies():
    x, y = examples()
    model = model_of(losses.SparseCategoricalCrossentropy(from_logits=True))
    stop = keras.callbacks.EarlyStopping(monitor="val_top_3_accuracy")
    model.fit(x, y, verbose=0, validation_data=(x, y), callbacks=[stop])
    assert stop.monitor_op is keras.ops.greater


def test_saved_models_report_the_same(tmp_path):
    x, y = examples()
    model = model_of(losses.SparseCategoricalCrossentropy(from_logits=True, subset=[0, 2, 5]))
    expected = model.evaluate(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    for load in (fusedloss.load_model, keras.models.load_model):
        loaded = load(tmp_path / "model.keras")
        np.testing.assert_allclose(loaded.evaluate(x, y, verbose=0), expected, rtol=1e-6)


@compiled
def test_a_loaded_model_reads_the_predictions_once(tmp_path):
    x, y = examples()
    model_of(losses.SparseCategoricalCrossentropy(from_logits=True)).save(tmp_path / "m.keras")
    loaded = fusedloss.load_model(tmp_path / "m.keras")
    train, test = traced_ops(loaded, (tf.constant(x), tf.constant(y)))
    assert loss_ops(train) == {"Fusedloss>SoftmaxXentReduced": 1}
    assert loss_ops(test) == {"Fusedloss>SoftmaxXent": 1}


def test_numbers_are_those_of_the_targets_given():
    labels, logits = labels_and_logits()
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    (metric, *_) = metrics.crossentropy_metrics(loss)
    y_pred = tf.constant(logits)
    loss(tf.constant(labels), y_pred)
    best = tf.argmax(logits, axis=-1)
    assert metric(best, y_pred) == 1


@pytest.mark.parametrize("changed", ["labels", "logits"])
def test_what_can_change_is_measured_anew(changed):
    labels, logits = np.array([0, 1]), tf.Variable([[1.0, 0.0], [0.0, 1.0]])
    if changed == "labels":
        logits = tf.convert_to_tensor(logits)
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = metrics.CrossentropyMetric(loss)
    loss(labels, logits)
    assert accuracy(labels, logits) == 1
    if changed == "labels":
        labels[:] = [1, 0]
    else:
        logits.assign(1 - logits)
    accuracy.reset_state()
    assert accuracy(labels, logits) == 0


@pytest.mark.parametrize("name", ["compiled", "reference"])
@pytest.mark.parametrize(
    "logits, label, rank",
    [([3, np.nan, 1], 0, 1), ([3, np.nan, 1], 1, 3), ([np.nan] * 3, 0, 3), ([np.nan, 1, 2], 2, 1)],
)
def test_nan_counts_as_higher(name, logits, label, rank, monkeypatch):
    if name == "reference":
        monkeypatch.setattr(_lib, "ops", lambda: None)
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    row = loss.row_metrics(np.array([label]), np.array([logits], np.float32))
    assert row[0, 0] == rank


def test_a_row_of_weight_0_hides_its_nan():
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    logits = np.array([[np.nan, 1], [0, 0]], np.float32)
    entropy = metrics.CrossentropyMetric(loss, "entropy")
    assert float(entropy([0, 1], logits, sample_weight=[0, 1])) == pytest.approx(np.log(2))


@pytest.mark.parametrize("top_k", [0, 1.5, True, [2, 2], [3, -1]])
def test_a_number_of_best_classes_is_positive_and_listed_once(top_k):
    loss = losses.CategoricalCrossentropy()
    with pytest.raises(
        ValueError, match="`top_k` must be positive integers, each listed once. Got"
    ):
        metrics.crossentropy_metrics(loss, top_k)


def test_nothing_of_a_graph_is_used_outside_of_it():
    labels, logits = (tf.constant(x) for x in labels_and_logits())
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    (metric, *_) = metrics.crossentropy_metrics(loss)
    expected = metric(labels, logits).numpy()

    fresh = tf.identity(logits)
    traced = tf.function(lambda: loss(labels, fresh))
    traced()
    metric.reset_state()
    assert metric(labels, fresh).numpy() == expected

    @tf.function
    def in_a_branch(labels, logits):
        y_pred = tf.identity(logits)
        value = tf.cond(labels[0] >= 0, lambda: loss(labels, y_pred), lambda: tf.constant(0.0))
        metric.update_state(labels, y_pred)
        return value

    metric.reset_state()
    in_a_branch(labels, logits)
    assert metric.result().numpy() == expected


REPLICAS = """
import keras, numpy as np, tensorflow as tf
cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
from fusedloss import losses, metrics
rng = np.random.default_rng(0)
x, y = rng.standard_normal((24, 8)).astype("float32"), rng.integers(0, 5, 24)

def evaluated(strategy):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(5)])
        loss = losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss=loss, metrics=metrics.crossentropy_metrics(loss, top_k=2))
    history = model.fit(x, y, batch_size=12, verbose=0, shuffle=False).history
    return [v[0] for k, v in sorted(history.items())] + model.evaluate(x, y, verbose=0)

one = evaluated(tf.distribute.get_strategy())
two = evaluated(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
np.testing.assert_allclose(one, two, rtol=1e-4)
print("alike")
"""


def test_two_replicas_report_as_one():
    answer = subprocess.run([sys.executable, "-c", REPLICAS], capture_output=True, text=True)
    assert answer.stdout == "alike\n", answer.stderr[-2000:]


@pytest.mark.parametrize(
    "arguments,error,text",
    [
        ((keras.losses.CategoricalCrossentropy(),), TypeError, "fusedloss.losses. Got <"),
        ((losses.Huber(),), TypeError, "CategoricalFocalCrossentropy"),
        ((losses.CategoricalCrossentropy(), "top_0_accuracy"), ValueError, "'top_0_accuracy'"),
        ((losses.CategoricalCrossentropy(), "precision"), ValueError, "`measure` must be"),
    ],
)
def test_what_has_no_metrics_is_named(arguments, error, text):
    with pytest.raises(error) as raised:
        metrics.CrossentropyMetric(*arguments)
    assert text in str(raised.value)


def test_metrics_have_the_config_they_were_made_from():
    loss = losses.CategoricalCrossentropy(subset=[0, 2], from_logits=True)
    metric = metrics.CrossentropyMetric(loss, "top_5_accuracy", name="top", dtype="float64")
    copy = type(metric).from_config(metric.get_config())
    assert copy.get_config() == metric.get_config()
    assert copy.loss.get_config() == loss.get_config()
