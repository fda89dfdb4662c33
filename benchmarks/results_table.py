"""
The results of `comparison.py`: one tidy table, and what is made of it.

`results/comparison.csv` has a row a number: data, method, seed, images seen, metric, value, commit, machine. A metric
is what was scored, of which features, for which label, with slashes between: `k-NN/[CLS]/count`, `attentive/label`,
`RankMe/mean`, `fine-tuned/1%`, `seconds`. Raw pixels and the untrained network are methods that have seen 0 images.

Tables in README, docs and cards stand between two comments, the first of which says what is in them:

    <!-- comparison: DATA | METHOD; METHOD; ... or all | TITLE = METRIC; TITLE = METRIC; ... -->
    <!-- end of comparison -->

`python benchmarks/comparison.py --table` writes them anew. `frozen/[CLS]/count` stands for k-NN / linear.
"""

import csv
import fcntl
import re
import statistics
from collections import defaultdict
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import claims
from hf_mim.files import replacing, write_text

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "comparison.csv"
COLUMNS = ["data", "method", "seed", "images_seen", "metric", "value", "commit", "machine"]
REFERENCES = ["raw pixels", "untrained"]
_MARKED = re.compile(r"(<!-- comparison: (.*?) -->\n).*?(<!-- end of comparison -->)", re.DOTALL)


def read(path: Path = RESULTS) -> list[dict]:
    """Rows of the table: `seed` and `images_seen` are integers (None where there is none), `value` is a float."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["value"] = float(row["value"])
        row["seed"], row["images_seen"] = (int(row[key]) if row[key] else None for key in ("seed", "images_seen"))
    return rows


def append(rows: list[dict], path: Path = RESULTS) -> None:
    """Adds rows, all or none of them, whoever else adds some at the same time; a number that is there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table = {_key(row): row for row in read(path)} | {_key(row): row for row in rows}
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table[key] for key in sorted(table, key=lambda key: tuple(map(str, key))))


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in ("data", "method", "seed", "images_seen", "metric"))


def scores(rows: list[dict]) -> dict:
    """{data: {method: {metric: [one number a seed]}}}, each after the most images that the method has seen."""
    last: dict = {}
    for row in rows:
        key = row["data"], row["method"], row["metric"], row["seed"]
        if key not in last or (row["images_seen"] or 0) >= (last[key]["images_seen"] or 0):
            last[key] = row
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for (data, method, metric, _), row in last.items():
        found[data][method][metric].append(row["value"])
    return found


def rounded(value: Decimal) -> str:
    """With one digit after the point, halves up: a decimal's, since 28.45 as a binary number is a little less."""
    return str(value.quantize(Decimal("0.1"), rounding=ROUND_HALF_UP))


def mean_and_spread(values: list[float]) -> str:
    # As they stand in the table: a mean of halves is a half.
    decimals = [Decimal(repr(value)) for value in values]
    # Raw pixels have no seed.
    spread = f" ± {rounded(statistics.stdev(decimals))}" if len(set(values)) > 1 else ""
    return f"{rounded(statistics.mean(decimals))}{spread}"


def cell(metrics: dict[str, list[float]], metric: str) -> str:
    """What a table says of a metric: mean and standard deviation over the seeds."""
    kind, _, rest = metric.partition("/")
    if kind == "frozen":
        both = [cell(metrics, f"{score}/{rest}") for score in ("k-NN", "linear")]
        return " / ".join(both) if all(both) else ""
    # Raw pixels are neither [CLS] nor mean.
    for name in (metric, f"{kind}/{rest.partition('/')[2]}"):
        if name in metrics:
            return mean_and_spread(metrics[name])
    return ""


def order_of(methods, known: list[str]) -> list[str]:
    """References first, then the methods as they are listed in `known`, each after its earlier stages."""
    places = {name: place for place, name in enumerate([*REFERENCES, *known])}

    def place(name: str):
        base, _, stage = name.partition(", after stage ")
        return places.get(base, len(places)), 0 if stage else 1, name

    return sorted(methods, key=place)


