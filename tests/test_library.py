"""The compiled library: its versions, its threads, and what happens without it."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

import fusedloss
from fusedloss import _lib, bench_memory

needs_library = pytest.mark.skipif(
    fusedloss.backend() != "compiled", reason="there is no compiled library to test"
)


def run_python(code, timeout_s=300, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


# What depends on the version of the arithmetic.
ACCURACY = (
    "test_accuracy.py",
    "test_softmax_xent.py::test_what_is_not_in_the_subset_is_not_looked_at",
    "test_softmax_xent.py::test_long_rows_under_any_mask",
    "test_softmax_xent.py::test_a_softcap_holds_any_logit",
    "test_softmax_xent.py::test_nan_and_inf_of_a_warped_row_stay_in_it",
    "test_pointwise.py::test_error_is_within_twice_tensorflows",
    "test_pointwise.py::test_error_of_gradients_larger_than_the_caches",
    "test_pointwise.py::test_errors_of_any_size_keep_their_digits",
    "test_pointwise.py::test_logits_of_any_size_keep_their_digits",
    "test_pointwise.py::test_nan_and_inf_propagate_as_in_the_reference_and_stay_in_their_row",
    "test_pointwise.py::test_probabilities_at_and_beyond_their_bounds",
    "test_pointwise.py::test_corners_have_no_slope",
    "test_penalty.py::test_error_is_within_twice_tensorflows",
    "test_penalty.py::test_nan_and_inf_propagate",
    "test_penalty.py::test_zeros_have_no_slope",
    "test_feature_distance.py::test_error_is_within_twice_tensorflows",
    "test_feature_distance.py::test_error_of_gradients_larger_than_the_caches",
    "test_feature_distance.py::test_features_of_zero_have_a_finite_gradient",
    "test_feature_distance.py::test_equal_features_have_the_least_distance_and_no_slope",
    "test_feature_distance.py::test_nan_and_inf_propagate_as_in_the_reference",
    "test_feature_distance.py::test_bits_are_the_same_in_every_run_inside_xla_and_outside",
)


@needs_library
def test_versions_for_lesser_cpus_pass_the_accuracy_tests():
    # The version for this CPU is the one that all the other tests run.
    from fusedloss import _core

    levels = _core.build_info()["cpu_levels"]
    here = os.path.dirname(__file__)
    tests = [os.path.join(here, name) for name in ACCURACY]
    chosen = ["-k", "not xla and not graph and not product"]
    for level in levels[: levels.index(_core.cpu_level())]:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", *chosen, *tests],
            env={**os.environ, "FUSEDLOSS_CPU": level, "CUDA_VISIBLE_DEVICES": "-1"},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert run.returncode == 0, run.stdout[-3000:]


@needs_library
def test_the_forced_cpu_version_is_the_one_that_runs():
    for level, expected in (("baseline", "baseline"), ("avx2", "avx2")):
        run = run_python(
            "from fusedloss import _core; print(_core.cpu_level())", FUSEDLOSS_CPU=level
        )
        assert run.stdout.strip() == expected, run.stderr
    run = run_python("import fusedloss", FUSEDLOSS_CPU="sse9")
    assert "must be baseline, avx2 or avx512" in run.stderr and "Got 'sse9'" in run.stderr


STEP = """
import sys
import numpy as np, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(THREADS)
import fusedloss
rng = np.random.default_rng(0)
digests = []
import hashlib
for shape in ((300, 1000), (20000, 10), (7, 70001)):
    x = tf.constant(rng.normal(size=shape).astype(np.float32))
    labels = rng.integers(0, shape[-1], shape[:-1])
    listed = np.concatenate([labels[:, None], rng.integers(-1, shape[-1], (shape[0], 9))], axis=1)
    listed[::2, 3] = labels[::2]
    one_hot = tf.one_hot(labels, shape[-1])
    negative = tf.where(rng.random(shape) < 0.1, one_hot, 2 * one_hot - 1)
    sparse = fusedloss.losses.SparseCategoricalCrossentropy
    losses = (
        (sparse(from_logits=True), tf.constant(labels)),
        (sparse(True, candidates_in_targets=True), tf.constant(listed)),
        (sparse(True, temperature=0.7, z_loss=0.1, softcap=9.0), tf.constant(labels)),
        (fusedloss.losses.CategoricalCrossentropy(True, mask_negative_targets=True), negative),
        (fusedloss.losses.CategoricalFocalCrossentropy(from_logits=True), one_hot),
    )
    for jit in (False, True):
        @tf.function(jit_compile=jit)
        def step(x, *targets):
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(x)
                found = [fused(y, x) for (fused, _), y in zip(losses, targets)]
            return *found, *[tape.gradient(loss, x) for loss in found]
        found = step(x, *[y for _, y in losses])
        result = b"".join(each.numpy().tobytes() for each in found)
        digests.append(hashlib.sha256(result).hexdigest())
