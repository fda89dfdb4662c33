"""The main job: from flags to a pretrained encoder, and to what it is worth."""

import gc
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import set_seed

from ..data.arguments import DataArguments
from ..data.image_processing import build_image_processor
from ..data.loading import ImageSplits, check_images, load_images, resolve_mean_std, spread_indices
from ..data.pretraining import PretrainingDataset, StreamingPretrainingDataset
from ..data.transforms import PretrainingTransform
from ..evaluation.appraisal import reconstruction_errors
from ..evaluation.online import OnlineEvaluation
from ..evaluation.verdict import Verdict
from ..files import replacing
from ..hub.export import stock_format
from ..hub.sharing import push_run
from ..models.vit.sizes import as_pair
from ..training.arguments import MIMTrainingArguments
from ..training.building import (
    build_config,
    build_model,
    describe_frozen,
    load_beginning,
    load_pretraining_model,
)
from ..training.callbacks import LogReconstructions, SaveOnInterrupt
from ..training.command import ModelArguments, parse_arguments, say
from ..training.datasets import HeldOutTransform
from ..training.errors import run_job
from ..training.run_lock import only_run_in
from ..training.stages import (
    check_finished_stages,
    mark_finished,
    optimizer_state_of,
    set_later_stages_aside,
    stage_arguments,
    where_to_start,
)
from ..training.target_cache import cache_targets, check_cached_targets
from ..training.trainable import add_encoder_lora, check_partial_pretraining, train_last_blocks
from ..training.trainer import MIMTrainer
from ..training.weights import trained_normalization
from .pretraining_results import describe_stage, evaluate, write_results
from .verdicts import appraise, images_before, reference_of

_NUM_SHOWN = 8


def main(argv: list[str] | None = None) -> int:
    """`examples/run_mim.py`: reads the flags, trains, and says how good the features are. Returns the exit status."""
    return run_job(lambda: pretrain(*parse_arguments((ModelArguments, DataArguments, MIMTrainingArguments), argv)))


def pretrain(model_args: ModelArguments, data_args: DataArguments, training_args: MIMTrainingArguments) -> int:
    """
    Trains, saves the model and its image processor, and writes the pictures and numbers that say how it went.

    Everything that can be wrong with the input is looked at before the first step.

    Returns:
        `int`: 0, or 130 after an interrupt.
    """
    with only_run_in(training_args.output_dir):
        return _pretrain(model_args, data_args, training_args)


