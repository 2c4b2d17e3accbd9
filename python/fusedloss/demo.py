"""`fusedloss demo`: the same Keras model trained twice, with Keras's loss and with ours.

The digits (real scans, 8×8 pixels) and the diabetes patients are scikit-learn's. Both models of a
task start from the same weights and see the same batches, so their loss curves must be one curve.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
from rich.markup import escape
from rich.table import Table
from sklearn.datasets import load_diabetes, load_digits

import fusedloss
from fusedloss import losses, metrics

BATCH, CLASSES = 64, 10
SUBSET = [3, 5, 8, 9]  # the digits that are mistaken for one another
SUBSET_WEIGHT, FULL_WEIGHT = 0.8, 0.2
DELTA, L2 = 1.0, 0.001  # of the regression, in standard deviations of its target
# Both losses round in the last place of float32, and every step of the optimizer carries it on.
TOLERANCE = 1e-5
# Heads as wide as a tokenizer's vocabulary and as a chess engine's moves, where the loss is a large
# part of the step.
WORDS, WORDS_BATCH = 32000, 256
MOVES, MOVES_BATCH, LEGAL = 1858, 1024, 0.02
WIDE_STEPS = 4
TIMED_ROUNDS = 8


@dataclass
class Comparison:
    """Keras's loss and ours for one task."""

    title: str
    unit: str
    """Of the loss."""
    stock: list[float]
    """Training loss of each epoch under Keras's loss."""
    fused: list[float]
    """The same under ours."""
    metric: str
    """Name of the metric."""
    held_out: list[str]
    """The metric of the two models on examples that neither was trained on."""
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


def masked_by_hand(targets, logits):
    """What `mask_negative_targets=` replaces: classes whose target is negative are not legal."""
    legal = targets >= 0
    return keras.losses.categorical_crossentropy(
        keras.ops.where(legal, targets, 0.0),
        keras.ops.where(legal, logits, -1e9),
        from_logits=True,
    )


def legal_accuracy(targets, logits):
    """Whether the greatest legal logit of each row is that of its class."""
    best = keras.ops.argmax(keras.ops.where(targets >= 0, logits, -np.inf), axis=-1)
    return keras.ops.equal(best, keras.ops.argmax(targets, axis=-1))


def compare(
    title: str,
    unit: str,
    data: tuple[np.ndarray, np.ndarray],
    models: tuple[keras.Model, keras.Model],
    losses: tuple[Callable, Callable],
    metric: Callable[[], keras.metrics.Metric],
    metric_format: str,
    epochs: int,
) -> Comparison:
    """Trains two equal models, epoch by epoch in turn.

    Args:
      data: inputs and targets, in an order that says nothing; the first fifth is held out.
      models, losses: of Keras, then ours.
      metric: what is measured on the examples held out.
    """
    inputs, targets = data
    held_out = len(inputs) // 5
    curves = ([], [])
    for model, loss in zip(models, losses, strict=True):
        model.compile("adam", loss, metrics=[metric()])
    for epoch in range(epochs):
        batches = held_out + np.random.default_rng(epoch).permutation(len(inputs) - held_out)
        for model, curve in zip(models, curves, strict=True):
            history = model.fit(
                inputs[batches], targets[batches], batch_size=BATCH, shuffle=False, verbose=0
            )
            curve += history.history["loss"]
    measured = [
        model.evaluate(inputs[:held_out], targets[:held_out], verbose=0)[1] for model in models
    ]
    timed_ms = step_ms(models, inputs, targets, BATCH)
    return Comparison(
        title, unit, *curves, metric().name, [metric_format.format(x) for x in measured], timed_ms
    )


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


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return digits.data[order].astype("float32") / 16, digits.target[order]


def _told_parity(labels: np.ndarray) -> np.ndarray:
    """Dense targets if it is known which digits are odd: -1 for the five that cannot be."""
    targets = keras.utils.to_categorical(labels, CLASSES)
    targets[(labels[:, None] + np.arange(CLASSES)) % 2 == 1] = -1
    return targets


def _classifier(activation: str | None) -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input([64]),
            keras.layers.Dense(64, "relu"),
            keras.layers.Dense(CLASSES, activation),
        ]
    )


def _diabetes() -> tuple[np.ndarray, np.ndarray]:
    """Ten measurements of each patient and the progression of the disease, both standardised."""
    patients = load_diabetes()
    order = np.random.default_rng(0).permutation(len(patients.target))
    measurements = patients.data[order] / patients.data.std(axis=0)
    progression = patients.target[order, None]
    progression = (progression - progression.mean()) / progression.std()
    return measurements.astype("float32"), progression.astype("float32")


def _regressor(regularizer: Callable[[], keras.regularizers.Regularizer | None]) -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input([10]),
            keras.layers.Dense(32, "relu", kernel_regularizer=regularizer()),
            keras.layers.Dense(1, kernel_regularizer=regularizer()),
        ]
    )


