"""The job of `examples/run_object_detection.py`: from flags to a detector, and to how well it finds objects."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import set_seed
from transformers.image_utils import PILImageResampling

from ..data.arguments import DataArguments
from ..data.coco import load_objects
from ..data.detection import DetectionDataset, DetectionTransform, ObjectArguments, WholePicture, collate_objects
from ..data.image_processing import MIMImageProcessor
from ..data.images import BrokenImageError
from ..data.loading import resolve_mean_std, spread_indices
from ..evaluation.detection import DetectionScores, draw_objects
from ..evaluation.pictures import draw_loss_curves, label_rows, to_rgb
from ..files import replacing, write_json
from ..hub.cards import write_detector_card
from ..hub.sharing import push_run
from ..models.vit.sizes import as_pair
from ..training.checkpoints import checkpoint_to_resume
from ..training.command import ClassifierArguments, parse_arguments, say
from ..training.detection_trainer import DetectionTrainer
from ..training.errors import run_job
from ..training.presets import DETECTION_PRESETS
from ..training.run_lock import only_run_in
from ..training.task_models import build_dense, build_dense_config
from ..training.trainable import describe_trainable, set_trainable
from ..training.weights import trained_normalization
from .dense import DenseArguments
from .sharing import card_context, card_name
from .training import train_to_the_end

_NUM_SHOWN = 8
# Of what is shown.
_SURE = 0.5


@dataclass
class DetectionArguments(DenseArguments):
    """
    [`DenseArguments`] with the defaults of fine-tuning a detector, and its head.

    Raises:
        ValueError: If a number is out of its range.
    """

    detection_head_size: int = field(default=256, metadata={"help": "Channels of the pyramid and the heads."})
    detection_anchor_size: float = field(
        default=8.0, metadata={"help": "Side of a square anchor in pixels of the pyramid's maps."}
    )
    detection_regions: int = field(
        default=512, metadata={"help": "Regions of each picture that the box head learns from."}
    )
    base_learning_rate: float = field(
        default=4e-4, metadata={"help": "Of the head per 256 pictures. Not used if learning_rate is given."}
    )
    layer_decay: float = field(
        default=0.7, metadata={"help": "Each block learns at the next one's rate times this; 1: all at the head's."}
    )
    weight_decay: float = field(
        default=0.1, metadata={"help": "AdamW's weight decay, on matrices (not biases, norms, tokens, positions)."}
    )
    scale_jitter: list[float] = field(
        default_factory=lambda: [0.1, 2.0],
        metadata={"help": "Lowest and highest factor by which a picture is resized before it is cropped."},
    )
    photometric_jitter: bool = field(
        default=False, metadata={"help": "Change brightness, contrast, saturation and hue, by chance."}
    )

    def __post_init__(self):
        for name in ("detection_head_size", "detection_anchor_size", "detection_regions"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; expected a number above 0.")
        super().__post_init__()


CLASSES = (ClassifierArguments, DataArguments, ObjectArguments, DetectionArguments)


def main(argv: list[str] | None = None) -> int:
    """`examples/run_object_detection.py`: reads the flags, trains, and tests. Returns the exit status."""
    return run_job(lambda: detect(*parse_arguments(CLASSES, argv, DETECTION_PRESETS)))


def detect(
    model_args: ClassifierArguments, data_args: DataArguments, object_args: ObjectArguments, args: DetectionArguments
) -> int:
    """
    Trains a detector, saves it and its image processor, and says how well it finds objects.

    Everything that can be wrong with the input is looked at before the first step.

    Returns:
        `int`: 0, or 130 after an interrupt.
    """
    with only_run_in(args.output_dir):
        return _detect(model_args, data_args, object_args, args)


def _detect(model_args, data_args, object_args, args) -> int:
    if data_args.streaming or data_args.skip_broken_images or model_args.lora_rank is not None:
        raise ValueError("Detectors take no --streaming, --skip_broken_images or --lora_rank: leave them out.")
    # Whether what it is judged by is installed.
    DetectionScores(with_masks=True)
    config, encoder = build_dense_config(model_args, data_args.image_height_width, data_args.num_channels)
    size, channels = as_pair(config.image_size), config.num_channels
    # Scenes are drawn at this size; other pictures keep theirs.
    data_args = data_args.for_model(channels, size)
    try:
        with PartialState().main_process_first():
            splits = load_objects(data_args, object_args, args.seed)
    except BrokenImageError as error:
        raise ValueError(f"{error} Remove it and its objects: detectors skip no picture.") from error
    names, with_masks = splits.names, splits.with_masks
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.detection_masks = with_masks
    config.detection_head_size = args.detection_head_size
    config.detection_anchor_size = args.detection_anchor_size
    config.detection_regions = args.detection_regions
    set_seed(args.seed)
    model = build_dense(model_args, config, encoder, "ForObjectDetection")
    if model_args.trainable != "all":
        set_trainable(model, model_args.trainable)
    checkpoint = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint, model.config)
    mean, std = resolve_mean_std(data_args, splits.train, trained_normalization(model_args))
    processor = detection_processor(size, mean, std)
    transform = DetectionTransform(
        size,
        mean,
        std,
        scale_jitter=args.scale_jitter,
        horizontal_flip=data_args.horizontal_flip,
        photometric_jitter=args.photometric_jitter,
        with_masks=with_masks,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    trainer = DetectionTrainer(
        model=model,
        args=args,
        train_dataset=DetectionDataset(splits.train, transform, with_masks),
        eval_dataset=DetectionDataset(splits.validation, WholePicture(processor), with_masks),
        data_collator=collate_objects,
        processing_class=processor,
        run_settings={
            "start": model_args.model_name_or_path or "untrained",
            "classes": list(names),
            "objects": splits.fingerprint,
            "masks": with_masks,
            "trainable": model_args.trainable,
            "drop_path_rate": model_args.drop_path_rate,
            "horizontal_flip": data_args.horizontal_flip,
            "image_mean": list(map(float, mean)),
            "image_std": list(map(float, std)),
        },
    )
    described = (
        f"{type(model).__name__} ({'Mask' if with_masks else 'Faster'} R-CNN): {describe_trainable(model)}; "
        f"{len(splits.train)} training and {len(splits.validation)} held-out pictures, {len(names)} classes; "
        f"effective batch {args.effective_batch_size}, peak learning rate {args.learning_rate:.2e}, {args.precision} "
        f"on {args.device}."
    )
    if not train_to_the_end(trainer, checkpoint, described):
        return 130
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    trainer.evaluate()
    results = trainer.scores | {"num_train": len(splits.train), "num_test": len(splits.validation)}
    if trainer.is_world_process_zero():
        write_results(trainer, data_args, results)
    PartialState().wait_for_everyone()
    if args.push_to_hub:
        say(f"Pushed to {push_run(trainer, None)}.")
    return 0


def detection_processor(size: tuple[int, int], mean, std) -> MIMImageProcessor:
    """What fits a picture into `size` (height, width), in its proportions, and fills the rest up."""
    return MIMImageProcessor(
        num_channels=len(mean),
        size={"max_height": size[0], "max_width": size[1]},
        do_pad=True,
        pad_size={"height": size[0], "width": size[1]},
        resample=PILImageResampling.BILINEAR,
        image_mean=list(map(float, mean)),
        image_std=list(map(float, std)),
    )


def draw_detections(trainer: DetectionTrainer, num_classes: int) -> None:
    """Writes `detections.png`: held-out pictures, what is in them, and what is found."""
    size, data = as_pair(trainer.model.config.image_size), trainer.eval_dataset
    rows = {"picture": [], "truth": [], "found": []}
    trainer.model.eval()
    for index in spread_indices(len(data), _NUM_SHOWN):
        item = data[0, index]
        truth = item["objects"] | {"labels": item["objects"]["classes"]}
        with trainer.averaged_weights():
            found = {name: values.cpu() for name, values in trainer.find_objects(item, _SURE).items()}
        image = data.pictures[index]
        image = image.float() / 255 if image.dtype == torch.uint8 else image.clamp(0, 1)
        image = to_rgb(image[None])[0]
        rows["picture"].append(_fit(image, size))
        rows["truth"].append(_fit(draw_objects(image, truth, num_classes), size))
        rows["found"].append(_fit(draw_objects(image, found, num_classes), size))
    sheet = label_rows({name: np.stack(images) for name, images in rows.items()})
    with replacing(Path(trainer.args.output_dir) / "detections.png") as temporary:
        sheet.save(temporary, format="PNG")


def _fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture (height, width, 3) within `size`, in its proportions, on white."""
    from PIL import Image, ImageOps

    fitted = ImageOps.contain(Image.fromarray(image), (size[1], size[0]))
    sheet = Image.new("RGB", (size[1], size[0]), "white")
    sheet.paste(fitted)
    return np.array(sheet)


