"""
Uploading what a run leaves in its output directory, as a repository that needs no hf_mim.

At the root: the encoder, or the classifier, as a stock network, with card and results. In `pretraining/`: the run's
own model, which `from_pretrained` of hf_mim's classes, and its flags, find.
"""

import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError
from transformers import AutoConfig, Trainer

from ..models.vit.repository import PRETRAINING
from .export import export

# Files of a model; and of its image processor.
_MODEL = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_PROCESSOR = "preprocessor_config.json"
# What only going on with the run needs, of several stages, whose last model is the run's, the stages; what a killed
# process leaves; and a pickle, which nobody should have to open.
_LEFT_AT_HOME = re.compile(r"[._].*|checkpoint-.*|stage-\d+|nonfinite|training_args\.bin")
# Seconds before each further try.
_WAITS = (1, 2, 4, 8, 16, 32)


def push_run(trainer: Trainer, form: str | None) -> str | None:
    """
    Uploads the trainer's output directory, card included, to `hub_model_id`, in one commit: where it is interrupted,
    the repository is as it was. Weights of an earlier push that this one has not are deleted with it.

    Not `Trainer.push_to_hub`, which would upload the stages of a run, with every checkpoint.

    Args:
        form (`str`, *optional*): What `stock_format` says of the output directory.

    Returns:
        `str`: where it is now, in the main process.

    Raises:
        OSError: If the Hub refuses, or does not answer in several tries.
    """
    if not trainer.is_world_process_zero():
        return None
    args = trainer.args
    repository = repository_name(trainer)
    trainer._finish_current_push()
    with tempfile.TemporaryDirectory() as temporary:
        files = _files(Path(args.output_dir), form, Path(temporary) / "stock")
        try:
            return _commit(HfApi(token=args.hub_token), repository, files, args.hub_revision, args.hub_create_pr)
        except HTTPError as error:
            raise OSError(
                f"Pushing to {repository} failed, and changed nothing there: {error}. The run is whole in "
                f"{args.output_dir}; the same command pushes it again."
            ) from error


def repository_name(trainer: Trainer) -> str:
    """What a run is pushed to, which is made if it is not there."""
    if trainer.hub_model_id is None:
        trainer.init_hf_repo()
    return trainer.hub_model_id


def _files(folder: Path, form: str | None, stock: Path) -> dict[str, Path]:
    """What is pushed, by its name in the repository; a stock export is made in the folder `stock`."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(map(_LEFT_AT_HOME.fullmatch, path.relative_to(folder).parts))
    }
    if form is None:
        return files
    own = {name: path for name, path in files.items() if _MODEL.fullmatch(name) or name == _PROCESSOR}
    files = {name: path for name, path in files.items() if name not in own}
    if any("ForPreTraining" in name for name in AutoConfig.from_pretrained(folder).architectures or ()):
        files |= {f"{PRETRAINING}/{name}": path for name, path in own.items()}
    export(folder, stock, form)
    return files | {path.name: path for path in stock.iterdir()}


def _commit(api: HfApi, repository: str, files: dict[str, Path], revision: str | None, create_pr: bool) -> str:
    if revision is not None and not revision.startswith("refs/"):
        _retrying(lambda: api.create_branch(repository, branch=revision, exist_ok=True))

    def commit():
        # All anew each time: the Hub's client marks what it has uploaded, and a commit whose answer was lost is made.
        there = api.list_repo_files(repository, revision=revision)
        stale = [
            name
            for name in there
            if (_MODEL.fullmatch(name) or name.startswith(f"{PRETRAINING}/")) and name not in files
        ]
        return api.create_commit(
            repository,
            [CommitOperationAdd(name, path) for name, path in files.items()]
            + [CommitOperationDelete(name) for name in stale],
            commit_message="End of training",
            revision=revision,
            create_pr=create_pr,
        )

    done = _retrying(commit)
    return done.pr_url or f"{api.endpoint}/{repository}"


def _retrying(call: Callable):
    """What `call` gives; tried again where the Hub is busy, out of order, or not reached."""
    for wait in (*_WAITS, None):
        try:
            return call()
        except HTTPError as error:
            response = getattr(error, "response", None)
            passing = response is None or response.status_code == 429 or response.status_code >= 500
            if not passing or wait is None:
                raise
            asked = "" if response is None else response.headers.get("Retry-After", "")
            time.sleep(max(wait, min(int(asked), 300) if asked.isdigit() else 0))
