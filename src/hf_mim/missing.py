"""Packages that an embedding server may leave out, and what to say where one is wanted and not there."""

# What is imported: what is installed. What does not come with hf_mim itself is in its extras.
_INSTALLED_AS = {
    "datasets": "datasets",
    "evaluate": "evaluate",
    "faster_coco_eval": "faster-coco-eval",
    "imagecodecs": "imagecodecs",
    "matplotlib": "matplotlib",
    "nibabel": "nibabel",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxscript",
    "pandas": "pandas",
    "peft": "peft",
    "pyarrow": "pyarrow",
    "pydicom": "pydicom",
    "rasterio": "rasterio",
    "sklearn": "scikit-learn",
    "tifffile": "tifffile",
    "timm": "timm",
    "torchmetrics": "torchmetrics",
    "accelerate": "accelerate",
}


def say_missing(error: ImportError) -> str | None:
    """What to install, in a line, where one of these packages could not be imported; None for any other error."""
    package = _INSTALLED_AS.get((error.name or "").split(".")[0])
    if package is None:
        return None
    return f"The package {package} is wanted for this and is not installed: pip install {package}"