def write_results(trainer: DetectionTrainer, data_args: DataArguments, results: dict) -> None:
    """Writes `results.json`, pictures and the card, and says how good the detector is and where it lies."""
    folder, run = Path(trainer.args.output_dir), trainer.run_record["decides"]
    write_json(folder / "results.json", results)
    curves = folder / "loss_curves.png"
    drawn = [curves] if draw_loss_curves(trainer.state.log_history, curves) else []
    draw_detections(trainer, len(run["classes"]))
    training = {
        "start": run["start"],
        "data": f"{data_args.dataset_name or data_args.train_dir or 'scenes (embedded)'}, {results['num_train']} "
        "training pictures",
        "steps": f"{trainer.state.global_step}, of {run['effective_batch_size']} pictures",
        "peak learning rate": f"{run['learning_rate']:.3g}, times {run['layer_decay']:g} a block below the head",
        "augmentation": f"resized by {run['scale_jitter'][0]:g} to {run['scale_jitter'][1]:g}, cropped"
        f"{', flipped' if run['horizontal_flip'] else ''}{', colours changed' if run['photometric_jitter'] else ''}",
        "parameters": describe_trainable(trainer.model),
        "precision": run["precision"],
        "seed": str(run["seed"]),
    }
    # Stock detectors have other heads: the repository's root is the model itself.
    context = card_context(trainer, data_args, [folder / "detections.png", *drawn], None)
    write_detector_card(folder, card_name(trainer), trainer.model.config, training, results, context)
    said = "; ".join(
        f"mAP of {kind}: {results[f'{one}_map']:.2f} % (at IoU 0.5: {results[f'{one}_map_50']:.2f} %)"
        for one, kind in (("box", "boxes"), ("mask", "masks"))
        if results.get(f"{one}_map") is not None
    )
    say(f"\n{said} of {results['num_test']} held-out pictures.")
    say(f"The detector is in {folder}: pipeline('object-detection', {str(folder)!r}) after `import hf_mim`.")
