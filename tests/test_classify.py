"""classify_asfe.py on planted data: what is there is found, and no person is split."""

import numpy as np
import pytest

from cli import UserError
from evaluation.classify import by_person, judge, nearest_accuracy, person_folds, scores

WHO = np.repeat([f"p{i:02}" for i in range(20)], 5)


def planted(seed: int, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """Features (100, 6) with a mark of each person and of the label, and the labels (100,)."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.permutation(20) % 2, 5)
    features = np.repeat(rng.normal(size=(20, 6)), 5, 0) + 0.05 * rng.normal(size=(100, 6))
    features[:, 0] += effect * labels
    return features, labels


def test_a_planted_label_is_found_by_people():
    features, labels = planted(0, 8)
    folds = person_folds(WHO, 5, np.random.default_rng(0))
    votes = by_person(scores(features, labels, WHO, folds), WHO)
    assert min(judge(votes, by_person(labels, WHO))) > 0.9


def test_random_labels_leak_by_slices_and_not_by_people():
    features, _ = planted(0, 0)
    rng = np.random.default_rng(1)
    labels = np.repeat(rng.integers(0, 2, (200, 20)), 5, 1)
    assert nearest_accuracy(features, labels, rng.permutation(100) % 5).mean() > 0.95
    assert abs(nearest_accuracy(features, labels, person_folds(WHO, 5, rng)).mean() - 0.5) < 0.05


def test_a_person_in_two_folds_is_an_error():
    features, labels = planted(0, 0)
    with pytest.raises(UserError, match="p00 is in two folds"):
        scores(features, labels, WHO, np.arange(100) % 5)
