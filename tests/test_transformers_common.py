"""
transformers' own common tests of models, on every class of ours.

They come with transformers' source alone: HF_MIM_TRANSFORMERS_SOURCE names its folder, a clone or what
`pip download transformers==5.24.0 --no-deps --no-binary :all:` fetched, unpacked. CI does this.

What is left out is what transformers' tests of ViT and ViTMAE leave out, and no more: `inputs_embeds`, which no
picture has, and the kind of the input embeddings, an nn.Embedding where there are words. What is random in ViTMAE's
tests is not here: the noise that hides patches is given. Besides: a loss that compares the pictures of a batch cannot
be had of one picture, and an averaged copy of an encoder is of its class, and no base model.
"""

import copy
import importlib
import os
import sys
import tempfile
import types
import unittest
from pathlib import Path

import pytest
import torch
from transformers.models.auto import modeling_auto

from hf_mim.models.vit.pretraining import MaskedViTForPreTraining
from hf_mim.registry import BASELINES, ENCODER, METHODS, method_class

pytestmark = pytest.mark.slow

SOURCE = os.environ.get("HF_MIM_TRANSFORMERS_SOURCE")
SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
# Of a method's classes those that do not pretrain.
USED = ("Model", "ForImageClassification", "ForSemanticSegmentation", "ForDepthEstimation", "Backbone")
DECODER = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
PREDICTOR = {"predictor_hidden_size": 32, "predictor_num_hidden_layers": 2}
FIELDS = {
    "pilamim": DECODER,
    "ocl": {},
    "tec": DECODER | {"adapter_group_size": 1},
    "dbot": DECODER,
    "ijepa": PREDICTOR,
    "vit_mae": DECODER,
    "masked_vit": {},
}


def common_tests():
    """`tests/test_modeling_common.py` of the source, without what it imports from models' own folders."""
    package = types.ModuleType("transformers_common_tests")
    package.__path__ = [str(Path(SOURCE) / "tests")]
    sys.modules[package.__name__] = package
    # Of exporting and generating text: a source archive has not got them, and no model here generates.
    for folder, module, name in (
        ("exporters", "test_export", "ExportTesterMixin"),
        ("generation", "test_utils", "GenerationTesterMixin"),
    ):
        stand_in = types.ModuleType(f"{package.__name__}.{folder}.{module}")
        setattr(stand_in, name, type(name, (), {}))
        sys.modules[stand_in.__name__.rpartition(".")[0]] = types.ModuleType(f"{package.__name__}.{folder}")
        sys.modules[stand_in.__name__] = stand_in
    # By these lists the tests know what gives a loss, and of which labels: ours would stand there.
    for suffix, names in (
        ("Model", modeling_auto.MODEL_MAPPING_NAMES),
        ("ForPreTraining", modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES),
        ("ForImageClassification", modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        ("ForSemanticSegmentation", modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES),
        ("ForDepthEstimation", modeling_auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES),
        ("Backbone", modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES),
    ):
        names |= {model_type: prefix + suffix for model_type, prefix in (METHODS | ENCODER).items()}
    common = importlib.import_module(f"{package.__name__}.test_modeling_common")
    common._config_zero_init = without_spread
    return common


def without_spread(config):
    """With initial weights that hardly differ. The original takes each `..._std` for theirs, that of pixels too."""
    config = copy.deepcopy(config)
    config.initializer_range = 1e-10
    return config


class ModelTester:
    """A small config of a method and a batch, as transformers' `XModelTester`."""

    batch_size = 13
    is_training = True
    num_labels = 3

    def __init__(self, model_type: str, suffixes: tuple[str, ...]):
        self.model_type = model_type
        vars(self).update(SIZES)
        config = self.get_config()
        # Where there is noise the encoder sees what is kept, OCL's half of it at a time.
        self.has_noise = suffixes == ("ForPreTraining",) or model_type == "vit_mae"
        length = config.num_patches
        if self.has_noise:
            length = config.num_keep // (2 if model_type == "ocl" else 1)
        self.seq_length = int(getattr(config, "use_cls_token", True)) + length

    def get_config(self):
        fields = SIZES | FIELDS[self.model_type]
        return method_class(self.model_type, "Config")(**fields, num_labels=self.num_labels)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        generator = torch.Generator().manual_seed(0)
        inputs = {"pixel_values": torch.rand(self.batch_size, 3, 32, 32, generator=generator)}
        if self.has_noise:
            inputs["noise"] = torch.rand(self.batch_size, config.num_patches, generator=generator)
        return config, inputs


def make_tests(mixin, model_type: str, name: str, suffixes: tuple[str, ...]) -> type:
    """A class of tests as transformers' `XModelTest`."""

    class Tests(mixin, unittest.TestCase):
        all_model_classes = tuple(method_class(model_type, suffix) for suffix in suffixes)
        test_resize_embeddings = False
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self):
            self.model_tester = ModelTester(model_type, suffixes)

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
            if return_labels and model_class.__name__.endswith("ForDepthEstimation"):
                # The original knows of no labels of these: transformers' own are not trained.
                inputs["labels"] = torch.ones(self.model_tester.batch_size, 32, 32)
            return inputs

        @unittest.skip("Pictures have no inputs_embeds, as transformers' ViT says.")
        def test_inputs_embeds(self):
            pass

        def test_model_get_set_embeddings(self):
            config, _ = self.model_tester.prepare_config_and_inputs_for_common()
            for model_class in self.all_model_classes:
                model = model_class(config)
                self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
                outputs = model.get_output_embeddings()
                self.assertTrue(outputs is None or isinstance(outputs, torch.nn.Linear))

        def test_batching_equivalence(self):
            if any(getattr(model_class, "pairwise_loss", False) for model_class in self.all_model_classes):
                self.skipTest("The loss compares the pictures of a batch.")
            super().test_batching_equivalence()

        def test_reverse_loading_mapping(self):
            if any(issubclass(model_class, MaskedViTForPreTraining) for model_class in self.all_model_classes):
                self.skipTest("What pretrains is saved under the names of its modules, from which training resumes.")
            super().test_reverse_loading_mapping()

        def test_base_model_prefix_loads_base_weights(self):
            config, _ = self.model_tester.prepare_config_and_inputs_for_common()
            for model_class in self.all_model_classes:
                model = model_class(config)
                prefix = model.base_model_prefix
                if model.base_model is model:
                    self.assertFalse(hasattr(model, prefix))
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    model.base_model.save_pretrained(folder)
                    _, info = model_class.from_pretrained(folder, output_loading_info=True)
                of_base = {key for key in model.state_dict() if key.startswith(f"{prefix}.")}
                self.assertTrue(of_base and of_base.isdisjoint(info["missing_keys"]))

    Tests.__name__ = Tests.__qualname__ = name
    return Tests


if SOURCE:
    _mixin = common_tests().ModelTesterMixin
    for _model_type, _prefix in (METHODS | BASELINES | ENCODER).items():
        _suffixes = ("Model",) if _model_type in BASELINES else USED
        globals()[f"Test{_prefix}"] = make_tests(_mixin, _model_type, f"Test{_prefix}", _suffixes)
        if _model_type not in ENCODER:
            _name = f"Test{_prefix}ForPreTraining"
            globals()[_name] = make_tests(_mixin, _model_type, _name, ("ForPreTraining",))
    del _mixin
else:

    @pytest.mark.skip(reason="HF_MIM_TRANSFORMERS_SOURCE names no folder of transformers' source")
    def test_common():
        pass