nn = fusedloss.nn
x = tf.constant(rng.normal(size=(400, 500)).astype(np.float32))
labels, soft = tf.constant(rng.integers(0, 500, 400)), tf.nn.softmax(-x)
options = dict(subset=range(0, 500, 3), subset_weight=0.8, full_weight=0.2)
for loss in (
    nn.sparse_softmax_xent(labels, tf.cast(x, tf.bfloat16), ignore_class=3),
    nn.sparse_softmax_xent(labels, tf.cast(x, tf.float64), subset=[1, 5, 9]),
    nn.softmax_xent(soft, tf.nn.softmax(x) * 1, from_logits=False, **options),
):
    digests += [hashlib.sha256(loss.numpy().tobytes()).hexdigest()] * 2
weights = [tf.Variable(rng.normal(size=s).astype(np.float32)) for s in ((999, 999), (7,), (80, 3))]
penalty = fusedloss.Penalty(weights, l1=0.1, l2=0.2)
for shape in ((300, 1000), (20000, 10), (7, 70001), (300000, 1)):
    x, y = tf.constant(rng.normal(size=(2, *shape)).astype(np.float32))
    row_weight = tf.constant(rng.random(shape[0]).astype(np.float32))
    output_weights = rng.random(shape[1]).tolist()
    for fused in (
        fusedloss.losses.Huber(penalty=penalty),
        fusedloss.losses.LogCosh(output_weights=output_weights, penalty=penalty),
    ):
        for jit in (False, True):
            @tf.function(jit_compile=jit)
            def step(y, x, row_weight):
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    loss = fused(y, x, row_weight)
                return loss, *tape.gradient(loss, [x, *weights])
            found = step(y, x, row_weight)
            result = b"".join(each.numpy().tobytes() for each in found)
            digests.append(hashlib.sha256(result).hexdigest())
