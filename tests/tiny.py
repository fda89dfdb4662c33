"""Small models of every method, for the tests. A new method is one line in `TINY`."""

from typing import NamedTuple

import torch

from hf_mim.registry import method_class

# Awkward on purpose: another number of rows than of columns, of channels than three, of decoder width than encoder's.
_ENCODER = {
    "image_size": (32, 48),
    "patch_size": (8, 4),
    "num_channels": 5,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
_DECODER = {"decoder_hidden_size": 48, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 3}


class Tiny(NamedTuple):
    """The sizes of a small model, and the parts that a checkpoint with only an encoder leaves untrained."""

    fields: dict
    besides_encoder: tuple[str, ...]


TINY = {
    "pilamim": Tiny(_ENCODER | _DECODER, ("latent_decoder", "pixel_decoder")),
    "ocl": Tiny(_ENCODER, ()),
    "tec": Tiny(_ENCODER | _DECODER, ("base", "decoder", "encoder_adapter")),
    # Other than by default without stochastic depth, which the tests turn on where they want it.
    "dbot": Tiny(_ENCODER | _DECODER | {"drop_path_rate": 0.0}, ("decoder", "teacher")),
    "ijepa": Tiny(_ENCODER | {"predictor_hidden_size": 48, "predictor_num_hidden_layers": 2}, ("predictor",)),
}


def tiny_config(model_type: str, **fields):
    """The small config of a method, with other values for some fields."""
    return method_class(model_type, "Config")(**(TINY[model_type].fields | fields))


def tiny_model(model_type: str, suffix: str, *, scramble: bool = True, **fields):
    """
    The same small model every time, in eval mode.

    Args:
        scramble (`bool`): Whether all parameters are moved off their initial values, so that no bias is 0, no norm 1,
            and no target equal to its encoder.
    """
    torch.manual_seed(0)
    model = method_class(model_type, suffix)(tiny_config(model_type, **fields)).eval()
    return scrambled(model) if scramble else model


@torch.no_grad()
def scrambled(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with noise added to every parameter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_batch(config, batch_size: int = 3, seed: int = 2) -> dict[str, torch.Tensor]:
    """Pictures, and the noise that masks them."""
    generator = torch.Generator().manual_seed(seed)
    height, width = config.image_size
    return {
        "pixel_values": torch.randn(batch_size, config.num_channels, height, width, generator=generator),
        "noise": torch.rand(batch_size, config.num_patches, generator=generator),
    }


def checkpoint_activations(model) -> None:
    """Turns gradient checkpointing on, by the name that it has in this version of transformers."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


def slow_position_table(rows: int, columns: int, dim: int) -> torch.Tensor:
    """MAE's table (1, 1 + rows * columns, dim), number by number as the methods' specification words it."""
    quarter = dim // 4
    table = [[0.0] * dim]
    for row in range(rows):
        for column in range(columns):
            line = []
            for place in (column, row):
                angles = [place * 10000 ** (-i / quarter) for i in range(quarter)]
                line += [torch.tensor(angle, dtype=torch.float64).sin().item() for angle in angles]
                line += [torch.tensor(angle, dtype=torch.float64).cos().item() for angle in angles]
            table.append(line)
    return torch.tensor([table])
