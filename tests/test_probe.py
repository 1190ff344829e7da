"""vit-triton probe: classifiers and statistics against scikit-learn and SciPy, the cache, and real data sets."""

import math

import numpy as np
import pytest
import torch

for name in ("matplotlib", "rich", "sklearn", "timm", "torchvision"):
    pytest.importorskip(name)
import scipy.stats  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import balanced_accuracy_score  # noqa: E402
from sklearn.model_selection import PredefinedSplit, cross_val_score  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

from vit_triton.training import classifiers  # noqa: E402

# --- classifiers and statistics ----------------------------------------------------------------------------


def clusters(images: int, classes: int, dim: int, seed: int = 0, spread: float = 1.5):
    """Features around one center per class, and labels of unequal frequency."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    labels = (torch.rand(images, generator=generator) ** 1.5 * classes).long()
    return centers[labels] + spread * torch.randn(images, dim, generator=generator), labels


@pytest.mark.parametrize("images", [7, 57, 301])
def test_knn_is_that_of_scikit_learn(images):
    train, labels = clusters(images, 5, 13)
    test, _ = clusters(1100, 5, 13, seed=1)
    theirs = KNeighborsClassifier(min(20, images), metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    theirs.fit(train.double().numpy(), labels.numpy())
    expected = theirs.predict(test.double().numpy())
    assert (classifiers.knn(train, labels, test, 5).numpy() == expected).all()


def test_knn_does_not_overflow_and_ignores_lengths():
    train, labels = clusters(40, 3, 8)
    test, _ = clusters(50, 3, 8, seed=1)
    expected = classifiers.knn(train, labels, test, 3)
    scaled = classifiers.knn(train * torch.logspace(-3, 3, 40)[:, None], labels, test * 1e4, 3)
    assert torch.equal(scaled, expected)


def test_linear_is_logistic_regression_on_standardized_features():
    train, labels = clusters(203, 4, 11)
    test, _ = clusters(90, 4, 11, seed=1)
    train, test = (x * torch.logspace(-2, 2, 11) + 5 for x in (train, test))
    predicted, strength = classifiers.linear(train, labels, test)
    scaler = StandardScaler().fit(train.double())
    scaled, labels_array = scaler.transform(train.double()), labels.numpy()
    folds = PredefinedSplit(classifiers.folds(labels, 0).numpy())
    assert folds.get_n_splits() == 5
    right = [
        # the number of right predictions, not the mean of the accuracies: the folds differ in size
        sum(cross_val_score(LogisticRegression(C=c, max_iter=5000), scaled, labels_array, cv=folds,
                            scoring=lambda model, x, y: (model.predict(x) == y).sum()))
        for c in classifiers.STRENGTHS
    ]  # fmt: skip
    assert strength == classifiers.STRENGTHS[int(np.argmax(right))] and len(set(right)) > 2
    model = LogisticRegression(C=strength, max_iter=5000).fit(scaled, labels_array)
    expected = model.predict(scaler.transform(test.double()))
    differ = (predicted.numpy() != expected).sum()
    assert differ <= 1, "more than rounding"


def test_test_images_influence_no_other_prediction():
    train, labels = clusters(60, 3, 6)
    test, _ = clusters(40, 3, 6, seed=1)
    moved = torch.cat((test[:20], test[20:] * 100 + 7))
    for predict in (lambda x: classifiers.knn(train, labels, x, 3), lambda x: classifiers.linear(train, labels, x)[0]):
        assert torch.equal(predict(test)[:20], predict(moved)[:20])


def test_every_fold_has_images_of_every_class():
    labels = torch.tensor([0] * 6 + [1] * 23 + [2] * 9)[torch.randperm(38, generator=torch.Generator().manual_seed(1))]
    fold = classifiers.folds(labels, 3)
    counts = torch.tensor([[((fold == i) & (labels == c)).sum() for c in range(3)] for i in range(5)])
    assert fold.max() == 4 and counts.min() >= 1 and (counts.amax(0) - counts.amin(0) <= 1).all()
    assert not torch.equal(fold, classifiers.folds(labels, 4))
    assert classifiers.folds(torch.tensor([0, 1, 1, 0, 1]), 0).max() == 1  # two images of a class: two folds


def test_a_class_with_one_image_and_constant_features():
    train, labels = clusters(30, 3, 6)
    labels[labels == 2], labels[0] = 1, 2
    train[0] += 9
    train[:, 2] = 0.1
    predicted, strength = classifiers.linear(train, labels, train)
    assert strength == 1 and predicted[0] == 2 and (predicted == labels).float().mean() > 0.8


def test_balanced_accuracy_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels = (4 * torch.rand(50, generator=generator) ** 2).long()
    labels[labels == 1] = 2  # a class without test images
    other = torch.randint(4, (50,), generator=generator)
    predicted = torch.where(torch.rand(50, generator=generator) < 0.6, labels, other)
    predicted[predicted == 1] = 0  # scikit-learn warns about it
    expected = balanced_accuracy_score(labels, predicted)
    assert math.isclose(classifiers.balanced_accuracy(predicted, labels), expected, rel_tol=1e-6)
    assert not math.isclose(expected, float((predicted == labels).double().mean()), abs_tol=1e-3)


@pytest.mark.parametrize(("right", "images"), [(0, 5), (5, 5), (349, 359), (1, 999)])
def test_wilson_interval(right, images):
    p, z = right / images, scipy.stats.norm.ppf(0.975)
    middle = (p + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z * math.sqrt(p * (1 - p) / images + z**2 / (4 * images**2)) / (1 + z**2 / images)
    np.testing.assert_allclose(classifiers.wilson_interval(right, images), (middle - half, middle + half), atol=1e-12)
