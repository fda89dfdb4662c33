"""How the trainers save and go on: checkpoints and models that are whole or not there, each with the run's record."""

import functools
import shutil
from pathlib import Path

from huggingface_hub import HfApi
from safetensors import SafetensorError
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from ..files import replacing
from .checkpoints import (
    check_same_config,
    finish_checkpoint,
    finish_model,
    last_whole_checkpoint,
    rotate_checkpoints,
    set_later_checkpoints_aside,
    unfinished,
)
from .losses import NonFiniteLossError
from .run_lock import only_run_in
from .run_record import RUN_RECORD, check_same_run, run_record, set_record_aside, write_record

# What transformers calls the state of a training.
_STATE = "trainer_state.json"


class SavingMixin:
    """
    Of a `Trainer` with `run_settings`, see [`ViTTrainer`], `speed`, and `_is_saving`, True within `_save_checkpoint`.
    """

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        As `Trainer.train`; True goes on from the last whole checkpoint.

        Raises:
            ValueError: If the checkpoint is of a run that was decided otherwise, see [`run_record`]; or if another
                process is training into `output_dir`.
        """
        with only_run_in(self.args.output_dir):
            return self._train(resume_from_checkpoint, *args, **kwargs)

    def _train(self, resume_from_checkpoint, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no whole checkpoint in {self.args.output_dir} to resume from.")
        checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if checkpoint is not None:
            check_same_run(checkpoint, self.run_record, "is a checkpoint of another run")
        # All have looked before one renames.
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            set_later_checkpoints_aside(self.args.output_dir, checkpoint)
            if checkpoint is None:
                set_record_aside(self.args.output_dir, self.run_record)
        self.accelerator.wait_for_everyone()
        return super().train(checkpoint, *args, **kwargs)

    def check_output_dir(self) -> None:
        """
        Raises ValueError if `output_dir` holds what another run has made, unless `resume_from_checkpoint` is "false":
        what this run does not replace would be taken for its own.
        """
        folder = Path(self.args.output_dir)
        if str(self.args.resume_from_checkpoint).lower() == "false":
            return
        check_same_run(folder, self.run_record)
        if (folder / RUN_RECORD).is_file():
            check_same_config(folder, self.model.config)

    @functools.cached_property
    def run_record(self) -> dict:
        """What decides the result of training, and what else is worth knowing of it; see [`run_record`]."""
        return run_record(self.model, self.args, self.train_dataset, self.run_settings)

    def _issue_warnings_after_load(self, load_result) -> None:
        # The stock method warns, and trains on with what the network was initialised with.
        parts = (("lacks", load_result.missing_keys), ("has besides", load_result.unexpected_keys))
        wrong = [f"{what} {', '.join(names[:3])} ({len(names)} tensors)" for what, names in parts if names]
        if wrong:
            raise ValueError(f"The checkpoint's weights are not this network's: it {', and '.join(wrong)}.")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.check_losses()
        self.check_weights()
        super().save_model(output_dir, _internal_call)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            # The stock method leaves all to the shards, which only training can read.
            if output_dir in (None, self.args.output_dir):
                self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
            elif self.args.should_save:
                self.model.config.save_pretrained(output_dir)
        if self.args.should_save:
            write_record(output_dir or self.args.output_dir, self.run_record)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if output_dir in (None, self.args.output_dir):
            # Written beside first: a run that is killed here leaves the files that were there, whole.
            super()._save(str(unfinished(self.args.output_dir) / "model"), state_dict)
            if self.args.should_save:
                finish_model(self.args.output_dir, "model")
            return
        # transformers writes the weights of ViT and ViTMAE under the names of its older versions, which its Trainer
        # does not find again. A checkpoint keeps the names of the modules; the model at the end gets the others.
        self.model.save_pretrained = functools.partial(self.model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.__dict__.pop("save_pretrained", None)

    def save_state(self) -> None:
        if self.is_world_process_zero():
            with replacing(Path(self.args.output_dir) / _STATE) as temporary:
                self.state.save_to_json(str(temporary))

    def create_model_card(self, *args, **kwargs) -> None:
        """Keeps the card that the job wrote, which the stock one would replace when pushing."""
        if not (Path(self.args.output_dir) / "README.md").is_file():
            super().create_model_card(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        As the stock method; but with `hub_strategy` "checkpoint" and "all_checkpoints" the checkpoint alone is pushed,
        in one commit: what else a repository holds is a finished run.
        """
        names = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name,
        }
        if self.args.hub_strategy not in names:
            return super()._push_from_checkpoint(checkpoint_folder)
        if not self.is_world_process_zero():
            return
        # One at a time: of several on their way the last would not always be the last to arrive.
        self._finish_current_push()
        job = HfApi(token=self.args.hub_token).upload_folder(
            repo_id=self.hub_model_id,
            folder_path=checkpoint_folder,
            path_in_repo=names[self.args.hub_strategy],
            # Of the checkpoint before.
            delete_patterns="*",
            commit_message=f"Checkpoint of step {self.state.global_step}",
            revision=self.args.hub_revision,
            run_as_future=True,
        )
        self.push_in_progress = PushInProgress([job])

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        # Only `_save_checkpoint` asks while it saves.
        return str(unfinished(folder)) if self._is_saving else folder

    def _save_checkpoint(self, model, trial):
        with self.speed.not_training():
            self._save_whole_checkpoint(model, trial)

    def _save_whole_checkpoint(self, model, trial) -> None:
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        push_to_hub, self.args.push_to_hub = self.args.push_to_hub, False
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            # Each process writes its own part.
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._correct_best_checkpoint(folder)
                finish_checkpoint(folder, name)
        except NonFiniteLossError:
            raise
        except BaseException as error:
            if self.args.should_save:
                shutil.rmtree(unfinished(folder), ignore_errors=True)
            # torch's writer says RuntimeError when it cannot write, and that comes from this file.
            torch_cannot = isinstance(error, RuntimeError) and "inline_container" in str(error)
            if not isinstance(error, OSError | SafetensorError) and not torch_cannot:
                raise
            checkpoint = last_whole_checkpoint(self.args.output_dir)
            kept = f"Training resumes from {checkpoint}" if checkpoint else "No earlier checkpoint is there"
            raise OSError(
                f"Writing the checkpoint {folder / name} failed ({error}); what was written of it is deleted. {kept}. "
                "Is the disk full? Free some space and start the same command again."
            ) from error
        finally:
            self._is_saving = False
            self.args.push_to_hub = push_to_hub
        if push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        if self.args.should_save:
            # Only now that the new one is whole.
            rotate_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _correct_best_checkpoint(self, folder: Path) -> None:
        # The stock method looks for the best checkpoint where this one lies until it is whole.
        if not self.state.best_global_step:
            return
        name = f"checkpoint-{self.state.best_global_step}"
        if name == f"checkpoint-{self.state.global_step}" or (folder / name).is_dir():
            self.state.best_model_checkpoint = str(folder / name)
        written = unfinished(folder) / f"checkpoint-{self.state.global_step}"
        self.state.save_to_json(str(written / _STATE))
