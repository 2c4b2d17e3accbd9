"""`fusedloss demo`: the same Keras model trained twice, with Keras's loss and with ours.

The digits are scikit-learn's (real scans, 8×8 pixels). Both models start from the same weights and
see the same batches, so their loss curves must be one curve.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
from rich.markup import escape
from rich.table import Table
from sklearn.datasets import load_digits

from fusedloss import losses, metrics

BATCH, CLASSES = 64, 10
SUBSET = [3, 5, 8, 9]  # the digits that are mistaken for one another
SUBSET_WEIGHT, FULL_WEIGHT = 0.8, 0.2
# Both losses round in the last place of float32, and every step of the optimizer carries it on.
TOLERANCE = 1e-5
# A head as wide as a tokenizer's vocabulary, where the loss is a large part of the step.
WIDE_CLASSES, WIDE_BATCH, WIDE_STEPS = 32000, 256, 4
TIMED_ROUNDS = 8


@dataclass
class Comparison:
    """Keras's loss and ours for one task."""

    title: str
    stock: list[float]
    """Training loss of each epoch under Keras's loss."""
    fused: list[float]
    """The same under ours."""
    metric: str
    """Name of the metric."""
    accuracy: list[float]
    """The metric of the two models on images that neither was trained on."""
    step_ms: list[float]
    """Milliseconds of a training step of the two."""

    @property
    def difference(self) -> float:
        """Largest relative difference of the two curves."""
        stock, fused = np.array(self.stock), np.array(self.fused)
        return float(np.max(np.abs(stock - fused) / np.abs(stock)))


def naive_mixture(targets, predictions):
    """What `subset=`, `subset_weight=` and `full_weight=` replace, in plain operations."""
    part = keras.losses.categorical_crossentropy(
        keras.ops.take(targets, SUBSET, axis=-1), keras.ops.take(predictions, SUBSET, axis=-1)
    )
    full = keras.losses.categorical_crossentropy(targets, predictions)
    return SUBSET_WEIGHT * part + FULL_WEIGHT * full


def _model(activation: str | None) -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input([64]),
            keras.layers.Dense(64, "relu"),
            keras.layers.Dense(CLASSES, activation),
        ]
    )


