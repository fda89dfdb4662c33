"""How good features are: k-NN and linear accuracy for every label, and RankMe, as numbers and as a table."""

import torch
from accelerate import PartialState

from .encoders import PIXELS
from .features import Features
from .knn import knn_predict, rank_me
from .linear import linear_probe_predict
from .multi_label import mean_average_precision

RAW_PIXELS = "raw pixels"
_FEW = 50
# Of `knn_predict`.
_NEIGHBOURS = 20


def evaluate_features(
    train: Features,
    test: Features,
    train_labels: dict[str, torch.Tensor],
    test_labels: dict[str, torch.Tensor],
    *,
    answers: dict | None = None,
) -> dict:
    """
    k-NN and linear accuracy for every label, and RankMe of the test features.

    Args:
        train, test: As `extract_features` gives.
        train_labels, test_labels: By name, `torch.LongTensor` of shape `(num_pictures,)`; -1 where there is none. Or,
            of several labels a picture, `(num_pictures, num_labels)`.
        answers (`dict`, *optional*): Filled in: by encoder's name, pooling, "knn" or "linear" and label, which test
            pictures are told: float `torch.Tensor` of shape `(num_pictures,)`, 1, 0, or NaN without a label. Labels of
            which a picture may have several, and those that are all the same, are left out.

    Returns:
        `dict` for JSON: `num_train`, `num_test`, `notes` (what is to be known of the numbers), and `features`: by
        name, `knn` and `linear` (percent by label; None of features that are not finite) and `rank_me` (None for raw
        pixels, and features that are not finite).
    """
    origin = {feature_name(name, pooling): (name, pooling) for name, pooled in train.items() for pooling in pooled}
    pairs = {
        feature_name(name, pooling): (features, test[name][pooling])
        for name, pooled in train.items()
        for pooling, features in pooled.items()
    }
    first_train, first_test = next(iter(pairs.values()))
    results = {"num_train": len(first_train), "num_test": len(first_test), "features": {}}
    # Features are kept on the CPU; their similarities are computed where there is a faster device.
    device = PartialState().device
    results["notes"] = [note for label in train_labels for note in label_notes(label, train_labels, test_labels)]
    for name, (train_features, test_features) in pairs.items():
        finite = bool(train_features.isfinite().all() and test_features.isfinite().all())
        if not finite:
            results["notes"].append(f"The features {name!r} are not finite: they are not evaluated.")
            scores = {"knn": dict.fromkeys(train_labels), "linear": dict.fromkeys(train_labels), "rank_me": None}
            results["features"][name] = scores
            continue
        scores = {"knn": {}, "linear": {}, "rank_me": None if name == RAW_PIXELS else rank_me(test_features)}
        for label in train_labels:
            known = labelled(train_features, train_labels[label])
            asked, right = labelled(test_features, test_labels[label])
            for score, predicted in (
                ("knn", knn_predict(*known, asked, device=device)),
                ("linear", linear_probe_predict(*known, asked)),
            ):
                scores[score][label] = accuracy(predicted, right)
                if answers is not None and tells_apart(right):
                    network, pooling = origin[name]
                    by_label = answers.setdefault(network, {}).setdefault(pooling, {}).setdefault(score, {})
                    by_label[label] = told(predicted, test_labels[label])
        results["features"][name] = scores
    return results


def accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent of labels that are told; of several a picture, scores being given, the mean average precision."""
    if predicted.ndim == 2:
        return mean_average_precision(predicted, labels)
    return 100.0 * (predicted == labels).double().mean().item()


def tells_apart(labels: torch.Tensor) -> bool:
    """Whether labels are classes, one a picture, and not all the same."""
    return labels.ndim == 1 and len(labels.unique()) > 1


def told(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which labels (-1: none) the predictions for those that are there are right of: 1, 0, or NaN for none."""
    right = torch.full(labels.shape, float("nan"))
    known = labels >= 0
    right[known] = (predicted.cpu() == labels[known]).float()
    return right


def label_notes(
    label: str,
    train_labels: dict[str, torch.Tensor],
    test_labels: dict[str, torch.Tensor],
    num_neighbours: int = _NEIGHBOURS,
) -> list[str]:
    """What is to be known of the numbers that a label gives; `num_neighbours`: of k-NN, 0 where it is not asked."""
    if train_labels[label].ndim == 2:
        return [f"Of {label!r} a picture may have several: what is given is the mean average precision."]
    train, test = (labels[label][labels[label] >= 0] for labels in (train_labels, test_labels))
    if len(test.unique()) == 1:
        return [f"All held-out pictures have the same {label!r}: how often it is told says nothing."]
    counts = train.bincount(minlength=int(test_labels[label].max()) + 1)[test.unique()]
    unseen, few = int((counts == 0).sum()), int(((counts > 0) & (counts < num_neighbours)).sum())
    notes = []
    if unseen:
        notes.append(f"{unseen} classes of {label!r} have no training picture, and cannot be told.")
    if few:
        notes.append(
            f"{few} classes of {label!r} have fewer training pictures than the {num_neighbours} neighbours of k-NN."
        )
    return notes


