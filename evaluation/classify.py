"""Frozen features and a linear model, judged by folds of whole people.

Features are a histogram, uniform local binary patterns (Ojala et al., IEEE TPAMI 2002) and
co-occurrence statistics (Haralick et al., IEEE Trans. SMC 1973).

Legend: N images, F features; `who` and `labels` are (N,), labels are 0 or 1.
"""

import numpy as np
from numpy import ndarray
from skimage.feature import graycomatrix, graycoprops, local_binary_pattern

from cli import UserError


def radiomics(luma: ndarray) -> ndarray:
    """(F,) features of a (H, W) uint8 luma; F is 36."""
    histogram = np.histogram(luma, 16, (0, 256))[0] / luma.size
    patterns = local_binary_pattern(luma, 8, 1, "uniform")
    lbp = np.histogram(patterns, 10, (0, 10))[0] / luma.size
    pairs = graycomatrix(luma // 16, [1], [0, np.pi / 2], 16, symmetric=True, normed=True)
    names = ("contrast", "homogeneity", "energy", "correlation", "dissimilarity")
    return np.concatenate([histogram, lbp, *(graycoprops(pairs, n).ravel() for n in names)])


def person_folds(who: ndarray, count: int, rng: np.random.Generator) -> ndarray:
    """(N,) fold of each image; the images of a person share theirs. UserError if too few people."""
    people, index = np.unique(who, return_inverse=True)
    if len(people) < count:
        raise UserError(f"{len(people)} people, expected at least folds ({count})")
    return (rng.permutation(len(people)) % count)[index]


def check_folds(who: ndarray, folds: ndarray) -> None:
    """Raises UserError if the images of a person are in two folds."""
    for person in np.unique(who):
        if len(set(folds[who == person])) > 1:
            raise UserError(f"person {person} is in two folds, expected one")


def scores(features: ndarray, labels: ndarray, who: ndarray, folds: ndarray) -> ndarray:
    """(N,) decision values of a logistic regression that has not seen the image's person.

    Raises UserError if a person is in two folds or the other folds lack a label.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_folds(who, folds)
    found = np.zeros(len(labels))
    for fold in np.unique(folds):
        held = folds == fold
        if len(set(labels[~held])) < 2:
            raise UserError("without one fold a single label is left; name more people or folds")
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=500)
        )
        found[held] = model.fit(features[~held], labels[~held]).decision_function(features[held])
    return found


def by_person(values: ndarray, who: ndarray) -> ndarray:
    """Mean value of each person, in the order of their names."""
    return np.array([values[who == person].mean() for person in np.unique(who)])


def judge(votes: ndarray, truth: ndarray) -> tuple[float, float]:
    """Balanced accuracy and AUC; one vote and one label (0 or 1) for each person."""
    first, second = votes[truth == 0], votes[truth == 1]
    accuracy = ((first <= 0).mean() + (second > 0).mean()) / 2
    differences = second[:, None] - first[None]
    return float(accuracy), float(((differences > 0) + (differences == 0) / 2).mean())


def interval(votes: ndarray, truth: ndarray, draws: int, rng: np.random.Generator) -> ndarray:
    """(2, 2) 95 % bootstrap intervals over people within each label: rows low and high."""
    groups = [np.flatnonzero(truth == label) for label in (0, 1)]
    samples = [np.concatenate([rng.choice(g, len(g)) for g in groups]) for _ in range(draws)]
    return np.percentile([judge(votes[s], truth[s]) for s in samples], (2.5, 97.5), axis=0)


def nearest_accuracy(features: ndarray, labels: ndarray, folds: ndarray) -> ndarray:
    """(draws,) accuracy of the nearest neighbour of other folds, for labels (draws, N)."""
    scaled = (features - features.mean(0)) / (features.std(0) + 1e-9)
    squares = (scaled**2).sum(1)
    distances = squares[:, None] + squares - 2 * scaled @ scaled.T
    distances[folds[:, None] == folds] = np.inf
    return (labels[:, distances.argmin(1)] == labels).mean(1)
