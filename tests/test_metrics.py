"""The `evaluate.Metric` classes say what the functions say, without a network."""

import socket

import evaluate
import numpy as np
import pytest
import torch

import hf_mim
from hf_mim.evaluation.knn import knn_accuracy, rank_me
from hf_mim.evaluation.linear import linear_probe_accuracy


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
