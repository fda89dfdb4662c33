"""Packaging of hf_mim."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# The one place of the version; importing the package would need what is not installed yet.
PACKAGE = Path(__file__).with_name("src") / "hf_mim" / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+)"$', PACKAGE.read_text(encoding="utf-8"), re.MULTILINE)[1]

extras = {
    # Tracking runs beyond the files that every run writes.
    "tracking": ["tensorboard>=2.20", "trackio>=0.43"],
    # t-SNE in the representation report.
    "viz": ["scikit-learn>=1.7"],
    # Low-rank fine-tuning.
    "peft": ["peft>=0.18"],
    # The pages of docs/: mkdocs build.
    "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
    # hf_mim export --format onnx.
    "export": ["onnx>=1.19", "onnxscript>=0.5.4", "onnxruntime>=1.22"],
    # hf_mim detect: mean average precision, and COCO's masks.
    "detection": ["torchmetrics>=1.6", "faster-coco-eval>=1.6.6"],
    # The page of examples/space.
    "space": ["gradio>=6.31,<7"],
    # Multiband pictures.
    "tiff": ["tifffile>=2025.5", "imagecodecs>=2025.3"],
    # DICOM, GeoTIFF scenes, NIfTI volumes.
    "dicom": ["pydicom>=3.0.1"],
    "geo": ["rasterio>=1.4.3"],
    "volumes": ["nibabel>=5.3.2"],
}
# All that the package itself has a use for.
extras["all"] = sorted(
    requirement for name, group in extras.items() if name not in ("docs", "space") for requirement in group
)
extras["dev"] = sorted(
    {
        "hypothesis>=6.150",
        # The wheel's test.
        "build>=1.6",
        "twine>=7.0",
        # Kernel and client of the notebook's test.
        "ipykernel>=6.29",
        "nbclient>=0.10",
        # transformers' own tests of models, where its source is at hand.
        "parameterized>=0.9",
        "pytest>=9.0",
        "pytest-xdist>=3.8",
        # The wheel's test, and build-system.requires.
        "setuptools>=77",
        "ruff==0.17.5",
        *extras["all"],
    }
)

setup(
    name="hf_mim",
    version=VERSION,
    description="Masked image modelling (PiLaMIM, TEC, OCL, dBOT) native to the Hugging Face stack",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"hf_mim": ["py.typed"], "hf_mim.evaluation": ["reference_curves.json"]},
    entry_points={"console_scripts": ["hf_mim=hf_mim.__main__:main"]},
    # The lowest versions that the tests pass with: tests/floors.txt, which CI runs.
    install_requires=[
        "torch>=2.9.1",
        "numpy>=2.0.2",
        "torchvision>=0.24.1",
        "transformers>=5.17,<6",
        "accelerate>=1.12",
        "datasets>=4.4.1",
        "evaluate>=0.4.6",
        "timm>=1.0.22",
        "safetensors>=0.8",
        "huggingface-hub>=1.33",
        "matplotlib>=3.9.4",
        "pillow>=11.3",
        "pyyaml>=6.0.2",
    ],
    extras_require=extras,
)
