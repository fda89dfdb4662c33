"""The `evaluate.Metric` classes say what the functions say, without a network."""

import socket

import evaluate
import numpy as np
import pytest
import torch

import hf_mim
from hf_mim.evaluation.knn import knn_accuracy, rank_me
from hf_mim.evaluation.linear import linear_probe_accuracy
from hf_mim.evaluation.multi_label import mean_average_precision


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def data(number: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    return torch.nn.functional.one_hot(labels, 5) + 0.7 * torch.randn(number, 5, generator=generator), labels


@pytest.mark.parametrize("form", [lambda x: x, lambda x: x.numpy(), lambda x: x.tolist()])
def test_same_as_the_functions(form, tmp_path):
    (train, train_labels), (test, test_labels) = data(60, 0), data(30, 1)
    given = {"train_features": form(train), "train_labels": form(train_labels)}
    knn = hf_mim.KNNAccuracy(cache_dir=str(tmp_path))
    assert isinstance(knn, evaluate.Metric)
    for settings in ({}, {"k": 1}, {"k": 3, "temperature": 1.0}):
        found = knn.compute(predictions=form(test), references=form(test_labels), **given, **settings)
        assert found == {"knn_accuracy": knn_accuracy(train, train_labels, test, test_labels, **settings)}
    linear = hf_mim.LinearProbeAccuracy(cache_dir=str(tmp_path))
    for settings in ({}, {"weight_decay": 10.0}):
        found = linear.compute(predictions=form(test), references=form(test_labels), **given, **settings)
        assert found == {"linear_accuracy": linear_probe_accuracy(train, train_labels, test, test_labels, **settings)}
    found = hf_mim.RankMe(cache_dir=str(tmp_path)).compute(predictions=form(test))
    assert found == {"rank_me": pytest.approx(rank_me(test))}


def test_in_batches(tmp_path):
    (train, train_labels), (test, test_labels) = data(60, 0), data(30, 1)
    metric = hf_mim.KNNAccuracy(cache_dir=str(tmp_path))
    for part, answers in zip(test.split(7), test_labels.split(7), strict=True):
        metric.add_batch(predictions=part, references=answers)
    found = metric.compute(train_features=train, train_labels=train_labels)
    assert found["knn_accuracy"] == knn_accuracy(train, train_labels, test, test_labels)


def test_by_hand(tmp_path):
    corners = np.array([[1.0, 0.0], [0.0, 1.0]])
    metric = hf_mim.KNNAccuracy(cache_dir=str(tmp_path))
    settings = {"train_features": corners, "train_labels": [0, 1], "k": 1}
    assert metric.compute(predictions=3 * corners, references=[0, 1], **settings)["knn_accuracy"] == 100.0
    assert metric.compute(predictions=3 * corners, references=[0, 0], **settings)["knn_accuracy"] == 50.0
    assert hf_mim.RankMe(cache_dir=str(tmp_path)).compute(predictions=corners)["rank_me"] == pytest.approx(2, rel=1e-4)


def test_says_what_is_missing(tmp_path):
    with pytest.raises(TypeError, match="train_features"):
        hf_mim.KNNAccuracy(cache_dir=str(tmp_path)).compute(predictions=[[1.0]], references=[0])
    metric = hf_mim.LinearProbeAccuracy(cache_dir=str(tmp_path))
    assert "train_features" in metric.inputs_description and "BatchNorm" not in metric.description


def test_mean_average_precision_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.2], [0.1, 0.9]])
    targets = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 0]])
    # First label: right at places 1 and 3, precisions 1 and 2/3. Second: one right among the three best, two of which
    # have the same score.
    assert mean_average_precision(scores, targets) == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1 / 3) / 2)
    # A label that nobody has counts for nothing.
    wider = [torch.cat((values, values.new_zeros(4, 1)), dim=1) for values in (scores, targets)]
    assert mean_average_precision(*wider) == mean_average_precision(scores, targets)
    with pytest.raises(ValueError, match="No picture has any"):
        mean_average_precision(scores, torch.zeros(4, 2))


def test_multi_label_metrics_are_those_of_sklearn(tmp_path):
    from sklearn import metrics

    generator = np.random.default_rng(0)
    scores, targets = generator.random((50, 6)).round(1), (generator.random((50, 6)) < 0.3).astype(int)
    found = hf_mim.MeanAveragePrecision(cache_dir=str(tmp_path)).compute(predictions=scores, references=targets)
    expected = 100 * metrics.average_precision_score(targets, scores, average="macro")
    assert found == {"mean_average_precision": pytest.approx(expected)}
    found = hf_mim.MultiLabelF1(cache_dir=str(tmp_path)).compute(predictions=scores > 0.5, references=targets)
    assert found == {"f1": pytest.approx(100 * metrics.f1_score(targets, scores > 0.5, average="micro"))}
