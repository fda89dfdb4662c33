"""The verdict on a run: its logic on numbers made by hand, and where it is said."""

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ViTConfig, ViTForImageClassification

import hf_mim
from golden import SHARED
from hf_mim.data.dataset import ImageDataset
from hf_mim.data.image_processing import build_image_processor
from hf_mim.data.loading import ImageSplits
from hf_mim.evaluation.appraisal import compare, evidence_of, reconstruction_errors, untrained_like
from hf_mim.evaluation.online import OnlineEvaluation
from hf_mim.evaluation.report import evaluate_features
from hf_mim.evaluation.verdict import (
    BETTER,
    COLLAPSING,
    LEARNING,
    NOT_BETTER,
    TOO_EARLY,
    UNTRAINED,
    WORSE,
    Comparison,
    Evidence,
    Verdict,
    at_images,
    bootstrap,
    compare_answers,
    describe_reference,
    feature_spread,
    has_collapsed,
    judge,
    read_curves,
)
from hf_mim.jobs.pretraining import main
from hf_mim.jobs.verdicts import reference_of
from hf_mim.training.command import ModelArguments
from tiny_training import FLAGS, REPOSITORY, SIZES, pictures, tiny_config, tiny_data

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import reference_curves  # noqa: E402
import verdicts  # noqa: E402


def told(share: float, number: int = 1000) -> np.ndarray:
    """So many pictures of which a share is told."""
    return (np.arange(number) < share * number).astype(float)


def evidence(now: float, before: float, images: int = 100_000, **changes) -> Evidence:
    scores = {"answers": {"k-NN accuracy": told(now)}, "untrained_answers": {"k-NN accuracy": told(before)}}
    return Evidence(images, **scores, **changes)


