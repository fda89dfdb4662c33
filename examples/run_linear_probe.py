"""
Linear probing: how much a linear classifier reads off a Vision Transformer's frozen features.

    python examples/run_linear_probe.py --model_name_or_path runs/demo --output_dir runs/demo/probe
    accelerate launch examples/run_linear_probe.py --model_name_or_path facebook/dinov2-base --dataset_name cifar100 \
        --preset pilamim --output_dir runs/dinov2

`--help` lists all flags. A recipe (JSON or YAML) may come first; flags override it.
"""

import sys

from hf_mim.jobs.linear_probe import main

if __name__ == "__main__":
    sys.exit(main())
