"""The flags that say where the pictures are and what is done to them."""

from dataclasses import dataclass, field, replace

AUTO = "auto"
TORCHVISION_PREFIX = "torchvision:"


@dataclass
class DataArguments:
    """Where the pictures are, and what is done to them. With neither a name nor a folder: the embedded scenes."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set of the Hub, a local one (save_to_disk, parquet, arrow), or torchvision:NAME, with "
            "--train_dir as its root."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of pictures, with or without a sub-folder per class, of DICOM, NIfTI or idx files, or "
            "CLEVR_v1.0. It may hold splits (train, val, test, ...), or be one of them: others beside it are found."
        },
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same for the held-out pictures."})
    tile_size: int | None = field(
        default=None, metadata={"help": "TIFF are GeoTIFF scenes, cut into tiles of so many pixels on the fly."}
    )
    bands: list[int] | None = field(
        default=None, metadata={"help": "Bands of the scenes, in this order, from 1 (4 3 2). Default: all."}
    )
    slice_axis: int | None = field(
        default=None,
        metadata={"help": "Axis that counts the slices of volumes: .npy are then stacks. Default of NIfTI: 2."},
    )
    value_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "Of scenes, volumes and DICOM: the values that become 0 and 1 (of DICOM after its rescale slope, "
            "in the place of its window); beyond them is clipped."
        },
    )
    group_by: str | None = field(
        default=None,
        metadata={
            "help": "Of DICOM: the attribute (PatientID) whose images stay on one side where some are held out."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split of the data set to train on."})
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Split held out. Default: validation or test where there is one, else a share of training."},
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the training pictures that is held out where there is no split."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data set as it comes, without downloading it. Needs --max_steps."}
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "With --streaming: pictures from which the next one is drawn."}
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the pictures. Default: the only one of type Image, or of arrays."}
    )
    label_column_names: list[str] | None = field(
        default=None,
        metadata={"help": "Columns of labels, or of lists of them. Default: every ClassLabel, and list of them."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many training pictures, by chance."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many held-out pictures, by chance."})
    image_size: list[int] | None = field(
        default=None, metadata={"help": "Size of the model's input: one number, or height and width."}
    )
    num_channels: int | None = field(
        default=None,
        metadata={"help": "Channels of the model's input. Default: those of the weights that are given, else 3."},
    )
    image_mean: list[str] | None = field(
        default=None,
        metadata={
            "help": "Mean of each channel, for values from 0 to 1, or auto: computed. Default: ImageNet's for 3 "
            "channels, computed for any other number."
        },
    )
    image_std: list[str] | None = field(default=None, metadata={"help": "Standard deviation, as --image_mean."})
    crop_scale_min: float | None = field(
        default=None,
        metadata={
            "help": "Smallest share of a picture's area that a crop covers (the largest is 1). Default: 0.2; 0.8 for "
            "the embedded scenes, of which smaller crops show other numbers of solids."
        },
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror every second picture, by chance."})
    skip_broken_images: bool = field(
        default=False, metadata={"help": "Leave out pictures that cannot be read, and count them."}
    )
    max_image_pixels: int | None = field(
        default=None,
        metadata={"help": "Do not decode pictures of more pixels (height x width). Default: 178956970, as Pillow."},
    )
    data_cache_dir: str | None = field(default=None, metadata={"help": "Where `datasets` keeps what it prepares."})

    def __post_init__(self):
        if isinstance(self.image_size, int):  # a recipe's
            self.image_size = [self.image_size]
        if self.image_size is not None and not (
            len(self.image_size) in (1, 2) and all(isinstance(side, int) and side > 0 for side in self.image_size)
        ):
            raise ValueError(f"--image_size must be one number or two (height, width) above 0, got {self.image_size}.")
        if self.num_channels is not None and self.num_channels < 1:
            raise ValueError(f"--num_channels must be at least 1, got {self.num_channels}.")
        self._check_files_of_several()
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction must lie between 0 and 1, got {self.validation_fraction}.")
        if self.crop_scale_min is None:
            self.crop_scale_min = 0.8 if self.dataset_name is None and self.train_dir is None else 0.2
        if not 0 < self.crop_scale_min <= 1:
            raise ValueError(f"--crop_scale_min must be above 0 and at most 1, got {self.crop_scale_min}.")
        for flag in ("max_train_samples", "max_eval_samples", "max_image_pixels"):
            if getattr(self, flag) is not None and getattr(self, flag) < 1:
                raise ValueError(f"--{flag} must be at least 1, got {getattr(self, flag)}.")
        if self.streaming and (self.dataset_name is None or self.dataset_name.startswith(TORCHVISION_PREFIX)):
            raise ValueError("--streaming needs --dataset_name of a Hub or local `datasets` data set.")
        if self.dataset_name and self.train_dir and not self.dataset_name.startswith(TORCHVISION_PREFIX):
            raise ValueError(
                f"Both --dataset_name {self.dataset_name} and --train_dir {self.train_dir} are given: leave one out."
            )
        if self.validation_dir and (not self.train_dir or self.dataset_name):
            raise ValueError("--validation_dir goes with --train_dir alone, not with --dataset_name or nothing.")
        self.image_mean = _numbers_or_auto(self.image_mean, self.num_channels, "--image_mean")
        self.image_std = _numbers_or_auto(self.image_std, self.num_channels, "--image_std")
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("Give both --image_mean and --image_std, or neither.")
        if isinstance(self.image_std, list) and min(self.image_std) <= 0:
            raise ValueError(f"--image_std must be above 0, got {self.image_std}.")

    def _check_files_of_several(self) -> None:
        if self.tile_size is not None and self.tile_size < 1:
            raise ValueError(f"--tile_size must be at least 1, got {self.tile_size}.")
        if self.slice_axis is not None and self.slice_axis not in (0, 1, 2):
            raise ValueError(f"--slice_axis must be 0, 1 or 2, got {self.slice_axis}.")
        if self.value_range is not None and not (
            len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]
        ):
            raise ValueError(f"--value_range must be two numbers, the lower first, got {self.value_range}.")
        if self.bands is None:
            return
        if self.tile_size is None:
            raise ValueError("--bands is of scenes that are cut into tiles: give --tile_size too.")
        if min(self.bands, default=0) < 1:
            raise ValueError(f"--bands are counted from 1, got {self.bands}.")
        if self.num_channels not in (None, len(self.bands)):
            raise ValueError(f"--bands names {len(self.bands)} bands, and --num_channels is {self.num_channels}.")
        self.num_channels = len(self.bands)

    @property
    def image_height_width(self) -> tuple[int, int] | None:
        """`--image_size` as (height, width); None where it was not given."""
        return None if self.image_size is None else (self.image_size[0], self.image_size[-1])

    def for_model(self, num_channels: int, image_size: tuple[int, int]) -> "DataArguments":
        """
        The same, with the channels and the size (height, width) of a model's input.

        Raises:
            ValueError: If `--image_mean` has not one number a channel.
        """
        return replace(self, num_channels=num_channels, image_size=list(image_size))


def _numbers_or_auto(value, num_channels: int | None, flag: str):
    if value is None or value == AUTO or value == [AUTO]:
        return AUTO if value else None
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError):
        raise ValueError(f"{flag} must be numbers, one per channel, or auto, got {value}.") from None
    if num_channels is not None and len(numbers) != num_channels:
        raise ValueError(f"{flag} needs one number per channel ({num_channels}), got {len(numbers)}: {numbers}.")
    return numbers
