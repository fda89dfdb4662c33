"""
Fine-tune a pretrained Vision Transformer as a classifier.

    accelerate launch examples/run_image_classification.py --model_name_or_path runs/demo --label_column_name count \
        --output_dir runs/count
    accelerate launch examples/run_image_classification.py --model_name_or_path runs/mine --preset small \
        --train_dir my_pictures --output_dir runs/classifier

`--help` lists all flags. A recipe (JSON or YAML) may come first; flags override it.
"""

import sys

from hf_mim.jobs.finetuning import main

if __name__ == "__main__":
    sys.exit(main())