print("\\n".join(digests))
"""


@needs_library
def test_results_are_bitwise_the_same_for_any_number_of_threads():
    runs = [
        run_python(STEP.replace("THREADS", str(threads)), CUDA_VISIBLE_DEVICES="-1")
        for threads in (1, 2, 5)
    ]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr[-2000:]
    digests = [run.stdout.split() for run in runs]
    assert len(digests[0]) == 28
    assert digests[0] == digests[1] == digests[2]
    assert digests[0][0::2] == digests[0][1::2]  # the same kernel inside XLA and outside


@needs_library
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_raw_kernel_is_bitwise_the_same_for_any_number_of_threads(dtype):
    from fusedloss import _core

    rng = np.random.default_rng(0)
    for shape in ((1000, 129), (5000, 7), (3, 40000)):
        logits = rng.normal(size=shape).astype(dtype)
        labels = rng.integers(0, shape[1], shape[0])
        results = []
        for threads in (1, 2, 3, 8):
            gradient = np.empty_like(logits)
            loss = _core.softmax_xent_reduced(logits, labels, gradient, threads=threads)
            results.append((loss, gradient.tobytes()))
        assert all(result == results[0] for result in results)


STEPS_OF_16_MB = {
    "softmax_xent/mixture": ("1024x4096", "float32"),
    "pointwise/huber": ("2048x4096", "bfloat16"),
    "pointwise/huber_penalty": ("1024x4096", "float32"),
}


@needs_library
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="it is Linux's to say")
def test_a_step_allocates_its_gradients_and_nothing_else_of_their_size():
    words = [word for case, setting in STEPS_OF_16_MB.items() for word in (case, *setting)]
    run = subprocess.run(
        [sys.executable, "-m", "fusedloss.bench_memory", *words],
        env={**os.environ, **bench_memory.ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for case, found in zip(STEPS_OF_16_MB, json.loads(run.stdout), strict=True):
        assert found["graph fusedloss"] < 2**20 and found["xla fusedloss"] < 2**20, case
        stock = [extra for form, extra in found.items() if form.startswith("graph ")]
        assert max(stock) > 2**22, "what a stock form needs is seen"


DEADLOCK = """
import threading
import numpy as np, tensorflow as tf
import fusedloss
fused = fusedloss.losses.SparseCategoricalCrossentropy(from_logits=True)
rng = np.random.default_rng(0)
xs = [tf.constant(rng.normal(size=(512, 1000)).astype(np.float32)) for _ in range(8)]
labels = tf.constant(rng.integers(0, 1000, 512))

@tf.function(jit_compile=True)
def step(labels, *xs):
    with tf.GradientTape() as tape:
        tape.watch(xs)
        loss = tf.add_n([fused(labels, x) for x in xs])
    return loss, tape.gradient(loss, xs)

expected = step(labels, *xs)[0].numpy()
results = []

def caller():
    for _ in range(10):
        results.append(step(labels, *xs)[0].numpy())

callers = [threading.Thread(target=caller) for _ in range(4)]
for thread in callers: thread.start()
for thread in callers: thread.join()
assert len(results) == 40 and all(result == expected for result in results)
print("finished")
"""


@needs_library
def test_many_callers_of_many_losses_do_not_wait_for_each_other():
    run = run_python(DEADLOCK, timeout_s=180, CUDA_VISIBLE_DEVICES="-1")
    assert run.stdout.strip() == "finished", run.stderr[-2000:]


BEFORE = {
    "nothing": "",
    "an op": "tf.constant(1.0) + 1",
    "a compiled op": "tf.function(lambda x: x + 1, jit_compile=True)(tf.constant(1.0))",
}


@needs_library
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_xla_knows_the_ops_whatever_ran_before_they_were_loaded(before):
    run = run_python(f"""
import tensorflow as tf
{before}
import fusedloss
loss = fusedloss.losses.SparseCategoricalCrossentropy(from_logits=True)
print(float(tf.function(loss, jit_compile=True)(tf.constant([1]), tf.zeros([1, 4]))))
""")
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout) == pytest.approx(np.log(4))


# Stands where the compiled module would be, built for another TensorFlow.
OTHER_BUILD = """
import sys, types, warnings
core = types.ModuleType("fusedloss._core")
core.build_info = lambda: {info}
sys.modules["fusedloss._core"] = core
{machine}
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import fusedloss
    fusedloss._core = core
    print(fusedloss.backend())
    print(fusedloss.backend())
