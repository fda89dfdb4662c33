"""The representation report: what one or several models' features are worth, in numbers and pictures."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub.constants import HF_HOME
from transformers import AutoConfig

from ..data.arguments import DataArguments
from ..data.image_processing import evaluation_transform
from ..data.transforms import sample_generator
from ..evaluation.attentive_probe import evaluate_attentively
from ..evaluation.batches import transformed_pictures
from ..evaluation.dense import DENSE_PICTURE, DENSE_ROWS, annotated_maps, evaluate_dense, raw_patches
from ..evaluation.encoders import RawPixels, blocks_read, untrained_encoder
from ..evaluation.features import Features, extract_features, labelled_splits, shared_labels
from ..evaluation.pictures import label_rows, to_rgb, unnormalise
from ..evaluation.properties import draw_attention_distances, draw_singular_shares, encoder_properties
from ..evaluation.report import (
    RAW_PIXELS,
    describe_results,
    described_tables,
    evaluate_features,
    markdown_table,
    text_table,
)
from ..evaluation.representation import (
    attention_pictures,
    draw_scores,
    draw_tsne,
    embed_tsne,
    enlarge,
    patch_colours,
    require_sklearn,
)
from ..files import save_picture, write_json, write_text
from ..models.vit.repository import locate
from ..models.vit.sizes import as_pair
from ..registry import method_class
from ..training.arguments import ViTTrainingArguments
from ..training.command import parse_arguments, say
from ..training.errors import run_job
from ..training.run_lock import only_run_in
from .loading import Subject, load_subject

# Principal components are those of more pictures than are shown.
_PCA_PICTURES = 64
_MAX_TSNE_CLASSES = 20
_LEAST_TSNE = 5
_PROPERTY_PICTURES = 256
# The shorter side of a picture on a sheet, at least.
_TILE = 112


@dataclass
class ReportArguments(ViTTrainingArguments):
    """
    Which models are looked at, and how. Of transformers' `TrainingArguments` those of devices, precision, seed, batch
    for evaluation and data loading count.
    """

    model_names_or_paths: list[str] | None = field(
        default=None,
        metadata={
            "aliases": ["--model_name_or_path"],
            "help": "One or several ViTs: hf_mim's, ViT, ViTMAE, DINOv2, DINOv3, CLIP.",
        },
    )
    poolings: list[str] = field(
        default_factory=lambda: ["cls", "mean"],
        metadata={"help": "cls, mean (of the patches), last_N ([CLS] of the last N blocks). t-SNE is of the first."},
    )
    references: bool = field(
        default=True, metadata={"help": "Evaluate raw pixels and the untrained networks beside the models."}
    )
    num_shown: int = field(default=8, metadata={"help": "Pictures on the sheets."})
    max_labelled: int = field(default=10000, metadata={"help": "Training pictures for k-NN and probe, at most."})
    max_tested: int = field(default=4000, metadata={"help": "Held-out pictures for k-NN, probe and RankMe, at most."})
    tsne_label: str | None = field(
        default=None, metadata={"help": "The label that colours t-SNE. Default: the one of most classes, up to 10."}
    )
    tsne_classes: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes in t-SNE. Default: all, or the first 10."}
    )
    num_tsne: int = field(default=1000, metadata={"help": "Pictures in t-SNE, at most."})
    feature_cache_dir: str = field(
        default=os.path.join(HF_HOME, "hf_mim", "features"), metadata={"help": "Where features are kept."}
    )

    def __post_init__(self):
        if not self.model_names_or_paths:
            raise ValueError("--model_names_or_paths is missing: the folders or repositories of the models.")
        if len(set(self.model_names_or_paths)) < len(self.model_names_or_paths):
            raise ValueError(f"--model_names_or_paths has a model twice: {', '.join(self.model_names_or_paths)}.")
        if self.output_dir is None:
            raise ValueError("--output_dir is missing: where the report goes.")
        for pooling in self.poolings:
            blocks_read(pooling)
        for name, least in (("num_shown", 1), ("max_labelled", 2), ("max_tested", 2), ("num_tsne", 5)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}.")
        super().__post_init__()


def main(argv: list[str] | None = None) -> int:
    """`examples/run_representation_report.py`: reads the flags, writes the report. Returns the exit status."""
    return run_job(lambda: report(*parse_arguments((ReportArguments, DataArguments), argv, {})))


def report(args: ReportArguments, data_args: DataArguments) -> int:
    """Writes `README.md`, `report.json` and the pictures into `output_dir`."""
    with only_run_in(args.output_dir):
        return _report(args, data_args)


def _report(args: ReportArguments, data_args: DataArguments) -> int:
    require_sklearn()
    subjects = {
        name: load_subject(path, data_args, seed=args.seed, device=args.device)
        for name, path in short_names(args.model_names_or_paths).items()
    }
    splits = {
        name: labelled_splits(subject.pictures, args.max_labelled, args.max_tested)
        for name, subject in subjects.items()
    }
    train, test = next(iter(splits.values()))
    train_labels, test_labels = shared_labels(train, test, multi_label=True)
    # A point has one colour.
    colours = {name: column for name, column in test_labels.items() if column.ndim == 1}
    chosen = choose_classes(args, colours, test.label_names) if colours else None
    for subject in subjects.values():
        for pooling in args.poolings:
            depth = subject.encoder.model.config.num_hidden_layers
            if blocks_read(pooling) > depth:
                raise ValueError(f"--poolings {pooling}: {subject.name} has {depth} blocks.")

    features = tuple(_features(subjects, splits, split, args) for split in range(2))
    attentive = _attentive(subjects, splits, train_labels, test_labels, args)
    if not PartialState().is_main_process:
        PartialState().wait_for_everyone()
        return 0
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = evaluate_features(*features, train_labels, test_labels) | {"attentive": attentive}
    dense, dense_rows = _dense(subjects, splits, args)
    results |= {"dense": dense} if dense else {}
    for what, rows in described_tables(results):
        say(f"\n{what}\n{text_table(rows)}")
    data = data_args.dataset_name or data_args.train_dir or "scenes (embedded)"
    settings = {"models": {name: subject.name for name, subject in subjects.items()}, "data": data, "seed": args.seed}
    # Before the pictures, so that numbers are kept whatever comes of these.
    write_json(folder / "report.json", settings | results)

    sections = []
    if train_labels:
        draw_scores(results, list(subjects), folder / "scores.png")
        sections.append(("Scores", "scores.png", "k-NN (k = 20) and a linear probe (logistic regression)."))
        if chosen is not None:
            drawn = _tsne(folder, args, features[1], list(subjects), test_labels, test.label_names, *chosen)
            sections += [drawn] if drawn is not None else []
    if dense:
        save_picture(folder / DENSE_PICTURE, label_rows(dense_rows))
        sections.append(("Segmentation and depth", DENSE_PICTURE, "What linear layers on frozen patches tell."))
    sections += _sheets(folder, args, subjects, {name: pair[1] for name, pair in splits.items()})
    properties = _properties(subjects, {name: pair[1] for name, pair in splits.items()})
    sections += _property_plots(folder, properties)
    names = {name: subject.name for name, subject in subjects.items()}
    write_text(folder / "README.md", _readme(args, names, data, results, sections))
    settings["pictures"] = [file for _, file, _ in sections]
    settings["properties"] = {
        name: {key: values.tolist() for key, values in found.items()} for name, found in properties.items()
    }
    write_json(folder / "report.json", settings | results)
    say(f"\nThe report is {folder / 'README.md'}.")
    PartialState().wait_for_everyone()
    return 0


def short_names(paths: list[str]) -> dict[str, str]:
    """What models are called on pictures: as many of the last parts of their paths as tell them apart."""
    parts = [Path(path).parts for path in paths]
    for number in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-number:]) for part in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    return dict(zip(paths, paths, strict=True))


def choose_classes(
    args: ReportArguments, labels: dict[str, torch.Tensor], names: dict[str, list[str]]
) -> tuple[str, list[int]] | None:
    """
    The label that colours t-SNE, and its classes.

    Raises:
        ValueError: If a label or a class is asked for that is not there.
    """
    label = args.tsne_label
    if label is None:
        fitting = [name for name in labels if len(names[name]) <= 10] or list(labels)
        label = max(fitting, key=lambda name: len(names[name]))
    if label not in labels:
        raise ValueError(f"--tsne_label {label}: the data has the labels {', '.join(labels)}.")
    if args.tsne_classes is None:
        return label, list(range(min(10, len(names[label]))))
    unknown = [name for name in args.tsne_classes if name not in names[label]]
    if unknown:
        raise ValueError(f"--tsne_classes {', '.join(unknown)}: {label} has {', '.join(names[label][:50])}.")
    if len(args.tsne_classes) > _MAX_TSNE_CLASSES:
        raise ValueError(f"--tsne_classes: at most {_MAX_TSNE_CLASSES} can be told apart by colour.")
    return label, [names[label].index(name) for name in args.tsne_classes]


def _features(subjects: dict[str, Subject], splits, split: int, args: ReportArguments) -> Features:
    features: Features = {}
    known: dict[str, str] = {}
    for number, (name, subject) in enumerate(subjects.items()):
        encoders = {name: subject.encoder}
        if args.references:
            untrained = untrained_encoder(subject.encoder, args.seed)
            # Models of one architecture share their reference.
            if known.setdefault(untrained.digest(), name) == name:
                encoders[f"{name} untrained"] = untrained
            if number == 0:
                encoders = {RAW_PIXELS: RawPixels()} | encoders
        features |= extract_features(
            encoders,
            splits[name][split],
            subject.processor,
            args.poolings,
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
            bf16=args.bf16,
            cache_dir=args.feature_cache_dir,
        )
    # References first, as in the tables of pretraining.
    references = [name for name in features if name not in subjects]
    return {name: features[name] for name in (*references, *subjects)}


def _attentive(subjects: dict[str, Subject], splits, train_labels, test_labels, args: ReportArguments) -> dict:
    """`evaluate_attentively` of every model, after its untrained twin where references are asked for."""
    results: dict = {}
    for name, subject in subjects.items():
        untrained = {f"{name} untrained": untrained_encoder(subject.encoder, args.seed)} if args.references else {}
        found = evaluate_attentively(
            untrained | {name: subject.encoder},
            *splits[name],
            train_labels,
            test_labels,
            subject.processor,
            device=args.device,
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
            bf16=args.bf16,
        )
        results = found | {"accuracy": results.get("accuracy", {}) | found["accuracy"]}
    return results


def _dense(subjects: dict[str, Subject], splits, args: ReportArguments) -> tuple[dict, dict[str, np.ndarray]]:
    """`evaluate_dense` of every model, after references where they are asked for; empty where there is no truth."""
    results, rows = {}, {}
    if not annotated_maps(*next(iter(splits.values()))):
        return results, rows
    for number, (name, subject) in enumerate(subjects.items()):
        encoders = {name: subject.encoder}
        if args.references:
            encoders = {f"{name} untrained": untrained_encoder(subject.encoder, args.seed)} | encoders
            if number == 0:
                encoders = raw_patches(as_pair(subject.encoder.model.config.patch_size)) | encoders
        found, drawn = evaluate_dense(
            encoders,
            *splits[name],
            subject.processor,
            num_shown=args.num_shown,
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
            bf16=args.bf16,
            seed=args.seed,
        )
        results = found | {"features": results.get("features", {}) | found["features"]}
        rows |= drawn
    # What is told of one thing side by side.
    return results, dict(sorted(rows.items(), key=lambda row: DENSE_ROWS.index(row[0].split(":")[0])))


def _tsne(
    folder: Path, args, features: Features, models: list[str], labels, names, label: str, classes: list[int]
) -> tuple[str, str, str] | None:
    """Draws t-SNE of every model side by side; None of so few pictures that it would show nothing."""
    columns = labels[label].numpy()
    rows = np.flatnonzero(np.isin(columns, classes))[: args.num_tsne]
    if len(rows) < _LEAST_TSNE:
        say(f"t-SNE is left out: {len(rows)} held-out pictures of the chosen classes, fewer than {_LEAST_TSNE}.")
        return None
    places = {
        model: embed_tsne(features[model][args.poolings[0]][torch.from_numpy(rows)], args.seed) for model in models
    }
    numbers = {value: place for place, value in enumerate(classes)}
    colours = np.array([numbers[value] for value in columns[rows]])
    draw_tsne(places, colours, [names[label][value] for value in classes], label, folder / "tsne.png")
    caption = f"{len(rows)} held-out pictures by cosine distance of their features ({args.poolings[0]}), coloured by "
    return "t-SNE", "tsne.png", f"{caption}{label}. Only neighbourhoods mean something, not distances between groups."


def _properties(subjects: dict[str, Subject], tests: dict) -> dict[str, dict[str, torch.Tensor]]:
    """`encoder_properties` of every model, on the first held-out pictures."""
    found = {}
    for name, subject in subjects.items():
        test = tests[name].select(list(range(min(len(tests[name]), _PROPERTY_PICTURES))))
        transform = evaluation_transform(subject.processor, test.num_channels)
        found[name] = encoder_properties(subject.encoder.model, transformed_pictures(test, transform))
    return found


def _property_plots(folder: Path, properties: dict[str, dict[str, torch.Tensor]]) -> list[tuple[str, str, str]]:
    distances = {name: found["attention_distance"] for name, found in properties.items()}
    shares = {name: found["top_singular_share"] for name, found in properties.items()}
    draw_attention_distances(distances, folder / "attention_distance.png")
    draw_singular_shares(shares, folder / "singular_values.png")
    distance = "How far each head's attention reaches from patch to patch; the line is the mean of a block's heads."
    share = "How much of the patches' features within a picture the five largest singular values hold."
    return [
        ("Attention distance", "attention_distance.png", distance),
        ("Singular values", "singular_values.png", share),
    ]


def _sheets(folder: Path, args, subjects: dict[str, Subject], tests: dict) -> list[tuple[str, str, str]]:
    """Sheets of the first held-out pictures: attention, patch features as colours, and reconstructions."""
    attention, colours, masked, reconstructed = {}, {}, {}, {}
    size = None
    for name, subject in subjects.items():
        test = tests[name]
        transform = evaluation_transform(subject.processor, test.num_channels)
        number = min(len(test), max(_PCA_PICTURES, args.num_shown))
        pixel_values = torch.stack([transform(test[index]) for index in range(number)])
        shown = pixel_values[: args.num_shown]
        if size is None:
            scale = max(1, -(-_TILE // min(shown.shape[2:])))
            size = (shown.shape[2] * scale, shown.shape[3] * scale)
            originals = enlarge(unnormalise(shown, subject.mean, subject.std), size)
        pictures = enlarge(unnormalise(shown, subject.mean, subject.std), size)
        looked_at = subject.encoder.cls_attention(shown)
        if looked_at is not None:
            attention[name] = attention_pictures(pictures, looked_at)
        patches = torch.cat([subject.encoder.patches(batch) for batch in pixel_values.split(16)])
        colours[name] = patch_colours(patches, len(shown), size)
        found = _reconstruct(subject, shown, args.seed)
        if found is not None:
            mask, predicted = (enlarge(values, size) for values in found)
            masked[name] = to_rgb(pictures * (1 - mask) + 0.5 * mask)
            reconstructed[name] = to_rgb(pictures * (1 - mask) + predicted * mask)
    picture = {"picture": to_rgb(originals)}
    sections = [
        (
            "Attention of [CLS]",
            "attention.png",
            "Last block, mean of all heads, from the least (dark) to the most (bright) of each picture.",
        ),
        (
            "Patch features",
            "patch_pca.png",
            "Their first three principal components as red, green, blue: patches of like colour have like features.",
        ),
    ]
    for (_, file, _), rows in zip(sections, (attention, colours), strict=True):
        save_picture(folder / file, label_rows(picture | rows))
    if not attention:
        sections.pop(0)
    if reconstructed:
        rows = dict(picture)
        first = next(iter(masked.values()))
        if all(np.array_equal(first, other) for other in masked.values()):
            rows |= {"masked": first} | reconstructed
        else:
            for name in reconstructed:
                rows |= {f"masked for {name}": masked[name], name: reconstructed[name]}
        save_picture(folder / "reconstructions.png", label_rows(rows))
        caption = "What the decoder makes of the hidden patches; the others are the picture's own."
        sections.append(("Reconstructions", "reconstructions.png", caption))
    return sections


@torch.no_grad()
def _reconstruct(subject: Subject, pixel_values: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mask and predicted pictures in [0, 1], where the model was saved with a decoder that predicts pixels."""
    path = locate(subject.name)
    config = AutoConfig.from_pretrained(path)
    try:
        model_class = method_class(config.model_type, "ForPreTraining")
        model = model_class.from_pretrained(path, dtype=torch.float32).to(subject.encoder.device).eval()
    except ValueError:
        # Another library's model, or an encoder alone.
        return None
    grid = subject.encoder.grid(pixel_values)
    noise = [sample_generator(seed, 0, index).random(grid[0] * grid[1]) for index in range(len(pixel_values))]
    try:
        found = model.reconstruct(
            pixel_values.to(model.device), torch.tensor(np.stack(noise), dtype=torch.float32, device=model.device)
        )
    except ValueError as error:
        say(f"No reconstructions of {subject.name}: {error}")
        return None
    if found is None:
        return None
    mask, predicted = found
    return mask.float().cpu(), unnormalise(predicted, subject.mean, subject.std)


def _readme(args, models: dict[str, str], data: str, results: dict, sections) -> str:
    lines = ["# Representation report", "", f"Data: {data}. {describe_results(results)}.", ""]
    lines += [f"- {name}: `{path}`" for name, path in models.items()]
    (what, first), *others = described_tables(results)
    lines += ["", markdown_table(first), ""]
    for what, rows in others:
        lines += [f"{what}.", "", markdown_table(rows), ""]
    if args.references:
        lines += ["Untrained: the same network before training. RankMe: effective rank of the held-out features.", ""]
    for title, file, caption in sections:
        lines += [f"## {title}", "", caption, "", f"![{title}]({file})", ""]
    return "\n".join(lines)
