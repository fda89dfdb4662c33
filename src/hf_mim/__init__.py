"""Masked image modelling (PiLaMIM, TEC, OCL, dBOT) native to the Hugging Face stack.

Importing this package registers its models with transformers' Auto classes. Everything else is imported on first use.
"""

import importlib
from typing import TYPE_CHECKING

from .missing import say_missing
from .registry import _AUTO_CLASSES, BASELINES, ENCODER, METHODS, method_class, register_auto_classes

__version__ = "0.1.0.dev0"

_IN_MODULES = {
    "export": ".hub.export",
    "from_original": ".hub.original",
    "encoder_from": ".models.vit.encoders",
    "to_dinov2": ".hub.vit",
    "to_dinov3": ".hub.vit",
    "to_eomt": ".hub.vit",
    "to_vit": ".hub.vit",
    "KNNAccuracy": ".evaluation.metrics",
    "LinearProbeAccuracy": ".evaluation.metrics",
    "MeanAveragePrecision": ".evaluation.metrics",
    "MultiLabelF1": ".evaluation.metrics",
    "RankMe": ".evaluation.metrics",
    "extract_features": ".evaluation.features",
    "MIMImageProcessor": ".data.image_processing",
    "PretrainingDataset": ".data.pretraining",
    "PretrainingTransform": ".data.transforms",
    "MIMCallback": ".training.callbacks",
    "MIMTrainer": ".training.trainer",
    "MIMTrainingArguments": ".training.arguments",
    "estimate_memory": ".training.memory",
    "FineTuningTrainer": ".training.finetuning_trainer",
    "FineTuningArguments": ".jobs.finetuning",
}
# Of a baseline what transformers has not, or has with other defaults; of the encoder without a method all but a task.
_SUFFIXES = dict.fromkeys(METHODS, ("Config", *_AUTO_CLASSES.values()))
_SUFFIXES |= dict.fromkeys(
    ENCODER,
    (
        "Config",
        "Model",
        "ForImageClassification",
        "ForSemanticSegmentation",
        "ForDepthEstimation",
        "ForObjectDetection",
        "Backbone",
    ),
)
_SUFFIXES |= dict.fromkeys(BASELINES, ("Config", "ForPreTraining"))
_CLASSES = {
    prefix + suffix: (model_type, suffix)
    for model_type, prefix in (METHODS | ENCODER | BASELINES).items()
    for suffix in _SUFFIXES[model_type]
}

__all__ = [*_CLASSES, *_IN_MODULES]

