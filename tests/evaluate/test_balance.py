"""Balanced accuracy and collapsed classifiers: scikit-learn's numbers, and cases known by hand."""

import pytest
import torch
from sklearn.dummy import DummyClassifier
from sklearn.metrics import balanced_accuracy_score

from sslvit.evaluate.balance import balanced_accuracy, collapsed, commonest, most_predicted, unbalanced


def drawn(seed: int, images: int, chances: list[float]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.tensor(chances), images, replacement=True, generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_balanced_accuracy_is_scikit_learns_on_unequal_classes(seed):
    labels, noise = (drawn(seed + offset, 300, [0.7, 0.2, 0.09, 0.01]) for offset in (0, 100))
    predicted = torch.where(drawn(seed + 200, 300, [0.5, 0.5]).bool(), labels, noise)
    expected = balanced_accuracy_score(labels.numpy(), predicted.numpy())
    assert balanced_accuracy(predicted, labels) == pytest.approx(expected, abs=1e-12)


def test_classes_without_test_images_do_not_count_towards_balanced_accuracy():
    labels, predicted = torch.tensor([0, 0, 0, 5]), torch.tensor([0, 0, 3, 5])
    assert balanced_accuracy(predicted, labels) == pytest.approx((2 / 3 + 1) / 2)


def test_the_most_predicted_class_and_its_share():
    assert most_predicted(torch.tensor([4, 1, 4, 4, 0])) == (4, 0.6)


def test_always_answering_the_training_sets_commonest_class_is_scikit_learns_dummy():
    train, test = drawn(1, 200, [0.2, 0.5, 0.3]), drawn(2, 100, [0.1, 0.3, 0.6])
    dummy = DummyClassifier(strategy="most_frequent").fit(train[:, None].numpy(), train.numpy())
    assert commonest(train, test) == pytest.approx(dummy.score(test[:, None].numpy(), test.numpy()))


def test_a_classifier_that_answers_one_class_is_named_with_both_shares():
    labels = torch.arange(10).repeat(20)
    predicted = torch.full((200,), 7)
    predicted[:4] = torch.arange(4)
    sentence = collapsed(predicted, labels)
    assert sentence == "98.0% of 200 images are predicted as class 7; 10.0% belong to it"


def test_a_class_that_most_images_belong_to_may_be_the_usual_answer():
    labels = torch.tensor([0] * 97 + [1] * 3)
    assert collapsed(torch.zeros(100, dtype=torch.int64), labels) is None


def test_95_percent_of_one_answer_is_not_yet_a_collapse():
    labels = torch.arange(100) % 10
    predicted = torch.zeros(100, dtype=torch.int64)
    predicted[:5] = 1
    assert collapsed(predicted, labels) is None
    predicted[0] = 0
    assert collapsed(predicted, labels)


@pytest.mark.parametrize(("counts", "expected"), [([10, 15], False), ([10, 16], True), ([10, 0, 10], False)])
def test_classes_are_unbalanced_from_one_and_a_half_times_the_smallest(counts, expected):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert unbalanced(labels) is expected


def test_scores_in_the_place_of_class_numbers_are_refused():
    with pytest.raises(ValueError, match="one class number per image"):
        balanced_accuracy(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
