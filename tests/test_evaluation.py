"""k-NN, linear probe, RankMe, feature extraction, pictures and the model card, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_mim.evaluation.knn import knn_accuracy, knn_predict, nearest_neighbours, rank_me
from hf_mim.evaluation.linear import linear_probe_accuracy
from hf_mim.evaluation.pictures import draw_loss_curves, draw_reconstructions, unnormalise
from hf_mim.evaluation.report import describe_results, evaluate_features, results_table
from hf_mim.hub.cards import write_card
from tiny import tiny_config


def test_knn_weighs_votes_by_similarity():
    # One neighbour of class 0 at cosine 1, two of class 1 at cosine 0.8: exp(1 / t) against 2 exp(0.8 / t).
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 1])
    query = torch.tensor([[5.0, 0.0]])
    # The two outweigh the one above t = 0.2 / ln 2 = 0.2885.
    assert knn_predict(train, labels, query, k=3, temperature=0.28).tolist() == [0]
    assert knn_predict(train, labels, query, k=3, temperature=0.30).tolist() == [1]
    assert knn_predict(train, labels, query, k=1, temperature=10.0).tolist() == [0]


def test_knn_in_chunks_and_with_fewer_neighbours_than_k():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(30, 8, generator=generator), torch.randn(17, 8, generator=generator)
    labels = torch.arange(30) % 4
    whole = knn_predict(train, labels, test)
    assert torch.equal(whole, knn_predict(train, labels, test, chunk_size=5))
    assert knn_predict(train, labels, test, k=1000).shape == (17,)
    assert knn_accuracy(train, labels, train, labels, k=1) == 100.0
    assert knn_accuracy(train, labels, test, whole) == 100.0
    assert knn_accuracy(train, labels, test, (whole + 1) % 4) == 0.0


def test_knn_without_labels_says_so():
    with pytest.raises(ValueError, match="got 3 and 2"):
        knn_predict(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), torch.zeros(1, 2))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10**6))
def test_rank_me_of_equal_singular_values_is_their_number(rank, seed):
    basis = torch.linalg.qr(torch.randn(20, 8, generator=torch.Generator().manual_seed(seed))).Q
    features = 3.0 * basis[:, :rank] @ torch.eye(rank, 8)
    assert rank_me(features) == pytest.approx(rank, rel=1e-3)


def test_rank_me_by_its_formula():
    p = [3 / 4 + 1e-7, 1 / 4 + 1e-7]
    expected = math.exp(-sum(q * math.log(q) for q in p))
    assert rank_me(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])) == pytest.approx(expected, rel=1e-5)


def test_linear_probe_finds_what_is_linear_and_not_what_is_not():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(2000, 6, generator=generator), torch.randn(1000, 6, generator=generator)
    # A shift, a scale and a constant feature must not matter: features are standardised.
    scale = torch.tensor([1.0, 100.0, 0.01, 1.0, 1.0, 0.0])

    def linear(x):
        return (x[:, 0] + x[:, 1] > 0).long()

    def xor(x):
        return ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long()

    probe = linear_probe_accuracy(train * scale + 7, linear(train), test * scale + 7, linear(test))
    assert probe > 97
    assert 35 < linear_probe_accuracy(train, xor(train), test, xor(test)) < 65


def test_results_as_table_and_card(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = {"count": torch.arange(40) % 2}
    pixels = torch.randn(40, 3, generator=generator)
    train = {"raw pixels": {"pixels": pixels}}
    train["trained"] = {"mean": labels["count"].float().unsqueeze(1) * 10 + pixels}
    results = evaluate_features(train, train, labels, labels)
    assert results["features"]["trained, mean"]["linear"]["count"] == 100.0
    assert results["features"]["raw pixels"]["rank_me"] is None
    # Pictures without a label do not count, whatever their features.
    some = {"count": torch.cat([labels["count"], torch.full((5,), -1)])}
    more = {name: {key: torch.cat([v, 99.0 * v[:5]]) for key, v in f.items()} for name, f in train.items()}
    scores = evaluate_features(more, more, some, some)["features"]
    assert [scores[name]["knn"] for name in scores] == [results["features"][name]["knn"] for name in scores]
    assert describe_results(results).startswith("k-NN / linear accuracy in % (40 labelled pictures, tested on 40")
    assert describe_results(evaluate_features(train, train, {}, {})).startswith("The data has no labels")
    table = results_table(results)
    assert table[0] == ["features", "count", "RankMe"]
    assert table[2][0] == "trained, mean" and table[2][1].endswith("/ 100.0") and table[1][2] == ""
    card = write_card(tmp_path, "me/mine", tiny_config("pilamim"), {"steps": "7"}, results).read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'AutoModel.from_pretrained("me/mine")' in card
    assert "- steps: 7" in card and "| trained, mean |" in card and "PiLaMIM" in card
    from huggingface_hub import ModelCard

    assert ModelCard(card).data.pipeline_tag == "image-feature-extraction"
    assert "Not evaluated" in write_card(tmp_path, "me/mine", tiny_config("pilamim"), {}, None).read_text()


def test_reconstruction_sheet_shows_the_right_pixels():
    mean, std = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
    original, predicted = torch.full((2, 3, 96, 96), 1.0), torch.full((2, 3, 96, 96), -1.0)
    mask = torch.zeros(2, 1, 96, 96)
    mask[:, :, :, 48:] = 1
    sheet = np.asarray(draw_reconstructions(original, mask, predicted, mean, std))
    # Undone: 1 * 0.25 + 0.5 = 191 / 255, -1 gives 64 / 255, hidden is grey, 128 / 255.
    rows = [98 * i + 10 for i in range(3)]
    assert [sheet[row, 104 + 10, 0] for row in rows] == [191, 191, 191]
    assert [sheet[row, 104 + 80, 0] for row in rows] == [191, 128, 64]
    assert np.array_equal(sheet[:, 104:200], sheet[:, 202:298])
    assert sheet.shape == (3 * 98, 104 + 2 * 98, 3)
    # The rows are named.
    assert all(sheet[98 * i : 98 * i + 96, :104].min() < 50 for i in range(3))


def test_unnormalise_inverts_and_clips():
    picture = torch.rand(2, 5, 3, 4)
    mean, std = torch.rand(5), torch.rand(5) + 0.1
    normalised = (picture - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    torch.testing.assert_close(unnormalise(normalised, mean, std), picture)
    assert unnormalise(torch.full((1, 1, 1, 1), 9.0), [0.5], [0.5]).item() == 1.0


def test_loss_curves_are_drawn_when_there_is_something_to_draw(tmp_path):
    path = tmp_path / "curves.png"
    assert not draw_loss_curves([{"loss": 1.0, "step": 1}], path) and not path.exists()
    history = [{"loss": 3.0 / s, "loss_pixel": 1.0 / s, "step": s} for s in (1, 2, 3)]
    history.append({"eval_loss": 1.0, "eval_loss_pixel": 0.5, "step": 3})
    assert draw_loss_curves(history, path)
    assert np.asarray(Image.open(path).convert("L")).std() > 5


def test_knn_without_neighbours():
    with pytest.raises(ValueError, match="k is 0"):
        knn_predict(torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(1, 3), k=0)


class TestNearestNeighbours:
    def brute_force(self, train, test, k):
        similarity = torch.nn.functional.normalize(test, dim=1) @ torch.nn.functional.normalize(train, dim=1).T
        values, order = similarity.sort(dim=1, descending=True, stable=True)
        return values[:, :k], order[:, :k]

    def test_blocks_change_nothing(self):
        generator = torch.Generator().manual_seed(0)
        train, test = torch.randn(5000, 8, generator=generator), torch.randn(70, 8, generator=generator)
        # Blocks of 1,024, the fewest that there are.
        values, rows = nearest_neighbours(train, test, 20, chunk_size=16, max_bytes=1)
        expected_values, expected_rows = self.brute_force(train, test, 20)
        torch.testing.assert_close(values, expected_values)
        assert torch.equal(rows, expected_rows)

    def test_of_equal_ones_the_first(self):
        train = torch.ones(3000, 4)
        values, rows = nearest_neighbours(train, torch.ones(2, 4), 5, max_bytes=1)
        assert rows.tolist() == [[0, 1, 2, 3, 4]] * 2 and torch.allclose(values, torch.ones(2, 5))

    def test_memory_is_that_of_a_block(self, monkeypatch):
        largest = []
        multiply = torch.Tensor.__matmul__

        def watched(self, other):
            product = multiply(self, other)
            largest.append(product.numel())
            return product

        monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
        nearest_neighbours(torch.randn(20000, 4), torch.randn(600, 4), 3, chunk_size=256, max_bytes=4 * 256 * 2048)
        assert len(largest) > 20 and max(largest) <= 256 * 2048


def test_several_labels_a_picture():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=generator)
    labels = (features[:, :3] > 0).long()
    labels[::50] = -1
    train, test = features[:300], features[300:]
    results = evaluate_features(
        {"net": {"cls": train}}, {"net": {"cls": test}}, {"tags": labels[:300]}, {"tags": labels[300:]}
    )
    scores = results["features"]["net, [CLS]"]
    assert scores["linear"]["tags"] > 99 and 70 < scores["knn"]["tags"] < 100
    assert "a picture may have several" in describe_results(results)


def test_what_cannot_be_evaluated_is_said_and_the_rest_is():
    generator = torch.Generator().manual_seed(0)
    good, bad = torch.randn(60, 4, generator=generator), torch.full((60, 4), float("nan"))
    features = {"net": {"cls": good, "mean": bad}}
    labels = {"same": torch.zeros(60, dtype=torch.long), "rare": torch.arange(60).clamp(max=3)}
    results = evaluate_features(features, features, labels, labels)
    assert results["features"]["net, mean"] == {
        "knn": {"same": None, "rare": None},
        "linear": {"same": None, "rare": None},
        "rank_me": None,
    }
    assert results["features"]["net, [CLS]"]["knn"]["rare"] > 90
    said = describe_results(results)
    assert "'net, mean' are not finite" in said and "the same 'same'" in said
    assert "- / -" in results_table(results)[2]
    others = {"rare": torch.full((60,), 7)}
    others["rare"][0] = 1
    notes = evaluate_features(features, features, {"rare": labels["rare"]}, others)["notes"]
    assert notes[:2] == [
        "1 classes of 'rare' have no training picture, and cannot be told.",
        "1 classes of 'rare' have fewer training pictures than the 20 neighbours of k-NN.",
    ]
