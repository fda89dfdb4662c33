"""The main job: from flags to a pretrained encoder, and to what it is worth."""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModel, set_seed
from transformers.utils import logging

from ..data.arguments import DataArguments
from ..data.image_processing import build_image_processor, evaluation_transform
from ..data.loading import PictureSplits, check_pictures, load_pictures, resolve_mean_std
from ..data.pretraining import PretrainingDataset, StreamingPretrainingDataset
from ..data.transforms import PretrainingTransform, sample_generator
from ..evaluation.features import extract_features, transformed_pictures
from ..evaluation.knn import knn_accuracy, rank_me
from ..evaluation.pictures import draw_loss_curves
from ..hub.cards import write_card
from ..models.vit.configuration_vit import as_pair
from ..registry import METHODS, method_class
from .arguments import MIMTrainingArguments
from .building import build_config, build_model
from .callbacks import LogReconstructions, SaveOnInterrupt
from .checkpoints import checkpoint_to_resume
from .command import ModelArguments, parse_arguments
from .errors import plain_message
from .trainer import MIMTrainer

_NUM_SHOWN = 8
_MAX_KNN_TRAIN, _MAX_KNN_TEST = 10000, 4000


def main(argv: list[str] | None = None) -> int:
    """`examples/run_mim.py`: reads the flags, trains, and says how good the features are. Returns the exit status."""
    try:
        arguments = parse_arguments((ModelArguments, DataArguments, MIMTrainingArguments), argv)
        return pretrain(*arguments)
    except Exception as error:
        # What the user can mend is said without a page of stack; everything else keeps its stack.
        message = plain_message(error)
        if message is None or logging.get_verbosity() <= logging.INFO:
            raise
        rank = int(os.environ.get("RANK", 0))
        print(f"\nError{f' (process {rank})' if rank else ''}: {message}", file=sys.stderr)
        return 1


def pretrain(model_args: ModelArguments, data_args: DataArguments, training_args: MIMTrainingArguments) -> int:
    """
    Trains, saves the model and its image processor, and writes the pictures and numbers that say how it went.

    Everything that can be wrong with the input is looked at before the first step.

    Returns:
        `int`: 0, or 130 after an interrupt.
    """
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError("--streaming data has no length, so give --max_steps (and --warmup_steps, not epochs).")
    config = build_config(model_args, data_args.image_height_width, data_args.num_channels)
    checkpoint = checkpoint_to_resume(training_args.output_dir, training_args.resume_from_checkpoint, config)
    data_args.image_size = list(as_pair(config.image_size))
    # One process draws or converts, the others find it in the cache.
    with PartialState().main_process_first():
        pictures = load_pictures(data_args, seed=training_args.seed)
    for split in (pictures.train, pictures.validation):
        check_pictures(split)
    mean, std = resolve_mean_std(data_args, pictures.train)
    processor = build_image_processor(as_pair(config.image_size), config.num_channels, mean, std)
    train_data, held_out = build_datasets(data_args, training_args, config, pictures, processor, mean, std)

    set_seed(training_args.seed)
    model = build_model(model_args, config)
    trainer = MIMTrainer(
        model=model, args=training_args, train_dataset=train_data, eval_dataset=held_out, processing_class=processor
    )
    shown = trainer.data_collator([held_out[0, index] for index in range(min(_NUM_SHOWN, len(held_out)))])
    reconstructions = LogReconstructions(trainer, shown, mean, std)
    interrupt = SaveOnInterrupt(trainer)
    trainer.add_callback(reconstructions)
    trainer.add_callback(interrupt)
    say(
        f"{METHODS[config.model_type]}: {count_parameters(model)}; {describe_data(pictures)}; effective batch "
        f"{training_args.effective_batch_size}, peak learning rate {training_args.learning_rate:.2e}, "
        f"{'bfloat16' if training_args.bf16 else 'float16' if training_args.fp16 else 'float32'} on "
        f"{training_args.device}."
    )
    if checkpoint is not None:
        say(f"Resuming from {checkpoint}.")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        interrupt.restore()
    if isinstance(train_data, PretrainingDataset) and train_data.broken_indices:
        say(f"Skipped {len(train_data.broken_indices)} broken pictures (--skip_broken_images).")
    if interrupt.stopped:
        say(f"Stopped after step {trainer.state.global_step}; the same command goes on from there.")
        return 130
    # "Internal": without pushing, which waits for the card.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_results(trainer, data_args, pictures, processor, reconstructions.last_path)
    PartialState().wait_for_everyone()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return 0


class HeldOutTransform:
    """A picture as the image processor gives it, with noise that is a function of (seed, index)."""

    def __init__(self, processor, num_channels: int, num_patches: int, seed: int):
        self.transform = evaluation_transform(processor, num_channels)
        self.num_patches, self.seed = num_patches, seed

    def __call__(self, picture: torch.Tensor, epoch: int, index: int) -> dict[str, torch.Tensor]:
        noise = sample_generator(self.seed, 0, index).random(self.num_patches, dtype="float32")
        return {"pixel_values": self.transform(picture), "noise": torch.from_numpy(noise)}


