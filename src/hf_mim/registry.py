"""The methods, and how their classes reach transformers' Auto classes without being imported."""

import functools
import importlib
import importlib.abc
import sys

from .models.method import Method

# A method is a folder here, with its record in `method.py`.
_FOLDERS = ("pilamim", "ocl", "tec", "dbot", "vit_mae", "ijepa")

# By model_type, the records of all methods and baselines; and the prefixes of their class names.
RECORDS: dict[str, Method] = {}
METHODS: dict[str, str] = {}
# Pretrained as the methods are, under a model_type of transformers, whose Auto classes stay as they are: what is saved
# is stock.
BASELINES: dict[str, str] = {}
# What --model_type may be.
MODEL_TYPES: dict[str, str] = {}
# The encoder without a method, in `hf_mim.models.vit`: what a stock ViT or ViTMAE becomes for fine-tuning.
ENCODER = {
    "masked_vit": "MaskedViT",
}


def add_method(record: Method) -> None:
    """
    Makes a method known, by what its folder's `method.py` says of it. `register_auto_classes` then makes transformers
    know it too.

    Raises:
        ValueError: If another has its model_type.
    """
    if record.model_type in MODEL_TYPES:
        raise ValueError(f"There is a method {record.model_type!r} already.")
    RECORDS[record.model_type] = record
    MODEL_TYPES[record.model_type] = record.prefix
    (BASELINES if record.is_baseline else METHODS)[record.model_type] = record.prefix


for _folder in _FOLDERS:
    add_method(importlib.import_module(f"hf_mim.models.{_folder}.method").METHOD)

# Auto class in transformers: suffix of our class.
_AUTO_CLASSES = {
    "AutoModel": "Model",
    "AutoModelForPreTraining": "ForPreTraining",
    "AutoModelForImageClassification": "ForImageClassification",
    "AutoModelForSemanticSegmentation": "ForSemanticSegmentation",
    "AutoModelForDepthEstimation": "ForDepthEstimation",
    "AutoModelForObjectDetection": "ForObjectDetection",
    "AutoBackbone": "Backbone",
}
_OF_BASELINES = ("Config", "Model", "ForPreTraining")


def method_name(model_type: str) -> str:
    """What people call a method or baseline."""
    return RECORDS[model_type].name


def method_module(model_type: str, kind: str):
    """
    The module `kind` ("configuration", "modeling" or "convert") of a method.

    Raises:
        ValueError: If there is no such method.
    """
    known = MODEL_TYPES if kind == "convert" else MODEL_TYPES | ENCODER
    if model_type not in known:
        # The encoder without a method cannot be pretrained, which is what most ask for.
        names = ", ".join(name for name in known if name not in ENCODER)
        raise ValueError(f"model_type is {model_type!r}; expected one of {names}.")
    if model_type in ENCODER:
        return importlib.import_module(f"hf_mim.models.vit.{kind}_vit")
    return importlib.import_module(f"{RECORDS[model_type].package}.{model_type}.{kind}_{model_type}")


def method_class(model_type: str, suffix: str) -> type:
    """
    A method's class, by the suffix "Config", "Model", "ForPreTraining", "ForImageClassification",
    "ForSemanticSegmentation", "ForDepthEstimation", "ForObjectDetection" or "Backbone"; a baseline has the first
    three, the encoder without a method all but "ForPreTraining".

    Raises:
        ValueError: If there is no such method or class.
    """
    if model_type in (ENCODER if suffix == "ForPreTraining" else BASELINES if suffix not in _OF_BASELINES else ()):
        raise ValueError(f"model_type {model_type!r} has no {suffix} class.")
    kind = "configuration" if suffix == "Config" else "modeling"
    return getattr(method_module(model_type, kind), (MODEL_TYPES | ENCODER)[model_type] + suffix)


class _Later:
    """A value of `_LazyContents` that is made when it is asked for."""

    def __init__(self, make):
        self.make = make


class _LazyContents(dict):
    """
    What was registered with one of transformers' mappings from configs to classes, where ours are imported when they
    are asked for. It stands in the place of the mapping's own dict, so that what is seen is always the real class.
    """

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if isinstance(value, _Later):
            value = self[key] = value.make()
        return value

    def get(self, key, default=None):
        try:
            return self[key]
        except KeyError:
            return default

    def __iter__(self):
        # Overridden, so that dict(self) asks for the values and does not copy what makes them.
        return super().__iter__()

    def values(self):
        return [self[key] for key in self]

    def items(self):
        return [(key, self[key]) for key in self]


def _register_later(mapping, config_class: type, make) -> None:
    """Registers with `mapping`, for a config, what `make()` will give when somebody asks for it."""
    if not isinstance(getattr(mapping, "_extra_content", None), dict):
        # Another transformers, which keeps it elsewhere: what is asked for now is right, if slower.
        mapping.register(config_class, make(), exist_ok=True)
        return
    if not isinstance(mapping._extra_content, _LazyContents):
        mapping._extra_content = _LazyContents(mapping._extra_content)
    mapping._extra_content[config_class] = _Later(make)


def register_auto_classes() -> None:
    """
    Makes AutoConfig, AutoModel, AutoImageProcessor and the others know our methods, now or as soon as transformers'
    modules of them are imported: importing hf_mim imports neither transformers nor torch. No model is imported.
    """
    for name, register in _REGISTRATIONS.items():
        if name in sys.modules:
            register(sys.modules[name])
    if not _are_imported(_REGISTRATIONS) and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register_configs(module) -> None:
    if hasattr(module, "AutoConfig"):
        for model_type in METHODS | ENCODER:
            module.AutoConfig.register(model_type, method_class(model_type, "Config"), exist_ok=True)


def _register_models(module) -> None:
    for auto_class, suffix in _AUTO_CLASSES.items():
        if hasattr(module, auto_class):
            for model_type in METHODS if suffix == "ForPreTraining" else METHODS | ENCODER:
                mapping, config_class = getattr(module, auto_class)._model_mapping, method_class(model_type, "Config")
                _register_later(mapping, config_class, functools.partial(method_class, model_type, suffix))


def _register_image_processor(module) -> None:
    if hasattr(module, "IMAGE_PROCESSOR_MAPPING"):
        for model_type in METHODS | ENCODER:
            _register_later(module.IMAGE_PROCESSOR_MAPPING, method_class(model_type, "Config"), _image_processors)


# Module of transformers: what tells it of ours. It may be in the middle of being imported, and is told at the end.
_REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.image_processing_auto": _register_image_processor,
}


def _are_imported(names) -> bool:
    return all(name in sys.modules for name in names)


def _image_processors() -> dict[str, type]:
    return {"torchvision": importlib.import_module("hf_mim.data.image_processing").MIMImageProcessor}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers ours right after transformers' registries are imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _REGISTRATIONS:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _REGISTRATIONS[fullname](module)
            # Not before: somebody may only have asked where the module is, and imports it later.
            if _are_imported(_REGISTRATIONS) and self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = execute_and_register
        return spec
