"""Sizes of networks by name."""

from ..registry import RECORDS
from .method import PRESETS
from .vit.sizes import as_pair

# Encoders. Grids: about 8 x 8 patches in tiny, whose patch follows the image size; mini cuts images of 32 to 64 pixels
# into patches of 4; elsewhere 14 x 14, huge 16 x 16.
_ENCODERS = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "mini": {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "huge": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16},
}
_IMAGE_AND_PATCH_SIZE = {"tiny": (64, None), "mini": (64, 4), "huge": (224, 14)}
_TINY_GRID = 8


def preset_config(
    model_type: str, preset: str, image_size: tuple[int, int] | None, patch_size: list[int] | None = None
) -> dict:
    """
    The config fields of a preset.

    Args:
        model_type (`str`): The method.
        preset (`str`): One of `PRESETS`.
        image_size (`tuple[int, int]`, *optional*): (height, width); the preset's own if None.
        patch_size (`list[int]`, *optional*): One number, or height and width; the preset's own if None.

    Raises:
        ValueError: If there is no such preset, or if tiny finds no patch size for the image size.
    """
    if preset not in _ENCODERS:
        raise ValueError(f"preset is {preset!r}; expected one of {', '.join(PRESETS)}.")
    default_size, default_patch = _IMAGE_AND_PATCH_SIZE.get(preset, (224, 16))
    image_size = image_size or (default_size, default_size)
    if patch_size is not None:
        patch_size = [patch_size[0], patch_size[-1]]
    elif default_patch is not None:
        patch_size = default_patch
    else:
        patch_size = [_tiny_patch(side) for side in image_size]
    sizes = {"image_size": list(image_size), "patch_size": patch_size}
    # The encoder without a method has no record.
    of_method = RECORDS[model_type].presets.get(preset, {}) if model_type in RECORDS else {}
    return _ENCODERS[preset] | sizes | of_method


def _tiny_patch(side: int) -> int:
    wanted = side / _TINY_GRID
    divisors = [d for d in range(1, side + 1) if side % d == 0]
    patch = min(divisors, key=lambda divisor: (abs(divisor - wanted), -divisor))
    if not _TINY_GRID / 2 <= side // patch <= 2 * _TINY_GRID:
        raise ValueError(
            f"The preset tiny cuts pictures into about {_TINY_GRID} patches a side, and {side} pixels have no divisor "
            f"near {wanted:.0f}. Choose another --image_size, for example {_TINY_GRID * max(1, round(wanted))}, or "
            "give --patch_size."
        )
    return patch


class FromPreset:
    """For configs: sizes by name."""

    @classmethod
    def from_preset(cls, name: str, *, image_size=None, patch_size=None, **fields):
        """
        A config of the sizes that a preset has.

        Args:
            name (`str`): "tiny", "mini", "small", "base", "large" or "huge".
            image_size (`int` or pair (height, width), *optional*): The preset's own if None: 64 for tiny and mini,
                else 224.
            patch_size (`int` or pair (height, width), *optional*): The preset's own if None: 16, 14 for huge, 4 for
                mini, and for tiny what cuts the image into about 8 x 8 patches.
            fields: Of the config, in the place of the preset's.

        Raises:
            ValueError: If there is no such preset, or sizes do not fit.
        """
        sizes = [None if size is None else as_pair(size) for size in (image_size, patch_size)]
        return cls(**(preset_config(cls.model_type, name, *sizes) | fields))
