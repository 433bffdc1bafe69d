"""Handwritten digits: small real classification tasks on which retraining costs under a second, or nothing.

The 1,797 images of 8 x 8 pixels come with scikit-learn (`sklearn.datasets.load_digits`: the test half of the UCI set
*Optical Recognition of Handwritten Digits*), so nothing is downloaded. They are split once, by a fixed shuffle, into
training documents ``{"x": pixels / 16 [64], "y": class}``, query images, and other query images that settings are
tuned on.

`digits_subject` is a multilayer perceptron that a recipe trains again on any subset. `Softmax` is the convex twin: its
minimum is found to rounding, and gradients and Hessian have a closed form, so that influence can be judged without any
noise of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from torch import nn

from rootward.core.errors import InputError, NumericalError
from rootward.subject.behaviour import Behaviour
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject
from rootward.subject.supervised import Classification

Floats = NDArray[np.float64]
PIXELS, CLASSES, WIDTH = 64, 10, 256
TRAIN, QUERIES, TUNING = 1400, 100, 100
SPLIT_SEED, START_SEED = 0, 0
# The rate falls to 0 and the decay is felt, so that trainings on the same images end at nearly the same weights
# whatever their order: two seeds rank half-subsets alike (Spearman 0.98), where a constant rate leaves 0.5.
RECIPE = Recipe.parse(
    {
        "optimiser": "sgd",
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-3,
        "schedule": "cosine",
        "epochs": 30,
        "batch_size": 64,
        "reduction": "document",
        "checkpoints": (0.05, 0.15, 0.3, 0.6, 1.0),
    }
)


@dataclass(frozen=True)
class Images:
    """``x [n, 64]`` with values from 0 to 1, ``y [n]`` from 0 to 9."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)

    @property
    def documents(self) -> list[dict[str, object]]:
        """As `load_documents` takes them."""
        return [{"x": torch.from_numpy(x), "y": int(y)} for x, y in zip(self.x, self.y, strict=True)]


@dataclass(frozen=True)
class Digits:
    """Training images, query images and those for tuning: no image is in two of them."""

    train: Images
    queries: Images
    tuning: Images


@cache
def _all() -> Images:
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(found.target))
    return Images((found.data[order] / 16).astype(np.float32), found.target[order].astype(np.int64))


def digits(train: int = TRAIN, queries: int = QUERIES, tuning: int = TUNING) -> Digits:
    """The split. Queries come first in the shuffle, so they are the same for any number of training images.

    Raises `InputError` for numbers below 1, or more than the 1,797 images there are.
    """
    images, ends = _all(), np.cumsum([queries, tuning, train])
    if min(train, queries, tuning) < 1 or ends[-1] > len(images):
        raise InputError(
            f"digits: expected at least 1 image in each part and {len(images)} in all, got train = {train}, "
            f"queries = {queries}, tuning = {tuning}"
        )
    asked, tuned, rest = (
        Images(images.x[start:end], images.y[start:end]) for start, end in zip([0, *ends], ends, strict=False)
    )
    return Digits(rest, asked, tuned)


def start() -> nn.Module:
    """The untrained perceptron 64-256-256-10 with ReLU, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(START_SEED)
        return nn.Sequential(
            nn.Linear(PIXELS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)
        )


def start_smooth() -> nn.Module:
    """The same with SiLU in place of ReLU: its training is a smooth function of the documents' weights."""
    model = start()
    assert isinstance(model, nn.Sequential)
    return nn.Sequential(*(nn.SiLU() if isinstance(part, nn.ReLU) else part for part in model))


def digits_subject(data: Digits | None = None, recipe: Recipe = RECIPE, *, smooth: bool = False) -> Subject:
    """The perceptron trained by the recipe, with all its parameters (biases too) to be attributed.

    ``smooth``: with SiLU, for what differentiates the training itself.
    """
    found = digits() if data is None else data
    return Subject.trained(
        start_smooth if smooth else start,
        found.train.documents,
        Classification(),
        recipe,
        name="digits",
        parameters=r"weight|bias",
    )


def loss_of(images: Images, name: str = "loss of the right class") -> Behaviour:
    """The loss of the right class, a query for each image."""
    return Behaviour.loss(name, images.documents)


