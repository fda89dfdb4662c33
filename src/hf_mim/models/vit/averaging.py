"""Averaged targets: networks that follow another one slowly."""

import torch
from torch import nn

# What wrappers put between the names of modules.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@torch.no_grad()
def average_weights(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """
    `target = momentum * target + (1 - momentum) * source`, weight by weight of the same name.

    Args:
        target: The averaged network, in float32.
        source: The trained one, of the same parameter names. Where it alone has adapters of PEFT, these are added to
            the weights that they adapt.
        momentum (`float`): In [0, 1].

    Raises:
        ValueError: If the target's weights are of 16 bits, in which it would stand still, or a name is not in both.
    """
    sources = {_plain_name(name): weight for name, weight in source.named_parameters()}
    targets = {_plain_name(name): weight for name, weight in target.named_parameters()}
    for name, weight in targets.items():
        if weight.dtype.itemsize < 4:
            raise ValueError(
                f"The averaged weights ({name}, ...) are {weight.dtype}, in which a step of {1 - momentum:.4f} of the "
                "way is rounded to none: they would stand still. Keep them in float32 (from_pretrained does, with any "
                "dtype), and train in 16 bits by autocast (bf16=True)."
            )
    if targets.keys() != sources.keys():
        sources = _merged(source)
    if targets.keys() != sources.keys():
        name = sorted(targets.keys() ^ sources.keys())[0]
        raise ValueError(
            f"The averaged network and the one that it follows have not the same weights: {name} is in one of them. "
            "Change both alike, or neither."
        )
    followed = [sources[name].to(weight.dtype) for name, weight in targets.items()]
    torch._foreach_lerp_(list(targets.values()), followed, 1.0 - momentum)


def _merged(network: nn.Module) -> dict[str, torch.Tensor]:
    """Weights by plain names, with what PEFT's adapters add to them."""
    adapters = {_plain_name(name): module for name, module in network.named_modules() if hasattr(module, "base_layer")}
    prefixes = tuple(f"{name}.lora_" for name in adapters)
    weights = {}
    for name, weight in ((_plain_name(name), weight) for name, weight in network.named_parameters()):
        if name.startswith(prefixes):
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer in adapters and not adapters[layer].merged:
            for adapter in adapters[layer].active_adapters:
                weight = weight + adapters[layer].get_delta_weight(adapter)
        weights[name.replace(".base_layer.", ".")] = weight
    return weights


def _plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
