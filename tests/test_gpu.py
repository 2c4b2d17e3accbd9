"""The library on each device of this machine: where ops run, and what a GPU does its own way."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import kernels

import fusedloss
from fusedloss import losses, nn

pytestmark = pytest.mark.skipif(
    fusedloss.backend() != "compiled", reason="there is no compiled library to test"
)
RUN = {
    "eager": lambda function: function,
    "graph": lambda function: tf.function(function, autograph=False),
    "xla": lambda function: tf.function(function, autograph=False, jit_compile=True),
}


def registered(op):
    return {kernel.device_type for kernel in kernels.get_registered_kernels_for_op(op).kernel}


OPS = [
    *(
        name + suffix
        for name in ("SoftmaxXent", "Pointwise", "FeatureDistance")
        for suffix in ("", "Grad", "Reduced", "ReducedPenalized")
    ),
    "Penalty",
    "PenaltyGrad",
    "PenaltyReduced",
]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_kernel_for_every_device_of_the_build(op):
    from fusedloss import _core

    tf.function(lambda x: x + 1, jit_compile=True)(tf.constant(1.0))  # XLA registers its kernels.
    compiled_for = {device for device in registered("AddV2") if device.endswith("_JIT")}
    assert "XLA_CPU_JIT" in compiled_for
    gpu = {"GPU"} if _core.build_info()["cuda_architectures"] else set()
    assert registered(f"Fusedloss>{op}") == {"CPU"} | gpu | compiled_for


@contextlib.contextmanager
def no_other_device():
    before = tf.config.get_soft_device_placement()
    tf.config.set_soft_device_placement(False)
    try:
        yield
    finally:
        tf.config.set_soft_device_placement(before)


def loss_and_gradient(labels, logits, loss):
    with tf.GradientTape() as tape:
        tape.watch(logits)
        value = loss(labels, logits)
    return value, tape.gradient(value, logits)


LOSSES = {
    "general": nn.sparse_softmax_xent,
    "training": losses.SparseCategoricalCrossentropy(from_logits=True),
}


@pytest.mark.parametrize("labels_dtype", ["int32", "int64"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_results_are_where_the_predictions_are(loss, labels_dtype, device):
    """Labels on the CPU are copied to them."""
    rng = np.random.default_rng(0)
    with tf.device("CPU:0"):
        labels = tf.constant(rng.integers(0, 40, 30), labels_dtype)
    logits = tf.constant(rng.normal(size=(30, 40)).astype(np.float32))
    with no_other_device():
        value, gradient = loss_and_gradient(labels, logits, loss)
    assert value.device.endswith(device) and gradient.device.endswith(device)
    stock = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    np.testing.assert_allclose(tf.reduce_mean(value), tf.reduce_mean(stock), rtol=1e-5)


@pytest.mark.parametrize("shape", [(300, 1000), (20000, 10), (7, 70001)], ids=str)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_bits_are_the_same_in_every_run_inside_xla_and_outside(loss, shape, device):
    rng = np.random.default_rng(0)
    logits = tf.constant(rng.normal(size=shape).astype(np.float32))
    labels = tf.constant(rng.integers(0, shape[-1], shape[:-1]))
    found = []
    for run in RUN.values():
        step = run(lambda y, x: loss_and_gradient(y, x, loss))
        found += [[x.numpy().tobytes() for x in step(labels, logits)] for _ in range(3)]
    assert all(bits == found[0] for bits in found)


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("ignore_class", [None, -3])
@pytest.mark.parametrize("classes", [5, 3000])
@pytest.mark.parametrize("path", LOSSES)
def test_labels_out_of_range(path, classes, ignore_class, run, device):
    """A CPU refuses them. A GPU, as TensorFlow's own kernel there, answers with NaN."""
    labels = tf.constant([1, classes, 4, -3, 2])
    logits = tf.constant(np.random.default_rng(0).normal(size=(5, classes)).astype(np.float32))
    if path == "general":

        def loss(y, x):
            return nn.sparse_softmax_xent(y, x, ignore_class=ignore_class)

    else:
        loss = losses.SparseCategoricalCrossentropy(True, ignore_class=ignore_class)
    step = run(lambda y, x: loss_and_gradient(y, x, loss))
    if device.startswith("CPU"):
        with pytest.raises(tf.errors.InvalidArgumentError, match="`labels` holds .* position 1"):
            step(labels, logits)
        return
    value, gradient = step(labels, logits)
    bad = [1] if ignore_class == -3 else [1, 3]
    if path == "general":
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(value)), bad)
    else:
        assert np.isnan(value)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(gradient).all(-1)), bad)
    assert np.isfinite(np.delete(gradient, bad, axis=0)).all()


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("full_weight", [0.0, 0.2])
def test_a_candidate_out_of_range(full_weight, run, device):
    """As a label."""
    labels, candidates = tf.constant([2, 1, 4]), tf.constant([[0, 2], [1, 9], [-1, 4]])
    logits = tf.constant(np.random.default_rng(0).normal(size=(3, 9)).astype(np.float32))

    def loss(y, x):
        return nn.sparse_softmax_xent(y, x, candidates=candidates, full_weight=full_weight)

    step = run(lambda y, x: loss_and_gradient(y, x, loss))
    if device.startswith("CPU"):
        with pytest.raises(tf.errors.InvalidArgumentError, match="`candidates`.* 9"):
            step(labels, logits)
        return
    value, gradient = step(labels, logits)
    np.testing.assert_array_equal(np.isnan(value), [False, True, False])
    np.testing.assert_array_equal(np.isnan(gradient).all(-1), [False, True, False])
    assert np.isfinite(gradient[::2]).all()


