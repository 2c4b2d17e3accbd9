"""A pytest plugin that puts the package's losses in place of Keras's own.

    python -m pytest -p keras_suite --pyargs keras.src.losses.losses_test -k HuberLossTest

runs the tests that ship in Keras's wheel against them.
"""

from keras.src.losses import losses

import fusedloss

# Tests of what Keras refuses on TensorFlow and this package allows, and of configs that hold name
# and reduction alone: Keras's lose dtype and delta.
OTHERWISE = (
    "SparseCategoricalCrossentropyTest::test_binary_segmentation_different_axis",
    "SparseCategoricalCrossentropyTest::test_multi_class_segmentation_different_axis",
    "HuberLossTest::test_config",
    "LogCoshTest::test_config",
)


def pytest_configure():
    for name in fusedloss.losses.__all__:
        setattr(losses, name, getattr(fusedloss.losses, name))


def pytest_collection_modifyitems(config, items):
    otherwise = [item for item in items if item.nodeid.endswith(OTHERWISE)]
    config.hook.pytest_deselected(items=otherwise)
    items[:] = [item for item in items if item not in otherwise]