def markdown(found: dict, data: str, methods: list[str], columns: dict[str, str]) -> str:
    """A table of Markdown: a row a method, and for each title its metric."""
    lines = ["| | " + " | ".join([*columns, "seeds"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for method in methods:
        metrics = found.get(data, {}).get(method, {})
        values = [cell(metrics, metric) for metric in columns.values()]
        lines.append(f"| {method} | {' | '.join(values)} | {max(map(len, metrics.values()), default=0)} |")
    return "\n".join(lines) + "\n"


def all_tables(found: dict, known: list[str]) -> str:
    """Every number: a table for each data set and kind of features."""
    lines = ["Written by `python benchmarks/comparison.py --table`. k-NN / linear accuracy in %, mean and standard"]
    lines += ["deviation over the seeds, after the most images that a method has seen.", ""]
    for data, methods in sorted(found.items()):
        metrics = {metric for scored in methods.values() for metric in scored}
        names = order_of(methods, known)
        labels = sorted({metric.split("/")[-1] for metric in metrics if metric.startswith("k-NN/")})
        for features in ("[CLS]", "mean"):
            columns = {label: f"frozen/{features}/{label}" for label in labels} | {"RankMe": f"RankMe/{features}"}
            lines += [f"### {data}: {features}", "", markdown(found, data, names, columns)]
        rest = sorted(m for m in metrics if m.split("/")[0] in ("attentive", "fine-tuned", "accuracy"))
        if rest:
            lines += [f"### {data}: attentive probes, and trained with labels", ""]
            lines += [markdown(found, data, names, {metric.replace("/", ", "): metric for metric in rest})]
    return "\n".join(lines)


def marked_files(root: Path = REPOSITORY) -> list[Path]:
    """README, docs and cards that have a table of the comparison."""
    paths = [root / "README.md", *sorted((root / "docs").rglob("*.md")), *sorted((root / "model_cards").glob("*.md"))]
    return [path for path in paths if path.is_file() and "<!-- end of c" in path.read_text(encoding="utf-8")]


def renewed(text: str, found: dict, known: list[str]) -> str:
    """A text with its marked tables, and that of the claims, written anew."""

    def table(match: re.Match) -> str:
        data, methods, columns = (part.strip() for part in match[2].split("|"))
        names = [name.strip() for name in methods.split(";")]
        if names == ["all"]:
            names = [name for name in order_of(found.get(data, {}), known) if ", after stage " not in name]
        pairs = (column.rpartition("=") for column in columns.split(";"))
        columns = {title.strip(): metric.strip() for title, _, metric in pairs}
        return match[1] + markdown(found, data, names, columns) + match[3]

    return claims.renewed(_MARKED.sub(table, text), found)


def stale_files(found: dict, known: list[str], root: Path = REPOSITORY) -> list[Path]:
    """Which files have a table that is not what the results say."""
    texts = {path: path.read_text(encoding="utf-8") for path in marked_files(root)}
    stale = [path for path, text in texts.items() if renewed(text, found, known) != text]
    whole = root / "benchmarks" / "results" / "comparison.md"
    return stale if whole.is_file() and whole.read_text() == all_tables(found, known) else [*stale, whole]


def write_tables(found: dict, known: list[str], root: Path = REPOSITORY) -> None:
    """Writes `results/comparison.md`, and the marked tables everywhere."""
    write_text(root / "benchmarks" / "results" / "comparison.md", all_tables(found, known))
    for path in marked_files(root):
        write_text(path, renewed(path.read_text(encoding="utf-8"), found, known))


def curves(rows: list[dict], data: str) -> dict:
    """{method: {metric: {images seen: ([values], [seconds])}}} of the methods that were looked at on their way."""
    seconds = {
        (row["method"], row["seed"], row["images_seen"]): row["value"]
        for row in rows
        if row["data"] == data and row["metric"] == "seconds"
    }
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: ([], []))))
    for row in rows:
        place = row["method"], row["seed"], row["images_seen"]
        if row["data"] == data and row["metric"] != "seconds" and row["images_seen"] is not None:
            values, times = found[row["method"]][row["metric"]][row["images_seen"]]
            values.append(row["value"])
            times += [seconds[place]] if place in seconds else []
    return found


