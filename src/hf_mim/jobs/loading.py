"""A model and the pictures to judge it by, as the flags of the evaluation scripts name them."""

from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState
from transformers import AutoImageProcessor

from ..data.arguments import DataArguments
from ..data.dataset import ImageDataset
from ..data.image_processing import build_image_processor
from ..data.images import BrokenImageError
from ..data.loading import ImageSplits, check_images, load_all_images, load_images, resolve_mean_std, without_broken
from ..data.sources.packed import is_packed
from ..evaluation.encoders import FeatureEncoder, load_encoder
from ..models.vit.encoders import read_normalization
from ..models.vit.sizes import as_pair
from ..training.command import say


@dataclass
class Subject:
    """What is judged, and by what."""

    name: str
    encoder: FeatureEncoder
    pictures: ImageSplits | ImageDataset
    processor: object
    image_size: tuple[int, int]
    mean: list[float]
    std: list[float]


def load_subject(path: str, args: DataArguments, *, seed: int = 0, device="cpu", hold_out: bool = True) -> Subject:
    """
    The encoder at `path`, the pictures that the flags name, with the channels and of the size that it takes, and the
    image processor that was saved with it; where there is none, or other sizes or means are asked for, a new one.

    Args:
        hold_out (`bool`, defaults to True): Whether some pictures are held out. Without, `pictures` is one
            `ImageDataset` of all, in order, the broken ones among them.

    Raises:
        ValueError: If there is no such model or data, if they do not fit, or if the data is a stream.
    """
    if args.streaming:
        raise ValueError("Features are taken of pictures that can be gone through again: leave out --streaming.")
    encoder = load_encoder(path)
    config = encoder.model.config
    saved = _saved_processor(path)
    if saved is None:
        say(f"{path} has no image processor of a fixed size: pictures are resized and normalised as for pretraining.")
    size = args.image_height_width or _fixed_size(saved) or as_pair(config.image_size)
    patch_size = as_pair(config.patch_size)
    if size[0] % patch_size[0] or size[1] % patch_size[1]:
        raise ValueError(
            f"--image_size {size[0]} {size[1]} (height, width) is not a multiple of the patches of {path}, "
            f"{patch_size[0]} x {patch_size[1]}."
        )
    asked = args.image_height_width is not None or args.image_mean is not None
    args = replace(args, num_channels=config.num_channels, image_size=list(size))
    if not hold_out:
        args = replace(args, skip_broken_images=True)
    with PartialState().main_process_first():
        images = load_images(args, seed=seed) if hold_out else load_all_images(args)
    train = images.train if hold_out else images
    for split in (images.validation, train) if hold_out else (train,):
        try:
            first = check_images(split, skip_broken=args.skip_broken_images)
        except BrokenImageError:
            raise
        except ValueError as error:
            raise ValueError(f"{path} takes pictures of {config.num_channels} channels. {error}") from error
    if hold_out and args.skip_broken_images:
        images = ImageSplits(without_broken(images.train), without_broken(images.validation))
        train = images.train
    if saved is not None and args.image_mean is None:
        mean, std = list(saved.image_mean), list(saved.image_std)
    else:
        mean, std = resolve_mean_std(args, train, read_normalization(path))
    if saved is None or asked:
        saved = build_image_processor(size, config.num_channels, mean, std, floating_point=first.is_floating_point())
    return Subject(path, encoder.to(device), images, saved, size, mean, std)


def name_data(path: str) -> str:
    """The flag that a folder, or a data set of the Hub or on disk, is given by."""
    folder = Path(path).expanduser()
    if is_packed(folder):
        return "train_dir"
    # A folder that `datasets` wrote is one of its data sets.
    of_datasets = (
        any(folder.glob("*.parquet")) or (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    )
    return "train_dir" if folder.is_dir() and not of_datasets else "dataset_name"


def _saved_processor(path: str):
    try:
        processor = AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError):
        return None
    return processor if _fixed_size(processor) is not None else None


def _fixed_size(processor) -> tuple[int, int] | None:
    """The (height, width) of all that a processor gives; None where it keeps a picture's proportions."""
    if processor is None:
        return None
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    return None if size is None or size.height is None else (size.height, size.width)
