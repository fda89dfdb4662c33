"""Loaded weights at aligned addresses: products with them are to the bit those with the same weights in memory."""

from torch import nn

# What torch's own allocator on a CPU gives.
_ALIGNMENT = 64


def align_weights(model: nn.Module) -> None:
    """
    Moves weights on the CPU that do not start at a multiple of 64 bytes, in place and without changing a value.

    `from_pretrained` maps a safetensors file into memory, where a tensor starts wherever its bytes lie in the file.
    MKL takes another path for such addresses and its products differ in the last bits, so that a network from disk
    would not be the one that was saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


class AlignedLoading:
    """Mixin before `PreTrainedModel`: what is loaded is aligned."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `PreTrainedModel.from_pretrained`."""
        loaded = super().from_pretrained(*args, **kwargs)
        align_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded
