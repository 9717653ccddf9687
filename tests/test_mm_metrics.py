"""ClassificationMetric against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, top_k_accuracy_score

pytest.importorskip("mmengine")

from backbones.mm import ClassificationMetric


def evaluate(metric: ClassificationMetric, scores: np.ndarray, targets: np.ndarray, batch: int) -> dict[str, float]:
    samples = [{"scores": torch.from_numpy(s), "target": torch.tensor(t)} for s, t in zip(scores, targets, strict=True)]
    for start in range(0, len(samples), batch):
        metric.process(None, samples[start : start + batch])
    return metric.evaluate(len(samples))


@pytest.mark.parametrize("images, classes, batch", [(1, 5, 1), (101, 7, 8), (64, 10, 64)])
def test_agrees_with_sklearn(images: int, classes: int, batch: int) -> None:
    rng = np.random.default_rng(0)
    scores, targets = rng.random((images, classes)), rng.integers(0, classes, images)
    metric = ClassificationMetric(topk=(1, 3, 5))
    result = evaluate(metric, scores, targets, batch)
    labels = np.arange(classes)
    assert result["accuracy/top1"] == pytest.approx(100 * accuracy_score(targets, scores.argmax(1)))
    for k in (3, 5):
        if k < classes:  # scikit-learn warns where every class is within the first k
            expected = 100 * top_k_accuracy_score(targets, scores, k=k, labels=labels)
            assert result[f"accuracy/top{k}"] == pytest.approx(expected)
    expected = confusion_matrix(targets, scores.argmax(1), labels=labels)
    np.testing.assert_array_equal(metric.confusion_matrix, expected)


def test_a_second_evaluation_starts_afresh() -> None:
    scores = np.eye(5)
    metric = ClassificationMetric(topk=(1,))
    assert evaluate(metric, scores, np.arange(5), 5) == {"accuracy/top1": 100}
    assert evaluate(metric, scores, (np.arange(5) + 1) % 5, 5) == {"accuracy/top1": 0}
    assert metric.confusion_matrix.trace() == 0


def test_impossible_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"topk is \(5,\), but there are 4 classes"):
        evaluate(ClassificationMetric(topk=(5,)), np.eye(4), np.arange(4), 4)
    metric = ClassificationMetric()
    metric.dataset_meta = {"classes": "abcdef"}
    with pytest.raises(ValueError, match="the model has 5 classes, the data set 6"):
        evaluate(metric, np.eye(5), np.arange(5), 5)
    scores = np.eye(5)
    scores[2, 2] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        evaluate(ClassificationMetric(), scores, np.arange(5), 5)


def test_a_k_above_the_number_of_classes_is_left_out() -> None:
    assert evaluate(ClassificationMetric(topk=(1, 3, 5)), np.eye(3), np.arange(3), 3) == {
        "accuracy/top1": 100,
        "accuracy/top3": 100,
    }
