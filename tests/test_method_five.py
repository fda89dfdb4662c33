"""What a further method touches: its own folder with a record, and one line that makes it known."""

import dataclasses
import json

import pytest

from hf_mim.models.method import Method
from hf_mim.registry import METHODS, RECORDS, add_method
from tiny_training import FLAGS, write_pictures

RECORD = """
from hf_mim.models.method import Method

METHOD = Method(
    model_type="toy", prefix="Toy", name="TOY", paper="Nobody, *A Toy*, 2026", citation="@misc{toy}", package="toys",
    presets={"tiny": {"mask_ratio": 0.5}}, schedules={"tiny": {"base_learning_rate": 0.03}}, frozen=None,
)
"""
CONFIGURATION = """
from huggingface_hub.dataclasses import strict
from hf_mim.models.vit.configuration_vit import MaskedAutoencoderConfig

@strict
class ToyConfig(MaskedAutoencoderConfig):
    model_type = "toy"
"""
MODELING = """
from dataclasses import dataclass
import torch
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from hf_mim.models.vit.modeling_vit import (
    MaskedViTBackbone, MaskedViTForDepthEstimation, MaskedViTForImageClassification, MaskedViTForObjectDetection,
    MaskedViTForSemanticSegmentation, MaskedViTModel, with_encoder,
)
from hf_mim.models.vit.pretraining import MaskedViTForPreTraining
from toys.toy.configuration_toy import ToyConfig

@dataclass
class ToyOutput(ModelOutput):
    loss: torch.Tensor | None = None
    loss_toy: torch.Tensor | None = None

class ToyModel(MaskedViTModel):
    config: ToyConfig

class ToyForPreTraining(MaskedViTForPreTraining):
    config: ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder = ToyModel(config)
        self.post_init()
        self.freeze()

    @can_return_tuple
    def forward(self, pixel_values, noise=None, return_loss=True, **kwargs):
        loss = self.encoder(pixel_values, **kwargs).last_hidden_state.square().mean()
        return ToyOutput(loss=loss, loss_toy=loss)

class ToyForImageClassification(MaskedViTForImageClassification):
    config: ToyConfig
    encoder_class = ToyModel

ToyForDepthEstimation = with_encoder(MaskedViTForDepthEstimation, ToyModel)
ToyForObjectDetection = with_encoder(MaskedViTForObjectDetection, ToyModel)
ToyForSemanticSegmentation = with_encoder(MaskedViTForSemanticSegmentation, ToyModel)

class ToyBackbone(MaskedViTBackbone):
    config: ToyConfig
    encoder_class = ToyModel
"""
RUN = """
import sys
from hf_mim import registry
from toys.toy.method import METHOD

registry.add_method(METHOD)
registry.register_auto_classes()
from transformers import AutoModel
from hf_mim.jobs import finetuning, pretraining

*flags, data, out, classifier = sys.argv[1:]
assert pretraining.main(["--model_type=toy", *flags, f"--train_dir={data}", f"--output_dir={out}"]) == 0
assert type(AutoModel.from_pretrained(out)).__name__ == "ToyModel"
assert type(AutoModel.from_pretrained(out)).__module__ == "toys.toy.modeling_toy"
"""


def test_a_toy_method_trains_is_told_and_loads(tmp_path, processes):
    folder = tmp_path / "toys" / "toy"
    folder.mkdir(parents=True)
    for name, text in (("method", RECORD), ("configuration_toy", CONFIGURATION), ("modeling_toy", MODELING)):
        (folder / f"{name}.py").write_text(text)
    (tmp_path / "run.py").write_text(RUN)
    data = write_pictures(tmp_path / "data", 12)
    flags = [*FLAGS, "--max_steps=2", "--save_strategy=no", "--references=false"]
    result = processes([str(tmp_path / "run.py"), *flags, str(data), str(tmp_path / "out"), str(tmp_path / "c")])
    assert result.returncode == 0, result.stderr
    assert "TOY: " in result.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nobody, *A Toy*, 2026" in card and "```bibtex\n@misc{toy}\n```" in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "toy" and config["mask_ratio"] == 0.5


def test_a_forgotten_field_fails_at_once():
    fields = {field.name: getattr(RECORDS["tec"], field.name) for field in dataclasses.fields(Method)}
    for name in ("paper", "citation", "presets", "schedules", "frozen", "name", "prefix"):
        with pytest.raises(TypeError, match=name):
            Method(**{key: value for key, value in fields.items() if key != name})
    with pytest.raises(ValueError, match="has no paper"):
        Method(**fields | {"paper": ""})
    with pytest.raises(ValueError, match="presets medium"):
        Method(**fields | {"presets": {"medium": {}}})


def test_one_model_type_one_method():
    before = dict(METHODS)
    with pytest.raises(ValueError, match="'tec' already"):
        add_method(RECORDS["tec"])
    assert before == METHODS
