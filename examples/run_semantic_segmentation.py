"""
Fine-tune a pretrained Vision Transformer to tell the class of each pixel.

    accelerate launch examples/run_semantic_segmentation.py --model_name_or_path runs/demo --output_dir runs/segmenter
    accelerate launch examples/run_semantic_segmentation.py --model_name_or_path runs/mine --preset base \
        --train_dir my_pictures --train_mask_dir my_masks --segmentation_head upernet --output_dir runs/segmenter

`--help` lists all flags. A recipe (JSON or YAML) may come first; flags override it.
"""

import sys

from hf_mim.jobs.segmentation import main

if __name__ == "__main__":
    sys.exit(main())
