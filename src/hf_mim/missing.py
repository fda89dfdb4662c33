"""Packages that an embedding server may leave out, and what to say where one is wanted and not there."""

# What is imported: what is installed. All but scikit-learn, PEFT and the readers of TIFF come with hf_mim itself.
_INSTALLED_AS = {
    "datasets": "datasets",
    "evaluate": "evaluate",
    "imagecodecs": "imagecodecs",
    "matplotlib": "matplotlib",
    "peft": "peft",
    "sklearn": "scikit-learn",
    "tifffile": "tifffile",
    "timm": "timm",
    "accelerate": "accelerate",
}


def say_missing(error: ImportError) -> str | None:
    """What to install, in a line, where one of these packages could not be imported; None for any other error."""
    package = _INSTALLED_AS.get((error.name or "").split(".")[0])
    if package is None:
        return None
    return f"The package {package} is wanted for this and is not installed: pip install {package}"
