"""Predictions blended with what a frozen model makes of them, before the cross-entropy.

Of the labels of some digits seven in ten are right; the others come from a careless reader, who
takes every digit for one that looks like it. A model g of that reader, trained before and kept in a
file, turns probabilities of digits into those of what the reader writes. The loss is the
cross-entropy of the labels and 0.7 · ŷ + 0.3 · g(ŷ): g explains the wrong labels, so that ŷ need
not. (Patrini et al., Making Deep Neural Networks Robust to Label Noise, 2017: forward correction.)

The trap: a model called inside a loss is easily trained with the rest, run in training mode, or cut
off from the gradient by `predict`. Then g is no longer what the file says, or ŷ never learns of it.
"""

from pathlib import Path

import keras
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fusedloss import losses, models
from fusedloss.examples import _command
from fusedloss.examples._digits import BATCH, accuracy, convnet, digits, largest_change
from fusedloss.examples._picture import BLUE, GREY, plain, save

LOOKS_LIKE = np.array([6, 7, 7, 8, 9, 3, 5, 1, 3, 4])  # what the careless reader takes 0 to 9 for
RIGHT, CARELESS = 0.7, 0.3  # shares of the labels
TRAINED_ON, READ_TWICE = 800, 300  # digits; the others are held out


def save_reader(labels: np.ndarray, path: Path) -> None:
    """Trains g on digits that the reader was seen to read, and saves it."""
    keras.utils.set_random_seed(0)
    reader = keras.Sequential(
        [
            keras.Input([1, 10]),  # A row of probabilities.
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    reader.compile(keras.optimizers.Adam(0.1), "sparse_categorical_crossentropy")
    rows = keras.utils.to_categorical(labels, 10)[:, None]
    reader.fit(rows, LOOKS_LIKE[labels], batch_size=len(rows), epochs=100, verbose=0)
    reader.save(path)


def train(loss, images, labels, held_out, epochs: int) -> list[float]:
    """The share of right labels found for the digits held out, after each epoch."""
    keras.utils.set_random_seed(0)
    model = convnet()
    model.compile("adam", loss)
    found = []
    for _ in range(epochs):
        model.fit(images, labels, BATCH, verbose=0)
        found.append(accuracy(model, *held_out))
    return found


def run(quick: bool, folder: Path, console: Console) -> dict:
    """Trains with and without g, prints, draws. Returns both curves and how far g has moved."""
    images, labels = digits()
    given = labels[:TRAINED_ON].copy()
    is_careless = np.random.default_rng(0).random(TRAINED_ON) < CARELESS
    given[is_careless] = LOOKS_LIKE[given[is_careless]]
    held_out = images[TRAINED_ON + READ_TWICE :], labels[TRAINED_ON + READ_TWICE :]

    save_reader(labels[TRAINED_ON : TRAINED_ON + READ_TWICE], folder / "blended_reader.keras")
    reader = models.load_frozen(folder / "blended_reader.keras")
    before = reader.get_weights()

    entropy = losses.SparseCategoricalCrossentropy()
    # `adapt` makes of ŷ, [rows, 10], what g takes.
    blended = losses.BlendedLoss(
        entropy, reader, weights=(RIGHT, CARELESS), adapt=keras.layers.Reshape([1, 10])
    )
    epochs = 5 if quick else 20
    plain_curve = train(entropy, images[:TRAINED_ON], given, held_out, epochs)
    blended_curve = train(blended, images[:TRAINED_ON], given, held_out, epochs)
    moved = largest_change(before, reader.get_weights())

    table = Table("predictions in the loss", f"accuracy on {len(held_out[1])} digits held out")
    table.add_row("ŷ", f"{plain_curve[-1]:.1%}")
    table.add_row(f"{RIGHT} · ŷ + {CARELESS} · g(ŷ)", f"{blended_curve[-1]:.1%}")
    console.print(table)
    console.print(f"{np.mean(given == labels[:TRAINED_ON]):.1%} of the labels are right.")
    console.print(f"The largest change of a weight of g: {moved:g}.")

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    read, curves = figure.subplots(1, 2, width_ratios=[4, 5])
    shares = read.imshow(reader(np.eye(10, dtype="float32")[:, None]), cmap="Blues", vmin=0, vmax=1)
    read.set_title("The frozen model: the careless reader", fontsize=10)
    read.set(xlabel="what the reader writes", ylabel="the digit")
    read.set(xticks=range(10), yticks=range(10))
    figure.colorbar(shares, ax=read, label="probability")
    epoch = np.arange(1, epochs + 1)
    curves.plot(epoch, blended_curve, color=BLUE, label=f"loss of {RIGHT} · ŷ + {CARELESS} · g(ŷ)")
    curves.plot(epoch, plain_curve, color=GREY, label="loss of ŷ")
    plain(curves, "Trained on labels of which 3 in 10 are wrong", "epoch", "accuracy, held out")
    curves.set_ylim(0, 1)
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.legend(frameon=False, loc="lower right")
    save(figure, folder / "blended.png", console)
    return {"plain": plain_curve, "blended": blended_curve, "moved": moved}


if __name__ == "__main__":
    _command.main(run, __doc__)
