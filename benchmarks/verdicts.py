"""
Verdicts on runs that are broken on purpose, and on healthy ones.

    python benchmarks/verdicts.py --cifar10 /path/to/cifar10
    python benchmarks/verdicts.py --judge

Each case trains the preset tiny of a method on 10,000 photographs of CIFAR-10 for 10,240 images (about a minute on
one core), and asks for the verdict twice: with labels (k-NN and linear accuracy on 2,000 + 1,000 pictures of the
training split, beside the untrained network) and without. What was measured is kept in `--runs`; `--judge` gives the
verdicts anew without training. Results: `results/verdicts.json`.
"""

import argparse
import pickle
import time
from pathlib import Path

import numpy as np
import torch

import hf_mim
from hf_mim.data.arguments import DataArguments
from hf_mim.data.dataset import ImageDataset
from hf_mim.data.image_processing import build_image_processor
from hf_mim.data.loading import load_images
from hf_mim.data.pretraining import PretrainingDataset
from hf_mim.data.transforms import PretrainingTransform
from hf_mim.evaluation.appraisal import evidence_of, reconstruction_errors, untrained_like
from hf_mim.evaluation.encoders import FeatureEncoder
from hf_mim.evaluation.features import extract_features, shared_labels
from hf_mim.evaluation.report import evaluate_features
from hf_mim.evaluation.verdict import COLLAPSING, LEARNING, TOO_EARLY, UNTRAINED, judge
from hf_mim.files import write_json
from hf_mim.registry import method_class
from hf_mim.training.datasets import HeldOutTransform
from hf_mim.training.presets import preset_training

RESULTS = Path(__file__).parent / "results" / "verdicts.json"
MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
STEPS, BATCH_SIZE = 80, 128
NUM_TRAIN, NUM_LABELLED, NUM_TEST = 10_000, 2_000, 1_000

# (method, fields of the config, arguments of the training, what is done to the pictures).
HEALTHY = {
    "MAE": ("vit_mae", {}, {}, None),
    "PiLaMIM": ("pilamim", {}, {}, None),
    "OCL": ("ocl", {}, {}, None),
    "MAE, normalised targets": ("vit_mae", {"norm_pix_loss": True}, {}, None),
    "dBOT": ("dbot", {}, {}, None),
    # No limit was set on these, nor on those at the end of BROKEN.
    "PiLaMIM, another seed": ("pilamim", {}, {"seed": 1}, None),
    "dBOT, another seed": ("dbot", {}, {"seed": 1}, None),
    "I-JEPA": ("ijepa", {}, {}, None),
}
# 0.99 leaves none of 8 x 8 patches, which is refused; 0.984 leaves one.
BROKEN = {
    "MAE, rate too high": ("vit_mae", {}, {"learning_rate": 0.1, "max_grad_norm": 0.0}, None),
    "PiLaMIM, rate too high": ("pilamim", {}, {"learning_rate": 0.1, "max_grad_norm": 0.0}, None),
    "OCL, rate too high": ("ocl", {}, {"learning_rate": 0.1, "max_grad_norm": 0.0}, None),
    "MAE, mask ratio 0.984": ("vit_mae", {"mask_ratio": 0.984}, {}, None),
    "PiLaMIM, mask ratio 0.984": ("pilamim", {"mask_ratio": 0.984}, {}, None),
    "MAE, constant images": ("vit_mae", {}, {}, "constant"),
    "OCL, constant images": ("ocl", {}, {}, "constant"),
    "MAE, shuffled positions": ("vit_mae", {}, {}, "shuffled"),
    "PiLaMIM, shuffled positions": ("pilamim", {}, {}, "shuffled"),
    "PiLaMIM, target not averaged": ("pilamim", {"ema_momentum": 0.0, "ema_momentum_end": 0.0}, {}, None),
    "dBOT, rate too high": ("dbot", {}, {"learning_rate": 0.1, "max_grad_norm": 0.0}, None),
    "dBOT, shuffled positions": ("dbot", {}, {}, "shuffled"),
    "I-JEPA, rate too high": ("ijepa", {}, {"learning_rate": 0.1, "max_grad_norm": 0.0}, None),
}
CASES = HEALTHY | BROKEN


class Shuffled:
    """A transform whose result has its patches in an order of chance."""

    def __init__(self, transform, patch_size: int, seed: int):
        self.transform, self.patch_size, self.seed = transform, patch_size, seed

    def __call__(self, picture: torch.Tensor, epoch: int, index: int) -> dict[str, torch.Tensor]:
        item = self.transform(picture, epoch, index)
        pixels, size = item["pixel_values"], self.patch_size
        patches = pixels.unfold(1, size, size).unfold(2, size, size)
        rows, columns = patches.shape[1:3]
        order = np.random.default_rng([self.seed, epoch, index]).permutation(rows * columns)
        patches = patches.flatten(1, 2)[:, order].unflatten(1, (rows, columns))
        return item | {"pixel_values": patches.permute(0, 1, 3, 2, 4).reshape(pixels.shape)}