class TestJudge:
    def test_labels_decide(self):
        found = judge(evidence(0.45, 0.30))
        assert (found.verdict, found.value) == (LEARNING, pytest.approx(15))
        assert found.low > 10 and found.high < 20
        assert "45.0%, untrained 30.0%" in found.number and "1000 held-out pictures, paired" in found.number
        assert judge(evidence(0.30, 0.30, images=200_000)).verdict == UNTRAINED
        assert judge(evidence(0.20, 0.30, images=200_000)).verdict == UNTRAINED

    def test_paired(self):
        # Two points of 1,000 pictures tell nothing of other pictures; of the same ones, none lost, they do.
        generator = np.random.default_rng(0)
        before, now = told(0.300), told(0.320)
        assert judge(Evidence(10**6, answers={"a": now}, untrained_answers={"a": before})).verdict == LEARNING
        shuffled = generator.permutation(now)
        assert judge(Evidence(10**6, answers={"a": shuffled}, untrained_answers={"a": before})).verdict == UNTRAINED

    def test_too_early(self):
        assert judge(evidence(0.30, 0.30, images=5_000)).verdict == TOO_EARLY
        assert judge(evidence(0.30, 0.30, progress=0.02)).verdict == TOO_EARLY
        assert judge(evidence(0.45, 0.30, images=5_000)).verdict == LEARNING
        # The task is being learnt, and labels follow.
        colour = np.linspace(0.8, 1.2, 200)
        task = {"errors": 0.6 * colour, "mean_colour_errors": colour}
        assert judge(evidence(0.30, 0.30, images=50_000, **task)).verdict == TOO_EARLY
        assert judge(evidence(0.30, 0.30, images=10**6, **task)).verdict == UNTRAINED
        # Where nothing is known of the task, as of dBOT's: RankMe may fall and labels follow.
        ranks = {"rank_me": {"mean": 10.0}, "untrained_rank_me": {"mean": 20.0}}
        assert judge(evidence(0.30, 0.30, images=50_000, **ranks)).verdict == TOO_EARLY
        assert judge(evidence(0.30, 0.30, images=200_000, **ranks)).verdict == UNTRAINED
        # A share of the error that may as well be none: the task is known, and not learnt.
        noisy = {"errors": np.array([0.0, 1.9] * 20), "mean_colour_errors": np.ones(40)}
        assert judge(evidence(0.30, 0.30, images=50_000, **noisy)).verdict == UNTRAINED

    def test_collapse_comes_first(self):
        ranks = {"rank_me": {"[CLS]": 1.5}, "untrained_rank_me": {"[CLS]": 30.0}}
        found = judge(evidence(0.45, 0.30, **ranks))
        assert found.verdict == COLLAPSING and "RankMe of [CLS] features is 1.5, untrained 30" in found.number
        spread = {"spread": {"mean": 0.09}, "untrained_spread": {"mean": 0.3}}
        assert judge(evidence(0.45, 0.30, **spread)).verdict == COLLAPSING
        spread["spread"]["mean"] = 0.2
        assert judge(evidence(0.45, 0.30, **spread)).verdict == LEARNING
        alike = {"spread": {"mean": 0.0}, "untrained_spread": {"mean": 1e-6}}
        found = judge(evidence(0.1, 0.1, **alike))
        assert found.verdict == UNTRAINED and "hf_mim check" in found.advice

    def test_reconstruction(self):
        colour = np.linspace(0.8, 1.2, 200)
        for share, verdict in ((0.6, LEARNING), (0.995, UNTRAINED), (1.5, UNTRAINED)):
            found = judge(Evidence(100_000, errors=share * colour, mean_colour_errors=colour))
            assert found.verdict == verdict, share
            assert found.value == pytest.approx(1 - share) and found.low <= found.value <= found.high
        early = Evidence(1_000, errors=colour, mean_colour_errors=colour)
        assert judge(early).verdict == TOO_EARLY
        # A network that reconstructs nothing has not learnt its task, whatever its features tell by chance.
        assert judge(evidence(0.45, 0.30, errors=colour, mean_colour_errors=colour)).verdict == UNTRAINED
        # Nothing to reconstruct is no fault of the network.
        none = np.zeros(200)
        found = judge(evidence(0.45, 0.30, errors=none, mean_colour_errors=none))
        assert found.verdict == LEARNING and "one colour" in str(found)

    def test_rank_alone(self):
        def ranks(now, spread):
            samples = {"mean": np.linspace(-spread, spread, 20)}
            return Evidence(10**5, rank_me={"mean": now}, untrained_rank_me={"mean": 30.0}, rank_me_samples=samples)

        assert judge(ranks(50.0, 2.0)).verdict == LEARNING
        assert judge(ranks(31.0, 2.0)).verdict == TOO_EARLY
        assert "labels would tell" in str(judge(ranks(20.0, 2.0)))
        assert judge(Evidence(10**5)).verdict == TOO_EARLY

    def test_said_in_one_line_with_what_to_try(self):
        found = judge(evidence(0.45, 0.30), "The reference.")
        text = str(found)
        assert text.startswith("Verdict: learning. k-NN accuracy 45.0%") and "\n" not in text
        assert "The reference." in text and "To try: " in text
        assert Verdict(**json.loads(json.dumps(found.to_dict()))) == found

    @settings(max_examples=30, deadline=None)
    @given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**9), st.integers(2, 300))
    def test_any_numbers_give_a_verdict(self, now, before, images, number):
        found = judge(
            Evidence(images, answers={"a": told(now, number)}, untrained_answers={"a": told(before, number)})
        )
        assert found.verdict in (LEARNING, TOO_EARLY, UNTRAINED)
        assert found.low <= found.high
        # Never learning where no more is told.
        assert found.verdict != LEARNING or found.value > 0