def compare(
    title: str,
    activation: str | None,
    stock: Callable,
    fused: Callable,
    metric: Callable[[], keras.metrics.Metric],
    encode: Callable,
    epochs: int,
) -> Comparison:
    """Trains the same model twice, epoch by epoch in turn.

    Args:
      activation: of the last layer.
      metric: what is measured on the images held out.
      encode: integer labels -> targets of the two losses.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, targets = digits.data[order].astype("float32") / 16, encode(digits.target[order])
    held_out = len(images) // 5
    models, curves = [], ([], [])
    for loss in (stock, fused):
        model = _model(activation)
        model.compile("adam", loss, metrics=[metric()])
        models.append(model)
    for epoch in range(epochs):
        batches = held_out + np.random.default_rng(epoch).permutation(len(images) - held_out)
        for model, curve in zip(models, curves, strict=True):
            history = model.fit(
                images[batches], targets[batches], batch_size=BATCH, shuffle=False, verbose=0
            )
            curve += history.history["loss"]
    accuracy = [
        model.evaluate(images[:held_out], targets[:held_out], verbose=0)[1] for model in models
    ]
    timed_ms = step_ms(models, images, targets, BATCH)
    return Comparison(title, *curves, metric().name, accuracy, timed_ms)


def step_ms(models: list[keras.Model], images, targets, batch: int) -> list[float]:
    """Median milliseconds of a training step of each model, measured in turn. Trains them on."""
    samples = np.empty((TIMED_ROUNDS, len(models)))
    for number, sample in enumerate(samples):
        # Every other round backwards: going first after a change of model is no advantage.
        for index in range(len(models))[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            models[index].fit(images, targets, batch_size=batch, epochs=2, verbose=0)
            sample[index] = (time.perf_counter() - start) * 1e3
    return list(np.median(samples, axis=0) / (2 * np.ceil(len(images) / batch)))


def comparisons(epochs: int) -> list[Comparison]:
    full = compare(
        "all classes, from logits",
        None,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        losses.SparseCategoricalCrossentropy(from_logits=True),
        lambda: keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        lambda labels: labels,
        epochs,
    )
    mixture = compare(
        f"{SUBSET_WEIGHT} · classes {SUBSET} + {FULL_WEIGHT} · all, from probabilities",
        "softmax",
        naive_mixture,
        losses.CategoricalCrossentropy(
            subset=SUBSET, subset_weight=SUBSET_WEIGHT, full_weight=FULL_WEIGHT
        ),
        lambda: metrics.SubsetAccuracy(SUBSET, name="subset accuracy"),
        lambda labels: keras.utils.to_categorical(labels, CLASSES),
        epochs,
    )
    return [full, mixture]


def wide_step_ms() -> list[float]:
    """Milliseconds of a training step with a wide output layer: under Keras's loss, under ours."""
    random = np.random.default_rng(0)
    images = random.standard_normal((WIDE_BATCH * WIDE_STEPS, 64), np.float32)
    labels = random.integers(0, WIDE_CLASSES, len(images))
    models = []
    for module in (keras.losses, losses):
        model = keras.Sequential([keras.Input([64]), keras.layers.Dense(WIDE_CLASSES)])
        model.compile("sgd", module.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(images, labels, batch_size=WIDE_BATCH, verbose=0)
        models.append(model)
    return step_ms(models, images, labels, WIDE_BATCH)


def plot(compared: list[Comparison], path: str) -> None:
    """Both curves of each comparison, to an image file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, comparison in zip(figure.subplots(1, len(compared)), compared, strict=True):
        epochs = np.arange(1, len(comparison.stock) + 1)
        # Ours is drawn over Keras's: wide below, dashed above, both are seen where they agree.
        axes.plot(epochs, comparison.stock, color="#e0912f", linewidth=5, label="Keras")
        axes.plot(epochs, comparison.fused, color="#1f6f8b", linestyle="--",
                  marker="o", markersize=4, label="fusedloss")  # fmt: skip
        axes.set_title(comparison.title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.set_ylabel("training loss, nats")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def run(epochs: int, path: str, console) -> int:
    """Trains, prints, plots. Returns 0, or 1 if the curves are not one curve."""
    console.print(
        "scikit-learn's digits; Dense(64) and Dense(10), Adam; same weights, same batches."
    )
    compared = comparisons(epochs)
    for comparison in compared:
        console.print(f"\n{comparison.title}")
        table = Table()
        for heading in ("epoch", "Keras", "fusedloss", "absolute difference"):
            table.add_column(heading, justify="right")
        curves = zip(comparison.stock, comparison.fused, strict=True)
        for epoch, (stock, fused) in enumerate(curves, 1):
            table.add_row(str(epoch), f"{stock:.6f}", f"{fused:.6f}", f"{abs(stock - fused):.0e}")
        console.print(table)
        console.print(
            "held-out {}: Keras {:.1%}, fusedloss {:.1%}; "
            "step: Keras {:.2f} ms, fusedloss {:.2f} ms".format(
                comparison.metric, *comparison.accuracy, *comparison.step_ms
            )
        )
    stock_ms, fused_ms = wide_step_ms()
    console.print(
        "\nOn the digits a step is nearly all Python and dispatch: the loss hardly shows. With "
        f"{WIDE_CLASSES} classes (random inputs, batch {WIDE_BATCH}, whole training step with its "
        f"matrix products): Keras {stock_ms:.1f} ms, fusedloss {fused_ms:.1f} ms, "
        f"{stock_ms / fused_ms:.1f} times as fast."
    )
    plot(compared, path)
    console.print(f"Curves: {escape(path)}")
    worst = max(comparison.difference for comparison in compared)
    agree = worst <= TOLERANCE
    console.print(
        f"Largest relative difference of the curves: {worst:.0e}, "
        f"{'within' if agree else 'NOT within'} {TOLERANCE:.0e}."
    )
    return 0 if agree else 1
