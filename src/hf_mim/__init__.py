"""Masked image modelling (PiLaMIM, TEC, OCL, dBOT) native to the Hugging Face stack.

Importing this package registers its models with transformers' Auto classes. Everything else is imported on first use.
"""

import importlib

from .registry import _AUTO_CLASSES, ENCODER, METHODS, method_class, register_auto_classes

__version__ = "0.1.0.dev0"

_FUNCTIONS = {
    "from_original": ".hub.original",
    "to_vit": ".hub.vit",
    "KNNAccuracy": ".evaluation.metrics",
    "LinearProbeAccuracy": ".evaluation.metrics",
    "RankMe": ".evaluation.metrics",
}
_CLASSES = {
    prefix + suffix: (model_type, suffix)
    for model_type, prefix in (METHODS | ENCODER).items()
    for suffix in ("Config", *_AUTO_CLASSES.values())
    if model_type in METHODS or suffix != "ForPreTraining"
}

__all__ = [*_CLASSES, *_FUNCTIONS]


def __getattr__(name: str):
    if name in _CLASSES:
        return method_class(*_CLASSES[name])
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_auto_classes()
