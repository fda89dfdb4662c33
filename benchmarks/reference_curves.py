"""
The reference curves that a verdict names, from the learning curves on CIFAR-10 in `results/comparison.csv`.

    python benchmarks/reference_curves.py

They go into `src/hf_mim/evaluation/reference_curves.json`, which is part of the package: for each method k-NN and
linear accuracy of the better of [CLS] and mean, the mean over seeds, against images seen.
"""

import statistics
from collections import defaultdict

import results_table
from hf_mim.files import write_json

PATH = results_table.REPOSITORY / "src" / "hf_mim" / "evaluation" / "reference_curves.json"
# Methods of the comparison that are the presets as they are: preset and model_type.
PRESETS = {
    "MAE": ("tiny", "vit_mae"),
    "PiLaMIM": ("tiny", "pilamim"),
    "OCL": ("tiny", "ocl"),
    "TEC (base: MAE)": ("tiny", "tec"),
    "dBOT (2 stages)": ("tiny", "dbot"),
    "I-JEPA": ("tiny", "ijepa"),
    "MAE, mini": ("mini", "vit_mae"),
    "PiLaMIM, mini": ("mini", "pilamim"),
}
_SCORES = {"k-NN": "k-NN accuracy", "linear": "linear accuracy"}


def curves_of(rows: list[dict]) -> list[dict]:
    """The curves, as `hf_mim.evaluation.verdict.read_curves` gives them; none of a table without such rows."""
    values = defaultdict(list)
    for row in rows:
        score, _, rest = row["metric"].partition("/")
        pooling, _, label = rest.partition("/")
        if row["data"] == "cifar10" and label == "label" and score in _SCORES:
            values[row["method"], score, row["images_seen"], pooling].append(row["value"])
    means = defaultdict(dict)
    for (method, score, images, _), found in values.items():
        curve = means[method, score]
        curve[images] = max(curve.get(images, 0.0), round(statistics.mean(found), 2))
    # The comparison's untrained network is tiny's.
    starts = {("tiny", score): means["untrained", score] for score in _SCORES}
    return [
        {
            "preset": preset,
            "model_type": model_type,
            "data": "CIFAR-10",
            "metric": name,
            "points": [
                list(point) for point in sorted((starts.get((preset, score), {}) | means[method, score]).items())
            ],
        }
        for method, (preset, model_type) in PRESETS.items()
        for score, name in _SCORES.items()
        if means.get((method, score))
    ]


def main() -> None:
    curves = curves_of(results_table.read())
    write_json(PATH, {"curves": curves})
    print(f"{len(curves)} curves in {PATH}")


if __name__ == "__main__":
    main()
