"""The main job: from flags to a pretrained encoder, and to what it is worth."""

import gc
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import set_seed

from ..data.arguments import DataArguments
from ..data.dataset import ImageStream
from ..data.image_processing import build_image_processor
from ..data.loading import ImageSplits, check_images, load_images, resolve_mean_std, spread_indices
from ..data.pretraining import PretrainingDataset, StreamingPretrainingDataset
from ..data.transforms import PretrainingTransform
from ..evaluation.appraisal import evidence_of, reconstruction_errors
from ..evaluation.attentive_probe import evaluate_attentively
from ..evaluation.dense import DENSE_PICTURE, annotated_maps, evaluate_dense, raw_patches
from ..evaluation.encoders import FeatureEncoder, RawPixels
from ..evaluation.features import extract_features, labelled_splits, shared_labels
from ..evaluation.online import OnlineEvaluation
from ..evaluation.pictures import draw_loss_curves, draw_shares, label_rows
from ..evaluation.report import RAW_PIXELS, described_tables, evaluate_features, text_table
from ..evaluation.verdict import Verdict, judge
from ..files import replacing, save_picture, write_json
from ..hub.cards import write_card
from ..hub.sharing import push_run
from ..models.vit.sizes import as_pair
from ..registry import RECORDS, method_class, method_name
from ..training.arguments import MIMTrainingArguments
from ..training.building import (
    build_config,
    build_model,
    describe_frozen,
    load_pretraining_model,
    trained_normalization,
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
    run_history,
    set_later_stages_aside,
    stage_arguments,
    where_to_start,
)
from ..training.trainable import add_encoder_lora, check_partial_pretraining, train_last_blocks
from ..training.trainer import MIMTrainer
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
        folders, config, pictures, processor, training_args, images_seen=seen, errors=errors, reference=reference(seen)
    )
    verdict = None
    if results is not None:
        verdict = Verdict(**results["verdict"])
    elif appraisal is not None:
        # Of a stream: without labels.
        appraisal(model, trainer.state.global_step, trainer.state.max_steps)
        verdict = appraisal.last
    if trainer.is_world_process_zero():
        write_results(trainer, data_args, pictures, results, verdict, reconstructions.last_path, shares, stages)
    PartialState().wait_for_everyone()
    if training_args.push_to_hub:
        push_run(trainer)
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


def write_results(
    trainer,
    data_args,
    pictures: ImageSplits,
    results: dict | None,
    verdict: Verdict | None,
    reconstructions: Path | None,
    shares: list[float] | None,
    stages: list[MIMTrainingArguments],
) -> None:
    """Writes loss curves, `features.json` and the card; says what the features are worth and where everything is."""
    folder = Path(trainer.args.output_dir)
    drawn = [reconstructions] if reconstructions is not None else []
    history = run_history(stages) if len(stages) > 1 else trainer.state.log_history
    if draw_loss_curves(history, folder / "loss_curves.png"):
        drawn.append(folder / "loss_curves.png")
    if shares is not None:
        drawn.append(draw_shares(shares, folder / "adapter_shares.png"))
    config = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).config
    if results is not None:
        write_json(folder / "features.json", results)
        drawn += [folder / DENSE_PICTURE] if "dense" in results else []
        say("\n" + format_results(results))
    name = trainer.args.hub_model_id or str(folder)
    write_card(folder, name, config, describe_training(trainer, data_args, pictures, stages), results, verdict)
    if verdict is not None:
        say(f"\n{verdict}")
    load = f"AutoModel.from_pretrained({str(folder)!r})"
    if RECORDS[config.model_type].stock_hides:
        load = f"hf_mim.to_vit({load})"
    say(f"\nThe model is in {folder}: {load} after `import hf_mim`.")
    if drawn:
        say("Pictures: " + ", ".join(str(path) for path in drawn))


