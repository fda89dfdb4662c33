"""
What `--cache_base_features` is worth: training steps by targets that are read from a file, beside steps in which the
frozen base computes them.

    python benchmarks/cached_targets.py --preset small --base_preset base

Networks are untrained, pictures are noise: neither changes what is computed. Both ways take the same pictures from the
same data set, in turns, so that what else the machine does meets both; a step is forward, backward and AdamW. Printed
as JSON: pictures a second of each way, the median over rounds of their ratio, and what the cache costs: seconds and
bytes a picture, and after how many epochs it has paid for itself.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time

import numpy as np
import torch

from hf_mim.data.dataset import ImageDataset
from hf_mim.data.pretraining import PretrainingDataset, pretraining_collator
from hf_mim.data.transforms import PretrainingTransform
from hf_mim.models.presets import preset_config
from hf_mim.registry import method_class
from hf_mim.training.target_cache import TargetCache


def build(args):
    config_class, model_class = (method_class(args.method, kind) for kind in ("Config", "ForPreTraining"))
    encoder = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    base = preset_config(args.method, args.base_preset, None)
    part = "base" if args.method == "tec" else "teacher"
    # By the base's grid: at the preset tiny both have 8 x 8 patches.
    fields = preset_config(args.method, args.preset, None)
    described = {name: base[name] for name in encoder if name in base}
    torch.manual_seed(0)
    model = model_class(config_class(**fields, **{f"{part}_config": described}))
    model.get_submodule(part).is_trained = True
    return model.train()


def pictures(config, number: int) -> PretrainingDataset:
    side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    noise = np.random.default_rng(0).integers(0, 256, (number, side, side, 3), dtype=np.uint8)
    transform = PretrainingTransform(
        (side, side), config.num_patches, [0.5] * 3, [0.25] * 3, crop_scale=(1.0, 1.0), horizontal_flip=False
    )
    return PretrainingDataset(ImageDataset(noise, 3, source="noise"), transform)


def steps(model, optimizer, data, batch_size: int, epoch: int, bf16: bool) -> float:
    """Pictures a second of one pass."""
    start = time.perf_counter()
    for first in range(0, len(data) - batch_size + 1, batch_size):
        batch = pretraining_collator([data[epoch, index] for index in range(first, first + batch_size)])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (len(data) // batch_size * batch_size) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", default="tec", choices=("tec", "dbot"))
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--base_preset", default="small")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_pictures", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    model = build(args)
    data, cached = (pictures(model.config, args.num_pictures) for _ in range(2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        cache = TargetCache(folder, len(cached), {})
        start = time.perf_counter()
        cache.fill(model, cached, batch_size=args.batch_size, bf16=args.bf16)
        filled = time.perf_counter() - start
        cached.targets = cache
        for one in (data, cached):  # warm
            steps(model, optimizer, one, args.batch_size, 0, args.bf16)
        rates = [
            [steps(model, optimizer, one, args.batch_size, epoch, args.bf16) for one in (data, cached)]
            for epoch in range(args.rounds)
        ]
        kept = sum(value.nbytes for value in cache[0].values())
    computed, read = (statistics.median(column) for column in zip(*rates, strict=True))
    saved = len(data) / computed - len(data) / read
    found = {
        "pictures_a_second_computed": round(computed, 2),
        "pictures_a_second_cached": round(read, 2),
        "ratio": round(statistics.median(second / first for first, second in rates), 2),
        "ratios": [round(second / first, 2) for first, second in rates],
        "filling_seconds_a_picture": round(filled / len(data), 4),
        "bytes_a_picture": kept,
        "epochs_to_pay": round(filled / saved, 1) if saved > 0 else None,
    }
    where = {"threads": torch.get_num_threads(), "machine": platform.processor() or platform.machine()}
    print(json.dumps(vars(args) | found | where))


if __name__ == "__main__":
    main()
