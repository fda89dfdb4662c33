"""
Whether a run learns: one of four words, with the number it rests on, how sure that is, and what to try. And whether
what it leaves is better than another network: one of three.

Nothing here looks at a network or a picture: numbers in, a [`Verdict`] or [`Comparison`] out. `appraisal.py` measures
them.
"""

import json
from dataclasses import asdict, dataclass, field
from importlib import resources

import numpy as np

LEARNING = "learning"
TOO_EARLY = "too early to say"
UNTRAINED = "no better than untrained"
COLLAPSING = "collapsing"

BETTER = "better"
NOT_BETTER = "not better"
WORSE = "worse"

# Features have collapsed whose RankMe is under a tenth of what it was untrained (healthy methods go down to a third),
# or whose spread over pictures is under a third (healthy ones keep three quarters and more).
_COLLAPSED_RANK, _COLLAPSED_SPREAD = 0.1, 1 / 3
# Below, pictures are alike to the last digits that bfloat16 has.
_ALIKE = 1e-3
# A reconstruction has to be better than the mean colour by so much of its error.
_SKILL = 0.05
# Before, the weights have hardly left where they started.
_EARLY_IMAGES = 10_000
# Before, features may not yet tell labels better although the task is being learnt: tiny MAE needs as many.
_EARLY_FOR_LABELS = 200_000
_EARLY_PROGRESS = 0.1
_RESAMPLES = 1000
_LEVEL = 0.95

_TRY = {
    LEARNING: "Go on: longer training may teach more.",
    TOO_EARLY: "Go on, and look again at a later evaluation, or on more held-out pictures.",
    COLLAPSING: "Lower the learning rate, lengthen the warm-up, enlarge the batch, and keep averaged targets slow "
    "(ema_momentum near 1).",
}
# By what shows it.
_TRY_OF_UNTRAINED = {
    "pictures": "All pictures are alike to an untrained network too: look at them (`hf_mim check`), and at "
    "--image_mean and --image_std.",
    "reconstruction": "Nothing beyond a mean colour is reconstructed: lower the learning rate and the mask ratio, and "
    "see in reconstructions/ that pictures and patches are whole.",
    "labels": "Lower the learning rate and the mask ratio to the preset's, crop less (--crop_scale_min), or train "
    "longer.",
}


def has_collapsed(rank: float, first: float) -> bool:
    """Whether RankMe has fallen under a tenth of what it was untrained."""
    return rank < _COLLAPSED_RANK * first


@dataclass(frozen=True)
class Evidence:
    """
    What is known of a network. All but `images_seen` may be missing; arrays have an entry a held-out picture.

    Args:
        images_seen (`int`): Pictures that training went through, each as often as it was seen.
        progress (`float`): Share of the planned steps, in [0, 1].
        answers (`dict[str, np.ndarray]`): By what was scored ("k-NN accuracy"), the share of a picture's labels that
            is told, in [0, 1]; NaN of a picture without labels.
        untrained_answers (`dict[str, np.ndarray]`): The same, in the same order, of the network untrained.
        rank_me, untrained_rank_me (`dict[str, float]`): By pooling.
        rank_me_samples (`dict[str, np.ndarray]`): By pooling, trained minus untrained, of resampled pictures.
        spread, untrained_spread (`dict[str, float]`): By pooling, as [`feature_spread`] gives.
        errors, mean_colour_errors (`np.ndarray`, *optional*): Squared error of hidden pixels, and of a mean colour.
        notes (`list[str]`): What could not be measured, and why.
    """

    images_seen: int
    progress: float = 1.0
    answers: dict[str, np.ndarray] = field(default_factory=dict)
    untrained_answers: dict[str, np.ndarray] = field(default_factory=dict)
    rank_me: dict[str, float] = field(default_factory=dict)
    untrained_rank_me: dict[str, float] = field(default_factory=dict)
    rank_me_samples: dict[str, np.ndarray] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    untrained_spread: dict[str, float] = field(default_factory=dict)
    errors: np.ndarray | None = None
    mean_colour_errors: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """
    Args:
        verdict (`str`): "learning", "too early to say", "no better than untrained" or "collapsing".
        number (`str`): What it rests on, in words.
        value, low, high (`float`, *optional*): That number and its bootstrap interval (95%, over held-out pictures).
        reference (`str`, *optional*): The preset's curve at as many pictures.
        advice (`str`): What to try.
        notes (`list[str]`): What could not be said, and why.
    """

    verdict: str
    number: str
    advice: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    reference: str | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"Verdict: {self.verdict}. {self.number}.", self.reference, *self.notes, f"To try: {self.advice}"]
        return " ".join(part for part in parts if part)

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """
    Whether a trained network is better than another one, by one number on the same held-out pictures.

    Args:
        than (`str`): The other network.
        by (`str`): The number: "linear accuracy of LABEL" in %, or "RankMe".
        word (`str`): "better" or "worse" where the interval of the difference leaves out 0, else "not better".
        value, other (`float`): The trained network's, and the other's.
        low, high (`float`): Bootstrap interval (95%, over held-out pictures, paired) of `value - other`.
        num_pictures (`int`): Held-out pictures.
    """

    than: str
    by: str
    word: str
    value: float
    other: float
    low: float
    high: float
    num_pictures: int

    def __str__(self) -> str:
        gain = self.value - self.other
        return (
            f"{self.by[0].upper()}{self.by[1:]}: {self.word} than {self.than}, {self.value:.1f} against "
            f"{self.other:.1f}: {gain:+.1f} (95% interval {self.low:+.1f} to {self.high:+.1f}, {self.num_pictures} "
            "held-out pictures)"
        )

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def compare_answers(than: str, label: str, now: np.ndarray, before: np.ndarray) -> Comparison | None:
    """
    By which held-out pictures are told: arrays of shape `(num_pictures,)` of 1 and 0, NaN without a label, in the same
    order. None where no picture is labelled in both.
    """
    known = ~(np.isnan(now) | np.isnan(before))
    if not known.any():
        return None
    now, before = 100 * now[known], 100 * before[known]
    low, high = bootstrap(now, before)
    return _compared(than, f"linear accuracy of {label}", now.mean(), before.mean(), low, high, len(now))


