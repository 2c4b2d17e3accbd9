"""A loss on an intermediate feature map, in a custom loop and under `fit`: the same numbers.

The loss is 0.5 · mean((F - F[0])²) + 0.5 · cross-entropy, F being the feature map of a layer and
F[0] that of the batch's first example; the gradient flows through both.

The trap: a loss that reads `model.get_layer("features").output` does not read this batch's
features. That is a symbol from the day the model was built, and calling the layers again inside the
loss would cost a second forward pass. The map has to leave the model beside its predictions: that
is all that `fusedloss.models.expose` does, and then `fit` needs no loop of one's own.
"""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fusedloss import losses, models, nn
from fusedloss.examples import _command
from fusedloss.examples._digits import BATCH, accuracy, convnet, digits
from fusedloss.examples._picture import BLUE, GREEN, GREY, ORANGE, plain, save

EXAMPLES = 44 * BATCH  # Whole batches, so that the mean of the batches is that of the examples.
WEIGHT = 0.5  # of each of the two parts
RATE = 0.1  # of plain descent, since Adam makes much of small differences
TOLERANCE = 1e-5  # Two ways to round, carried on and enlarged by every step.


def by_hand(features):
    """What `reference="first"` replaces, in plain operations."""
    return tf.reduce_mean((features - features[:1]) ** 2, axis=(1, 2, 3))


def fused(features):
    return nn.feature_distance(None, features, reference="first")


def new_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return models.expose(convnet(), ["features"])


def custom_loop(distance, images, labels, epochs: int) -> list[float]:
    """The mean loss of each epoch of a training."""
    model, optimizer = new_model(), keras.optimizers.SGD(RATE)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(batch, batch_labels):
        with tf.GradientTape() as tape:
            outputs = model(batch, training=True)
            entropy = keras.losses.sparse_categorical_crossentropy(batch_labels, outputs["digit"])
            loss = tf.reduce_mean(WEIGHT * distance(outputs["features"]) + WEIGHT * entropy)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    batches = tf.data.Dataset.from_tensor_slices((images, labels)).batch(BATCH)
    return [float(np.mean([step(*batch) for batch in batches])) for _ in range(epochs)]


def under_fit(images, labels, epochs: int) -> tuple[keras.Model, dict[str, list[float]]]:
    """The trained model, and the loss of each epoch beside its two parts before their weights."""
    model = new_model()
    model.compile(
        keras.optimizers.SGD(RATE),
        loss={
            "digit": losses.SparseCategoricalCrossentropy(),
            "features": losses.FeatureDistance(reference="first"),
        },
        loss_weights={"digit": WEIGHT, "features": WEIGHT},
    )
    # Keras wants a target for every output; under "first" the loss does not look at it.
    targets = {"digit": labels, "features": labels}
    fitted = model.fit(images, targets, BATCH, epochs, shuffle=False, verbose=0)
    return model, fitted.history


def run(quick: bool, folder: Path, console: Console) -> dict:
    """Trains three times, prints, draws. Returns the losses and their largest difference."""
    images, labels = digits()
    trained_on, epochs = (images[:EXAMPLES], labels[:EXAMPLES]), 3 if quick else 5
    loop = custom_loop(by_hand, *trained_on, epochs)
    fused_loop = custom_loop(fused, *trained_on, epochs)
    model, history = under_fit(*trained_on, epochs)
    curves = np.array([loop, fused_loop, history["loss"]])
    difference = float(np.max(np.abs(curves - curves[0]) / curves[0]))
    classifier = keras.Model(model.inputs, model.output["digit"])
    found = accuracy(classifier, images[EXAMPLES:], labels[EXAMPLES:])

    table = Table("epoch", "loop, plain operations", "loop, fusedloss.nn", "fit, fusedloss.losses")
    for epoch, values in enumerate(curves.T, 1):
        table.add_row(str(epoch), *(f"{value:.6f}" for value in values))
    console.print(table)
    console.print(f"Largest relative difference: {difference:.0e}, allowed: {TOLERANCE:.0e}.")
    console.print(f"Accuracy on {len(images) - EXAMPLES} digits held out: {found:.1%}.")

    figure = Figure(figsize=(10, 4), layout="constrained")
    same, parts = figure.subplots(1, 2)
    epoch = np.arange(1, epochs + 1)
    same.plot(epoch, loop, color=GREY, linewidth=8, label="custom loop, plain operations")
    same.plot(epoch, fused_loop, color=ORANGE, linewidth=4, label="custom loop, fusedloss.nn")
    same.plot(epoch, history["loss"], "--", color=BLUE, label="fit, fusedloss.losses")
    parts.plot(epoch, history["digit_loss"], color=BLUE, label="cross-entropy of the digit")
    parts.plot(epoch, history["features_loss"], color=GREEN, label="distance to the first's map")
    plain(same, "Three programs, one curve", "epoch", "training loss")
    plain(parts, f"Its two parts, before their weights of {WEIGHT}", "epoch", "training loss")
    for axes in (same, parts):
        axes.set_xticks(epoch)
        axes.legend(frameon=False)
    save(figure, folder / "content_loss.png", console)
    if difference > TOLERANCE:
        raise SystemExit("The three programs do not give the same losses.")
    return {"curves": curves, "difference": difference, "accuracy": found}


if __name__ == "__main__":
    _command.main(run, __doc__)