def accuracy(model: nn.Module, images: Images) -> float:
    """Share of images whose most probable class is the right one."""
    with torch.no_grad():
        predicted = model(torch.from_numpy(images.x)).argmax(1).numpy()
    return float((predicted == images.y).mean())


@dataclass(frozen=True)
class Softmax:
    """Softmax regression with L2 in float64: ``min_W  1/N sum_n w_n L_n(W) + l2/2 |W|^2``, ``W [10, 64]``.

    ``N`` is the number of images whatever the weights are, so the minimum is a smooth function of the weights ``w`` and
    ``d W / d w_n = - (H + l2 I)^-1 grad L_n / N`` is exact, with ``H`` the Hessian of the mean loss. A weight of 0 is
    the same as leaving the image out.
    """

    images: Images
    l2: float = 1e-3

    def fit(self, weights: Floats | None = None, begin: Floats | None = None) -> Floats:
        """The minimiser ``W [10, 64]``, with a gradient below 1e-10.

        Args:
            weights: ``w [n]``; 1 for all by default.
            begin: where to begin; from a nearby minimum it takes a few steps.

        Raises:
            InputError: weights that are not ``[n]`` and at least 0. NumericalError: the minimum was not reached.
        """
        count = len(self.images)
        w = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
        if w.shape != (count,) or not (w >= 0).all():
            raise InputError(f"softmax: expected {count} weights of at least 0, got shape {w.shape}")
        x, hot = self.images.x.astype(np.float64), np.eye(CLASSES)[self.images.y]

        def objective(flat: Floats) -> tuple[float, Floats]:
            matrix = flat.reshape(CLASSES, PIXELS)
            logits = x @ matrix.T
            losses = -(log_softmax(logits, axis=1) * hot).sum(1)
            slope = ((softmax(logits, axis=1) - hot) * w[:, None]).T @ x / count + self.l2 * matrix
            return float(w @ losses) / count + 0.5 * self.l2 * float(flat @ flat), slope.ravel()

        flat = np.zeros(CLASSES * PIXELS) if begin is None else np.asarray(begin, dtype=np.float64).ravel()
        options = {"maxiter": 5000, "maxcor": 30, "gtol": 1e-7, "ftol": 0.0}
        flat = minimize(objective, flat, jac=True, method="L-BFGS-B", options=options).x
        for _ in range(5):  # L-BFGS stops where the objective no longer shows a difference; Newton goes on
            slope = objective(flat)[1]
            if np.abs(slope).max() < 1e-12:
                break
            flat = flat - np.linalg.solve(self.hessian(flat, w) + self.l2 * np.eye(flat.size), slope)
        left = float(np.abs(objective(flat)[1]).max())
        if not left < 1e-10:
            raise NumericalError(f"softmax: expected a gradient below 1e-10 at the minimum, got {left:.2g}; raise l2")
        return flat.reshape(CLASSES, PIXELS)

    def gradients(self, matrix: Floats, images: Images | None = None) -> Floats:
        """``grad L_n(W)``, ``[n, 10 * 64]``, of the training images or others."""
        which = self.images if images is None else images
        x = which.x.astype(np.float64)
        error = softmax(x @ matrix.reshape(CLASSES, PIXELS).T, axis=1) - np.eye(CLASSES)[which.y]
        return (error[:, :, None] * x[:, None, :]).reshape(len(which), -1)

    def losses(self, matrix: Floats, images: Images) -> Floats:
        """``L_n(W)``, ``[n]``."""
        found = log_softmax(images.x.astype(np.float64) @ matrix.T, axis=1)
        return -found[np.arange(len(images)), images.y]

    def hessian(self, matrix: Floats, weights: Floats | None = None) -> Floats:
        """Of the weighted mean loss without L2, ``[640, 640]``: ``1/N sum_n w_n (diag(p) - p p^T) (x) x x^T``."""
        x = self.images.x.astype(np.float64)
        p = softmax(x @ matrix.reshape(CLASSES, PIXELS).T, axis=1)
        w = np.ones(len(x)) if weights is None else weights
        blocks = np.zeros((CLASSES, PIXELS, CLASSES, PIXELS))
        for a in range(CLASSES):
            for b in range(CLASSES):
                factor = w * p[:, a] * ((a == b) - p[:, b])
                blocks[a, :, b] = (x * factor[:, None]).T @ x / len(x)
        return blocks.reshape(CLASSES * PIXELS, CLASSES * PIXELS)
