"""Training with labels, as the jobs share it: what is said of it, resuming and interrupts."""

from ..training.base_trainer import ViTTrainer
from ..training.callbacks import SaveOnInterrupt
from ..training.command import say


def train_to_the_end(trainer: ViTTrainer, checkpoint: str | None, described: str) -> bool:
    """
    Trains, from `checkpoint` where there is one, and says what it does, first `described`.

    Returns:
        `bool`: False after an interrupt: a checkpoint is written, and the same command goes on from it.

    Raises:
        ValueError: If the output directory holds another run.
    """
    trainer.check_output_dir()
    interrupt = SaveOnInterrupt(trainer)
    trainer.add_callback(interrupt)
    say(described)
    if checkpoint is not None:
        say(f"Resuming from {checkpoint}.")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        interrupt.restore()
    if checkpoint is not None and not trainer.num_steps_trained:
        folder, step = trainer.args.output_dir, trainer.state.global_step
        say(f"Nothing is left to train: {folder} holds all {step} steps of this run.")
    if interrupt.stopped:
        say(f"Stopped after step {trainer.state.global_step}; the same command goes on from there.")
    return not interrupt.stopped