if TYPE_CHECKING:
    # What type checkers and editors see of the names that are imported on first use.
    from .data.image_processing import MIMImageProcessor as MIMImageProcessor
    from .data.pretraining import PretrainingDataset as PretrainingDataset
    from .data.transforms import PretrainingTransform as PretrainingTransform
    from .evaluation.features import extract_features as extract_features
    from .evaluation.metrics import KNNAccuracy as KNNAccuracy
    from .evaluation.metrics import LinearProbeAccuracy as LinearProbeAccuracy
    from .evaluation.metrics import MeanAveragePrecision as MeanAveragePrecision
    from .evaluation.metrics import MultiLabelF1 as MultiLabelF1
    from .evaluation.metrics import RankMe as RankMe
    from .hub.export import export as export
    from .hub.original import from_original as from_original
    from .hub.vit import to_dinov2 as to_dinov2
    from .hub.vit import to_dinov3 as to_dinov3
    from .hub.vit import to_eomt as to_eomt
    from .hub.vit import to_vit as to_vit
    from .jobs.finetuning import FineTuningArguments as FineTuningArguments
    from .models.dbot.configuration_dbot import DBOTConfig as DBOTConfig
    from .models.dbot.modeling_dbot import DBOTBackbone as DBOTBackbone
    from .models.dbot.modeling_dbot import DBOTForDepthEstimation as DBOTForDepthEstimation
    from .models.dbot.modeling_dbot import DBOTForImageClassification as DBOTForImageClassification
    from .models.dbot.modeling_dbot import DBOTForObjectDetection as DBOTForObjectDetection
    from .models.dbot.modeling_dbot import DBOTForPreTraining as DBOTForPreTraining
    from .models.dbot.modeling_dbot import DBOTForSemanticSegmentation as DBOTForSemanticSegmentation
    from .models.dbot.modeling_dbot import DBOTModel as DBOTModel
    from .models.ijepa.configuration_ijepa import IJepaConfig as IJepaConfig
    from .models.ijepa.modeling_ijepa import IJepaForPreTraining as IJepaForPreTraining
    from .models.ocl.configuration_ocl import OCLConfig as OCLConfig
    from .models.ocl.modeling_ocl import OCLBackbone as OCLBackbone
    from .models.ocl.modeling_ocl import OCLForDepthEstimation as OCLForDepthEstimation
    from .models.ocl.modeling_ocl import OCLForImageClassification as OCLForImageClassification
    from .models.ocl.modeling_ocl import OCLForObjectDetection as OCLForObjectDetection
    from .models.ocl.modeling_ocl import OCLForPreTraining as OCLForPreTraining
    from .models.ocl.modeling_ocl import OCLForSemanticSegmentation as OCLForSemanticSegmentation
    from .models.ocl.modeling_ocl import OCLModel as OCLModel
    from .models.pilamim.configuration_pilamim import PiLaMIMConfig as PiLaMIMConfig
    from .models.pilamim.modeling_pilamim import PiLaMIMBackbone as PiLaMIMBackbone
    from .models.pilamim.modeling_pilamim import PiLaMIMForDepthEstimation as PiLaMIMForDepthEstimation
    from .models.pilamim.modeling_pilamim import PiLaMIMForImageClassification as PiLaMIMForImageClassification
    from .models.pilamim.modeling_pilamim import PiLaMIMForObjectDetection as PiLaMIMForObjectDetection
    from .models.pilamim.modeling_pilamim import PiLaMIMForPreTraining as PiLaMIMForPreTraining
    from .models.pilamim.modeling_pilamim import PiLaMIMForSemanticSegmentation as PiLaMIMForSemanticSegmentation
    from .models.pilamim.modeling_pilamim import PiLaMIMModel as PiLaMIMModel
    from .models.tec.configuration_tec import TECConfig as TECConfig
    from .models.tec.modeling_tec import TECBackbone as TECBackbone
    from .models.tec.modeling_tec import TECForDepthEstimation as TECForDepthEstimation
    from .models.tec.modeling_tec import TECForImageClassification as TECForImageClassification
    from .models.tec.modeling_tec import TECForObjectDetection as TECForObjectDetection
    from .models.tec.modeling_tec import TECForPreTraining as TECForPreTraining
    from .models.tec.modeling_tec import TECForSemanticSegmentation as TECForSemanticSegmentation
    from .models.tec.modeling_tec import TECModel as TECModel
    from .models.vit.configuration_vit import MaskedViTConfig as MaskedViTConfig
    from .models.vit.encoders import encoder_from as encoder_from
    from .models.vit.modeling_vit import MaskedViTBackbone as MaskedViTBackbone
    from .models.vit.modeling_vit import MaskedViTForDepthEstimation as MaskedViTForDepthEstimation
    from .models.vit.modeling_vit import MaskedViTForImageClassification as MaskedViTForImageClassification
    from .models.vit.modeling_vit import MaskedViTForObjectDetection as MaskedViTForObjectDetection
    from .models.vit.modeling_vit import MaskedViTForSemanticSegmentation as MaskedViTForSemanticSegmentation
    from .models.vit.modeling_vit import MaskedViTModel as MaskedViTModel
    from .models.vit_mae.configuration_vit_mae import ViTMAEConfig as ViTMAEConfig
    from .models.vit_mae.modeling_vit_mae import ViTMAEForPreTraining as ViTMAEForPreTraining
    from .training.arguments import MIMTrainingArguments as MIMTrainingArguments
    from .training.callbacks import MIMCallback as MIMCallback
    from .training.finetuning_trainer import FineTuningTrainer as FineTuningTrainer
    from .training.memory import estimate_memory as estimate_memory
    from .training.trainer import MIMTrainer as MIMTrainer


def __getattr__(name: str):
    if name in _CLASSES:
        return method_class(*_CLASSES[name])
    if name in _IN_MODULES:
        try:
            return getattr(importlib.import_module(_IN_MODULES[name], __name__), name)
        except ImportError as error:
            message = say_missing(error)
            if message is None:
                raise
            raise ImportError(f"hf_mim.{name}: {message}", name=error.name) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_auto_classes()
