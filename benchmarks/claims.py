"""
What the papers claim, re-tested at the size of `comparison.py`: which of it its results show.

A claim compares two networks by the same metric, or several such pairs of them. It is "seen" where every pair is apart
by the margin, and by more than two standard errors once there are three seeds; "not seen" where one is not; and "not
measured" where a number is missing. The table stands between two comments in `docs/results.md` and is written, as all
tables are, by `python benchmarks/comparison.py --table`:

    <!-- claims -->
    <!-- end of claims -->
"""

import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

FROZEN = ("linear/[CLS]", "linear/mean", "attentive")
METHODS = {
    "MAE": "MAE",
    "PiLaMIM": "PiLaMIM",
    "OCL": "OCL",
    "TEC": "TEC (base: MAE)",
    "dBOT": "dBOT (2 stages, first teacher MAE)",
}
_MARKED = re.compile(r"(<!-- claims -->\n).*?(<!-- end of claims -->)", re.DOTALL)


@dataclass(frozen=True)
class Pair:
    """`better` is to be above `worse` by `margin` points in one of the metrics: the one where it is furthest above."""

    data: str
    better: str
    worse: tuple[str, ...]
    metrics: tuple[str, ...]
    margin: float = 0.0


@dataclass(frozen=True)
class Claim:
    text: str
    pairs: tuple[Pair, ...]


def _frozen(data: str, better: str, *worse: str, labels: tuple[str, ...] = ("label",), margin: float = 0.0):
    """A pair a label: by linear or attentive probes."""
    return tuple(Pair(data, better, worse, tuple(f"{m}/{label}" for m in FROZEN), margin) for label in labels)


CLAIMS = (
    *(
        Claim(
            f"{name}: 10 points above raw pixels and the untrained network (CIFAR-10, linear or attentive)",
            _frozen("cifar10", method, "raw pixels", "untrained", margin=10.0),
        )
        for name, method in METHODS.items()
    ),
    *(
        Claim(
            f"{name}, fine-tuned with 1% of the labels: 10 points above training from scratch (CIFAR-10)",
            (Pair("cifar10", method, ("untrained",), ("fine-tuned/1%",), 10.0),),
        )
        for name, method in METHODS.items()
    ),
    Claim("PiLaMIM above MAE for classes (CIFAR-10)", _frozen("cifar10", "PiLaMIM", "MAE")),
    Claim(
        "PiLaMIM above MAE for low-level labels (scenes: count and distance)",
        _frozen("scenes", "PiLaMIM", "MAE", labels=("count", "distance")),
    ),
    Claim(
        "PiLaMIM with its [CLS] loss above without (CIFAR-10)",
        _frozen("cifar10", "PiLaMIM", "PiLaMIM without [CLS] loss"),
    ),
    Claim(
        "TEC above its base, and above its base trained on for as long (CIFAR-10)",
        _frozen("cifar10", "TEC (base: MAE)", "MAE") + _frozen("cifar10", "TEC (base: MAE)", "MAE, twice as long"),
    ),
    Claim("OCL: steps of 256 images above steps of 64 (CIFAR-10)", _frozen("cifar10", "OCL", "OCL, 64 a step")),
    Claim(
        "dBOT: the second stage above the first (CIFAR-10)",
        (
            Pair(
                "cifar10",
                "dBOT (2 stages, first teacher MAE)",
                ("dBOT (2 stages, first teacher MAE), after stage 0",),
                tuple(f"{metric}/label" for metric in FROZEN[:2]),
            ),
        ),
    ),
)


def differences(pair: Pair, found: dict) -> Iterator[tuple[float, float, str]]:
    """(points above the best of the others, standard error, what was compared) for each metric that all have."""
    methods = found.get(pair.data, {})
    for metric in pair.metrics:
        numbers = [_values(methods.get(name, {}), metric) for name in (pair.better, *pair.worse)]
        if not numbers[0] or not all(numbers[1:]):
            continue
        best = max(numbers[1:], key=statistics.mean)
        above = statistics.mean(numbers[0]) - statistics.mean(best)
        error = math.sqrt(sum(statistics.variance(v) / len(v) for v in (numbers[0], best) if len(v) > 1))
        label = metric.rpartition("/")[2]
        name = metric.replace("/", ", ") if label != "label" else metric.rpartition("/")[0].replace("/", ", ")
        seeds = len(numbers[0])
        yield (
            above,
            error,
            f"{statistics.mean(numbers[0]):.1f} and {statistics.mean(best):.1f} ({name}; "
            f"{seeds} seed{'s' if seeds > 1 else ''})",
        )


def _values(metrics: dict, metric: str) -> list[float]:
    # Raw pixels have one number for [CLS] and mean, and no tokens to attend to.
    kind, _, rest = metric.partition("/")
    for name in (metric, f"{kind}/{rest.partition('/')[2]}", f"linear/{rest}" if kind == "attentive" else metric):
        if metrics.get(name):
            return metrics[name]
    return []


def judge(claim: Claim, found: dict) -> tuple[str, str]:
    """("seen", "not seen" or "not measured", the numbers that say so)."""
    numbers, seen = [], True
    for pair in claim.pairs:
        compared = list(differences(pair, found))
        if not compared:
            return "not measured", ""
        above, error, text = max(compared)
        seen &= above >= pair.margin and above > 2 * error
        numbers.append(text)
    return "seen" if seen else "not seen", "; ".join(numbers)


def table(found: dict) -> str:
    """A table of Markdown: a row a claim."""
    lines = ["| claim | | the two numbers, where they are furthest apart |", "|---|---|---|"]
    for claim in CLAIMS:
        verdict, numbers = judge(claim, found)
        lines.append(f"| {claim.text} | {f'**{verdict}**' if verdict == 'not seen' else verdict} | {numbers} |")
    return "\n".join(lines) + "\n"


def renewed(text: str, found: dict) -> str:
    """A text with its table of claims written anew."""
    return _MARKED.sub(lambda match: match[1] + table(found) + match[2], text)
