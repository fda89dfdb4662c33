"""
Pretrain a Vision Transformer by masked image modelling.

    accelerate launch examples/run_mim.py --output_dir runs/demo
    accelerate launch examples/run_mim.py --train_dir my_pictures --preset small --output_dir runs/mine
    accelerate launch examples/run_mim.py examples/recipes/pilamim_base_imagenet.yaml --output_dir runs/base

`--help` lists all flags. A recipe (JSON or YAML) may come first; flags override it.
"""

import sys

from hf_mim.jobs.pretraining import main

if __name__ == "__main__":
    sys.exit(main())