def test_a_subset_that_names_no_class(device):
    """As above, where XLA drops the check that Python adds for a number of classes yet unknown."""
    function = tf.function(
        lambda y, x: nn.sparse_softmax_xent(y, x, subset=[0, 9]),
        input_signature=[tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, None])],
        autograph=False,
        jit_compile=True,
    )
    np.testing.assert_allclose(function([9, 0], tf.zeros([2, 10])), np.log([2, 2]), rtol=1e-6)
    if device.startswith("CPU"):
        with pytest.raises(tf.errors.InvalidArgumentError, match="`subset` names class 9"):
            function([1, 0], tf.zeros([2, 5]))
    else:
        assert np.isnan(function([1, 0], tf.zeros([2, 5]))).all()


def test_out_of_memory_is_an_error_that_names_the_op(device):
    nothing = tf.zeros([2**55, 0])  # The losses of so many rows fit no memory.
    with pytest.raises(tf.errors.ResourceExhaustedError, match="SoftmaxXent"):
        nn.softmax_xent(nothing, nothing)
    np.testing.assert_allclose(nn.softmax_xent([0.0, 1.0], [0.0, 0.0]), np.log(2), rtol=1e-6)


def trained(loss, strategy):
    """Weights and losses of a small classifier, compiled as Keras compiles it unless told."""
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(128, 8)).astype(np.float32), rng.integers(0, 5, 128)
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input([8]), keras.layers.Dense(5)])
        model.compile("sgd", loss=loss)
    history = model.fit(points, labels, batch_size=32, epochs=3, verbose=0)
    model.evaluate(points, labels, verbose=0)
    return [*model.get_weights(), np.array(history.history["loss"])]


def assert_trains_as_keras(strategy):
    tf.config.experimental.enable_tensor_float_32_execution(False)
    ours = trained(losses.SparseCategoricalCrossentropy(from_logits=True), strategy)
    theirs = trained(keras.losses.SparseCategoricalCrossentropy(from_logits=True), strategy)
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-6)


def test_fit_with_default_arguments_trains_as_keras():
    assert_trains_as_keras(tf.distribute.get_strategy())


def test_fit_under_a_strategy_of_one_device_trains_as_keras(device):
    assert_trains_as_keras(tf.distribute.MirroredStrategy([device]))
