"""
Fine-tune a pretrained Vision Transformer to tell how far away each pixel is.

    accelerate launch examples/run_depth_estimation.py --model_name_or_path runs/demo --output_dir runs/depth
    accelerate launch examples/run_depth_estimation.py --model_name_or_path runs/mine --preset base \
        --train_dir my_pictures --train_depth_dir my_depths --depth_scale 0.001 --depth_head dpt \
        --output_dir runs/depth

`--help` lists all flags. A recipe (JSON or YAML) may come first; flags override it.
"""

import sys

from hf_mim.jobs.depth import main

if __name__ == "__main__":
    sys.exit(main())
