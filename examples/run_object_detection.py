"""
Fine-tune a pretrained Vision Transformer to find objects, by their boxes and masks.

    accelerate launch examples/run_object_detection.py --model_name_or_path runs/demo --output_dir runs/detector
    accelerate launch examples/run_object_detection.py --model_name_or_path runs/mine --preset base \
        --train_dir my_pictures --train_annotations my_objects.json --output_dir runs/detector

`--help` lists all flags. A recipe (JSON or YAML) may come first; flags override it.
"""

import sys

from hf_mim.jobs.detection import main

if __name__ == "__main__":
    sys.exit(main())
