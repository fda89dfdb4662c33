"""
How fast and how large training is, beside its peers in the same run; on a CPU and on a GPU by the same commands.

    python benchmarks/speed.py step --preset base --batch_size 8
    python benchmarks/speed.py memory --preset base --batch_size 8
    python benchmarks/speed.py data --picture_size 500 --image_size 224
    python benchmarks/speed.py end_to_end --preset tiny --picture_size 500
    python benchmarks/speed.py start
    python benchmarks/speed.py hours --images_per_second 1000

`step`: forward, backward, AdamW and the averaged target, of every method, of transformers' ViTMAE (vit_mae), and of
Lightly's MAE where `lightly` and `timm` are installed. `matmul_share` is the share of the machine's own matrix product
rate that the step's arithmetic reaches, `frozen_share` that of the step which frozen networks take. `memory`: the peak
of a process of its own, less what it held before the model was built, and what `hf_mim.estimate_memory` says. `data`:
JPEG files to batches of crops, without a network, by time of the processor. `end_to_end`: the rate of
examples/run_mim.py from JPEG files as a share of the model's own. `start`: what `import hf_mim` costs, and the time
from Enter to the first step of the README's first command, without its launcher. `hours`: what the recipes take at a
measured rate.

What is compared is interleaved, so that what else the machine does hits all alike; medians over rounds are reported.
`--output FILE.json` writes the numbers, and a picture beside them.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import hf_mim
from hf_mim.data.dataset import ImageDataset
from hf_mim.data.pretraining import EpochSampler, PretrainingDataset, RawCollator, pretraining_collator
from hf_mim.data.scenes import render_scene
from hf_mim.data.sources import open_folder
from hf_mim.data.transforms import PretrainingTransform
from hf_mim.jobs import pack
from hf_mim.models.presets import PRESETS, preset_config
from hf_mim.models.vit.sizes import as_pair
from hf_mim.registry import MODEL_TYPES, method_class

REPOSITORY = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEER = "lightly_mae"
NAMES = {"fp32": "float32", "bf16": "bfloat16"}
IMAGENET = 1_281_167
# Of packed pictures in pixels, as the docs advise.
PACKED_SIDE = 256


# --- networks


class LightlyMAE(nn.Module):
    """MAE of Lightly's modules, of the sizes of a `ViTMAEConfig`."""

    def __init__(self, config):
        super().__init__()
        from lightly.models import utils
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        self.config, self.utils = config, utils
        (size, _), (patch, _) = as_pair(config.image_size), as_pair(config.patch_size)
        vit = VisionTransformer(
            img_size=size,
            patch_size=patch,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_classes=0,
        )
        self.encoder, self.patch = MaskedVisionTransformerTIMM(vit=vit), patch
        self.decoder = MAEDecoderTIMM(
            num_patches=(size // patch) ** 2,
            patch_size=patch,
            embed_dim=config.hidden_size,
            decoder_embed_dim=config.decoder_hidden_size,
            decoder_depth=config.decoder_num_hidden_layers,
            decoder_num_heads=config.decoder_num_attention_heads,
        )

    def forward(self, pixel_values, noise=None):
        utils, number = self.utils, self.encoder.sequence_length
        kept, masked = utils.random_token_mask(
            (len(pixel_values), number), mask_ratio=self.config.mask_ratio, device=pixel_values.device
        )
        embedded = self.decoder.embed(self.encoder.encode(pixel_values, idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(pixel_values), number)).type_as(embedded)
        decoded = self.decoder.decode(utils.set_at_index(tokens, kept, embedded))
        predicted = self.decoder.predict(utils.get_at_index(decoded, masked))
        # [CLS] is no patch.
        targets = utils.get_at_index(utils.patchify(pixel_values, self.patch), masked - 1)
        return argparse.Namespace(loss=nn.functional.mse_loss(predicted.float(), targets))


def build_model(method: str, preset: str) -> nn.Module:
    if method == PEER:
        return LightlyMAE(method_class("vit_mae", "Config")(**preset_config("vit_mae", preset, None)))
    config = method_class(method, "Config")(**preset_config(method, preset, None))
    return method_class(method, "ForPreTraining")(config)


def has_peer() -> bool:
    try:
        from lightly.models.modules import MAEDecoderTIMM  # noqa: F401
    except ImportError:
        return False
    return True


class Case:
    """One network and precision (`METHOD/fp32` or `METHOD/bf16`), and its training step."""

    def __init__(self, name: str, preset: str, batch_size: int, device: str):
        self.name = name
        self.method, self.precision = name.split("/")
        self.batch_size, self.device = batch_size, device
        torch.manual_seed(0)
        self.model = build_model(self.method, preset).to(device).train()
        config = self.model.config
        (height, width), (patch_height, patch_width) = as_pair(config.image_size), as_pair(config.patch_size)
        self.pixel_values = torch.randn(batch_size, config.num_channels, height, width, device=device)
        self.noise = torch.rand(batch_size, (height // patch_height) * (width // patch_width), device=device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)

    def loss(self) -> torch.Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(self.pixel_values, noise=self.noise).loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if hasattr(self.model, "after_optimizer_step"):
            self.model.after_optimizer_step(0, 100)

    def time(self, steps: int) -> float:
        """Seconds a step."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.device)
        return (time.perf_counter() - start) / steps

    def time_frozen(self, steps: int) -> float:
        """Seconds a step of what the frozen networks compute; 0 where there are none."""
        names = getattr(self.model, "frozen_modules", ())
        start = time.perf_counter()
        for _ in range(steps if names else 0):
            with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
                for name in names:
                    self.model.get_submodule(name)(self.pixel_values)
        synchronize(self.device)
        return (time.perf_counter() - start) / steps if names else 0.0

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.loss().backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def matmul_rate(dtype: torch.dtype, device: str, size: int = 2048, repeats: int = 3) -> float:
    """Floating-point operations per second of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    synchronize(device)
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def cases_of(args) -> list[str]:
    return [f"{method}/{precision}" for precision in args.precisions for method in args.methods]


def step(args) -> dict:
    cases = [Case(name, args.preset, args.batch_size, args.device) for name in cases_of(args)]
    flops = {case.name: case.flops() for case in cases}
    for case in cases:
        case.time(1)
    times, frozen = ({case.name: [] for case in cases} for _ in range(2))
    rates = {precision: [] for precision in args.precisions}
    for _ in range(args.rounds):
        for precision in args.precisions:
            rates[precision].append(matmul_rate(DTYPES[precision], args.device))
        for case in cases:
            times[case.name].append(case.time(args.steps))
            frozen[case.name].append(case.time_frozen(args.steps))
    report = {}
    for case in cases:
        seconds = statistics.median(times[case.name])
        of_mae = times.get(f"vit_mae/{case.precision}", [])
        of_float32 = times.get(f"{case.method}/fp32", [])
        report[case.name] = {
            "step_ms": 1000 * seconds,
            "images_per_second": args.batch_size / seconds,
            "times_vit_mae": median_ratio(of_mae, times[case.name]),
            "times_float32": median_ratio(of_float32, times[case.name]),
            "frozen_share": statistics.median(frozen[case.name]) / seconds,
            "gflop_per_image": flops[case.name] / args.batch_size / 1e9,
            "matmul_share": flops[case.name] / seconds / statistics.median(rates[case.precision]),
        }
    return {"cases": report, "matmul_gflops": {p: statistics.median(rates[p]) / 1e9 for p in rates}}


def median_ratio(slow: list[float], fast: list[float]) -> float | None:
    """How many times as fast, of times taken in the same rounds."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True)) if slow else None


def memory(args) -> dict:
    if args.memory_of:
        print(peak_of(args.memory_of, args))
        sys.exit()
    report = {}
    for name in cases_of(args):
        method, precision = name.split("/")
        command = [sys.executable, __file__, "memory", "--memory_of", name, "--preset", args.preset]
        command += ["--batch_size", str(args.batch_size), "--device", args.device]
        # What the allocator is given back goes back to the system, or it would count as held.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
        result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        report[name] = {"peak_mib": float(result.stdout.split()[-1])}
        if method != PEER:
            with torch.device("meta"):
                model = build_model(method, args.preset)
            told = hf_mim.estimate_memory(model, args.batch_size, precision=NAMES[precision]).total / 2**20
            report[name] |= {"estimate_mib": told, "estimate_share": told / report[name]["peak_mib"]}
    return {"cases": report}


def peak_of(name: str, args) -> float:
    """MiB that training takes at its peak."""
    held = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # noqa: E731
    # What libraries load when they are first used is none of it.
    Case(name, "tiny", 2, args.device).step()
    before = held()
    case = Case(name, args.preset, args.batch_size, args.device)
    for _ in range(3):
        case.step()
    return held() - before if args.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20


# --- data


def write_jpegs(folder: Path, number: int, size: int) -> list[str]:
    """Smooth colours with some noise, `size` pixels wide and three quarters as high."""
    random, paths = np.random.default_rng(0), []
    for i in range(number):
        smooth = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((size, size * 3 // 4))
        pixels = np.array(smooth, dtype=np.int16) + random.integers(-12, 13, (size * 3 // 4, size, 3), dtype=np.int16)
        paths.append(str(folder / f"{i:04}.jpg"))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def processor_seconds(dataset, collator, workers: int, normalise=None) -> float:
    """Of an epoch, of this process and its workers; `normalise` is called with each batch's pixels."""
    loader = DataLoader(
        dataset, batch_size=32, sampler=EpochSampler(len(dataset)), collate_fn=collator, num_workers=workers
    )
    before = spent()
    for batch in loader:
        if normalise is not None:
            normalise(batch["pixel_values"])
    del loader
    return spent() - before


def spent() -> float:
    """Seconds of the processor that this process took, and its children that have ended."""
    usages = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class PillowPictures:
    """JPEG files as Pillow alone reads them."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(Image.open(self.paths[index]).convert("RGB"))).permute(2, 0, 1)


def data(args) -> dict:
    torch.set_num_threads(1)
    size = (args.image_size, args.image_size)
    transform = PretrainingTransform(size, 196, [0.5] * 3, [0.25] * 3)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder), args.num_pictures, args.picture_size)
        pictures = ImageDataset(paths, 3, source=folder)
        cases = {
            "float32, Pillow": (PretrainingDataset(PillowPictures(paths), transform), pretraining_collator),
            "float32": (PretrainingDataset(pictures, transform), pretraining_collator),
            "bytes": (PretrainingDataset(pictures, transform.raw()), RawCollator(transform)),
        }
        packed = str(Path(folder) / "packed")
        if pack.main([folder, packed, f"--short_side={PACKED_SIDE}", "--num_workers=0"]):
            raise RuntimeError(f"{folder} could not be packed.")
        smaller = open_folder(packed, 3)
        cases["bytes, packed"] = (PretrainingDataset(smaller, transform.raw()), RawCollator(transform))
        cases = {name: (*case, args.workers) for name, case in cases.items()}
        cases["bytes, normalised"] = (*cases["bytes"], transform.normalise)
        seconds = {name: [] for name in cases}
        for round_ in range(args.rounds + 1):
            for name, case in cases.items():
                measured = processor_seconds(*case)
                if round_:
                    seconds[name].append(measured)
    return {
        "cases": {
            name: {
                "images_per_second": args.num_pictures / statistics.median(times),
                "times_pillow": median_ratio(seconds["float32, Pillow"], times),
            }
            for name, times in seconds.items()
        }
    }


# --- whole commands

# Tells when each step of a command ended: seconds since the process was started, and of the processor.
RUNNER = """
import sys, time
from transformers import TrainerCallback
from hf_mim.jobs import pretraining
began, ended = float(sys.argv[1]), []
class Clock(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        ended.append((time.time() - began, time.process_time()))
class Timed(pretraining.MIMTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(Clock())
pretraining.MIMTrainer = Timed
pretraining.write_results = lambda *args: None
pretraining.evaluate = lambda *args, **kwargs: None
status = pretraining.main(sys.argv[2:])
print("ENDED", *(number for pair in ended for number in pair))
sys.exit(status)
"""


def steps_ended(flags: list[str]) -> np.ndarray:
    """When each step of `run_mim.py` ended: (steps, 2), seconds since Enter and of the processor."""
    command = [sys.executable, "-c", RUNNER, str(time.time()), *flags, "--disable_tqdm=true", "--save_strategy=no"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("ENDED"))
    return np.array([float(word) for word in line.split()[1:]]).reshape(-1, 2)


def end_to_end(args) -> dict:
    skipped, precision = 4, args.precisions[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        folder.mkdir()
        for i in range(args.num_pictures):
            picture, _ = render_scene(i, image_size=args.picture_size)
            Image.fromarray(picture).save(folder / f"{i:05}.jpg", quality=90)
        flags = [f"--train_dir={folder}", f"--preset={args.preset}", f"--output_dir={name}/run"]
        flags += ["--resume_from_checkpoint=false", f"--max_steps={args.num_steps}", "--max_eval_samples=8"]
        flags += [f"--per_device_train_batch_size={args.batch_size}", f"--bf16={precision == 'bf16'}"]
        flags += ["--references=false", "--warmup_steps=0", *(["--use_cpu"] if args.device == "cpu" else [])]
        flags += [] if args.workers is None else [f"--dataloader_num_workers={args.workers}"]
        case, model, script = Case(f"pilamim/{precision}", args.preset, args.batch_size, args.device), [], []
        case.time(2)
        for _ in range(args.rounds):
            model.append(1 / case.time(max(2, args.num_steps // 4)))
            ended = steps_ended(flags)[:, 0]
            script.append((len(ended) - 1 - skipped) / (ended[-1] - ended[skipped]))
    shares = [s / m for s, m in zip(script, model, strict=True)]
    rates = {"model": statistics.median(model), "script": statistics.median(script)}
    cases = {name: {"images_per_second": args.batch_size * rate} for name, rate in rates.items()}
    return {"cases": cases, "share": statistics.median(shares)}


def start(args) -> dict:
    base = "from transformers import AutoModel, PreTrainedConfig"
    seconds = {"transformers": [], "with hf_mim": [], "first step": [], "first step, of the processor": []}
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--output_dir={folder}", "--resume_from_checkpoint=false", "--max_steps=1", "--warmup_steps=0"]
        # Draws the scenes, where they are not drawn yet.
        steps_ended(flags)
        for _ in range(args.rounds):
            for name, statement in (("transformers", base), ("with hf_mim", f"{base}; import hf_mim")):
                code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
                result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
                seconds[name].append(float(result.stdout))
            wall, processor = steps_ended(flags)[0]
            seconds["first step"].append(wall)
            seconds["first step, of the processor"].append(processor)
    return {"cases": {name: {"seconds": statistics.median(times)} for name, times in seconds.items()}}


def hours(args) -> dict:
    import yaml

    cases = {}
    for path in sorted((REPOSITORY / "examples" / "recipes").glob("*.yaml")):
        recipe = yaml.safe_load(path.read_text())
        if "imagenet-1k" not in str(recipe.get("dataset_name")) or path.name.startswith("finetune"):
            continue
        epochs = sum(recipe.get("stage_epochs") or [recipe["num_train_epochs"] * recipe.get("num_stages", 1)])
        took = epochs * IMAGENET / args.images_per_second / 3600
        cases[path.stem] = {"epochs": epochs, "hours": took}
    return {"cases": cases}


# --- report


def draw(report: dict, path: Path) -> None:
    """A bar for each case, of its first number."""
    from matplotlib.figure import Figure

    cases = report["cases"]
    unit = "images_per_second" if all("images_per_second" in case for case in cases.values()) else None
    unit = unit or next(iter(next(iter(cases.values()))))
    figure = Figure(figsize=(7, 0.8 + 0.32 * len(cases)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(cases), [case[unit] for case in cases.values()], color="#4477aa")
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(unit.replace("_", " "))
    axes.set_title(report["machine"], fontsize=8)
    figure.savefig(path, dpi=150)


def table(cases: dict[str, dict]) -> str:
    names = list(dict.fromkeys(name for case in cases.values() for name in case))
    rows = [["", *(name.replace("_", " ") for name in names)]]
    for case, numbers in cases.items():
        row = [numbers.get(name) for name in names]
        rows.append([case, *("" if number is None else f"{number:.4g}" for number in row)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(names) + 1)]
    lines = [
        [row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    return "\n".join("  ".join(line) for line in lines)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="what", required=True)
    tasks = {task.__name__: task for task in (step, memory, data, end_to_end, start, hours)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, task in tasks.items():
        command = commands.add_parser(name)
        command.set_defaults(task=task)
        command.add_argument("--output", type=Path, help="a JSON file for the numbers; a picture is drawn beside it")
        command.add_argument("--rounds", type=int, default=5)
        if name in ("step", "memory", "end_to_end"):
            command.add_argument("--preset", choices=PRESETS, default="base")
            command.add_argument("--batch_size", type=int, default=8)
            command.add_argument("--device", default=device)
            precisions = ["fp32"] if name == "end_to_end" else list(DTYPES)
            command.add_argument("--precisions", nargs="+", choices=DTYPES, default=precisions)
        if name in ("step", "memory"):
            methods = [*MODEL_TYPES, *([PEER] if has_peer() else [])]
            command.add_argument("--methods", nargs="+", choices=methods, default=methods)
        if name in ("data", "end_to_end"):
            command.add_argument("--picture_size", type=int, default=500, help="pixels of the JPEG files' width")
            command.add_argument("--num_pictures", type=int, default=256)
    of = commands.choices
    of["step"].add_argument("--steps", type=int, default=1, help="steps of each case in a round")
    of["memory"].add_argument("--memory_of", help=argparse.SUPPRESS)
    of["data"].add_argument("--image_size", type=int, default=224, help="of the crops that training sees")
    of["data"].add_argument("--workers", type=int, default=1)
    of["end_to_end"].add_argument("--workers", type=int, help="the command's own choice by default")
    of["end_to_end"].add_argument("--num_steps", type=int, default=40)
    of["hours"].add_argument("--images_per_second", type=float, required=True, help="of all devices together")
    return top


def main() -> None:
    args = parser().parse_args()
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}, torch {torch.__version__}",
    } | args.task(args)
    print(json.dumps({name: value for name, value in report.items() if name != "cases"}, indent=2))
    print(table(report["cases"]))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
        draw(report, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
