"""Finding a checkpoint to resume from, and refusing to resume from a damaged or foreign one."""

import json
import zipfile
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.trainer_utils import get_last_checkpoint

from ..models.vit.configuration_vit import as_pair

# How the pictures are normalised: of the data, which is read after this check.
_OF_DATA = ("image_mean", "image_std")


def checkpoint_to_resume(output_dir: str, requested: str | None, config: PreTrainedConfig) -> str | None:
    """
    The checkpoint that training goes on from: the one asked for, else the last one in `output_dir`, else None.

    Args:
        output_dir (`str`): Where this run writes.
        requested (`str`, *optional*): `resume_from_checkpoint`: a folder, "true" for the last one, "false" for none.
        config: Of the model to be trained.

    Raises:
        ValueError: If the checkpoint is damaged, is another model's, or is asked for and not there.
    """
    wanted = str(requested).lower() if requested is not None else None
    if wanted == "false":
        return None
    last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    folder = requested if wanted not in (None, "true") else last
    if folder is None:
        if wanted == "true":
            raise ValueError(
                f"There is no checkpoint in {output_dir} to resume from. Leave --resume_from_checkpoint out."
            )
        return None
    if not Path(folder).is_dir():
        raise ValueError(f"The checkpoint to resume from, {folder}, is not a folder.")
    problem = find_damage(Path(folder))
    if problem:
        older = [str(path) for path in checkpoints_in(output_dir) if path != Path(folder) and not find_damage(path)]
        fix = f"resume from an older one, --resume_from_checkpoint {older[-1]}, or " if older else ""
        raise ValueError(
            f"The checkpoint {folder} is damaged: {problem}. To go on, {fix}delete it; to start from zero, choose "
            "another --output_dir or pass --resume_from_checkpoint false."
        )
    check_same_config(Path(folder), config)
    return str(folder)


def check_same_config(folder: Path, config: PreTrainedConfig) -> None:
    """Raises ValueError if the model in `folder` is another than `config` describes."""
    differences = _differences(json.loads((folder / "config.json").read_text()), config)
    if differences:
        raise ValueError(
            f"{folder} is a checkpoint of another model ({', '.join(differences)}). Choose another --output_dir, or "
            "the same settings as that run, or pass --resume_from_checkpoint false to start from zero."
        )


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. Files are opened but not read through."""
    for name, entry in (("config.json", "model_type"), ("trainer_state.json", "global_step")):
        try:
            content = json.loads((folder / name).read_text())
        except FileNotFoundError:
            return f"{name} is missing"
        except (ValueError, OSError) as error:
            return f"{name} cannot be read ({error})"
        if not isinstance(content, dict) or not content.get(entry):
            return f"{name} has no {entry}"
    # Under FSDP there are folders of shards instead, or other names.
    shards = [path for path in folder.glob("*_0") if path.is_dir()]
    for path in shards:
        if not (path / ".metadata").is_file():
            return f"{path.name} is incomplete"
    problem = find_damaged_weights(folder) if not shards or list(folder.glob("model*.safetensors")) else None
    if problem:
        return problem
    optimizers = [path.name for path in folder.glob("optimizer.*")] or ([] if shards else ["optimizer.pt"])
    # One of each process: more or fewer than there are now, if their number changed.
    random_states = [path.name for path in folder.glob("rng_state*.pth")] or ["rng_state.pth"]
    for name in ["scheduler.pt", *optimizers, *random_states]:
        if not (folder / name).is_file():
            return f"{name} is missing (was it saved with --save_only_model?)"
        if not zipfile.is_zipfile(folder / name):
            return f"{name} is truncated"
    return None


def find_damaged_weights(folder: Path) -> str | None:
    """What is wrong with the weights that `save_pretrained` wrote into a folder, or None."""
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        return "model.safetensors is missing"
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} cannot be read ({error})"
    return None


def unused_path(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, ... that is not there."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def checkpoints_in(output_dir: str) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[-1]))


def _differences(saved: dict, wanted: PreTrainedConfig) -> list[str]:
    if saved["model_type"] != wanted.model_type:
        return [f"model_type: {saved['model_type']!r} there, {wanted.model_type!r} here"]
    # The file leaves out what is the class's default.
    there, here = type(wanted).from_dict(saved), wanted
    names = [
        field.name for field in fields(wanted) if field.name not in {field.name for field in fields(PreTrainedConfig)}
    ]
    differences = [
        f"{name}: {_plain(there, name)!r} there, {_plain(here, name)!r} here"
        for name in names
        if not name.startswith("_") and name not in _OF_DATA and _plain(there, name) != _plain(here, name)
    ]
    if there.id2label != here.id2label:
        classes = (", ".join(list(config.id2label.values())[:5]) for config in (there, here))
        differences.append("classes: {}, ... there, {}, ... here".format(*classes))
    return differences


def _plain(config: PreTrainedConfig, name: str):
    value = getattr(config, name)
    return as_pair(value) if name in ("image_size", "patch_size") else value
