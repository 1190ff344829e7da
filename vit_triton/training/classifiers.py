"""Classifiers on fixed features, and statistics of their predictions.

The arguments are CPU tensors: features (n, F), labels (n,).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_triton.training.extras import extra

NEIGHBOURS, TEMPERATURE = 20, 0.07
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of C, the inverse regularization
FEW_STRENGTH = 1.0  # C where a class has too few images to choose it
FOLDS = 5
ITERATIONS = 500


def knn(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Predict by a weighted vote of the nearest neighbours (Wu et al. 2018, arXiv:1805.01978, section 3.4).

    The 20 training images with the largest cosine similarity s vote with the weight exp(s / 0.07).

    Returns:
        The predicted labels, (n,). Equal votes select the first class.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    votes_of = F.one_hot(labels, classes).float()
    predicted = []
    for part in test.split(1024):
        nearest = (part @ train.T).topk(min(NEIGHBOURS, len(train)))
        # relative to the nearest neighbour: the same vote, without overflow
        weights = ((nearest.values - nearest.values[:, :1]) / TEMPERATURE).exp()
        predicted.append((weights[..., None] * votes_of[nearest.indices]).sum(1).argmax(1))
    return torch.cat(predicted)


def linear(train: Tensor, labels: Tensor, test: Tensor, seed: int = 0) -> tuple[Tensor, float]:
    """Predict by logistic regression on features standardized by the mean and deviation of the training images.

    C is the value with the highest accuracy in cross-validation within the training images; of equal ones, the
    smallest. If a class has a single training image, C is 1.

    Returns:
        The predicted labels, (n,), and C.
    """
    mean, deviation = train.mean(0), train.std(0, correction=0)
    deviation = torch.where(deviation > 1e-6 * mean.abs(), deviation, torch.ones(()))  # constant, as a black border is
    train, test = (train - mean) / deviation, (test - mean) / deviation
    if train.shape[1] > len(train):
        # the penalty makes the weights combinations of the training images: projected on their span, all stays the same
        basis = torch.linalg.qr(train.T).Q
        train, test = train @ basis, test @ basis
    strength = FEW_STRENGTH
    if labels.bincount()[labels].min() > 1:
        fold = folds(labels, seed)
        right = torch.zeros(len(STRENGTHS))
        for i in range(int(fold.max()) + 1):
            inside, outside = fold != i, fold == i
            fitted = _path(train[inside], labels[inside], train[outside], STRENGTHS)
            right += torch.stack([(predicted == labels[outside]).sum() for predicted in fitted])
        strength = STRENGTHS[int(right.argmax())]
    return _path(train, labels, test, (strength,))[0], strength


def folds(labels: Tensor, seed: int) -> Tensor:
    """Return the fold of each image, (n,). The images of a class are spread over all folds, at most FOLDS."""
    number = min(FOLDS, int(labels.bincount()[labels].min()))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # by class, in random order within a class
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels)) % number
    return fold


def _path(train: Tensor, labels: Tensor, test: Tensor, strengths: tuple[float, ...]) -> list[Tensor]:
    """Predict with each of the rising ``strengths``; each fit starts from the previous one."""
    model = extra("sklearn.linear_model").LogisticRegression(max_iter=ITERATIONS, warm_start=True)
    predicted = []
    for model.C in strengths:
        with warnings.catch_warnings():  # weak regularization separates few images ever further
            warnings.simplefilter("ignore", extra("sklearn.exceptions").ConvergenceWarning)
            model.fit(train.numpy(), labels.numpy())
        predicted.append(torch.from_numpy(model.predict(test.numpy())))
    return predicted


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the mean, over the classes in ``labels``, of the fraction of a class that is predicted right."""
    images = labels.bincount()
    right = labels[predicted == labels].bincount(minlength=len(images))
    return float((right[images > 0] / images[images > 0]).mean())


def wilson_interval(right: int, images: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of an accuracy."""
    interval = extra("scipy.stats").binomtest(right, images).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
