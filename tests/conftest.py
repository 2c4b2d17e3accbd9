"""What tests share: the devices of this machine."""

import pytest
import tensorflow as tf

DEVICES = ["CPU:0", *(["GPU:0"] if tf.config.list_physical_devices("GPU") else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device in turn, where everything runs that says nothing else."""
    with tf.device(request.param):
        yield request.param