def load(cifar10: Path, constant: bool) -> tuple[ImageDataset, ImageDataset]:
    """Pictures to train on, and held out of the same split."""
    pictures = load_images(
        DataArguments(
            dataset_name=str(cifar10 / "train.parquet"),
            validation_fraction=0.1,
            max_train_samples=NUM_TRAIN,
            max_eval_samples=NUM_TEST,
            image_size=[32],
        ).for_model(3, (32, 32))
    )
    splits = []
    for split in (pictures.train, pictures.validation):
        values = np.stack([split[index].permute(1, 2, 0).numpy() for index in range(len(split))])
        if constant:
            values[:] = 128
        splits.append(ImageDataset(values, 3, source=str(split.source), labels=split.labels))
    return tuple(splits)


def measure(name: str, args):
    """Trains a case; returns what a verdict rests on."""
    method, fields, changes, pictures_are = CASES[name]
    train, test = load(args.cifar10, pictures_are == "constant")
    config = method_class(method, "Config").from_preset("tiny", image_size=32, **fields)
    seed = changes.get("seed", 0)
    processor = build_image_processor((32, 32), 3, MEAN, STD)
    augment = PretrainingTransform((32, 32), config.num_patches, MEAN, STD, crop_scale=(0.2, 1.0), seed=seed)
    held_out = HeldOutTransform(processor, 3, config.num_patches, seed)
    if pictures_are == "shuffled":
        patch_size = 32 // config.grid_size[0]
        augment, held_out = (Shuffled(transform, patch_size, seed) for transform in (augment, held_out))
    held_out = PretrainingDataset(test, held_out)
    torch.manual_seed(seed)
    model = method_class(method, "ForPreTraining")(config)
    names = ("base_learning_rate", "weight_decay", "adam_beta2", "lr_scheduler_type")
    schedule = {key: value for key, value in preset_training("tiny", method).items() if key in names}
    settings = schedule | {
        "output_dir": str(args.runs / "training"),
        "max_steps": STEPS,
        "warmup_steps": STEPS // 10,
        "per_device_train_batch_size": BATCH_SIZE,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_steps": 20,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    trainer = hf_mim.MIMTrainer(
        model=model,
        args=hf_mim.MIMTrainingArguments(**(settings | changes)),
        train_dataset=PretrainingDataset(train, augment),
        processing_class=processor,
    )
    trainer.train()
    model.eval()
    encoders = {"untrained": untrained_like(model, seed), "trained": model.encoder}
    encoders = {key: FeatureEncoder(encoder) for key, encoder in encoders.items()}
    splits = train.select(np.arange(NUM_LABELLED)), test
    features = [extract_features(encoders, split, processor, ["cls", "mean"]) for split in splits]
    answers: dict = {}
    evaluate_features(*features, *shared_labels(*splits), answers=answers)
    measured = {
        "images_seen": STEPS * BATCH_SIZE,
        "features": features[1]["trained"],
        "untrained": features[1]["untrained"],
        "answers": answers.get("trained"),
        "untrained_answers": answers.get("untrained"),
        "errors": reconstruction_errors(model, held_out),
    }
    return evidence_of(**measured), evidence_of(**measured | {"answers": None, "untrained_answers": None})


def is_right(name: str, verdict: str) -> bool:
    """A healthy run may be too young; a broken one must not pass for one that learns."""
    return verdict in ((LEARNING, TOO_EARLY) if name in HEALTHY else (UNTRAINED, COLLAPSING))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/verdicts"))
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--judge", action="store_true")
    args = parser.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.cases:
        path = args.runs / f"{name.replace(', ', '-').replace(' ', '_')}.pickle"
        start = time.perf_counter()
        if not args.judge and not path.is_file():
            path.write_bytes(pickle.dumps(measure(name, args)))
        if not path.is_file():
            print(f"{name}: not measured")
            continue
        labelled, unlabelled = map(judge, pickle.loads(path.read_bytes()))
        row = {"case": name, "healthy": name in HEALTHY}
        for kind, verdict in (("with labels", labelled), ("without", unlabelled)):
            row[kind] = {"right": is_right(name, verdict.verdict)} | verdict.to_dict()
            print(f"{name}, {kind}: {'right' if row[kind]['right'] else 'WRONG'}. {verdict}", flush=True)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
        rows.append(row)
    for kind in ("with labels", "without"):
        for healthy in (False, True):
            mine = [row[kind]["right"] for row in rows if row["healthy"] is healthy]
            print(f"{'healthy' if healthy else 'broken'}, {kind}: {sum(mine)} of {len(mine)} right")
    if args.judge:
        write_json(RESULTS, rows)


if __name__ == "__main__":
    main()