def _pretrain(model_args: ModelArguments, data_args: DataArguments, training_args: MIMTrainingArguments) -> int:
    stages = stage_arguments(training_args)
    if data_args.streaming and any(args.max_steps <= 0 for args in stages):
        raise ValueError("--streaming data has no length, so give --max_steps (and --warmup_steps, not epochs).")
    config = build_config(model_args, data_args.image_height_width, data_args.num_channels)
    describe_frozen(model_args, config, data_args.num_channels)
    check_partial_pretraining(model_args, config, training_args)
    check_cached_targets(model_args, data_args, training_args)
    first, checkpoint = where_to_start(stages, config)
    data_args = data_args.for_model(config.num_channels, as_pair(config.image_size))
    # One process draws or converts, the others find it in the cache.
    with PartialState().main_process_first():
        pictures = load_images(data_args, seed=training_args.seed)
    first_picture = check_images(pictures.train, skip_broken=data_args.skip_broken_images)
    check_images(pictures.validation, skip_broken=data_args.skip_broken_images)
    mean, std = resolve_mean_std(data_args, pictures.train, trained_normalization(model_args))
    if hasattr(config, "image_mean"):
        # The network that the method learns from may want other pixels.
        config.image_mean, config.image_std = list(map(float, mean)), list(map(float, std))
    processor = build_image_processor(
        as_pair(config.image_size), config.num_channels, mean, std, floating_point=first_picture.is_floating_point()
    )
    feature_evaluation = build_feature_evaluation(
        training_args, pictures, processor, skip_broken=data_args.skip_broken_images
    )

    settings = {
        "start": model_args.model_name_or_path or "untrained",
        "learns_from": model_args.base_model_name_or_path or model_args.teacher_model_name_or_path,
        "trainable_blocks": model_args.trainable_blocks,
        "lora_rank": model_args.lora_rank,
        "cache_base_features": model_args.cache_base_features,
        "channel_map": model_args.channel_map and list(map(str, model_args.channel_map)),
        "crop_scale_min": data_args.crop_scale_min,
        "horizontal_flip": data_args.horizontal_flip,
        "image_mean": list(map(float, mean)),
        "image_std": list(map(float, std)),
    }
    reference = reference_of(model_args, config.model_type)
    requested = False
    for stage in range(first, len(stages)):
        if stage > first:
            # What is left of the stage before goes first: two stages would need twice the memory.
            trainer = model = tuner = reconstructions = interrupt = None
            gc.collect()
        args = stages[stage]
        train_data, held_out = build_datasets(data_args, args, config, pictures, processor, mean, std)
        set_seed(args.seed)
        model, tuner = build_stage(model_args, config, stages, stage), None
        if model_args.trainable_blocks is not None:
            train_last_blocks(model, model_args.trainable_blocks)
        elif model_args.lora_rank is not None:
            tuner = add_encoder_lora(model, model_args.lora_rank, model_args.model_name_or_path)
        trainer = MIMTrainer(
            model=model,
            args=args,
            train_dataset=train_data,
            eval_dataset=held_out,
            processing_class=processor,
            run_settings=settings,
            stage=stage if len(stages) > 1 else None,
            optimizer_state=optimizer_state_of(stages[stage - 1]) if stage > 0 and args.keep_optimizer_state else None,
        )
        trainer.feature_evaluation = feature_evaluation
        appraisal = appraise(
            trainer,
            pictures.validation,
            held_out,
            processor,
            before=images_before(stages, stage),
            reference=reference,
            skip_broken=data_args.skip_broken_images,
        )
        if stage == first:
            check_finished_stages(stages, first, trainer.run_record)
            if len(stages) == 1:
                trainer.check_output_dir()
        shown = trainer.data_collator([held_out[0, index] for index in spread_indices(len(held_out), _NUM_SHOWN)])
        reconstructions = LogReconstructions(trainer, shown, mean, std)
        interrupt = SaveOnInterrupt(trainer)
        # A request that came too late for the stage before.
        interrupt.requested = requested
        trainer.add_callback(reconstructions)
        trainer.add_callback(interrupt)
        say(describe_stage(trainer, pictures))
        if checkpoint is not None:
            say(f"Resuming from {checkpoint}.")
        if stage == first and trainer.is_world_process_zero():
            set_later_stages_aside(stages, first)
        if model_args.cache_base_features:
            cache_targets(trainer, train_data)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            interrupt.restore()
        is_resumed, checkpoint, requested = checkpoint is not None, None, interrupt.requested
        if train_data.num_broken:
            say(f"Skipped {train_data.num_broken} broken pictures (--skip_broken_images).")
        if is_resumed and not trainer.num_steps_trained:
            say(
                f"Nothing is left to train: {args.output_dir} holds all {trainer.state.global_step} steps of this run."
            )
        if interrupt.stopped:
            say(f"Stopped after step {trainer.state.global_step}; the same command goes on from there.")
            return 130
        if len(stages) > 1:
            save_stage(trainer)
    if tuner is not None:
        if trainer.is_world_process_zero():
            tuner.save_pretrained(str(Path(training_args.output_dir) / "adapter"))
        tuner.merge_and_unload()
    # The last stage's model is the run's.
    trainer.args.output_dir, trainer.args.seed = training_args.output_dir, training_args.seed
    # "Internal": without pushing, which waits for the card.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    shares = adapter_shares(trainer, shown)
    # The files that the evaluation reads are written by one process.
    PartialState().wait_for_everyone()
    folders = {f"stage {stage}": args.output_dir for stage, args in enumerate(stages[:-1])}
    folders["trained"] = training_args.output_dir
    seen = images_before(stages, len(stages) - 1) + trainer.state.global_step * args.effective_batch_size
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).eval()
    errors = reconstruction_errors(model, held_out, bf16=args.bf16)
    results = evaluate(
        folders,
        config,
        pictures,
        processor,
        training_args,
        images_seen=seen,
        beginning=load_beginning(model_args, config) if training_args.references else None,
        errors=errors,
        reference=reference(seen),
    )
    verdict = None
    if results is not None:
        verdict = Verdict(**results["verdict"])
    elif appraisal is not None:
        # Of a stream: without labels.
        appraisal(model, trainer.state.global_step, trainer.state.max_steps)
        verdict = appraisal.last
    form = None
    if trainer.is_world_process_zero():
        form = stock_format(training_args.output_dir) if training_args.push_to_hub else None
        write_results(trainer, data_args, pictures, results, verdict, reconstructions.last_path, shares, stages, form)
    PartialState().wait_for_everyone()
    if training_args.push_to_hub:
        say(f"Pushed to {push_run(trainer, form)}.")
    return 0


