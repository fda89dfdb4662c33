"""Uploading what a run leaves in its output directory."""

from huggingface_hub import HfApi
from transformers import Trainer

# What only going on with the run needs; of several stages, whose last model is the run's, the stages.
_LEFT_AT_HOME = ["_*", "checkpoint-*", "stage-*", "nonfinite/*"]


def push_run(trainer: Trainer) -> None:
    """
    Uploads the trainer's output directory, card included, to `hub_model_id`, which is made if it is not there.

    Not `Trainer.push_to_hub`, which would upload the stages of a run, with every checkpoint.
    """
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    if trainer.hub_model_id is None:
        trainer.init_hf_repo()
    trainer._finish_current_push()
    HfApi().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=args.output_dir,
        commit_message="End of training",
        token=args.hub_token,
        revision=args.hub_revision,
        ignore_patterns=_LEFT_AT_HOME,
    )