def draw_curves(rows: list[dict], data: str, label: str, path: Path, known: list[str]) -> None:
    """Accuracy against images seen and against seconds, a row a kind of score; references are lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = curves(rows, data)
    metrics = [f"k-NN/[CLS]/{label}", f"k-NN/mean/{label}", f"linear/[CLS]/{label}", f"linear/mean/{label}"]
    metrics += [f"attentive/{label}"]
    metrics = [metric for metric in metrics if any(metric in scored for scored in found.values())]
    figure, panels = plt.subplots(
        len(metrics), 2, figsize=(10, 2.8 * len(metrics)), squeeze=False, sharey="row", layout="constrained"
    )
    colors = {method: f"C{number % 10}" for number, method in enumerate(order_of(found, known))}
    for metric, (by_images, by_time) in zip(metrics, panels, strict=True):
        for method, color in colors.items():
            points = sorted(found[method].get(metric, {}).items())
            # Raw pixels have one number for [CLS] and mean.
            kind, _, rest = metric.partition("/")
            points = points or sorted(found[method].get(f"{kind}/{rest.partition('/')[2]}", {}).items())
            means = [statistics.mean(values) for _, (values, _) in points]
            if method in REFERENCES and points:
                for panel in (by_images, by_time):
                    panel.axhline(means[0], color=color, linestyle=":", label=method)
            elif points:
                by_images.plot([n for n, _ in points], means, color=color, marker="o", markersize=3, label=method)
                times = [statistics.mean(times) if times else None for _, (_, times) in points]
                if None not in times:
                    by_time.plot(times, means, color=color, marker="o", markersize=3)
        by_images.set(xlabel="images seen", ylabel=f"{metric.replace('/', ', ')}, %")
        by_time.set(xlabel="seconds")
        for panel in (by_images, by_time):
            panel.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def draw_scores(found: dict, known: list[str], path: Path) -> None:
    """k-NN and linear accuracy of [CLS] of every method, a panel a label; a line where raw pixels are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted(
        {
            (data, metric.split("/")[2])
            for data, methods in found.items()
            for metrics in methods.values()
            for metric in metrics
            if metric.startswith("k-NN/[CLS]/")
        }
    )
    methods = {name for data in found for name in found[data] if name != "raw pixels"}
    names = order_of(methods, known)
    size = (3.6 + 2.3 * len(panels), 1.4 + 0.3 * len(names))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained", sharey=True)
    for (data, label), axis in zip(panels, axes[0], strict=True):
        for offset, (score, color) in enumerate((("k-NN", "#4c72b0"), ("linear", "#dd8452"))):
            values = [found[data].get(name, {}).get(f"{score}/[CLS]/{label}", []) for name in names]
            means = [statistics.mean(v) if v else 0.0 for v in values]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            places = [place + 0.4 * offset for place in range(len(names))]
            axis.barh(places, means, 0.38, xerr=spread, color=color, label=score, error_kw={"elinewidth": 0.8})
            pixels = found[data].get("raw pixels", {}).get(f"{score}/{label}")
            if pixels:
                axis.axvline(statistics.mean(pixels), color=color, linestyle=":", label=f"raw pixels, {score}")
        axis.set_yticks([place + 0.2 for place in range(len(names))], names)
        axis.set_title(f"{data}: {label}", fontsize=9)
        axis.set_xlabel("accuracy of [CLS], %", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0][0].invert_yaxis()
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=8, frameon=False
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)
