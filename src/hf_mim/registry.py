"""The methods, and how their classes reach transformers' Auto classes without being imported."""

import importlib
import importlib.abc
import importlib.util
import sys

# model_type: prefix of the class names. The classes are in `hf_mim.models.<model_type>`.
METHODS = {
    "pilamim": "PiLaMIM",
    "ocl": "OCL",
    "tec": "TEC",
    "dbot": "DBOT",
}

# Where papers write a name otherwise than the classes do.
_WRITTEN = {
    "dbot": "dBOT",
    "vit_mae": "MAE",
}

# Pretrained as the methods are, under a model_type of transformers, whose Auto classes stay as they are: what is saved
# is stock.
BASELINES = {
    "vit_mae": "ViTMAE",
}
# The encoder without a method, in `hf_mim.models.vit`: what a stock ViT or ViTMAE becomes for fine-tuning.
ENCODER = {
    "masked_vit": "MaskedViT",
}
# What --model_type may be.
MODEL_TYPES = METHODS | BASELINES

# Auto class in transformers: suffix of our class.
_AUTO_CLASSES = {
    "AutoModel": "Model",
    "AutoModelForPreTraining": "ForPreTraining",
    "AutoModelForImageClassification": "ForImageClassification",
    "AutoBackbone": "Backbone",
}
_OF_BASELINES = ("Config", "Model", "ForPreTraining")
_IMAGE_PROCESSING_AUTO = "transformers.models.auto.image_processing_auto"


def method_name(model_type: str) -> str:
    """What people call a method or baseline."""
    return _WRITTEN.get(model_type, MODEL_TYPES[model_type])


def method_module(model_type: str, kind: str):
    """
    The module `kind` ("configuration", "modeling" or "convert") of a method.

    Raises:
        ValueError: If there is no such method.
    """
    # The baseline's original checkpoints are on the Hub in transformers' form.
    known = METHODS if kind == "convert" else MODEL_TYPES | ENCODER
    if model_type not in known:
        # The encoder without a method cannot be pretrained, which is what most ask for.
        names = ", ".join(name for name in known if name not in ENCODER)
        raise ValueError(f"model_type is {model_type!r}; expected one of {names}.")
    folder = "vit" if model_type in ENCODER else model_type
    return importlib.import_module(f"hf_mim.models.{folder}.{kind}_{folder}")


def method_class(model_type: str, suffix: str) -> type:
    """
    A method's class, by the suffix "Config", "Model", "ForPreTraining", "ForImageClassification" or "Backbone"; a
    baseline has the first three, the encoder without a method all but "ForPreTraining".

    Raises:
        ValueError: If there is no such method or class.
    """
    if model_type in (ENCODER if suffix == "ForPreTraining" else BASELINES if suffix not in _OF_BASELINES else ()):
        raise ValueError(f"model_type {model_type!r} has no {suffix} class.")
    kind = "configuration" if suffix == "Config" else "modeling"
    return getattr(method_module(model_type, kind), (MODEL_TYPES | ENCODER)[model_type] + suffix)


class _LazyClass(type):
    """Metaclass of a stand-in that becomes the real class on first use."""

    def __getattr__(cls, name):
        return getattr(cls.resolve(), name)

    def __call__(cls, *args, **kwargs):
        return cls.resolve()(*args, **kwargs)

    def __instancecheck__(cls, instance):
        return isinstance(instance, cls.resolve())

    def __subclasscheck__(cls, subclass):
        return issubclass(subclass, cls.resolve())


def _lazy_class(model_type: str, suffix: str) -> type:
    name = (METHODS | ENCODER)[model_type] + suffix
    return _LazyClass(name, (), {"resolve": staticmethod(lambda: method_class(model_type, suffix))})


def register_auto_classes() -> None:
    """Makes AutoConfig, AutoModel and the others know our methods. Imports their configurations, no model."""
    import transformers

    for model_type in METHODS | ENCODER:
        config_class = method_class(model_type, "Config")
        transformers.AutoConfig.register(model_type, config_class, exist_ok=True)
        for auto_class, suffix in _AUTO_CLASSES.items():
            if model_type in ENCODER and suffix == "ForPreTraining":
                continue
            mapping = getattr(transformers, auto_class)._model_mapping
            mapping.register(config_class, _lazy_class(model_type, suffix), exist_ok=True)
    register_image_processor()


def register_image_processor() -> None:
    """Makes AutoImageProcessor know our image processor, now or when somebody imports it."""
    # Importing AutoImageProcessor costs more than all the rest.
    if _IMAGE_PROCESSING_AUTO in sys.modules:
        _register_image_processor(sys.modules[_IMAGE_PROCESSING_AUTO])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register_image_processor(module) -> None:
    ours = sys.modules.get("hf_mim.data.image_processing")
    if ours is not None and not hasattr(ours, "MIMImageProcessor"):
        # Its own imports came here, before its class was there: it asks again at its end.
        return
    from .data.image_processing import MIMImageProcessor

    for model_type in METHODS | ENCODER:
        module.AutoImageProcessor.register(
            method_class(model_type, "Config"),
            image_processor_classes={"torchvision": MIMImageProcessor},
            exist_ok=True,
        )


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers our image processor right after transformers' registry of them is imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _IMAGE_PROCESSING_AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _register_image_processor(module)

        spec.loader.exec_module = execute_and_register
        return spec
