"""What a frozen network has of each training picture, computed once and mapped from files."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils import logging

from ..data.pretraining import pretraining_collator
from ..files import write_json
from ..registry import RECORDS, method_name

logger = logging.get_logger(__name__)

# In a run's folder.
FOLDER = "base_features"
_INDEX = "index.json"
# Batches after which what is there is counted: a computation that was stopped goes on from there.
_BATCHES_COUNTED = 20
_OF_NETWORK = ("_name_or_path", "architectures", "dtype", "transformers_version")


def check_cached_targets(model_args, data_args, training_args) -> None:
    """
    Looks at `--cache_base_features`, before data is read.

    Args:
        model_args ([`ModelArguments`]), data_args ([`DataArguments`]), training_args ([`MIMTrainingArguments`]): The
            flags.

    Raises:
        ValueError: If the method learns from no frozen network, the network sees other crops each time or a stream, or
            is another one in each stage; or under FSDP.
    """
    if not model_args.cache_base_features:
        return
    flag = "--cache_base_features"
    if RECORDS[model_args.model_type].frozen is None:
        raise ValueError(
            f"{flag} is of TEC and dBOT; {method_name(model_args.model_type)} learns from no frozen network."
        )
    if data_args.crop_scale_min != 1 or data_args.horizontal_flip:
        raise ValueError(
            f"{flag} needs whole pictures, each the same every time: give --crop_scale_min 1 --horizontal_flip false "
            f"(they are {data_args.crop_scale_min:g} and {str(data_args.horizontal_flip).lower()})."
        )
    if data_args.streaming:
        raise ValueError(f"{flag} needs pictures that can be gone through again: leave out --streaming.")
    if training_args.num_stages > 1:
        raise ValueError(f"{flag}: each stage learns from another network. Leave out --num_stages.")
    if training_args.fsdp:
        raise ValueError(f"{flag} does not work with FSDP, under which no process has the whole network.")


class TargetCache:
    """
    By training picture, what `model.frozen_targets` gives, in float16 (integers in int32): one `.npy` for each target,
    of shape `(num_pictures, ...)`, mapped by whoever reads it.

    Args:
        folder: Where the files are.
        num_pictures (`int`): Of the training data.
        key (`dict`): What decides the targets, as JSON has it.

    Raises:
        ValueError: If the folder holds targets of another key.
    """

    def __init__(self, folder: str | Path, num_pictures: int, key: dict):
        self.folder, self.num_pictures, self.key = Path(folder), num_pictures, json.loads(json.dumps(key, default=str))
        self.names: list[str] = []
        self.done = 0
        self._mapped: dict[str, np.ndarray] = {}
        if not (self.folder / _INDEX).is_file():
            return
        index = json.loads((self.folder / _INDEX).read_text())
        different = [name for name in self.key if index["key"].get(name) != self.key[name]]
        if different:
            raise ValueError(
                f"{self.folder} holds what another network has, or of other pictures ({', '.join(different)} differ): "
                "delete it, or choose another --output_dir."
            )
        self.names, self.done = index["names"], index["done"]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The targets of one picture, without the first axis."""
        if not self._mapped:
            self._mapped = {name: np.load(self._file(name), mmap_mode="r") for name in self.names}
        return {name: np.array(values[index]) for name, values in self._mapped.items()}

    def __getstate__(self) -> dict:
        # A worker maps the files itself.
        return self.__dict__ | {"_mapped": {}}

    @torch.no_grad()
    def fill(self, model, dataset, *, batch_size: int, num_workers: int = 0, bf16: bool = False) -> None:
        """
        Computes what is not there yet.

        Args:
            model: With `frozen_targets`, on the device where it is to run.
            dataset (`PretrainingDataset`): `dataset[0, index]` has `pixel_values`, the same in every epoch.
            bf16 (`bool`, defaults to False): Run it in bfloat16 autocast.
        """
        if self.done == self.num_pictures:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        device, files = next(model.parameters()).device, {}
        if self.done:
            logger.warning(f"{self.folder}: {self.done} of {self.num_pictures} pictures are there, the rest follows.")
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=[(0, index) for index in range(self.done, self.num_pictures)],
            num_workers=num_workers,
            collate_fn=pretraining_collator,
            # Of its own: the run's draws are the same whether anything is computed here or not.
            generator=torch.Generator(),
        )
        row = self.done
        # None: no bar where nobody looks.
        with tqdm(total=self.num_pictures, initial=row, desc="Features", disable=None, leave=False) as bar:
            for number, batch in enumerate(loader, start=1):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    targets = model.frozen_targets(batch["pixel_values"].to(device))
                for name, values in targets.items():
                    values = values.cpu().to(torch.float16 if values.is_floating_point() else torch.int32).numpy()
                    if name not in files:
                        files[name] = self._open(name, values)
                    files[name][row : row + len(values)] = values
                row += len(values)
                bar.update(len(values))
                if number % _BATCHES_COUNTED == 0 or row == self.num_pictures:
                    for file in files.values():
                        file.flush()
                    self._count(list(files), row)

    def _open(self, name: str, values: np.ndarray) -> np.ndarray:
        if name in self.names:
            return np.load(self._file(name), mmap_mode="r+")
        shape = (self.num_pictures, *values.shape[1:])
        return np.lib.format.open_memmap(self._file(name), mode="w+", dtype=values.dtype, shape=shape)

    def _count(self, names: list[str], done: int) -> None:
        self.names, self.done = names, done
        write_json(self.folder / _INDEX, {"key": self.key, "names": names, "num": self.num_pictures, "done": done})

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def cache_targets(trainer, dataset) -> None:
    """
    Has the training data of a trainer give the targets of its model's frozen network, computed now where they are not
    in the run's folder: by one process, while the others wait.

    Args:
        trainer ([`MIMTrainer`]): Of a model with `frozen_targets`.
        dataset (`PretrainingDataset`): Its training data.

    Raises:
        ValueError: If the run's folder holds targets of another network or other pictures.
    """
    args, model = trainer.args, trainer.model
    frozen = model.get_submodule(model.teacher_name)
    config = {name: value for name, value in model.config.to_dict().items() if name not in _OF_NETWORK}
    transform = dataset.transform
    key = {
        "network": _digest(frozen),
        "config": config,
        "pictures": dataset.pictures.content_fingerprint(),
        "transform": [list(transform.image_size), transform.mean, transform.std],
        "precision": args.precision,
    }
    cache = TargetCache(Path(args.output_dir) / FOLDER, len(dataset), key)
    if trainer.is_world_process_zero():
        model.to(args.device).eval()
        how = {"num_workers": args.dataloader_num_workers, "bf16": args.bf16}
        cache.fill(model, dataset, batch_size=args.per_device_train_batch_size, **how)
    trainer.accelerator.wait_for_everyone()
    dataset.targets = TargetCache(cache.folder, len(dataset), key)


def _digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
