"""Features of pictures: computed once, over all processes, and kept in files."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from ..data.dataset import ImageDataset
from ..data.image_processing import evaluation_transform
from ..data.loading import ImageSplits, without_broken
from .batches import transformed_pictures
from .encoders import PATCHES, PIXELS, FeatureEncoder, RawPixels, blocks_read

logger = logging.get_logger(__name__)

# Raise it whenever the same model, data and transforms would give other features: it is part of the key.
_VERSION = 2
Features = dict[str, dict[str, torch.Tensor]]

_MAX_LABELLED, _MAX_TEST = 10000, 4000


def labelled_splits(
    pictures: ImageSplits, max_train: int = _MAX_LABELLED, max_test: int = _MAX_TEST, *, skip_broken: bool = True
) -> tuple[ImageDataset, ImageDataset]:
    """
    Training and held-out pictures to judge features by: so many at most, the same at each call. With `skip_broken`
    each is read once, here, to leave out those that cannot be.
    """
    splits = []
    for data, most in ((pictures.train, max_train), (pictures.validation, max_test)):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:most]
        data = data.select(order.numpy())
        splits.append(without_broken(data) if skip_broken else data)
    return tuple(splits)


def shared_labels(
    train: ImageDataset, test: ImageDataset, *, multi_label: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    The labels that both splits have, by name: `torch.LongTensor` of shape `(num_pictures,)`, -1 where there is none.

    A label that no picture of a split has (as in published test sets) is left out. With `multi_label` those are there
    too of which a picture may have several: (num_pictures, num_classes), 1 or 0, a row of -1 where it is not known.
    """
    names = [name for name in train.labels if name in test.labels]
    names = [name for name in names if train.multi_label(name) == test.multi_label(name)]
    names = [name for name in names if multi_label or not train.multi_label(name)]
    names = [name for name in names if all((split.labels[name] >= 0).any() for split in (train, test))]
    return tuple({name: torch.as_tensor(split.labels[name]) for name in names} for split in (train, test))


def extract_features(
    encoders: Mapping[str, FeatureEncoder | RawPixels],
    pictures: ImageDataset,
    processor,
    poolings: Sequence[str] = ("cls",),
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    bf16: bool = False,
    cache_dir: str | os.PathLike | None = None,
) -> Features:
    """
    One feature vector a picture, of several encoders in one pass over the pictures.

    With several processes each takes an equal share of the pictures, and all get the whole result, in order.

    Args:
        encoders: By name, on the device where they are to run.
        pictures (`ImageDataset`): Every one has to be readable (`without_broken`).
        processor: The image processor; see `evaluation_transform`.
        poolings: As [`blocks_read`] explains, and `"patches"` for all patch tokens; raw pixels have none.
        bf16 (`bool`, defaults to False): Run the encoders in bfloat16 autocast.
        cache_dir (*optional*): Where features are looked for and kept, one safetensors file for each encoder and
            pooling, named by a hash of the weights and config, the pictures, the processor, the pooling and the
            precision: whatever changes the features changes the name. Patch tokens would fill the disk: never kept.

    Returns:
        `dict`: by encoder's name, by pooling (`"pixels"` for raw pixels): float32 `torch.Tensor` of shape
        `(num_pictures, dim)`, on the CPU; of `"patches"` float16 of shape `(num_pictures, num_patches, dim)`.

    Raises:
        ValueError: If there are no pictures, or a pooling is unknown.
    """
    if len(pictures) == 0:
        raise ValueError(f"{pictures.source} holds no pictures to take features of.")
    for pooling in poolings:
        if pooling != PATCHES:
            blocks_read(pooling)
    wanted = {name: [PIXELS] if isinstance(e, RawPixels) else list(poolings) for name, e in encoders.items()}
    files: dict[tuple[str, str], tuple[Path, dict]] = {}
    features: Features = {name: {} for name in encoders}
    if cache_dir is not None:
        # What lies there, and what it is: files may be replaced by others of the same names, sizes and times.
        looked_at = [pictures.fingerprint(), pictures.content_fingerprint()]
        data = {"pictures": looked_at, "processor": describe_processor(processor), "bf16": bf16}
        for name, encoder in encoders.items():
            model = encoder.digest()
            for pooling in set(wanted[name]) - {PATCHES}:
                key = data | {"model": model, "pooling": pooling, "version": _VERSION}
                files[name, pooling] = (_file(cache_dir, key), key)
        for (name, pooling), (path, _) in files.items():
            found = _load(path, len(pictures))
            # A process that sees the file must not leave one that does not alone with the work.
            if all(gather_object([found is not None])):
                features[name][pooling] = found
    missing = {name: [p for p in wanted[name] if p not in features[name]] for name in encoders}
    missing = {name: missed for name, missed in missing.items() if missed}
    if missing:
        computed = _compute(
            {name: encoders[name] for name in missing}, missing, pictures, processor, batch_size, num_workers, bf16
        )
        for name, pooled in computed.items():
            for pooling, values in pooled.items():
                features[name][pooling] = values
                if (name, pooling) in files and PartialState().is_main_process:
                    _save(*files[name, pooling], values)
        # Who asks again at once finds what the first process writes.
        PartialState().wait_for_everyone()
    # In the order asked for, whether cached or not.
    return {name: {pooling: features[name][pooling] for pooling in wanted[name]} for name in encoders}


@torch.no_grad()
def _compute(encoders, poolings, pictures, processor, batch_size, num_workers, bf16) -> Features:
    state = PartialState()
    share = -(-len(pictures) // state.num_processes)
    # The last process may have to repeat the last picture, so that all shares are equal.
    rows = torch.arange(state.process_index * share, (state.process_index + 1) * share).clamp(max=len(pictures) - 1)
    batches = transformed_pictures(
        pictures.select(rows.numpy()),
        evaluation_transform(processor, pictures.num_channels),
        batch_size=batch_size,
        num_workers=num_workers,
    )
    parts: dict[str, dict[str, list]] = {name: {} for name in encoders}
    for batch in batches:
        for name, encoder in encoders.items():
            precision = torch.autocast(encoder.device.type, torch.bfloat16) if bf16 else nullcontext()
            with precision:
                pooled = encoder.features(batch, poolings[name])
            for pooling, values in pooled.items():
                parts[name].setdefault(pooling, []).append(values.cpu())
    return {
        name: {pooling: _gather(torch.cat(values))[: len(pictures)] for pooling, values in pooled.items()}
        for name, pooled in parts.items()
    }


def _gather(values: torch.Tensor) -> torch.Tensor:
    state = PartialState()
    return gather(values.to(state.device)).cpu() if state.num_processes > 1 else values


def describe_processor(processor) -> dict:
    return {"class": type(processor).__name__} | json.loads(json.dumps(processor.to_dict(), default=str))


def _file(cache_dir, key: dict) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(cache_dir) / f"{digest[:32]}.safetensors"


def _load(path: Path, number: int) -> torch.Tensor | None:
    try:
        features = load_file(path)["features"] if path.is_file() else None
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning(f"The cached features {path} cannot be read ({error}): they are computed anew.")
        return None
    return features if features is not None and len(features) == number else None


def _save(path: Path, key: dict, features: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: a file that is there is whole.
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"features": features.contiguous()}, temporary, metadata={"key": json.dumps(key)})
    os.replace(temporary, path)