def build_stage(model_args: ModelArguments, config, stages: list[MIMTrainingArguments], stage: int):
    """The model of a stage: the flags' for stage 0; then one that learns from what the stage before left on disk."""
    if stage == 0:
        return build_model(model_args, config)
    return load_pretraining_model(model_args, stages[stage - 1].output_dir).next_stage()


def save_stage(trainer: MIMTrainer) -> None:
    """Leaves in the stage's folder its model and, last, the word that it is finished."""
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    if trainer.is_world_process_zero():
        if trainer.args.keep_optimizer_state:
            with replacing(optimizer_state_of(trainer.args)) as temporary:
                torch.save(trainer.optimizer.state_dict(), temporary)
        mark_finished(trainer.args)
    PartialState().wait_for_everyone()


def build_feature_evaluation(
    args: MIMTrainingArguments, pictures: ImageSplits, processor, *, skip_broken: bool = False
) -> OnlineEvaluation | None:
    """
    What `--eval_knn` and `--online_probe` ask for; None for neither.

    Raises:
        ValueError: If there are no labels or no evaluations, under FSDP, or if the best model is to be told by a
            feature metric that will not be there.
    """
    evaluation = None
    if args.eval_knn or args.online_probe:
        if args.eval_strategy == "no":
            raise ValueError("--eval_knn and --online_probe belong to an evaluation: give --eval_strategy epoch.")
        if args.fsdp_plugin_args is not None:
            raise ValueError("--eval_knn and --online_probe need the whole encoder in each process: not with --fsdp.")
        evaluation = OnlineEvaluation(
            pictures,
            processor,
            knn=args.eval_knn,
            linear=args.online_probe,
            num_workers=args.dataloader_num_workers,
            bf16=args.bf16,
            skip_broken=skip_broken,
        )
    best = (args.metric_for_best_model or "").removeprefix("eval_")
    names = evaluation.names if evaluation is not None else []
    if best.startswith(("knn_", "linear_")) and best not in names:
        raise ValueError(
            f"--metric_for_best_model {args.metric_for_best_model}: the evaluations will have "
            f"{', '.join(names) or 'no metrics of features: pass --eval_knn true or --online_probe true'}."
        )
    return evaluation


def build_datasets(data_args, training_args, config, pictures: ImageSplits, processor, mean, std):
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


def adapter_shares(trainer, shown: dict[str, torch.Tensor]) -> list[float] | None:
    """What the model's `adapter_shares` says of the pictures shown. On all processes: under FSDP a common effort."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).eval()
    if not hasattr(model, "adapter_shares"):
        return None
    with trainer.accelerator.autocast():
        return model.adapter_shares(*(shown[name].to(trainer.args.device) for name in ("pixel_values", "noise")))
