"""
Runs of several stages: each stage is a training call of its own, in a folder of its own, whose student the next stage
learns from. Stage k writes into `output_dir/stage-k`, with its checkpoints; a finished one holds its model and
`stage.json`, which is written last. A run of one stage writes into `output_dir`.
"""

import copy
import json
from pathlib import Path

import numpy as np
from transformers.utils import logging

from ..files import write_json
from .arguments import MIMTrainingArguments
from .checkpoints import (
    check_same_config,
    checkpoint_to_resume,
    find_damaged_weights,
    unused_path,
)
from .run_record import check_same_run

logger = logging.get_logger(__name__)

# Says that a stage is finished, and how long it was.
_RECORD = "stage.json"


def stage_arguments(args: MIMTrainingArguments) -> list[MIMTrainingArguments]:
    """
    The arguments of each stage: with its own folder, length and seed.

    The seeds differ, so that no stage repeats the weights, order, crops or masks that another began with (of a stream
    the order repeats). Stage 0 has the run's own: it equals a run of one stage.
    """
    return [_arguments_of(args, stage) for stage in range(args.num_stages)]


def _arguments_of(args: MIMTrainingArguments, stage: int) -> MIMTrainingArguments:
    own = copy.copy(args)
    if args.stage_epochs is not None:
        own.num_train_epochs, own.max_steps = args.stage_epochs[stage], -1
    elif args.stage_steps is not None:
        own.max_steps = args.stage_steps[stage]
    if args.num_stages > 1:
        own.output_dir = str(Path(args.output_dir) / f"stage-{stage}")
        own.seed = stage_seed(args.seed, stage)
        own.data_seed = None if args.data_seed is None else stage_seed(args.data_seed, stage)
        # The run pushes once, at its end.
        own.push_to_hub = False
    return own


def stage_seed(seed: int, stage: int) -> int:
    """The seed of a stage: the run's own for stage 0, and one that no other run's small seed meets for the others."""
    return seed if stage == 0 else int(np.random.SeedSequence([seed, stage]).generate_state(1)[0])


def where_to_start(stages: list[MIMTrainingArguments], config) -> tuple[int, str | None]:
    """
    The first stage that is not finished, and the checkpoint in it to go on from (None: from the stage's beginning).

    Args:
        stages: As `stage_arguments` gives.
        config: Of the first stage's model.

    Raises:
        ValueError: If the method has no stages; if a finished stage or a checkpoint is damaged, or of another model or
            length; or if the checkpoint asked for is not one of this run.
    """
    requested = stages[0].resume_from_checkpoint
    if len(stages) == 1:
        return 0, checkpoint_to_resume(stages[0].output_dir, requested, config)
    configs = [config]
    for _ in stages[1:]:
        configs.append(configs[-1].for_next_stage())
    wanted = None if requested is None else str(requested).lower()
    if wanted == "false":
        return 0, None
    if wanted in (None, "true"):
        unfinished = (stage for stage in range(len(stages) - 1) if not _record_of(stages[stage]).is_file())
        first = next(unfinished, len(stages) - 1)
    else:
        first = _stage_of(requested, stages)
    for stage in range(first):
        _check_finished(stages[stage], configs[stage])
    if wanted == "true" and first > 0:
        # The stage before is finished: there is something to go on from, with a checkpoint of this one or without.
        requested = None
    return first, checkpoint_to_resume(stages[first].output_dir, requested, configs[first])


def _stage_of(checkpoint: str, stages: list[MIMTrainingArguments]) -> int:
    folders = [Path(args.output_dir).resolve() for args in stages]
    parent = Path(checkpoint).resolve().parent
    if parent not in folders:
        raise ValueError(
            f"The checkpoint to resume from, {checkpoint}, is in no stage of this run; expected one like "
            f"{Path(stages[0].output_dir) / 'checkpoint-100'}, of {len(stages)} stages from stage-0."
        )
    return folders.index(parent)


def _check_finished(args: MIMTrainingArguments, config) -> None:
    """Raises ValueError unless the stage is finished, whole, and as long as is asked for now."""
    folder = Path(args.output_dir)
    fix = "Choose another --output_dir, or pass --resume_from_checkpoint false to start from stage 0."
    if not _record_of(args).is_file():
        raise ValueError(f"The stage in {folder} is not finished, so no later one can be resumed. {fix}")
    try:
        record = json.loads(_record_of(args).read_text())
        problem = find_damaged_weights(folder)
    except (ValueError, OSError) as error:
        record, problem = None, f"{_RECORD} cannot be read ({error})"
    state = optimizer_state_of(args)
    if problem is None and args.keep_optimizer_state and not state.is_file():
        problem = f"{state.name} is missing (was it trained without --keep_optimizer_state?)"
    if problem:
        raise ValueError(f"The finished stage in {folder} is damaged: {problem}. {fix}")
    if record != _settings(args):
        raise ValueError(f"The stage in {folder} was trained with {record}; asked for is {_settings(args)}. {fix}")
    check_same_config(folder, config)


def check_finished_stages(stages: list[MIMTrainingArguments], first: int, record: dict) -> None:
    """Raises ValueError if a stage before `first` is of another run than `record`, the one of stage `first`, is."""
    for args in stages[:first]:
        own = {"decides": record["decides"] | args.deciding()}
        check_same_run(args.output_dir, own, "holds a stage of another run")


def set_later_stages_aside(stages: list[MIMTrainingArguments], first: int) -> None:
    """Renames what earlier runs left of the stages after `first`, and makes `first` unfinished."""
    if len(stages) == 1:
        return
    _record_of(stages[first]).unlink(missing_ok=True)
    for folder in Path(stages[0].output_dir).parent.glob("stage-*"):
        number = folder.name.removeprefix("stage-")
        if number.isdigit() and int(number) > first:
            target = unused_path(folder.with_name(f"_old-{folder.name}"))
            folder.rename(target)
            logger.warning(f"Training goes on with stage {first}: {folder}, of an earlier run, is now {target.name}.")


def mark_finished(args: MIMTrainingArguments) -> None:
    """Writes the record of a stage, whole or not at all."""
    write_json(_record_of(args), _settings(args))


def run_history(stages: list[MIMTrainingArguments]) -> list[dict]:
    """The log of all stages, with steps that go on from stage to stage."""
    history, steps = [], 0
    for args in stages:
        state = json.loads((Path(args.output_dir) / "trainer_state.json").read_text())
        history += [log | {"step": steps + log["step"]} for log in state["log_history"]]
        steps += state["global_step"]
    return history


def optimizer_state_of(args: MIMTrainingArguments) -> Path:
    """Where a stage leaves its optimiser's state, with `keep_optimizer_state`."""
    return Path(args.output_dir) / "optimizer.pt"


def _record_of(args: MIMTrainingArguments) -> Path:
    return Path(args.output_dir) / _RECORD


def _settings(args: MIMTrainingArguments) -> dict:
    """What a finished stage must have in common with the run that goes on from it."""
    length = {"max_steps": args.max_steps} if args.max_steps > 0 else {"num_train_epochs": args.num_train_epochs}
    return length | {"seed": args.seed}