def labelled(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that have a label (not -1)."""
    known = labels >= 0 if labels.ndim == 1 else (labels >= 0).all(dim=1)
    return (features, labels) if known.all() else (features[known], labels[known])


def feature_name(name: str, pooling: str) -> str:
    """What features are called in tables: "trained, [CLS]"."""
    if pooling == PIXELS:
        return name
    return f"{name}, {'[CLS]' if pooling == 'cls' else pooling}"


def results_table(results: dict) -> list[list[str]]:
    """
    Rows of text, the head first: features; k-NN and linear accuracy as `knn / linear` for each label; RankMe. Then
    the accuracies of attentive probes, where there are `results["attentive"]`, as `evaluate_attentively` gives.
    """
    labels = list(next(iter(results["features"].values()))["knn"])
    rows = [["features", *labels, "RankMe"]]
    for name, scores in results["features"].items():
        rank = "" if scores["rank_me"] is None else f"{scores['rank_me']:.1f}"
        cells = [f"{_number(scores['knn'][label])} / {_number(scores['linear'][label])}" for label in labels]
        rows.append([name, *cells, rank])
    for name, accuracies in results.get("attentive", {}).get("accuracy", {}).items():
        rows.append([f"{name}, attentive", *(_number(accuracies.get(label)) for label in labels), ""])
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def describe_results(results: dict) -> str:
    """What the numbers of `results_table` are."""
    train, test = results["num_train"], results["num_test"]
    few = few_pictures(test)
    if not next(iter(results["features"].values()))["knn"]:
        return f"The data has no labels: RankMe of the features of {test} held-out pictures{few}"
    notes = list(results.get("notes", ()))
    if results.get("attentive", {}).get("accuracy"):
        attentive = results["attentive"]
        notes.append(
            f"Attentive: a probe with one query over the patches, {attentive['num_epochs']} epochs of "
            f"{attentive['num_train']} of the pictures, tested on {attentive['num_test']}"
        )
    notes = "".join(f". {note.rstrip('.')}" for note in notes)
    return f"k-NN / linear accuracy in % ({train} labelled pictures, tested on {test} held out{few}){notes}"


def dense_table(results: dict) -> list[list[str]]:
    """Rows of text, the head first, of what `evaluate_dense` gives."""
    columns = {
        "k-NN mIoU": ("knn_miou", ".1f"),
        "linear mIoU": ("linear_miou", ".1f"),
        "depth R2": ("depth_r2", ".1f"),
        "RMSE": ("depth_rmse", ".3f"),
        "delta_1": ("depth_delta1", ".1f"),
    }
    first = next(iter(results["features"].values()))
    columns = {head: column for head, column in columns.items() if column[0] in first}
    rows = [["patch features", *columns]]
    for name, scores in results["features"].items():
        rows.append(
            [name, *("-" if scores[key] is None else format(scores[key], form) for key, form in columns.values())]
        )
    return rows


def describe_dense(results: dict) -> str:
    """What the numbers of `dense_table` are."""
    parts = []
    if "classes" in results:
        parts.append(f"mean IoU over {len(results['classes'])} classes in %")
    if "depth_r2" in next(iter(results["features"].values())):
        parts.append("linear depth: R2 in % around the mean depth at each pixel, RMSE, and delta_1 in %")
    return (
        f"Frozen patches, judged at each pixel ({results['num_train']} training pictures, tested on "
        f"{results['num_test']} held out): {'; '.join(parts)}"
    )


def described_tables(results: dict) -> list[tuple[str, list[list[str]]]]:
    """All that `results` has: what the numbers are, and their table, head first; of pictures, then of patches."""
    tables = [(describe_results(results), results_table(results))]
    if results.get("dense"):
        tables.append((describe_dense(results["dense"]), dense_table(results["dense"])))
    return tables


def few_pictures(number: int) -> str:
    """What to say beside an accuracy on so many pictures; nothing from 50 on."""
    if number >= _FEW:
        return ""
    return f", which are few: one picture more or less is {100 / max(number, 1):.1f} points"


def text_table(rows: list[list[str]]) -> str:
    """Rows as aligned columns for the terminal, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def markdown_table(rows: list[list[str]]) -> str:
    """Rows as a table of Markdown, the head first."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))