def evaluate(
    folders: dict[str, str],
    config,
    pictures: ImageSplits,
    processor,
    args,
    *,
    images_seen: int,
    errors=None,
    reference: str | None = None,
) -> dict | None:
    """
    What raw pixels, the untrained network (`args.references`) and the saved ones (folders by name) are worth, for
    every label; and the verdict on the last one, by `errors` (see [`reconstruction_errors`]) too.

    None where the training data is a stream, which cannot be gone through again. Each process takes its share.
    """
    if isinstance(pictures.train, ImageStream):
        return None
    networks = {}
    if args.references:
        set_seed(args.seed)
        networks["untrained"] = method_class(config.model_type, "ForPreTraining")(config).encoder
    # Not AutoModel: a stock ViTMAE hides three quarters of the picture.
    encoder_class = method_class(config.model_type, "Model")
    networks |= {name: encoder_class.from_pretrained(folder) for name, folder in folders.items()}
    encoders = {name: FeatureEncoder(network.eval()).to(args.device) for name, network in networks.items()}
    poolings = encoders[next(iter(folders))].poolings
    if args.references:
        encoders = {RAW_PIXELS: RawPixels()} | encoders
    splits = labelled_splits(pictures)
    how = {"num_workers": args.dataloader_num_workers, "bf16": args.bf16}
    features = [extract_features(encoders, split, processor, poolings, **how) for split in splits]
    labels = shared_labels(*splits, multi_label=True)
    answers: dict = {}
    results = evaluate_features(*features, *labels, answers=answers)
    evidence = evidence_of(
        images_seen,
        features[1]["trained"],
        features[1].get("untrained"),
        answers=answers.get("trained"),
        untrained_answers=answers.get("untrained"),
        errors=errors,
    )
    results |= {"verdict": judge(evidence, reference).to_dict()}
    encoders.pop(RAW_PIXELS, None)
    attentive = evaluate_attentively(encoders, *splits, *labels, processor, device=args.device, **how)
    results |= {"attentive": attentive}
    # Of a sample of the patches, which takes seconds: not shared out over the processes.
    if PartialState().is_main_process and annotated_maps(*splits):
        references = raw_patches(as_pair(config.patch_size)) if args.references else {}
        dense, rows = evaluate_dense(references | encoders, *splits, processor, **how)
        results |= {"dense": dense}
        save_picture(Path(args.output_dir) / DENSE_PICTURE, label_rows(rows))
    return results


def format_results(results: dict) -> str:
    """The results as tables for the terminal."""
    return "\n\n".join(f"{what}\n{text_table(rows)}" for what, rows in described_tables(results))


def describe_stage(trainer: MIMTrainer, pictures: ImageSplits) -> str:
    """What is trained, on what, and how."""
    args, model = trainer.args, trainer.model
    stage = "" if trainer.stage is None else f"Stage {trainer.stage} (the last is {args.num_stages - 1}). "
    (height, width), (patch_height, patch_width) = as_pair(model.config.image_size), as_pair(model.config.patch_size)
    return (
        f"{stage}{method_name(model.config.model_type)}: {count_parameters(model)}; {describe_data(pictures)} of "
        f"{height} x {width} pixels, in patches of {patch_height} x {patch_width}; effective batch "
        f"{args.effective_batch_size}, peak learning rate {args.learning_rate:.2e}, {args.precision} on {args.device}."
    )


def count_parameters(model) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    return f"{encoder / 1e6:.1f} M parameters in the encoder, {trained / 1e6:.1f} M trained"


def describe_data(pictures: ImageSplits) -> str:
    if isinstance(pictures.train, ImageStream):
        return f"a stream of training pictures, {len(pictures.validation)} held out"
    return f"{len(pictures.train)} training and {len(pictures.validation)} held-out pictures"


def describe_training(trainer, data_args, pictures: ImageSplits, stages) -> dict[str, str]:
    """The settings that the model card tells."""
    several = {"stages": f"{len(stages)}; what follows is of the last"} if len(stages) > 1 else {}
    run = trainer.run_record["decides"]
    return several | {
        "start": run["start"],
        "data": f"{data_args.dataset_name or data_args.train_dir or 'scenes (embedded)'}, {describe_data(pictures)}",
        "steps": f"{trainer.state.global_step}, of {run['effective_batch_size']} pictures",
        "peak learning rate": f"{run['learning_rate']:.3g}, {run['lr_scheduler_type']}; weight decay "
        f"{run['weight_decay']:g}",
        "smallest crop": f"{run['crop_scale_min']:g} of the area",
        "precision": run["precision"],
        "seed": str(run["seed"]),
    }