def comparisons(epochs: int) -> list[Comparison]:
    images, labels = _digits()
    full = compare(
        "digits: all classes, from logits",
        "nats",
        (images, labels),
        (_classifier(None), _classifier(None)),
        (
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            losses.SparseCategoricalCrossentropy(from_logits=True),
        ),
        lambda: keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        "{:.1%}",
        epochs,
    )
    mixture = compare(
        f"digits: {SUBSET_WEIGHT} · classes {SUBSET} + {FULL_WEIGHT} · all, from probabilities",
        "nats",
        (images, keras.utils.to_categorical(labels, CLASSES)),
        (_classifier("softmax"), _classifier("softmax")),
        (
            naive_mixture,
            losses.CategoricalCrossentropy(
                subset=SUBSET, subset_weight=SUBSET_WEIGHT, full_weight=FULL_WEIGHT
            ),
        ),
        lambda: metrics.SubsetAccuracy(SUBSET, name="subset accuracy"),
        "{:.1%}",
        epochs,
    )
    masked = compare(
        "digits: the five classes of a parity that is known, from logits",
        "nats",
        (images, _told_parity(labels)),
        (_classifier(None), _classifier(None)),
        (
            masked_by_hand,
            losses.CategoricalCrossentropy(from_logits=True, mask_negative_targets=True),
        ),
        lambda: keras.metrics.MeanMetricWrapper(legal_accuracy, name="accuracy among the five"),
        "{:.1%}",
        epochs,
    )
    regressor = _regressor(lambda: None)
    kernels = [layer.kernel for layer in regressor.layers]
    regression = compare(
        "diabetes: Huber + L2 of the kernels",
        "squared standard deviations",
        _diabetes(),
        (_regressor(lambda: keras.regularizers.L2(L2)), regressor),
        (
            keras.losses.Huber(DELTA),
            losses.Huber(DELTA, penalty=fusedloss.Penalty(kernels, l2=L2)),
        ),
        lambda: keras.metrics.MeanAbsoluteError(name="absolute error"),
        "{:.3f}",
        epochs,
    )
    return [full, mixture, masked, regression]


def wide_step_ms(classes: int, batch: int, targets: np.ndarray, losses: tuple) -> list[float]:
    """Milliseconds of a training step with a wide output layer: under Keras's loss, under ours."""
    images = np.random.default_rng(0).standard_normal((len(targets), 64), np.float32)
    models = []
    for loss in losses:
        model = keras.Sequential([keras.Input([64]), keras.layers.Dense(classes)])
        model.compile("sgd", loss)
        model.fit(images, targets, batch_size=batch, verbose=0)
        models.append(model)
    return step_ms(models, images, targets, batch)


def wide_steps() -> dict[str, list[float]]:
    """`wide_step_ms` of random rows, by what they are."""
    random = np.random.default_rng(0)
    words = random.integers(0, WORDS, WORDS_BATCH * WIDE_STEPS)
    moves = np.where(random.random((MOVES_BATCH * WIDE_STEPS, MOVES)) < LEGAL, 0, -1)
    moves[:, 0] = 1  # The one that was made.
    return {
        f"{WORDS} classes, batch {WORDS_BATCH}": wide_step_ms(
            WORDS,
            WORDS_BATCH,
            words,
            (
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                losses.SparseCategoricalCrossentropy(from_logits=True),
            ),
        ),
        f"{MOVES} moves of which {LEGAL:.0%} are legal, batch {MOVES_BATCH}": wide_step_ms(
            MOVES,
            MOVES_BATCH,
            moves.astype("float32"),
            (
                masked_by_hand,
                losses.CategoricalCrossentropy(from_logits=True, mask_negative_targets=True),
            ),
        ),
    }


def plot(compared: list[Comparison], path: str) -> None:
    """Both curves of each comparison, to an image file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(compared), 4), layout="constrained")
    for axes, comparison in zip(figure.subplots(1, len(compared)), compared, strict=True):
        epochs = np.arange(1, len(comparison.stock) + 1)
        # Ours is drawn over Keras's: wide below, dashed above, both are seen where they agree.
        axes.plot(epochs, comparison.stock, color="#e0912f", linewidth=5, label="Keras")
        axes.plot(epochs, comparison.fused, color="#1f6f8b", linestyle="--",
                  marker="o", markersize=4, label="fusedloss")  # fmt: skip
        axes.set_title(comparison.title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"training loss, {comparison.unit}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def run(epochs: int, path: str, console) -> int:
    """Trains, prints, plots. Returns 0, or 1 if the curves are not one curve."""
    console.print(
        "scikit-learn's digits and diabetes patients; two Dense layers, Adam; same weights, same "
        "batches."
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
            "held-out {}: Keras {}, fusedloss {}; "
            "step: Keras {:.2f} ms, fusedloss {:.2f} ms".format(
                comparison.metric, *comparison.held_out, *comparison.step_ms
            )
        )
    console.print(
        "\nOn so small a model a step is nearly all dispatch: the loss hardly shows. With a wide "
        "layer at its end (random inputs, whole training step with its matrix products):"
    )
    for name, (stock_ms, fused_ms) in wide_steps().items():
        console.print(
            f"{name}: Keras {stock_ms:.1f} ms, fusedloss {fused_ms:.1f} ms, "
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