class TestComparison:
    @pytest.mark.parametrize(
        ("now", "before", "word"), [(0.9, 0.8, BETTER), (0.8, 0.9, WORSE), (0.8, 0.8, NOT_BETTER)]
    )
    def test_by_a_label(self, now, before, word):
        now, before = told(now), told(before)
        now[5] = before[7] = np.nan
        found = compare_answers("untrained", "shape", now, before)
        assert found.word == word and found.num_pictures == 998
        gain = found.value - found.other
        assert gain == pytest.approx(100 * np.sign(gain) * 100 / 998, abs=1e-9)
        # Of 998 pictures a tenth is told by one alone: a standard error of 0.95 points.
        assert (found.low, found.high) == pytest.approx(
            (gain - 1.86 * abs(gain) / 10, gain + 1.86 * abs(gain) / 10), abs=0.3
        )
        assert str(found).startswith(f"Linear accuracy of shape: {word} than untrained, {found.value:.1f} against")
        assert compare_answers("untrained", "shape", np.full(4, np.nan), now[:4]) is None

    def test_a_difference_that_may_be_chance(self):
        found = compare_answers("untrained", "shape", told(0.55, 20), told(0.5, 20))
        assert found.word == NOT_BETTER and found.low <= 0 < found.value - found.other

    def test_each_network_at_its_best_and_several_labels(self):
        def scores(**columns):
            return {"linear": {label: torch.tensor(column) for label, column in columns.items()}}

        good, bad = told(0.9, 100), told(0.3, 100)
        answers = {
            "trained": {"cls": scores(a=bad, b=bad), "mean": scores(a=good, b=bad)},
            "start": {"mean": scores(a=bad, b=good)},
        }
        features = {name: {"mean": torch.randn(100, 4)} for name in answers}
        by_a, by_b = compare(features, answers, {"start": "before"})
        assert (by_a.word, by_b.word) == (BETTER, WORSE) and by_a.value - by_a.other == pytest.approx(60)
        assert compare({name: {"mean": torch.randn(19, 4)} for name in answers}, answers, {"start": "before"}) == []

    def test_without_labels(self):
        generator = torch.Generator().manual_seed(0)
        many = torch.randn(200, 16, generator=generator)
        few = torch.randn(200, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
        features = {"trained": {"cls": many}, "start": {"mean": few, "cls": few}, "untrained": {"cls": many}}
        than = {"start": "before", "untrained": "untrained"}
        better, same = compare(features, {}, than)
        assert better.by == "RankMe" and (better.word, same.word) == (BETTER, NOT_BETTER)
        assert better.value == pytest.approx(16, abs=1.5) and better.other == pytest.approx(2, abs=0.3)
        (worse,) = compare({"trained": {"cls": few}, "start": {"cls": many}}, {}, {"start": "before"})
        assert worse.word == WORSE
        assert compare({"trained": {"cls": few * np.nan}, "start": {"cls": many}}, {}, {"start": "before"}) == []


def stripes(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy stripes of any phase, lying, standing or slanting, values about 0 to 1, and which of the three."""
    generator = np.random.default_rng(seed)
    classes = generator.integers(3, size=number)
    directions = np.array([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]])[classes]
    places = np.stack(np.meshgrid(np.arange(16), np.arange(16), indexing="ij"))
    phases = generator.uniform(0, 2 * np.pi, (number, 1, 1))
    waves = np.sin(np.einsum("nc,cyx->nyx", directions, places) * np.pi / 2 + phases)
    pictures = 0.5 + 0.08 * waves[..., None] + 0.2 * generator.standard_normal((number, 16, 16, 3))
    return torch.tensor(pictures, dtype=torch.float32), torch.tensor(classes)


@pytest.fixture(scope="module")
def weights_that_tell(tmp_path_factory):
    """Stripes in a folder a class, and a ViT that was trained to tell them."""
    folder = tmp_path_factory.mktemp("tell")
    for index, (picture, label) in enumerate(zip(*stripes(300, 0), strict=True)):
        (folder / "data" / str(int(label))).mkdir(parents=True, exist_ok=True)
        np.save(folder / "data" / str(int(label)) / f"{index}.npy", picture.numpy())
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("image_size", "patch_size", "hidden_size", "num_hidden_layers")}
    config = ViTConfig(**sizes, num_attention_heads=2, intermediate_size=64, num_labels=3)
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(150):
        pixel_values, labels = stripes(64, 1 + step)
        model((pixel_values.permute(0, 3, 1, 2) - 0.5) / 0.25, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.vit.save_pretrained(folder / "vit")
    return folder


@pytest.mark.parametrize(
    ("rate", "than_start", "than_untrained"),
    [("10", {WORSE}, {WORSE, NOT_BETTER}), pytest.param("0", {NOT_BETTER}, {BETTER}, marks=pytest.mark.slow)],
)
def test_a_run_says_whether_it_is_better(weights_that_tell, tmp_path, capsys, rate, than_start, than_untrained):
    """At no rate it is as good as the weights that it goes on from, at a huge one they are destroyed."""
    flags = [f"--train_dir={weights_that_tell / 'data'}", f"--model_name_or_path={weights_that_tell / 'vit'}"]
    flags += ["--config_overrides=decoder_hidden_size=16,decoder_num_hidden_layers=1,decoder_num_attention_heads=2"]
    flags += ["--max_steps=6", "--warmup_steps=0", f"--learning_rate={rate}", "--validation_fraction=0.5"]
    flags += ["--per_device_train_batch_size=4", "--use_cpu", "--disable_tqdm=true", "--eval_strategy=no"]
    flags += ["--image_mean", "0.5", "0.5", "0.5", "--image_std", "0.25", "0.25", "0.25", "--bf16=false"]
    assert main([*flags, f"--output_dir={tmp_path}"]) == 0
    found = json.loads((tmp_path / "features.json").read_text())["comparisons"]
    assert [one["than"] for one in found] == ["what it began with", "untrained"]
    assert found[0]["by"] == "linear accuracy of label" and found[0]["other"] > 80
    said = capsys.readouterr().out
    assert found[0]["word"] in than_start and found[1]["word"] in than_untrained
    for one in found:
        assert f"{Comparison(**one)}." in said and f"- {Comparison(**one)}." in (tmp_path / "README.md").read_text()


def test_bootstrap_covers_the_truth():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        low, high = bootstrap(generator.normal(1.0, 1.0, 80), generator.normal(0.5, 1.0, 80), seed=seed)
        covered += low <= 0.5 <= high
    assert 88 <= covered <= 100
    assert bootstrap(np.ones(10)) == (1.0, 1.0)


def test_spread_by_hand():
    assert feature_spread(np.ones((5, 3))) == 0
    assert feature_spread(np.array([[1.0, 0], [-1.0, 0]])) == pytest.approx(1)
    # Deviations of 1 about a mean of 2: 1 of 1 + 4.
    assert feature_spread(np.array([[1.0], [3.0]])) == pytest.approx(np.sqrt(1 / 5))
    assert has_collapsed(1.0, 11.0) and not has_collapsed(2.0, 11.0)


class TestReference:
    CURVES = [
        {"preset": "tiny", "model_type": "vit_mae", "data": "CIFAR-10", "metric": metric, "points": points}
        for metric, points in (("k-NN accuracy", [[1000, 20.0], [3000, 30.0]]), ("linear accuracy", [[1000, 40.0]]))
    ]

    def test_between_points(self):
        assert at_images([[1000, 20.0], [3000, 30.0]], 2000) == (2000, 25.0)
        assert at_images([[1000, 20.0], [3000, 30.0]], 10) == (1000, 20.0)
        assert at_images([[1000, 20.0], [3000, 30.0]], 10**9) == (3000, 30.0)
        said = describe_reference(self.CURVES, "tiny", "vit_mae", 2000)
        assert said.startswith("The preset tiny on CIFAR-10 after 2,000 images: k-NN accuracy 25.0%")
        assert "linear accuracy 40.0% (after 1,000)" in said

    def test_another_preset_is_said_and_left_out(self):
        assert "No reference curve of base vit_mae (there are: tiny vit_mae)" in describe_reference(
            self.CURVES, "base", "vit_mae", 10
        )
        assert "none yet" in describe_reference([], "tiny", "ocl", 10)
        said = reference_of(ModelArguments(preset="tiny", mask_ratio=0.9), "ocl")(1000)
        assert said.startswith("No reference curve: ") and "the preset tiny (--mask_ratio is 0.9)" in said

    def test_made_of_the_table(self):
        def row(method, seed, images, metric, value, data="cifar10"):
            row = {"data": data, "method": method, "seed": seed, "images_seen": images}
            return row | {"metric": metric, "value": value}

        rows = [row("MAE", seed, 1000, "k-NN/mean/label", 30.0 + seed) for seed in (0, 1)]
        rows += [row("MAE", 0, 1000, "k-NN/[CLS]/label", 20.0), row("MAE", 0, 500, "k-NN/mean/label", 25.0)]
        rows += [row("untrained", 0, 0, "k-NN/mean/label", 10.0), row("MAE", 0, 1000, "RankMe/mean", 5.0)]
        rows += [row("MAE", 0, 7, "k-NN/mean/label", 99.0, data="scenes")]
        # The untrained network is tiny's.
        rows += [row("MAE, mini", 0, 1000, "k-NN/mean/label", 40.0)]
        shared = {"model_type": "vit_mae", "data": "CIFAR-10", "metric": "k-NN accuracy"}
        assert reference_curves.curves_of(rows) == [
            shared | {"preset": "tiny", "points": [[0, 10.0], [500, 25.0], [1000, 30.5]]},
            shared | {"preset": "mini", "points": [[1000, 40.0]]},
        ]
        assert reference_curves.curves_of([]) == []
        assert isinstance(read_curves(), list)


def splits(label: np.ndarray) -> ImageSplits:
    def split(number, seed):
        return ImageDataset(pictures(number, seed), 3, source="noise", labels={"label": label[:number]})

    return ImageSplits(split(24, 0), split(12, 1))


def processor():
    return build_image_processor((16, 16), 3, [0.5] * 3, [0.25] * 3)


class TestBadInput:
    def test_features_that_are_not_finite(self):
        good = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
        bad = torch.full((60, 8), float("nan"))
        found = evidence_of(10**5, {"cls": good, "mean": bad}, {"cls": good + 0.01, "mean": good})
        assert list(found.rank_me) == ["[CLS]"] and set(found.untrained_rank_me) == {"[CLS]", "mean"}
        said = str(judge(found))
        assert "The mean features are not finite: left out." in said and "RankMe of [CLS]" in said

    def test_few_pictures(self):
        few = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
        found = evidence_of(10**5, {"cls": 0 * few}, {"cls": few})
        assert judge(found).verdict == TOO_EARLY and "Only 5 held-out pictures" in str(judge(found))

    def test_evaluation_goes_on_where_features_are_not_finite(self):
        evaluation = OnlineEvaluation(splits(np.arange(24) % 3), processor(), knn=True, linear=True)
        encoder = hf_mim.PiLaMIMModel(tiny_config()).eval()
        bias = next(value for name, value in encoder.named_parameters() if name.endswith("bias"))
        torch.nn.init.constant_(bias, float("nan"))
        metrics = evaluation(encoder)
        assert list(metrics) == evaluation.names and all(np.isnan(value) for value in metrics.values())

    def test_one_class_and_few_of_a_class(self):
        features = {"net": {"cls": torch.randn(60, 4, generator=torch.Generator().manual_seed(0))}}
        labels = {"same": torch.zeros(60, dtype=torch.long), "few": (torch.arange(60) >= 55).long()}
        answers: dict = {}
        results = evaluate_features(features, features, labels, labels, answers=answers)
        assert any("the same 'same'" in note for note in results["notes"])
        assert any("1 classes of 'few' have fewer training pictures than the 20" in note for note in results["notes"])
        assert all(value is not None for value in results["features"]["net, [CLS]"]["knn"].values())
        same = {"answers": answers["net"], "untrained_answers": answers["net"]}
        found = evidence_of(10**6, features["net"], features["net"], **same)
        # Of one class nothing is learnt; by the other the network is no better than itself.
        assert set(answers["net"]["cls"]["knn"]) == {"few"}
        assert judge(found).verdict == UNTRAINED
        evaluation = OnlineEvaluation(splits(np.zeros(24, dtype=int)), processor(), knn=True, linear=False)
        metrics, _, answers = evaluation.measure(hf_mim.PiLaMIMModel(tiny_config()).eval())
        assert metrics["knn_accuracy"] == 100 and not any(answers.values())
        assert evaluation.notes == ["All held-out pictures have the same 'label': how often it is told says nothing."]

    def test_answers(self):
        features = {"net": {"cls": torch.eye(4)}}
        labels = {"a": torch.tensor([0, 1, -1, 2])}
        answers: dict = {}
        evaluate_features(features, features, labels, labels, answers=answers)
        knn = answers["net"]["cls"]["knn"]["a"]
        assert knn.shape == (4,) and knn[2].isnan() and set(knn[[0, 1, 3]].tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("normalised", [False, True])
def test_reconstruction_errors_by_hand(normalised):
    torch.manual_seed(0)
    if normalised:
        config = hf_mim.ViTMAEConfig(**SIZES, norm_pix_loss=True)
        model = hf_mim.ViTMAEForPreTraining(config).eval()
    else:
        model = hf_mim.PiLaMIMForPreTraining(tiny_config()).eval()
    data = tiny_data(5)
    errors, colours = reconstruction_errors(model, data, batch_size=2)
    items = [data[0, index] for index in range(5)]
    pixels = torch.stack([item["pixel_values"] for item in items])
    mask, predicted = model.reconstruct(pixels, torch.stack([item["noise"] for item in items]))
    hidden = mask.bool().expand_as(pixels)
    for index in range(5):
        error = (pixels - predicted)[index][hidden[index]].square().mean().item()
        assert errors[index] == pytest.approx(error, rel=1e-4)
    if normalised:
        patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4)
        own = patches.mean(dim=(1, 4, 5)).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
        assert colours[3] == pytest.approx((pixels - own)[3][hidden[3]].square().mean().item(), rel=1e-4)
        return
    # The best of all shares between a picture's own visible colour and that of all.
    shown = ~hidden
    visible = (shown * pixels).sum((2, 3)) / shown.sum((2, 3))
    common = visible.mean(0)

    def error_of(share: float) -> float:
        guess = (common + share * (visible - common))[:, :, None, None].expand_as(pixels)
        return (pixels - guess)[hidden].square().mean().item()

    assert colours.mean() == pytest.approx(min(error_of(share) for share in np.linspace(0, 1, 101)), rel=1e-4)


def test_an_untrained_network_moves_no_draws():
    model = hf_mim.PiLaMIMForPreTraining(tiny_config())
    state = torch.get_rng_state()
    first, second = untrained_like(model, 3), untrained_like(model, 3)
    assert torch.equal(state, torch.get_rng_state()) and not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_run_says_its_verdict(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index, picture in enumerate(pictures(30, seed=ord(name))):
            np.save(tmp_path / "data" / name / f"{index}.npy", picture.astype(np.float32) / 255)
    out = tmp_path / "out"
    flags = [f"--train_dir={tmp_path / 'data'}", f"--output_dir={out}", "--max_steps=2", "--validation_fraction=0.5"]
    assert main([*FLAGS, *flags, "--eval_strategy=steps", "--eval_steps=1"]) == 0
    said = capsys.readouterr().out
    assert "Step 1. Verdict: too early to say. Hidden pixels" in said
    found = json.loads((out / "features.json").read_text())["verdict"]
    assert str(Verdict(**found)) in said and found["verdict"] == TOO_EARLY
    assert "No reference curve: " in found["reference"]
    assert str(Verdict(**found)) in (out / "README.md").read_text()
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    logged = [log for log in history if "eval_loss" in log]
    numbers = {"eval_feature_rank_me", "eval_feature_spread", "eval_error_saved"}
    assert logged and all(numbers <= set(log) for log in logged)


@pytest.mark.slow
def test_the_benchmark_measures_photographs(tmp_path, monkeypatch, capsys):
    """Two steps of a healthy case and of one with constant pictures, which only its pictures give away."""
    cifar10 = SHARED / "data" / "cifar10"
    if not cifar10.is_dir():
        pytest.skip(f"no photographs in {cifar10}; set HF_MIM_SHARED")
    for name, value in {"STEPS": 2, "BATCH_SIZE": 16, "NUM_TRAIN": 200, "NUM_LABELLED": 100, "NUM_TEST": 60}.items():
        monkeypatch.setattr(verdicts, name, value)
    verdicts.main([f"--cifar10={cifar10}", f"--runs={tmp_path}", "--cases", "MAE", "MAE, constant images"])
    said = capsys.readouterr().out
    assert "MAE, with labels: right. Verdict: " in said
    assert "MAE, constant images, with labels: right. Verdict: no better than untrained." in said
