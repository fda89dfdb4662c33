"""
A report on what Vision Transformers' features hold: k-NN, linear probe, RankMe, t-SNE, attention, patch features.

    python examples/run_representation_report.py --model_names_or_paths runs/demo --output_dir runs/demo/report
    python examples/run_representation_report.py --model_names_or_paths runs/a runs/b facebook/dinov2-small \
        --train_dir my_pictures --output_dir report

Needs scikit-learn: pip install -e ".[viz]". `--help` lists all flags.
"""

import sys

from hf_mim.jobs.representation_report import main

if __name__ == "__main__":
    sys.exit(main())
