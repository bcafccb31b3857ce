"""Features and class probabilities of the handwritten digits, from a small classifier trained on the spot.

The digits' counterpart of the Inception network: scikit-learn's multi-layer perceptron on its 1,797 images,
64 hidden units with tanh (no unit dies, so covariances keep full rank). Training takes half a second and is
deterministic.

N images, 64 pixels with grey levels 0 to 16, D features, C classes.
"""

import functools
import hashlib
import warnings

import numpy as np

PIXELS = 64
LEVELS = 17
FEATURES = 64


class DigitsClassifier:
    """Multi-layer perceptron on digits given as integer grey levels 0 to 16, [N, 64] or [N, 8, 8]."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier

        digits = load_digits()
        self.reference_codes = digits.data.astype(np.uint16)  # [1797, 64]
        self.reference_labels = digits.target.astype(np.int64)  # [1797]
        self._network = MLPClassifier(
            (FEATURES,), activation="tanh", learning_rate_init=2e-3, batch_size=64, alpha=1e-3, max_iter=40,
            random_state=0,
        )  # fmt: skip
        with warnings.catch_warnings():
            # a fixed number of passes is meant, not convergence
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._network.fit(_inputs(self.reference_codes), self.reference_labels)

    def features(self, images: np.ndarray) -> np.ndarray:
        """Activations of the last hidden layer, [N, 64] float64, between -1 and 1."""
        hidden = _inputs(images)
        for weight, bias in zip(self._network.coefs_[:-1], self._network.intercepts_[:-1], strict=True):
            hidden = np.tanh(hidden @ weight + bias)
        return hidden

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Probabilities of the ten digits, [N, 10] float64."""
        return self._network.predict_proba(_inputs(images))

    def sha256(self) -> str:
        """Of the trained weights, hexadecimal: another release of scikit-learn may train another network."""
        digest = hashlib.sha256()
        for array in (*self._network.coefs_, *self._network.intercepts_):
            digest.update(array.tobytes())
        return digest.hexdigest()


@functools.cache
def digits_classifier() -> DigitsClassifier:
    """The digits' classifier, trained at the first call of a process."""
    return DigitsClassifier()


def class_accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose most probable class, of probabilities [N, C], is their label [N]."""
    labels = np.asarray(labels)
    if len(probabilities) != len(labels) or len(labels) == 0:
        raise ValueError(f"{len(probabilities)} rows of probabilities for {len(labels)} labels: one row each")
    return float((np.asarray(probabilities).argmax(axis=1) == labels).mean())


def _inputs(images: np.ndarray) -> np.ndarray:
    """Grey levels [N, 64] or [N, 8, 8] as float64 [N, 64] between 0 and 1."""
    levels = np.asarray(images)
    levels = levels.reshape(len(levels), -1)
    if levels.shape[1] != PIXELS or not np.issubdtype(levels.dtype, np.integer):
        raise ValueError(f"digits of shape {np.shape(images)} and dtype {levels.dtype}: integers [N, 64] are needed")
    if len(levels) and (levels.min() < 0 or levels.max() >= LEVELS):
        raise ValueError(f"grey levels {levels.min()} to {levels.max()}: the digits have 0 to {LEVELS - 1}")
    return levels.astype(np.float64) / (LEVELS - 1)
