"""A linear model judged by folds of whole people, and p by shuffling the labels of people.

Legend: N images, F features, P people in the order of their names; features are (N, F), `who` and
`labels` are (N,), `votes` and `truth` are (P,). Labels are 0 or 1.
"""

from collections.abc import Iterable
from itertools import combinations
from warnings import catch_warnings, simplefilter

import numpy as np
from numpy import ndarray

from cli import UserError


def person_folds(who: ndarray, count: int, rng: np.random.Generator) -> ndarray:
    """(N,) fold of each image; the images of a person share theirs. UserError if too few people."""
    people, index = np.unique(who, return_inverse=True)
    if len(people) < count:
        raise UserError(f"{len(people)} people, expected at least folds ({count})")
    return (rng.permutation(len(people)) % count)[index]


def stratified_folds(truth: ndarray, who: ndarray, count: int, seed: int) -> ndarray:
    """(N,) fold of each image: whole people, and people of both labels in each fold.

    With as many folds as people, each person is a fold. Raises UserError if a label has fewer
    people than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold

    index = np.unique(who, return_inverse=True)[1]
    if count == len(truth):
        return index
    if (fewest := np.bincount(truth, minlength=2).min()) < count:
        raise UserError(f"a label has {fewest} people, expected at least --folds ({count})")
    folds = np.zeros(len(truth), int)
    split = StratifiedKFold(count, shuffle=True, random_state=seed).split(truth, truth)
    for fold, (_, held) in enumerate(split):
        folds[held] = fold
    return folds[index]


def check_folds(who: ndarray, folds: ndarray) -> None:
    """Raises UserError if the images of a person are in two folds."""
    for person in np.unique(who):
        if len(set(folds[who == person])) > 1:
            raise UserError(f"person {person} is in two folds, expected one")


def scores(features: ndarray, labels: ndarray, who: ndarray, folds: ndarray) -> ndarray:
    """(N,) decision values of a logistic regression that has not seen the image's person.

    Raises UserError if a person is in two folds or the other folds lack a label.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    check_folds(who, folds)
    found = np.zeros(len(labels))
    for fold in np.unique(folds):
        held = folds == fold
        if len(set(labels[~held])) < 2:
            raise UserError("without one fold a single label is left; name more people or folds")
        mean, deviation = features[~held].mean(0), features[~held].std(0)
        scaled = (features - mean) / np.where(deviation > 1e-12, deviation, 1)
        model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=500)
        with catch_warnings():
            simplefilter("ignore", ConvergenceWarning)
            model.fit(scaled[~held], labels[~held])
        found[held] = model.decision_function(scaled[held])
    return found


def by_person(values: ndarray, who: ndarray) -> ndarray:
    """(P,) mean value of each person."""
    index = np.unique(who, return_inverse=True)[1]
    return np.bincount(index, values) / np.bincount(index)


def vote(features: ndarray, truth: ndarray, who: ndarray, count: int, seed: int) -> ndarray:
    """(P,) votes, positive for label 1: the mean decision value of a person's images.

    The folds are made from the given labels. So true and shuffled labels are treated alike, which
    the permutation test needs.
    """
    index = np.unique(who, return_inverse=True)[1]
    folds = stratified_folds(truth, who, count, seed)
    return by_person(scores(features, truth[index], who, folds), who)


def judge(votes: ndarray, truth: ndarray) -> tuple[float, float]:
    """Balanced accuracy and AUC; one vote and one label for each person."""
    first, second = votes[truth == 0], votes[truth == 1]
    accuracy = ((first <= 0).mean() + (second > 0).mean()) / 2
    differences = second[:, None] - first[None]
    return float(accuracy), float(((differences > 0) + (differences == 0) / 2).mean())


def p_value(
    features: ndarray,
    truth: ndarray,
    who: ndarray,
    count: int,
    seed: int,
    others: Iterable[ndarray],
) -> float:
    """Part of the labelings, the true one among them, whose AUC is at least the true one's."""
    aucs = [judge(vote(features, t, who, count, seed), t)[1] for t in (truth, *others)]
    return float(np.mean(np.array(aucs) >= aucs[0] - 1e-9))


def shuffles(truth: ndarray, draws: int, rng: np.random.Generator) -> Iterable[ndarray]:
    """`draws` random labelings of the people, for `p_value`."""
    return (rng.permutation(truth) for _ in range(draws))


def all_others(truth: ndarray) -> Iterable[ndarray]:
    """Every other labeling with as many people of each label, for an exact `p_value`."""
    for chosen in combinations(range(len(truth)), int(truth.sum())):
        labeling = np.zeros_like(truth)
        labeling[list(chosen)] = 1
        if not np.array_equal(labeling, truth):
            yield labeling


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
