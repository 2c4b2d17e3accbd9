"""A pytest plugin that puts the package's losses in place of Keras's own.

    python -m pytest -p keras_suite --pyargs keras.src.losses.losses_test -k CategoricalCrossentropy

runs the tests that ship in Keras's wheel against them.
"""

from keras.src.losses import losses

import fusedloss

# Tests of what Keras refuses on TensorFlow and this package allows.
REFUSALS = (
    "SparseCategoricalCrossentropyTest::test_binary_segmentation_different_axis",
    "SparseCategoricalCrossentropyTest::test_multi_class_segmentation_different_axis",
)


def pytest_configure():
    for name in fusedloss.losses.__all__:
        setattr(losses, name, getattr(fusedloss.losses, name))


def pytest_collection_modifyitems(config, items):
    refusals = [item for item in items if item.nodeid.endswith(REFUSALS)]
    config.hook.pytest_deselected(items=refusals)
    items[:] = [item for item in items if item not in refusals]
