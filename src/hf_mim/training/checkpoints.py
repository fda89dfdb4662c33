"""
Checkpoints: written so that they are whole or not there, checked, chosen to go on from, set aside.

While it is written, a checkpoint (and the model at the end) lies in `output_dir/_saving`, and gets its name when it is
whole. Whatever is left there was not finished.
"""

import json
import os
import shutil
import zipfile
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..models.vit.sizes import as_pair

logger = logging.get_logger(__name__)

# How the pictures are normalised: of the data, which is read after this check.
_OF_DATA = ("image_mean", "image_std")


def checkpoint_to_resume(output_dir: str, requested: str | None, config: PreTrainedConfig) -> str | None:
    """
    The checkpoint that training goes on from: the one asked for, else the last whole one in `output_dir`, else None.
    Training then sets later ones aside (`set_later_checkpoints_aside`).

    Args:
        output_dir (`str`): Where this run writes.
        requested (`str`, *optional*): `resume_from_checkpoint`: a folder, "true" for the last one, "false" for none.
        config: Of the model to be trained.

    Raises:
        ValueError: If the checkpoint is another model's, or is asked for and damaged or not there.
    """
    wanted = str(requested).lower() if requested is not None else None
    if wanted == "false":
        return None
    if wanted in (None, "true") and _last_has_weights_only(output_dir):
        # As it was meant, and yet nothing to go on from: not to be set aside without a word from the user.
        requested = wanted = str(checkpoints_in(output_dir)[-1])
    if wanted in (None, "true"):
        folder = last_whole_checkpoint(output_dir)
        if folder is None:
            if wanted == "true":
                raise ValueError(
                    f"There is no checkpoint in {output_dir} to resume from. Leave --resume_from_checkpoint out."
                )
            return None
    else:
        folder = Path(requested)
        if not folder.is_dir():
            raise ValueError(f"The checkpoint to resume from, {folder}, is not a folder.")
        problem = find_damage(folder)
        if problem:
            older = last_whole_checkpoint(output_dir)
            fix = f"resume from another one, --resume_from_checkpoint {older}, or " if older else ""
            raise ValueError(
                f"The checkpoint {folder} is damaged: {problem}. To go on, {fix}leave --resume_from_checkpoint out; "
                "to start from zero, choose another --output_dir or pass --resume_from_checkpoint false."
            )
    check_same_config(folder, config)
    return str(requested if wanted not in (None, "true") else folder)


def _last_has_weights_only(output_dir: str | Path) -> bool:
    # The state is written last.
    last = checkpoints_in(output_dir)[-1:]
    return any((path / "trainer_state.json").is_file() and not list(path.glob("[ors]*.pt*")) for path in last)


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """The last checkpoint of a run that is not damaged."""
    return next((folder for folder in reversed(checkpoints_in(output_dir)) if find_damage(folder) is None), None)


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


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[-1]))


def unfinished(output_dir: str | Path) -> Path:
    """Where a checkpoint or a model lies while it is written."""
    return Path(output_dir) / "_saving"


def finish_checkpoint(output_dir: str | Path, name: str) -> Path:
    """Gives a checkpoint that was written into `unfinished(output_dir)` its name, in the place of an older one."""
    written, target = unfinished(output_dir) / name, Path(output_dir) / name
    if target.exists():
        # Of the same step, from before training went on from an earlier checkpoint.
        target.rename(unused_path(written.with_name(f"replaced-{name}")))
    written.rename(target)
    shutil.rmtree(unfinished(output_dir), ignore_errors=True)
    return target


def finish_model(output_dir: str | Path, name: str) -> None:
    """Moves the files of a model from `unfinished(output_dir)`, each in the place of an older one."""
    written = unfinished(output_dir) / name
    shards = {path.name for path in written.glob("model*.safetensors*")}
    for path in sorted(written.iterdir()):
        os.replace(path, Path(output_dir) / path.name)
    for path in Path(output_dir).glob("model*.safetensors*"):
        if path.name not in shards:
            path.unlink()
    shutil.rmtree(unfinished(output_dir), ignore_errors=True)


def rotate_checkpoints(output_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints until `limit` are left (None: all are); the last and the best one are kept."""
    folders = checkpoints_in(output_dir)
    if limit is None or len(folders) <= limit:
        return
    kept = {folders[-1], *([Path(best)] if best else [])}
    for folder in [folder for folder in folders if folder not in kept][: len(folders) - max(limit, len(kept))]:
        # Under its name it is whole, until it is gone.
        unfinished(output_dir).mkdir(exist_ok=True)
        shutil.rmtree(folder.rename(unfinished(output_dir) / folder.name), ignore_errors=True)
    shutil.rmtree(unfinished(output_dir), ignore_errors=True)


def set_later_checkpoints_aside(output_dir: str | Path, start: str | None) -> None:
    """
    Renames the checkpoints behind `start` (None: all), from which the next run would otherwise go on, to
    `_old-checkpoint-N`, and deletes what was not finished.
    """
    shutil.rmtree(unfinished(output_dir), ignore_errors=True)
    folders = checkpoints_in(output_dir)
    # Of another folder: all that are here are another run's.
    is_here = start is not None and Path(start).resolve().parent == Path(output_dir).resolve()
    for folder in folders:
        if is_here and _step_of(folder) <= _step_of(Path(start)):
            continue
        problem = find_damage(folder)
        why = f"is damaged ({problem})" if problem else "is of an earlier run"
        target = unused_path(folder.with_name(f"_old-{folder.name}"))
        folder.rename(target)
        where = "from zero" if start is None else f"from {start}"
        logger.warning(f"Training goes on {where}: {folder} {why}, and is now called {target.name}.")


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


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
