"""Parameter groups whose learning rate falls from the head to the embeddings."""

import re

from torch import nn

_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks)\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(?:^|\.)embeddings?\.(?!.*adapter)")


def parameter_depth(name: str, num_layers: int) -> int:
    """0 for the embeddings, 1 + i for block i, 1 + `num_layers` for all else: the last norm, adapters, the head."""
    layer = _LAYER.search(name)
    if layer:
        return 1 + int(layer.group(1))
    return 0 if _EMBEDDINGS.search(name) else 1 + num_layers


def layer_decay_groups(
    model: nn.Module,
    *,
    num_layers: int,
    learning_rate: float,
    layer_decay: float,
    weight_decay: float,
    decayed: set[str],
) -> list[dict]:
    """
    The trained parameters in groups, the head's first; depth d has `learning_rate * layer_decay ** (1 + num_layers -
    d)`.

    Args:
        decayed (`set[str]`): Names of the parameters that get the weight decay; others get none.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = parameter_depth(name, num_layers)
        rate = learning_rate * layer_decay ** (1 + num_layers - depth)
        decay = weight_decay if name in decayed else 0.0
        group = groups.setdefault((-depth, name not in decayed), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
