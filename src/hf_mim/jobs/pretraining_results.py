"""What a pretraining run has come to: features judged, tables, pictures and the card."""

from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from ..data.dataset import ImageStream
from ..data.loading import ImageSplits
from ..evaluation.appraisal import compare, evidence_of
from ..evaluation.attentive_probe import evaluate_attentively
from ..evaluation.dense import DENSE_PICTURE, annotated_maps, evaluate_dense, raw_patches
from ..evaluation.encoders import FeatureEncoder, FrozenEncoder, RawPixels
from ..evaluation.features import extract_features, labelled_splits, shared_labels
from ..evaluation.pictures import draw_loss_curves, draw_shares, label_rows
from ..evaluation.report import RAW_PIXELS, described_tables, evaluate_features, text_table
from ..evaluation.verdict import Comparison, Verdict, judge
from ..files import save_picture, write_json
from ..hub.cards import write_card
from ..models.vit.frozen import FrozenViT
from ..models.vit.sizes import as_pair
from ..registry import RECORDS, method_class, method_name
from ..training.arguments import MIMTrainingArguments
from ..training.command import say
from ..training.stages import run_history
from ..training.trainer import MIMTrainer
from .sharing import card_context, card_name


def write_results(
    trainer,
    data_args,
    images: ImageSplits,
    results: dict | None,
    verdict: Verdict | None,
    reconstructions: Path | None,
    shares: list[float] | None,
    stages: list[MIMTrainingArguments],
    form: str | None,
) -> None:
    """
    Writes loss curves, `features.json` and the card, for a repository whose root is in the stock format `form` or for
    the folder; says what the features are worth and where everything is.
    """
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
    training = describe_training(trainer, data_args, images, stages)
    context = card_context(trainer, data_args, drawn, form)
    write_card(folder, card_name(trainer), config, training, results, verdict, context)
    if verdict is not None:
        say(f"\n{verdict}")
    for comparison in (results or {}).get("comparisons", ()):
        say(f"{Comparison(**comparison)}.")
    load = f"AutoModel.from_pretrained({str(folder)!r})"
    if RECORDS[config.model_type].stock_hides:
        load = f"hf_mim.to_vit({load})"
    say(f"\nThe model is in {folder}: {load} after `import hf_mim`.")
    if drawn:
        say("Pictures: " + ", ".join(str(path) for path in drawn))


def evaluate(
    folders: dict[str, str],
    config,
    images: ImageSplits,
    processor,
    args,
    *,
    images_seen: int,
    beginning=None,
    errors=None,
    reference: str | None = None,
) -> dict | None:
    """
    What raw pixels, the untrained network (`args.references`), the one that the run began with (`beginning`, as
    [`load_beginning`] gives) and the saved ones (folders by name) are worth, for every label; the verdict on the last
    one, by `errors` (see [`reconstruction_errors`]) too; and whether it is better than the untrained and the first.

    None where the training data is a stream, which cannot be gone through again. Each process takes its share.
    """
    if isinstance(images.train, ImageStream):
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
    splits = labelled_splits(images)
    how = {"num_workers": args.dataloader_num_workers, "bf16": args.bf16}
    features = [extract_features(encoders, split, processor, poolings, **how) for split in splits]
    if beginning is not None:
        is_frozen = isinstance(beginning, FrozenViT)
        start = (FrozenEncoder(beginning) if is_frozen else FeatureEncoder(beginning)).to(args.device)
        for found, split in zip(features, splits, strict=True):
            # It may have no [CLS] where the others have.
            found |= extract_features({"start": start}, split, processor, start.poolings, **how)
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
    than = {"start": "what it began with", "untrained": "untrained"}
    than = {name: called for name, called in than.items() if name in features[1]}
    results["comparisons"] = [one.to_dict() for one in compare(features[1], answers, than)]
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


def describe_stage(trainer: MIMTrainer, images: ImageSplits) -> str:
    """What is trained, on what, and how."""
    args, model = trainer.args, trainer.model
    stage = "" if trainer.stage is None else f"Stage {trainer.stage} (the last is {args.num_stages - 1}). "
    (height, width), (patch_height, patch_width) = as_pair(model.config.image_size), as_pair(model.config.patch_size)
    return (
        f"{stage}{method_name(model.config.model_type)}: {count_parameters(model)}; {describe_data(images)} of "
        f"{height} x {width} pixels, in patches of {patch_height} x {patch_width}; effective batch "
        f"{args.effective_batch_size}, peak learning rate {args.learning_rate:.2e}, {args.precision} on {args.device}."
    )


def count_parameters(model) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    return f"{encoder / 1e6:.1f} M parameters in the encoder, {trained / 1e6:.1f} M trained"


def describe_data(images: ImageSplits) -> str:
    if isinstance(images.train, ImageStream):
        return f"a stream of training pictures, {len(images.validation)} held out"
    return f"{len(images.train)} training and {len(images.validation)} held-out pictures"


def describe_training(trainer, data_args, images: ImageSplits, stages) -> dict[str, str]:
    """The settings that the model card tells."""
    several = {"stages": f"{len(stages)}; what follows is of the last"} if len(stages) > 1 else {}
    run = trainer.run_record["decides"]
    return several | {
        "start": run["start"],
        "data": f"{data_args.dataset_name or data_args.train_dir or 'scenes (embedded)'}, {describe_data(images)}",
        "steps": f"{trainer.state.global_step}, of {run['effective_batch_size']} pictures",
        "peak learning rate": f"{run['learning_rate']:.3g}, {run['lr_scheduler_type']}; weight decay "
        f"{run['weight_decay']:g}",
        "smallest crop": f"{run['crop_scale_min']:g} of the area",
        "precision": run["precision"],
        "seed": str(run["seed"]),
    }
