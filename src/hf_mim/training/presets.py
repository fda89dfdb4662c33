"""Schedules by name, for the networks of the same names. Flags and recipes override every number."""

from ..registry import RECORDS

# MAE's schedule (its 40 epochs of warm-up are the default share of 0.05), and one of minutes for tiny.
_TRAINING = {"num_train_epochs": 800, "per_device_train_batch_size": 64}
_TINY_TRAINING = {
    "num_train_epochs": 12,
    # Of the same images, steps of 64 teach more than steps of 128 (MAE and PiLaMIM; benchmarks/LOG.md).
    "per_device_train_batch_size": 64,
    "base_learning_rate": 4e-3,
    "logging_steps": 25,
    "save_strategy": "epoch",
}
# A network of more than three times the work an image wants more epochs.
_MINI_TRAINING = _TINY_TRAINING | {"num_train_epochs": 40}

# The embedded scenes in tiny's minutes: many small steps learn more of them than few large ones, of as many pictures
# (benchmarks/LOG.md). The rate does not grow with the batch: so much would be too high for a larger one.
_TINY_SCENES = {
    "num_train_epochs": 6,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    # Of small solids a quarter of the patches leaves too little to tell the rest by.
    "mask_ratio": 0.6,
    "logging_steps": 250,
}
# The methods that this was tried with.
_SCENES_METHODS = ("pilamim", "vit_mae")

# Fine-tuning as MAE's: ViT-B's numbers, 50 epochs for L and H. The recipes of TEC and OCL have their own.
_FINE_TUNING = {
    "num_train_epochs": 100,
    "warmup_epochs": 5,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "crop_scale_min": 0.08,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
}
# Minutes on a CPU. Mixing, erasing and RandAugment are for schedules of more epochs.
_TINY_FINE_TUNING = {
    "num_train_epochs": 5,
    "warmup_epochs": 1,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "base_learning_rate": 8e-3,
    "layer_decay": 0.75,
    # Whole pictures are judged: at crops down to 0.5, five epochs ended 6 points lower (Fashion-MNIST).
    "crop_scale_min": 0.9,
    "drop_path_rate": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "random_erasing": 0.0,
    "auto_augment": "none",
    "logging_steps": 25,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
}

# The flags that a preset sets in fine-tuning.
FINE_TUNING_PRESETS = {
    "tiny": _TINY_FINE_TUNING,
    "mini": _TINY_FINE_TUNING,
    "small": _FINE_TUNING,
    "base": _FINE_TUNING,
    "large": _FINE_TUNING | {"num_train_epochs": 50, "layer_decay": 0.75, "drop_path_rate": 0.2},
    "huge": _FINE_TUNING | {"num_train_epochs": 50, "layer_decay": 0.75, "drop_path_rate": 0.3},
}


# Segmentation, as MAE fine-tunes UperNet on ADE20K: 160,000 steps of 16 pictures are 127 epochs of it.
_SEGMENTATION = {
    "num_train_epochs": 127,
    "warmup_epochs": 1,
    "per_device_train_batch_size": 16,
    # 1e-4 for 16 pictures.
    "base_learning_rate": 1.6e-3,
    "segmentation_head": "upernet",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
}
# Minutes on a CPU, for the embedded scenes: of as many pictures, small steps teach more (benchmarks/LOG.md).
_TINY_SEGMENTATION = {
    "num_train_epochs": 5,
    "warmup_epochs": 0.5,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-3,
    "layer_decay": 0.75,
    "drop_path_rate": 0.0,
    "scale_jitter": [0.9, 1.2],
    "photometric_jitter": False,
    "segmentation_head_size": 64,
    "logging_steps": 25,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
}
SEGMENTATION_PRESETS = dict.fromkeys(("tiny", "mini"), _TINY_SEGMENTATION) | dict.fromkeys(
    ("small", "base", "large", "huge"), _SEGMENTATION
)

# Depth: as segmentation, but of metric depths no picture is resized by chance.
_DEPTH = {
    "num_train_epochs": 25,
    "warmup_epochs": 1,
    "per_device_train_batch_size": 16,
    "depth_head": "dpt",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
}
_TINY_DEPTH = {
    name: value for name, value in _TINY_SEGMENTATION.items() if name not in ("scale_jitter", "segmentation_head_size")
} | {"depth_head_size": 64}
DEPTH_PRESETS = dict.fromkeys(("tiny", "mini"), _TINY_DEPTH) | dict.fromkeys(
    ("small", "base", "large", "huge"), _DEPTH
)

# Detection, as ViTDet fine-tunes on COCO: 64 pictures of 1024 pixels a step, for 100 epochs (its warm-up of 250 steps
# is an eighth of one).
_DETECTION = {
    "num_train_epochs": 100,
    "warmup_epochs": 0.13,
    "per_device_train_batch_size": 8,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
}
# Minutes on a CPU, for the embedded scenes.
_TINY_DETECTION = {
    "num_train_epochs": 3,
    "warmup_epochs": 0.5,
    "per_device_train_batch_size": 16,
    "base_learning_rate": 8e-3,
    "layer_decay": 0.75,
    "drop_path_rate": 0.0,
    "scale_jitter": [0.8, 1.25],
    "detection_head_size": 32,
    "detection_anchor_size": 4.0,
    "detection_regions": 64,
    "max_grad_norm": 1.0,
    "logging_steps": 25,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
}
DETECTION_PRESETS = dict.fromkeys(("tiny", "mini"), _TINY_DETECTION) | {
    "small": _DETECTION,
    "base": _DETECTION,
    "large": _DETECTION | {"layer_decay": 0.8, "drop_path_rate": 0.4},
    "huge": _DETECTION | {"layer_decay": 0.9, "drop_path_rate": 0.5},
}


def preset_training(preset: str, model_type: str, scenes: bool = False) -> dict:
    """The flags that a preset sets for a method; `scenes`: for an untrained network on the embedded scenes."""
    of_method = RECORDS[model_type].schedules.get(preset, {}) if model_type in RECORDS else {}
    of_data = _TINY_SCENES if scenes and preset == "tiny" and model_type in _SCENES_METHODS else {}
    return {"tiny": _TINY_TRAINING, "mini": _MINI_TRAINING}.get(preset, _TRAINING) | of_method | of_data