def build_datasets(data_args, training_args, config, pictures: PictureSplits, processor, mean, std):
    """The training data with random crops, and the held-out pictures as the image processor gives them."""
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    augment = PretrainingTransform(
        as_pair(config.image_size),
        config.num_patches,
        mean,
        std,
        crop_scale=(data_args.crop_scale_min, 1.0),
        horizontal_flip=data_args.horizontal_flip,
        seed=seed,
    )
    held_out = PretrainingDataset(
        pictures.validation,
        HeldOutTransform(processor, config.num_channels, config.num_patches, seed),
        skip_broken=data_args.skip_broken_images,
    )
    if data_args.streaming:
        rank, processes = training_args.process_index, training_args.world_size
        train = StreamingPretrainingDataset(pictures.train, augment, rank=rank, num_processes=processes)
    else:
        train = PretrainingDataset(pictures.train, augment, skip_broken=data_args.skip_broken_images)
    return train, held_out


def write_results(trainer, data_args, pictures: PictureSplits, processor, reconstructions: Path | None) -> None:
    """Writes loss curves, `features.json` and the model card, and says what the features are worth and where all is."""
    folder = Path(trainer.args.output_dir)
    drawn = [reconstructions] if reconstructions is not None else []
    if draw_loss_curves(trainer.state.log_history, folder / "loss_curves.png"):
        drawn.append(folder / "loss_curves.png")
    config = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).config
    results = evaluate_features(folder, config, pictures, processor, trainer.args)
    if results is not None:
        (folder / "features.json").write_text(json.dumps(results, indent=2) + "\n")
        say("\n" + format_results(results))
    write_card(folder, config, describe_training(trainer, data_args, pictures), results)
    say(f"\nThe model is in {folder}: AutoModel.from_pretrained({str(folder)!r}) after `import hf_mim`.")
    if drawn:
        say("Pictures: " + ", ".join(str(path) for path in drawn))


def evaluate_features(folder, config, pictures: PictureSplits, processor, args) -> dict | None:
    """
    k-NN accuracy for every label and RankMe, of raw pixels, the untrained network and the saved one.

    At most 10,000 training pictures are the memory, and 4,000 held-out ones the test. None where the training data is
    a stream, which cannot be gone through again.
    """
    if not hasattr(pictures.train, "select"):
        return None
    transform = evaluation_transform(processor, config.num_channels)
    splits = [
        data.select(torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:most].tolist())
        for data, most in ((pictures.train, _MAX_KNN_TRAIN), (pictures.validation, _MAX_KNN_TEST))
    ]
    batches = [
        torch.cat(list(transformed_pictures(data, transform, num_workers=args.dataloader_num_workers))).split(64)
        for data in splits
    ]
    set_seed(args.seed)
    encoder_class = method_class(config.model_type, "ForPreTraining")
    networks = {
        "raw pixels": None,
        "untrained network": encoder_class(config).encoder.to(args.device),
        "trained network": AutoModel.from_pretrained(folder).to(args.device),
    }
    labels = [name for name in splits[0].labels if name in splits[1].labels]
    results = {"num_train": len(splits[0]), "num_test": len(splits[1]), "knn": {}, "rank_me": {}}
    for name, network in networks.items():
        with quiet_autocast(args):
            train, test = (extract_features(network, split) for split in batches)
        if network is not None:
            results["rank_me"][name] = rank_me(test)
        results["knn"][name] = {
            label: knn_accuracy(
                train,
                torch.as_tensor(splits[0].labels[label]),
                test,
                torch.as_tensor(splits[1].labels[label]),
            )
            for label in labels
        }
    return results


def quiet_autocast(args):
    """Features in bfloat16 where training was: twice as fast or more, and alike."""
    if args.bf16:
        return torch.autocast(args.device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def format_results(results: dict) -> str:
    """The results as a table for the terminal."""
    labels = list(next(iter(results["knn"].values())))
    head = [f"k-NN accuracy, % ({results['num_train']} / {results['num_test']} pictures)", *labels, "RankMe"]
    rows = [
        [name, *(f"{scores[label]:.1f}" for label in labels), format(results["rank_me"].get(name, "-"), ".5")]
        for name, scores in results["knn"].items()
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        lines.append("  ".join([row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:])]))
    return "\n".join(lines)


def count_parameters(model) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    return f"{encoder / 1e6:.1f} M parameters in the encoder, {trained / 1e6:.1f} M trained"


def describe_data(pictures: PictureSplits) -> str:
    if hasattr(pictures.train, "select"):
        return f"{len(pictures.train)} training and {len(pictures.validation)} held-out pictures"
    return f"a stream of training pictures, {len(pictures.validation)} held out"


def describe_training(trainer, data_args, pictures: PictureSplits) -> dict[str, str]:
    """The settings that the model card tells."""
    args = trainer.args
    return {
        "data": f"{data_args.dataset_name or data_args.train_dir or 'scenes (embedded)'}, {describe_data(pictures)}",
        "steps": f"{trainer.state.global_step}, of {args.effective_batch_size} pictures",
        "peak learning rate": f"{args.learning_rate:.3g}, cosine; weight decay {args.weight_decay:g}",
        "smallest crop": f"{data_args.crop_scale_min:g} of the area",
        "seed": str(args.seed),
    }


def say(text: str) -> None:
    """Prints once, not once a process."""
    if PartialState().is_main_process:
        print(text, flush=True)
