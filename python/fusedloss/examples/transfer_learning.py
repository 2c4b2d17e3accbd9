"""A network for the digits 0 to 4 moved to the digits 5 to 9, of which only ten have labels.

Three ways to move it, beside training from scratch: keep the base frozen and train a new head;
train the head and the base's last layers at a small rate; or first the one and then the other, with
a second `compile` between them. They pay where labels are few: with twenty, training from scratch
overtakes them here.

The traps: `base.trainable = True` also thaws batch norm, whose statistics a few batches of new
images move away from what the base was trained with; here it stays frozen, and a frozen batch norm
runs in inference mode. And a change of `trainable` counts for nothing until the model is compiled
again. What must not be thawed with an outer model belongs into `fusedloss.models.Frozen`.
"""

from pathlib import Path

import keras
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fusedloss import losses
from fusedloss.examples import _command
from fusedloss.examples._digits import accuracy, digits
from fusedloss.examples._picture import BLUE, GREEN, GREY, ORANGE, plain, save

LABELLED, BATCH = 10, 5  # of the digits 5 to 9
LAST = 4  # layers of the base that are thawed: a convolution, its batch norm, and what follows
RATE, SMALL_RATE = 1e-2, 1e-3


def new_base() -> keras.Model:
    """Three convolutions, each with batch norm, and their features as one row an image."""
    layers = [keras.Input([8, 8, 1])]
    for filters in (16, 32, 64):
        layers.append(keras.layers.Conv2D(filters, 3, padding="same", activation="relu"))
        layers.append(keras.layers.BatchNormalization(momentum=0.9))
    return keras.Sequential([*layers, keras.layers.MaxPooling2D(), keras.layers.Flatten()])


def compiled(base: keras.Model, rate: float, head: keras.layers.Layer) -> keras.Model:
    model = keras.Sequential([base, head])
    model.compile(keras.optimizers.Adam(rate), losses.SparseCategoricalCrossentropy())
    return model


def freeze(base: keras.Model, last: int) -> None:
    """Freezes a base except its last layers, and its batch norm among these too."""
    for index, layer in enumerate(base.layers):
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = index >= len(base.layers) - last and not is_norm


def move(base: keras.Model, stages, data, held_out, epochs: int) -> dict:
    """Trains a head on `base`, and `base` as far as the stages say, which share the epochs.

    Args:
      stages: pairs of the layers of the base to thaw, None to leave all as they are, and a rate.
    Returns:
      "curve": accuracy held out, every five epochs; "trained": number of weights trained last;
      "moved": largest change of a weight or statistic of the base that was frozen throughout.
    """
    keras.utils.set_random_seed(1)
    head = keras.layers.Dense(5, activation="softmax")
    before, thawed, curve = {weight.path: weight.numpy() for weight in base.weights}, set(), []
    for last, rate in stages:
        if last is not None:
            freeze(base, last)
        model = compiled(base, rate, head)  # After freezing: what is trained is settled here.
        thawed |= {weight.path for weight in base.trainable_weights}
        for _ in range(epochs // 5 // len(stages)):
            model.fit(*data, BATCH, epochs=5, verbose=0)
            curve.append(accuracy(model, *held_out))
    frozen = [weight for weight in base.weights if weight.path not in thawed]
    moved = max(np.max(np.abs(weight.numpy() - before[weight.path])) for weight in frozen)
    trained = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    return {"curve": curve, "trained": trained, "moved": float(moved)}


def run(quick: bool, folder: Path, console: Console) -> dict:
    """Trains the base, moves it, prints, draws. Returns for each way what `move` does."""
    images, labels = digits()
    low, high = labels < 5, labels >= 5
    keras.utils.set_random_seed(0)
    base = new_base()
    original = compiled(base, SMALL_RATE, keras.layers.Dense(5, activation="softmax"))
    original.fit(images[low], labels[low], 32, epochs=2 if quick else 10, verbose=0)
    base.save(folder / "transfer_learning_base.keras")

    data = images[high][:LABELLED], labels[high][:LABELLED] - 5
    held_out = images[high][LABELLED:], labels[high][LABELLED:] - 5
    epochs = 10 if quick else 30
    results = {"from scratch": move(new_base(), [(None, SMALL_RATE)], data, held_out, epochs)}
    for way, stages in {
        "base frozen": [(0, RATE)],
        f"last {LAST} layers at a small rate": [(LAST, SMALL_RATE)],
        "first one, then the other": [(0, RATE), (LAST, SMALL_RATE)],
    }.items():
        base = keras.models.load_model(folder / "transfer_learning_base.keras")
        results[way] = move(base, stages, data, held_out, epochs)

    console.print(f"{LABELLED} labelled digits from 5 to 9; the base knows 0 to 4.")
    table = Table(
        "way", "weights trained", f"accuracy, {len(held_out[1])} held out", "frozen moved"
    )
    for way, found in results.items():
        moved = "none frozen" if way == "from scratch" else f"by {found['moved']:g}"
        table.add_row(way, str(found["trained"]), f"{found['curve'][-1]:.1%}", moved)
    console.print(table)

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.subplots()
    looks = (GREY, 2), (ORANGE, 6), (GREEN, 2), (BLUE, 2)  # A wide line is seen below another.
    for (way, found), (colour, width) in zip(results.items(), looks, strict=True):
        epoch = np.arange(1, len(found["curve"]) + 1) * 5
        axes.plot(epoch, found["curve"], color=colour, linewidth=width, label=way)
    axes.axvline(epochs / 2, color=BLUE, linestyle=":", linewidth=1)
    axes.text(epochs / 2, 0.02, " the last way's second compile", color=BLUE, fontsize=8)
    title = f"Digits 5 to 9, {LABELLED} labels, from a base that knows 0 to 4"
    plain(axes, title, "epoch", "accuracy, held out")
    axes.legend(frameon=False)
    save(figure, folder / "transfer_learning.png", console)
    return results


if __name__ == "__main__":
    _command.main(run, __doc__)