messages = [str(w.message) for w in seen if "fusedloss" in str(w.message)]
print(len(messages), *messages, sep="\\n")
import numpy as np
loss = fusedloss.losses.SparseCategoricalCrossentropy(from_logits=True)
assert abs(float(loss(np.array([1]), np.zeros((1, 4), np.float32))) - np.log(4)) < 1e-6
"""


def _info(**changes):
    info = {
        "tensorflow": tf.__version__, "cxx11_abi": tf.sysconfig.CXX11_ABI_FLAG,
        "cuda_architectures": [], "cuda_version": "",
    }  # fmt: skip
    return {**info, **changes}


A_GPU = """
import tensorflow as tf
gpu = types.SimpleNamespace(name="/physical_device:GPU:0")
tf.config.get_visible_devices = lambda kind=None: [gpu]
tf.config.experimental.get_device_details = lambda device: {"compute_capability": (6, 1)}
"""


@needs_library
@pytest.mark.parametrize(
    "changes, machine, says",
    [
        ({"tensorflow": "2.99.0"}, "", "built for TensorFlow 2.99"),
        ({"cxx11_abi": 7}, "", "CXX11_ABI=7"),
        ({}, A_GPU, "built without CUDA"),
        (
            {"cuda_architectures": ["75", "120-ptx"], "cuda_version": "13.0"},
            A_GPU,
            "GPU:0 has compute capability 6.1",
        ),
    ],
    ids=["TensorFlow", "ABI", "no CUDA", "other GPU"],
)
def test_a_library_for_another_machine_is_not_loaded(changes, machine, says):
    code = OTHER_BUILD.replace("{info}", repr(_info(**changes))).replace("{machine}", machine)
    run = run_python(code, FUSEDLOSS_REQUIRE_COMPILED="0")
    lines = run.stdout.splitlines()
    assert lines[:3] == ["reference", "reference", "1"], run.stdout + run.stderr[-2000:]
    assert says in lines[3] and "fusedloss doctor" in lines[3]
    assert run.returncode == 0, run.stderr[-2000:]
    run = run_python(code, FUSEDLOSS_REQUIRE_COMPILED="1")
    assert run.returncode != 0
    assert "ImportError: FUSEDLOSS_REQUIRE_COMPILED=1" in run.stderr and says in run.stderr


def test_a_backend_that_the_environment_names_is_refused_before_keras_imports_it():
    run = run_python("import fusedloss", KERAS_BACKEND="jax")
    assert "ImportError: fusedloss runs on Keras's TensorFlow backend" in run.stderr


BUILD = _info(cuda_architectures=["75", "86", "90", "90-ptx"], cuda_version="12.9")
SPECIAL = _info(cuda_architectures=["90a", "100f"], cuda_version="12.9")
# What the GPUs can do, the CUDA of the driver, what the library is built for, what is said of it.
MACHINES = {
    "no GPU": ([], None, BUILD, ""),
    "exactly": ([(8, 6)], (12, 9), BUILD, ""),
    "a newer minor version": ([(8, 9)], (12, 9), BUILD, ""),
    "two GPUs": ([(7, 5), (9, 0)], (13, 0), BUILD, ""),
    "an older driver of the same major version": ([(9, 0)], (12, 0), BUILD, ""),
    "translated": ([(12, 0)], (12, 9), BUILD, ""),
    "no CUDA": ([(9, 0)], (12, 9), _info(), "the library was built without CUDA; rebuild"),
    "an older minor version": (
        [(8, 0)], (12, 9), BUILD,
        "compute capability 8.0, which is not among .*75, 86, .*CMAKE_CUDA_ARCHITECTURES=80",
    ),
    "the second GPU": ([(9, 0), (6, 1)], (12, 9), BUILD, "^GPU:1 Some GPU has .* 6.1"),
    "too new for the driver to translate": (
        [(12, 0)], (12, 8), BUILD, "capability 12.0.*; update the NVIDIA driver to one for CUDA 12",
    ),
    "an older driver": (
        [(9, 0)], (11, 8), BUILD,
        "driver is for CUDA 11.8.* built with CUDA 12.9; update .* build of fusedloss for CUDA 11",
    ),
    "a driver that does not answer": ([(9, 0)], None, BUILD, "driver cannot be asked"),
    "architecture-specific": ([(9, 0)], (12, 9), SPECIAL, ""),
    "the same family": ([(10, 3)], (12, 9), SPECIAL, ""),
    "another than the specific one": ([(12, 0)], (12, 9), SPECIAL, "not among .*90a, 100f"),
    "not NVIDIA's": ([None], None, BUILD, "no CUDA compute capability; hide the GPU"),
}  # fmt: skip


@pytest.mark.parametrize("capabilities, driver, build, says", MACHINES.values(), ids=MACHINES)
def test_every_gpu_is_served_or_it_is_said_why_not(capabilities, driver, build, says, monkeypatch):
    gpus = [SimpleNamespace(name=f"/physical_device:GPU:{i}") for i in range(len(capabilities))]
    details = [
        {"device_name": "Some GPU"} | ({"compute_capability": capability} if capability else {})
        for capability in capabilities
    ]
    monkeypatch.setattr(tf.config, "get_visible_devices", {"GPU": gpus}.__getitem__)
    monkeypatch.setattr(
        tf.config.experimental, "get_device_details", lambda gpu: details[gpus.index(gpu)]
    )
    monkeypatch.setattr(_lib, "driver_cuda", lambda: driver)
    reason = _lib.gpu_reason(build)
    assert (re.search(says, reason) is not None) if says else (reason == ""), reason


def test_the_driver_says_what_cuda_it_is_for(monkeypatch):
    def driver(version, status):
        def ask(result):
            result._obj.value = version
            return status

        return lambda name: SimpleNamespace(cuDriverGetVersion=ask)

    monkeypatch.setattr(_lib.ctypes, "CDLL", driver(12040, 0))
    assert _lib.driver_cuda() == (12, 4)
    monkeypatch.setattr(_lib.ctypes, "CDLL", driver(0, 999))
    assert _lib.driver_cuda() is None
    monkeypatch.undo()
    monkeypatch.setattr(_lib, "DRIVER", "libno-such-driver.so")
    assert _lib.driver_cuda() is None


SHAPES = """
import tensorflow as tf, fusedloss
fused = fusedloss.losses.SparseCategoricalCrossentropy(from_logits=True)
mixed = fusedloss.losses.CategoricalCrossentropy(subset=[0, 2], from_logits=True)
for classes in (10, None):
    for loss, targets in ((fused, [None]), (mixed, [None, classes])):
        @tf.function(autograph=False)
        def step(y, x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = loss(y, x)
            gradient = tape.gradient(value, x)
            print(value.shape.rank, gradient.shape.as_list() == x.shape.as_list())
            return gradient
        kind = tf.int64 if loss is fused else tf.float32
        step.get_concrete_function(
            tf.TensorSpec(targets, kind), tf.TensorSpec([None, classes], tf.float32))
"""


@needs_library
def test_what_is_unknown_of_a_shape_stays_unknown():
    run = run_python(SHAPES)
    assert run.stdout.splitlines() == ["0 True"] * 4, run.stdout + run.stderr[-2000:]


LOCALE = """
import locale, numpy as np
import fusedloss
arguments = dict(subset=[0, 1], subset_weight=0.8, full_weight=0.2, label_smoothing=0.5)
loss = fusedloss.losses.SparseCategoricalCrossentropy(from_logits=True, **arguments)
x = np.arange(12, dtype=np.float32).reshape(3, 4)
before = float(loss(np.array([0, 1, 0]), x))
for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "C.UTF-8"):
    try:
        locale.setlocale(locale.LC_ALL, name)
    except locale.Error:
        continue
    assert float(loss(np.array([0, 1, 0]), x)) == before, name
print("same")
"""


@needs_library
def test_numbers_do_not_depend_on_the_locale():
    run = run_python(LOCALE)
    assert run.stdout.strip() == "same", run.stderr[-2000:]


@pytest.mark.parametrize("keras_backend", ["jax", "torch", "numpy"])
def test_another_backend_of_keras_is_refused_at_import(keras_backend):
    # The other frameworks need not be installed for this.
    code = f"import keras; keras.config.backend = lambda: {keras_backend!r}; import fusedloss"
    run = run_python(code)
    assert "ImportError" in run.stderr and "KERAS_BACKEND=tensorflow" in run.stderr


@needs_library
def test_the_library_is_loaded_once():
    assert _lib.ops() is _lib.ops()
    assert _lib.reason() == ""
