"""Packaging of hf_mim."""

from pathlib import Path

from setuptools import find_packages, setup

extras = {
    # Tracking runs beyond the files that every run writes.
    "tracking": ["tensorboard>=2.21", "trackio>=0.43"],
    # t-SNE in the representation report.
    "viz": ["scikit-learn>=1.9"],
    # Low-rank fine-tuning.
    "peft": ["peft>=0.21"],
    # Multiband pictures.
    "tiff": ["tifffile>=2026.3", "imagecodecs>=2026.3"],
}
extras["dev"] = sorted(
    {
        "hypothesis>=6.170",
        "pytest>=9.2",
        "pytest-xdist>=3.8",
        "ruff==0.17.5",
        *(requirement for group in extras.values() for requirement in group),
    }
)

setup(
    name="hf_mim",
    version="0.1.0.dev0",
    description="Masked image modelling (PiLaMIM, TEC, OCL, dBOT) native to the Hugging Face stack",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"hf_mim": ["py.typed"]},
    entry_points={"console_scripts": ["hf_mim=hf_mim.__main__:main"]},
    # The lowest versions that were tried.
    install_requires=[
        "torch>=2.15",
        "numpy>=2.4",
        "torchvision>=0.29",
        "transformers>=5.23,<6",
        "accelerate>=1.15",
        "datasets>=5.2",
        "evaluate>=0.4.6",
        "timm>=1.0.31",
        "safetensors>=0.8",
        "huggingface-hub>=2.4",
        "matplotlib>=3.11",
        "pillow>=12.3",
        "pyyaml>=6.0.3",
    ],
    extras_require=extras,
)