def compare_ranks(than: str, now: float, before: float, samples: np.ndarray, num_pictures: int) -> Comparison:
    """By RankMe; `samples` are differences of resampled pictures."""
    return _compared(than, "RankMe", now, before, *rank_interval(now, before, samples), num_pictures)


def _compared(than: str, by: str, now: float, before: float, low: float, high: float, number: int) -> Comparison:
    word = BETTER if low > 0 else WORSE if high < 0 else NOT_BETTER
    return Comparison(than, by, word, *(float(value) for value in (now, before, low, high)), number)


def rank_interval(now: float, before: float, samples: np.ndarray) -> tuple[float, float]:
    """
    The interval of a difference of RankMe. Resampled pictures repeat, which lowers both ranks: only how far samples
    lie apart is taken from them.
    """
    low, high = (now - before) + np.quantile(samples - samples.mean(), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def feature_spread(features: np.ndarray) -> float:
    """
    How far pictures are told apart by features (num_pictures, dim): the root of their variance over that of their mean
    square, from 0 (all alike) to 1.
    """
    features = np.asarray(features, dtype=np.float64)
    power = np.square(features).sum(axis=1).mean()
    return float(np.sqrt(np.square(features - features.mean(axis=0)).sum(axis=1).mean() / power)) if power > 0 else 0.0


def bootstrap(*columns: np.ndarray, statistic=None, level: float = _LEVEL, seed: int = 0) -> tuple[float, float]:
    """
    The percentile interval of a statistic over resampled pictures, the same of each column (so that two networks are
    compared picture by picture).

    Args:
        columns (`np.ndarray` of shape `(num_pictures,)`).
        statistic (*optional*): Of the resampled means, `(num_resamples,)` a column; the first minus the second (or the
            first alone) by default.
    """
    generator = np.random.default_rng(seed)
    number = len(columns[0])
    means = [[] for _ in columns]
    for start in range(0, _RESAMPLES, 100):
        rows = generator.integers(number, size=(min(100, _RESAMPLES - start), number))
        for column, found in zip(columns, means, strict=True):
            found.append(column[rows].mean(axis=1))
    means = [np.concatenate(found) for found in means]
    values = means[0] - sum(means[1:]) if statistic is None else statistic(*means)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def judge(evidence: Evidence, reference: str | None = None) -> Verdict:
    """
    The verdict on a network. Collapse is looked for first; then a reconstruction that knows no more than a mean
    colour; then labels decide where the untrained network was asked too; else the reconstruction; else RankMe.
    """
    notes = list(evidence.notes)

    def say(verdict: str, number: str, cause: str | None = None, value=None, low=None, high=None) -> Verdict:
        advice = _TRY[verdict] if cause is None else _TRY_OF_UNTRAINED[cause]
        return Verdict(verdict, number, advice, value, low, high, reference, notes)

    for kind, now, before in (
        ("RankMe", evidence.rank_me, evidence.untrained_rank_me),
        ("spread over pictures", evidence.spread, evidence.untrained_spread),
    ):
        for pooling, value in now.items():
            if pooling not in before:
                continue
            compared = f"The {kind} of {pooling} features is {value:.3g}, untrained {before[pooling]:.3g}"
            if kind != "RankMe" and before[pooling] < _ALIKE:
                return say(UNTRAINED, compared, "pictures", value)
            spread_is_lost = kind != "RankMe" and value < _COLLAPSED_SPREAD * before[pooling]
            if spread_is_lost or (kind == "RankMe" and has_collapsed(value, before[pooling])):
                return say(COLLAPSING, compared, None, value)
    early = evidence.images_seen < _EARLY_IMAGES or evidence.progress < _EARLY_PROGRESS
    skill = None
    if evidence.errors is not None:
        error, colour = evidence.errors.mean(), evidence.mean_colour_errors.mean()
        if colour > 0:
            skill = 1 - error / colour
            low, high = bootstrap(
                evidence.errors, evidence.mean_colour_errors, statistic=lambda error, colour: 1 - error / colour
            )
            reconstructed = (
                f"Hidden pixels: an error of {error:.3g}, of a mean colour {colour:.3g}; {skill:.1%} less "
                f"(95% interval {low:.1%} to {high:.1%}, {len(evidence.errors)} held-out pictures)"
            )
            if high < _SKILL and not early:
                return say(UNTRAINED, reconstructed, "reconstruction", float(skill), low, high)
        else:
            notes.append("Every picture is of one colour: there is nothing to reconstruct.")
    by_labels = _by_labels(evidence)
    if by_labels is not None:
        name, now, before, gain, low_gain, high_gain, number = by_labels
        compared = (
            f"{name} {100 * now:.1f}%, untrained {100 * before:.1f}%: a difference of {100 * gain:+.1f} points "
            f"(95% interval {100 * low_gain:+.1f} to {100 * high_gain:+.1f}, {number} held-out pictures, paired)"
        )
        numbers = [100 * float(part) for part in (gain, low_gain, high_gain)]
        if low_gain > 0:
            return say(LEARNING, compared, None, *numbers)
        # What is learnt of the task shows before the labels do; of a method without pixels it is not known.
        may_be_learning = skill is None or low > 0
        if early or (may_be_learning and evidence.images_seen < _EARLY_FOR_LABELS):
            return say(TOO_EARLY, compared, None, *numbers)
        return say(UNTRAINED, compared, "labels", *numbers)
    if skill is not None:
        if low > _SKILL:
            return say(LEARNING, reconstructed, None, float(skill), low, high)
        return say(TOO_EARLY, reconstructed, None, float(skill), low, high)
    for pooling, samples in evidence.rank_me_samples.items():
        now, before = evidence.rank_me[pooling], evidence.untrained_rank_me[pooling]
        low, high = rank_interval(now, before, samples)
        compared = (
            f"RankMe of {pooling} features {now:.1f}, untrained {before:.1f}: a difference of {now - before:+.1f} "
            f"(95% interval {low:+.1f} to {high:+.1f})"
        )
        numbers = float(now - before), low, high
        if low > 0 and not early:
            return say(LEARNING, compared, None, *numbers)
        notes.append("A RankMe that does not rise tells little: labels would tell (--eval_knn true).")
        return say(TOO_EARLY, compared, None, *numbers)
    return say(TOO_EARLY, "Nothing was measured that tells")


def _by_labels(evidence: Evidence):
    """(name, accuracy now, before, gain, its interval, pictures) of the score whose gain is the surest, or None."""
    names = [name for name in evidence.answers if name in evidence.untrained_answers]
    found = []
    for name in names:
        now, before = evidence.answers[name], evidence.untrained_answers[name]
        known = ~(np.isnan(now) | np.isnan(before))
        if known.any():
            now, before = now[known], before[known]
            # Several scores have several chances: each has its share of the doubt.
            interval = bootstrap(now, before, level=1 - (1 - _LEVEL) / len(names))
            found.append((name, now.mean(), before.mean(), now.mean() - before.mean(), *interval, len(now)))
    return max(found, key=lambda entry: entry[4], default=None)


def read_curves() -> list[dict]:
    """
    The reference curves: by `preset`, `model_type`, `data` and `metric` ("k-NN accuracy"), `points` of images seen and
    the mean over seeds. `benchmarks/reference_curves.py` writes them.
    """
    text = resources.files(__package__).joinpath("reference_curves.json").read_text(encoding="utf-8")
    return json.loads(text)["curves"]


def describe_reference(
    curves: list[dict], preset: str | None, model_type: str, images_seen: int, why_not: str | None = None
) -> str:
    """
    What the preset's curves say at as many images, in a line; or why nothing is said.

    Args:
        curves (`list[dict]`): As [`read_curves`] gives.
        preset (`str`, *optional*): None where the network is no preset's.
        why_not (`str`, *optional*): What makes it none.
    """
    if preset is None:
        return f"No reference curve: {why_not or 'the network is that of no preset'}."
    mine = [curve for curve in curves if curve["preset"] == preset and curve["model_type"] == model_type]
    if not mine:
        there = sorted({f"{curve['preset']} {curve['model_type']}" for curve in curves})
        return f"No reference curve of {preset} {model_type} (there are: {', '.join(there) or 'none yet'})."
    said = []
    for curve in mine:
        images, value = at_images(curve["points"], images_seen)
        said.append(f"{curve['metric']} {value:.1f}%" + ("" if images == images_seen else f" (after {images:,})"))
    return f"The preset {preset} on {mine[0]['data']} after {images_seen:,} images: {', '.join(said)}."


def at_images(points: list[list[float]], images_seen: int) -> tuple[int, float]:
    """
    A curve's value at so many images, straight between its points; before the first and after the last one, that one.

    Args:
        points (`list`): Pairs of images seen and value, in ascending order.

    Returns:
        The images that the value is of, and the value.
    """
    images, values = zip(*points, strict=True)
    place = int(min(max(images_seen, images[0]), images[-1]))
    return place, float(np.interp(place, images, values))
