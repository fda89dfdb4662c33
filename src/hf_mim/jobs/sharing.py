"""What a run's card tells besides the model and its results."""

from pathlib import Path

from ..data.arguments import DataArguments
from ..hub.cards import CardContext
from ..hub.origin import read_origin


def card_name(trainer) -> str:
    """What the model is loaded by: the repository that it is pushed to, or its folder."""
    return trainer.hub_model_id or trainer.args.hub_model_id or trainer.args.output_dir


def card_context(trainer, data_args: DataArguments, drawn: list[Path], form: str | None) -> CardContext:
    """
    Args:
        drawn (`list[Path]`): Pictures of the run; those beside the card are shown on it.
        form (`str`, *optional*): As `CardContext` has it.
    """
    folder, record = Path(trainer.args.output_dir), trainer.run_record
    decides = record["decides"]
    return CardContext(
        read_origin(
            decides["start"],
            decides.get("learns_from"),
            dataset_name=data_args.dataset_name,
            license=trainer.args.hub_license,
        ),
        data=data_args.dataset_name or data_args.train_dir or "scenes (embedded in hf_mim)",
        record=record,
        pictures=[
            path.relative_to(folder).as_posix()
            for path in drawn
            if path.is_relative_to(folder) and not path.relative_to(folder).parts[0].startswith("stage-")
        ],
        form=form,
    )
