"""scikit-learn's digits, and a network for them."""

import keras
import numpy as np
from sklearn.datasets import load_digits

BATCH = 32


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Scans `[1797, 8, 8, 1]` from 0 to 1 and their labels, in an order that says nothing."""
    scans = load_digits()
    order = np.random.default_rng(0).permutation(len(scans.target))
    return scans.images[order, ..., None].astype("float32") / 16, scans.target[order]


def convnet() -> keras.Model:
    """Two convolutions, "edges" and "features", a "summary", and the probabilities of a "digit"."""
    return keras.Sequential(
        [
            keras.Input([8, 8, 1]),
            keras.layers.Conv2D(32, 3, activation="relu", name="edges"),
            keras.layers.Conv2D(64, 3, activation="relu", name="features"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu", name="summary"),
            keras.layers.Dense(10, activation="softmax", name="digit"),
        ]
    )


def accuracy(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> float:
    predictions = model.predict(images, batch_size=len(images), verbose=0)
    return float(np.mean(predictions.argmax(-1) == labels))


def largest_change(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    return float(max(np.max(np.abs(a - b)) for a, b in zip(before, after, strict=True)))
