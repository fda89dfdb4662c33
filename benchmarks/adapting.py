"""
What going on from trained weights takes, by how much of the encoder is trained: weights, and memory of a step.

    python benchmarks/adapting.py --preset base --output benchmarks/results/adapting_base.json

Counted, and not measured by a clock or by the system, so that every machine gives the same: the parameters that are
trained, of the encoder and in all; the bytes of gradients and AdamW's two moments of these, and of all weights, in
float32; and the bytes that a forward pass in float32 keeps for the backward pass, weights apart, for each image.
"""

import argparse
import json

import torch

from hf_mim.models.presets import preset_config
from hf_mim.registry import method_class
from hf_mim.training.trainable import add_encoder_lora, train_last_blocks

METHODS = ("vit_mae", "pilamim", "ocl", "tec")
WAYS = ("all", "trainable_blocks 4", "lora_rank 8")
MIB = 2**20


def build(method: str, preset: str, way: str):
    torch.manual_seed(0)
    config = method_class(method, "Config")(**preset_config(method, preset, None))
    model = method_class(method, "ForPreTraining")(config)
    name, _, number = way.partition(" ")
    if name == "trainable_blocks":
        train_last_blocks(model, int(number))
    elif name == "lora_rank":
        add_encoder_lora(model, int(number))
    return model.train()


def kept_bytes(model, batch_size: int) -> int:
    """Bytes that the forward pass keeps for the backward pass, each storage once, without those of weights."""
    config = model.config
    side = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    pixel_values = torch.randn(batch_size, config.num_channels, *side)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), pixel_values)}
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Held until the sizes are counted: a storage that is freed could have its place taken.
        loss = model(pixel_values, noise=torch.rand(batch_size, config.num_patches)).loss
    loss.backward()
    return sum(sizes.values())


def measure(method: str, preset: str, way: str, batch_size: int) -> dict:
    model = build(method, preset, way)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "method": method,
        "way": way,
        "trained_of_encoder": sum(p.numel() for p in model.encoder.parameters() if p.requires_grad),
        "trained": trained,
        "weights_mib": 4 * sum(p.numel() for p in model.parameters()) / MIB,
        "gradients_and_moments_mib": 3 * 4 * trained / MIB,
        "kept_mib_an_image": kept_bytes(model, batch_size) / batch_size / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="base")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--output")
    args = parser.parse_args()
    rows = []
    for method in METHODS:
        for way in WAYS:
            rows.append(measure(method, args.preset, way, args.batch_size))
            print(json.dumps(rows[-1]), flush=True)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as stream:
            json.dump({"preset": args.preset, "batch_size": args.batch_size, "rows": rows}, stream, indent=1)
            stream.write("\n")


if __name__ == "__main__":
    main()
