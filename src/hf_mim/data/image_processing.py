"""The image processor that is saved beside a model, and the same path for evaluating features.

Three channels: a processor of transformers' own, which loads without hf_mim. Any other number: `MIMImageProcessor`.
"""

from collections.abc import Callable, Sequence

import torch
from torchvision.transforms.v2 import functional as F
from transformers import BatchFeature, BitImageProcessor, ViTImageProcessor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .images import read_image


class MIMImageProcessorKwargs(ImagesKwargs, total=False):
    """
    num_channels (`int`):
        Channels of the model's input; every picture is converted to it, or refused, as `read_image` says.
    """

    num_channels: int


class MIMImageProcessor(TorchvisionBackend):
    """Resizes, crops, and normalises pictures of any number of channels.

    It takes what `read_image` takes (arrays, tensors, PIL images, paths, bytes), one or a list, or an array or a
    tensor of four dimensions as a batch, and follows its rule: integers become 0 to 1 (`do_rescale`), floats stay as
    they are.

    With `do_pad` a picture is padded with zeros, on the right and below, to `pad_size`, after it was normalised, and
    `pixel_mask` (height, width) is 1 where the picture is: for detectors, with a `size` of `max_height` and
    `max_width`, into which it is fitted in its proportions.
    """

    valid_kwargs = MIMImageProcessorKwargs
    num_channels = 1
    resample = PILImageResampling.BICUBIC
    image_mean = (0.5,)
    image_std = (0.5,)
    size = {"height": 224, "width": 224}
    default_to_square = False
    do_resize = True
    do_center_crop = False
    do_rescale = True
    do_normalize = True
    do_pad = False

    def _preprocess_image_like_inputs(self, images, **kwargs) -> BatchFeature:
        return self._preprocess(_as_list(images), **kwargs)

    def _preprocess(
        self,
        images: list,
        *,
        num_channels,
        do_resize,
        size,
        resample,
        do_center_crop,
        crop_size,
        do_rescale,
        rescale_factor,
        do_normalize,
        image_mean,
        image_std,
        do_pad=False,
        pad_size=None,
        return_tensors=None,
        device=None,
        **kwargs,
    ) -> BatchFeature:
        pixel_values = []
        for number, image in enumerate(images):
            name = image if isinstance(image, str) else f"picture {number}"
            picture = read_image(image, num_channels, name=name).contiguous().to(device)
            if do_resize:
                picture = self.resize(picture, size, resample)
            if do_center_crop:
                picture = self.center_crop(picture, crop_size)
            if do_rescale and picture.dtype == torch.uint8:
                picture = picture.to(torch.float32) * rescale_factor
            picture = picture.to(torch.float32)
            if do_normalize:
                picture = F.normalize(picture, list(image_mean), list(image_std))
            pixel_values.append(picture)
        features = {"pixel_values": pixel_values}
        if do_pad:
            features["pixel_values"], features["pixel_mask"] = self.pad(pixel_values, pad_size, return_mask=True)
        return BatchFeature(features, tensor_type=return_tensors)

    def post_process_semantic_segmentation(
        self, outputs, target_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[torch.Tensor]:
        """
        The likeliest class of each pixel.

        Args:
            outputs: Of a model for semantic segmentation; `logits` (batch_size, num_labels, rows, columns).
            target_sizes (sequence of (height, width), *optional*): Of the pictures, to whose pixels the logits are
                interpolated; as many rows and columns as the logits have if None.

        Returns:
            A map of class indices, `torch.LongTensor` of shape `(height, width)`, for each picture.

        Raises:
            ValueError: If there are not as many sizes as pictures.
        """
        logits = outputs["logits"].float()
        if target_sizes is None:
            return list(logits.argmax(dim=1))
        _check_sizes(target_sizes, len(logits))
        # One picture's logits at a time.
        return [_interpolated(one, size).argmax(dim=0) for one, size in zip(logits, target_sizes, strict=True)]

    def post_process_depth_estimation(
        self, outputs, target_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """
        The depth of each pixel.

        Args:
            outputs: Of a model for depth estimation; `predicted_depth` (batch_size, rows, columns).
            target_sizes (sequence of (height, width), *optional*): Of the pictures, to whose pixels the depths are
                interpolated; as many rows and columns as the model gives if None.

        Returns:
            For each picture `{"predicted_depth": depths}`, float32 of shape `(height, width)`.

        Raises:
            ValueError: If there are not as many sizes as pictures.
        """
        depths = outputs["predicted_depth"].float()
        if target_sizes is None:
            return [{"predicted_depth": one} for one in depths]
        _check_sizes(target_sizes, len(depths))
        return [
            {"predicted_depth": _interpolated(one[None], size)[0]}
            for one, size in zip(depths, target_sizes, strict=True)
        ]

    def post_process_object_detection(
        self, outputs, threshold: float = 0.5, target_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """
        The objects of each picture that a detector is sure enough of, the likeliest first.

        Args:
            outputs: Of `XForObjectDetection`, in evaluation mode: with `detections`.
            threshold (`float`, defaults to 0.5): The score, 0 to 1, that is not enough.
            target_sizes (sequence of (height, width), *optional*): Of the pictures.

        Returns:
            For each picture `scores` (n,), `labels` (n,) and `boxes` (n, 4): x0, y0, x1, y1 in pixels of the picture;
            without `target_sizes` as shares of its width and height.

        Raises:
            ValueError: If there are not as many sizes as pictures.
        """
        found = _likely(outputs, threshold, target_sizes)
        return [{name: one[name] for name in ("scores", "labels", "boxes")} for one in found]

    def post_process_object_masks(
        self, outputs, threshold: float = 0.5, target_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """
        As `post_process_object_detection`, with `masks`, bool of shape (n, height, width) of the picture. (Not under
        transformers' name for instances: its pipeline of segmentation would take that for a segmenter's too.)

        Args:
            target_sizes (sequence of (height, width)): Needed here: of the pictures.

        Raises:
            ValueError: If there are not as many sizes as pictures, or the detector tells no masks.
        """
        from torchvision.models.detection.roi_heads import paste_masks_in_image

        if target_sizes is None:
            raise ValueError("Masks are of a picture's pixels: give target_sizes, its (height, width).")
        found = _likely(outputs, threshold, target_sizes)
        for one, size in zip(found, target_sizes, strict=True):
            if "masks" not in one:
                raise ValueError("This detector tells no masks (config.detection_masks is False).")
            size = tuple(int(side) for side in size)
            one["masks"] = paste_masks_in_image(one["masks"][:, None], one["boxes"], size)[:, 0] > 0.5
        return found


def _check_sizes(target_sizes, number: int) -> None:
    if len(target_sizes) != number:
        raise ValueError(f"{len(target_sizes)} target_sizes for {number} pictures; expected one for each.")


def _interpolated(maps: torch.Tensor, size) -> torch.Tensor:
    """Maps (channels, rows, columns) at that (height, width)."""
    size = tuple(int(side) for side in size)
    return torch.nn.functional.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def _likely(outputs, threshold: float, target_sizes) -> list[dict[str, torch.Tensor]]:
    """The detections above the threshold, their boxes in pixels where sizes are given."""
    detections = outputs["detections"]
    if target_sizes is not None:
        _check_sizes(target_sizes, len(detections))
    likely = []
    for number, one in enumerate(detections):
        one = {name: values[one["scores"] > threshold] for name, values in one.items()}
        if target_sizes is not None:
            height, width = (int(side) for side in target_sizes[number])
            one["boxes"] = one["boxes"] * one["boxes"].new_tensor([width, height, width, height])
        likely.append(one)
    return likely


def _as_list(images) -> list:
    if isinstance(images, list | tuple):
        return [image for entry in images for image in _as_list(entry)]
    if getattr(images, "ndim", 0) == 4:
        return list(images)
    return [images]


def build_image_processor(
    image_size: tuple[int, int],
    num_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    floating_point: bool = False,
):
    """The processor for a model of this input.

    A square picture is resized by its shorter edge and cropped in the middle: to the size itself below 128 pixels, to
    size / 0.875 from 128 (224 from 256, as in the papers). A rectangular size is resized to directly.

    Args:
        image_size (`tuple[int, int]`): height and width.
        num_channels (`int`): channels of the model's input.
        mean, std: one number per channel, for values from 0 to 1.
        floating_point (`bool`): whether `read_image` gives floats of these pictures, as of 16 bits.

    Returns:
        `BitImageProcessor` or `ViTImageProcessor` for pictures of 8 bits and three channels; else `MIMImageProcessor`,
        since those of transformers cut 16 bits and floats off at 255.
    """
    if not len(mean) == len(std) == num_channels:
        raise ValueError(
            f"--image_mean and --image_std need one number per channel ({num_channels}), got {len(mean)} and "
            f"{len(std)}."
        )
    height, width = image_size
    square = height == width
    settings = {
        "resample": PILImageResampling.BICUBIC,
        "image_mean": [float(number) for number in mean],
        "image_std": [float(number) for number in std],
        "size": {"height": height, "width": width},
    }
    if square:
        settings["size"] = {"shortest_edge": round(height / 0.875) if height >= 128 else height}
        settings["crop_size"] = {"height": height, "width": width}
    if num_channels != 3 or floating_point:
        return MIMImageProcessor(num_channels=num_channels, do_center_crop=square, **settings)
    if square:
        return BitImageProcessor(do_convert_rgb=True, **settings)
    return ViTImageProcessor(do_convert_rgb=True, **settings)


def evaluation_transform(processor, num_channels: int) -> Callable[..., torch.Tensor]:
    """What the processor makes of one picture, as a callable for evaluating features.

    Args:
        processor: from `build_image_processor`, or any image processor of transformers.
        num_channels (`int`): as in `read_image`.

    Returns:
        callable: takes what `read_image` takes, a tensor of shape `(channels, height, width)` among it, and gives
        `pixel_values`: float32 of shape `(channels, height, width)` of the processor's size.
    """

    def transform(picture) -> torch.Tensor:
        picture = read_image(picture, num_channels).contiguous()
        if picture.is_floating_point() and not isinstance(processor, MIMImageProcessor):
            # transformers' processors take every value for one of 0 to 255
            picture = picture / processor.rescale_factor
        batch = processor(picture, return_tensors="pt", input_data_format="channels_first")
        return batch["pixel_values"][0]

    return transform


def annotation_transform(processor, num_channels: int) -> Callable[..., torch.Tensor]:
    """What the processor does to where things are in a picture, for a map of its pixels: resizing and cropping.

    Args:
        processor, num_channels: as for `evaluation_transform`.

    Returns:
        callable: takes numbers (height, width), of each pixel of the picture, and gives those of the pixels of its
        `pixel_values`, each one that of the nearest: float32 of shape `(height, width)` of the processor's size.
    """

    def transform(values) -> torch.Tensor:
        values = torch.as_tensor(values).to(torch.float32).expand(num_channels, -1, -1).contiguous()
        batch = processor(
            values,
            return_tensors="pt",
            input_data_format="channels_first",
            resample=PILImageResampling.NEAREST,
            do_rescale=False,
            do_normalize=False,
        )
        return batch["pixel_values"][0, 0]

    return transform
