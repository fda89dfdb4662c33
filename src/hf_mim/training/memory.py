"""How much memory training will take, without the device that is to have it."""

import copy
import weakref
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.vit.sizes import as_pair
from ..registry import method_class

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class MemoryEstimate:
    """
    Bytes of one device. Besides come what torch and its libraries take for themselves (of CUDA about 0.5 GiB a
    process) and what their allocator leaves between tensors.

    Args:
        weights (`int`): parameters and buffers, of the frozen networks too.
        optimizer (`int`): AdamW's two moments of what is trained.
        step (`int`): what is held besides at a step's peak: gradients, what the forward pass keeps for the backward
            pass, and what comes and goes.
    """

    weights: int
    optimizer: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.step


def estimate_memory(
    model_or_config: PreTrainedModel | PreTrainedConfig,
    batch_size: int,
    *,
    precision: str = "bfloat16",
    shards: int = 1,
    chunk_size: int | None = None,
) -> MemoryEstimate:
    """
    The memory that pretraining takes on each device at its peak. No weight and no picture is made: forward and
    backward pass run on shapes, and what would be alive is added up. Takes seconds, and little memory.

    Args:
        model_or_config: A `ForPreTraining` model, or the config of one.
        batch_size (`int`): Pictures a device at a time (`per_device_train_batch_size`).
        precision (`str`, defaults to `"bfloat16"`): `"bfloat16"`, `"float16"` (both as autocast) or `"float32"`.
        shards (`int`, defaults to 1): Devices that FSDP shares weights, gradients and moments among; 1 for one device
            or DDP, which besides has a copy of the gradients to exchange them in.
        chunk_size (`int`, *optional*): `contrastive_chunk_size`.

    Raises:
        ValueError: If the precision is none of these, or a number is below 1.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    if batch_size < 1 or shards < 1:
        raise ValueError(f"batch_size is {batch_size} and shards {shards}; both must be at least 1.")
    model = model_or_config
    if isinstance(model, PreTrainedConfig):
        with torch.device("meta"):
            model = method_class(model.model_type, "ForPreTraining")(model)
    if chunk_size is not None:
        model = copy.copy(model)
        model.chunk_size = chunk_size
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    # An optimiser that works on all tensors at once holds one more of each, when nothing else of the step is left.
    step = max(_peak_of_step(model, batch_size, PRECISIONS[precision]), 2 * trained)
    # Of what is shared out, two blocks are whole at a time: the one that computes, and the one that is fetched.
    whole = 0 if shards == 1 else 2 * _largest_block(model)
    sharded_gradients = trained - trained // shards
    return MemoryEstimate(weights // shards + whole, 2 * trained // shards, step - sharded_gradients)


def _peak_of_step(model: PreTrainedModel, batch_size: int, dtype: torch.dtype | None) -> int:
    """Bytes that are alive at most in a forward and a backward pass, without weights."""
    config = model.config
    with FakeTensorMode(allow_non_fake_inputs=True):
        # What is found in the memo is not copied: tensors without memory take the place of the weights.
        tensors = {
            id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad) for p in model.parameters()
        }
        tensors |= {id(buffer): torch.empty(buffer.shape, dtype=buffer.dtype) for buffer in model.buffers()}
        # deepcopy notes in it what it has copied.
        model = copy.deepcopy(model, dict(tensors)).train()
        channels, size = getattr(config, "num_channels", 3), as_pair(config.image_size)
        patches = [side // patch for side, patch in zip(size, as_pair(config.patch_size), strict=True)]
        with _LiveBytes() as live:
            live.known.update(tensor.untyped_storage()._cdata for tensor in tensors.values())
            pixel_values = torch.empty(batch_size, channels, *size)
            noise = torch.empty(batch_size, patches[0] * patches[1])
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = model(pixel_values, noise=noise).loss
            loss.backward()
    return live.most


def _largest_block(model: nn.Module) -> int:
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
    return max(sizes, default=0)


class _LiveBytes(TorchDispatchMode):
    """Within, adds up the memory of the tensors that are alive, each counted once however many views it has."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
