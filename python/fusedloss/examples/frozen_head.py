"""A head that reads the model's outputs and what a frozen model makes of them.

A second camera takes dim negatives, and only a hundred of its pictures have labels. The model
learns to develop them: its outputs ŷ are an image. A network g that reads clean digits, trained
before and kept in a file, looks at that image; a Dense head reads ŷ and g's features of it
together. Once the head tells which digit it is (softmax, cross-entropy), once it gives the number
as such (one output, squared error). The gradient flows through g to the model.

The trap: `Dense(10)(concatenate([...]))` inside a loss makes a new layer whenever the loss is
traced. It is never trained and never saved, and the loss is that of a random projection. The head
belongs into the model, where `fusedloss.models.with_frozen_features` puts it.
"""

from pathlib import Path

import keras
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fusedloss import losses, models
from fusedloss.examples import _command
from fusedloss.examples._digits import BATCH, convnet, digits, largest_change
from fusedloss.examples._picture import BLUE, GREY, image, plain, save

READ, LABELLED = 1000, 100  # digits: of g, then of the second camera; the others are held out
TASKS = {  # what the head gives: the layer of g that it reads, the head, loss and metric
    "digit": ("digit", (10, "softmax"), losses.SparseCategoricalCrossentropy, "accuracy"),
    "number": ("summary", (1, None), losses.MeanSquaredError, "mae"),
}


def save_reader(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Trains g on clean digits and saves it."""
    keras.utils.set_random_seed(0)
    reader = convnet()
    reader.compile("adam", losses.SparseCategoricalCrossentropy())
    reader.fit(images, labels, BATCH, epochs=10, verbose=0)
    reader.save(path)


def second_camera(images: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(1).standard_normal(images.shape)
    return (0.7 - 0.5 * images + 0.05 * noise).astype("float32")


def train(task: str, frozen, data, held_out, epochs: int):
    """The model, the same with its head and g, unless that is None, and the metric held out."""
    _, head, loss, metric = TASKS[task]
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input([8, 8, 1]), keras.layers.Conv2D(1, 1), keras.layers.Flatten()]
    )
    head = keras.layers.Dense(*head)
    if frozen is None:
        full = keras.Sequential([model, head])
    else:
        # `adapt` makes of ŷ, [rows, 64], what g takes.
        adapt = keras.layers.Reshape([8, 8, 1])
        full = models.with_frozen_features(model, frozen, head, adapt)
    full.compile(keras.optimizers.Adam(0.01), loss(), metrics=[metric])
    full.fit(*data, BATCH, epochs, verbose=0)
    return model, full, full.evaluate(*held_out, batch_size=len(held_out[0]), verbose=0)[1]


def run(quick: bool, folder: Path, console: Console) -> dict:
    """Trains four models, prints, draws. Returns their metrics and what has become of g."""
    images, labels = digits()
    save_reader(images[:READ], labels[:READ], folder / "frozen_head_reader.keras")
    seen, epochs = second_camera(images), 20 if quick else 150
    part, rest = slice(READ, READ + LABELLED), slice(READ + LABELLED, None)
    table = Table(
        "the head gives", "measured on digits held out", "reading ŷ", "ŷ and g's features"
    )
    metrics, moved, trained = {}, [], {}
    for task, (layer, *_, metric) in TASKS.items():
        data, held_out = ((seen[s], labels[s, None].astype("float32")) for s in (part, rest))
        frozen = models.load_frozen(folder / "frozen_head_reader.keras", layers=[layer])
        before = frozen.get_weights()
        _, _, without = train(task, None, data, held_out, epochs)
        *trained[task], found = train(task, frozen, data, held_out, epochs)
        moved.append(largest_change(before, frozen.get_weights()))
        metrics[task] = (without, found)
        table.add_row(task, metric, f"{without:.3f}", f"{found:.3f}")

    model, full = trained["digit"]
    full.save(folder / "frozen_head.keras")  # g is inside.
    loaded = keras.models.load_model(folder / "frozen_head.keras")
    shown = seen[rest][:5]
    predictions = full.predict(shown, verbose=0)
    is_same = bool(np.array_equal(predictions, loaded.predict(shown, verbose=0)))
    console.print(table)
    console.print(f"The largest change of a weight of g: {max(moved):g}.")
    console.print(f"Saved and loaded, the same predictions: {'yes' if is_same else 'NO'}.")

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[7, 5])
    grid = left.subplots(2, len(shown))
    developed = model.predict(shown, verbose=0).reshape(-1, 8, 8)
    for column, read in enumerate(predictions.argmax(-1)):
        image(grid[0, column], shown[column], cmap="gray", vmin=0, vmax=1)
        image(grid[1, column], developed[column], f"read as {read}", cmap="gray")
    grid[0, 0].set_ylabel("second camera")
    grid[1, 0].set_ylabel("ŷ, developed")
    titles = ("digit: accuracy", "number: mean error")
    for axes, title, values in zip(right.subplots(1, 2), titles, metrics.values(), strict=True):
        bars = axes.bar(["ŷ alone", "ŷ and g"], values, color=[GREY, BLUE])
        axes.bar_label(bars, fmt="%.2f")
        plain(axes, title, "what the head reads", "")
    save(figure, folder / "frozen_head.png", console)
    return {"metrics": metrics, "moved": max(moved), "same after loading": is_same}


if __name__ == "__main__":
    _command.main(run, __doc__)
