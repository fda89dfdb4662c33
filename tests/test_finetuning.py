"""Fine-tuning: augmentation, learning rates, losses, accuracies, and the script from first flag to last file."""

import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, pipeline

import hf_mim
from hf_mim.data.arguments import DataArguments
from hf_mim.data.dataset import ImageDataset
from hf_mim.data.finetuning import FineTuningTransform, LabelledDataset, MixingCollator
from hf_mim.data.image_processing import build_image_processor
from hf_mim.evaluation.robustness import match_classes
from hf_mim.jobs import finetuning
from hf_mim.jobs.finetuning import FineTuningArguments, choose_label, main
from hf_mim.registry import METHODS
from hf_mim.training.command import ClassifierArguments, parse_arguments
from hf_mim.training.finetuning_trainer import FineTuningTrainer
from hf_mim.training.layer_decay import layer_decay_groups, parameter_depth
from hf_mim.training.presets import FINE_TUNING_PRESETS
from hf_mim.training.trainable import add_lora, set_trainable
from test_distributed import torchrun
from tiny import scrambled
from tiny_training import REPOSITORY, SIZES, losses, run, tiny_config

SCRIPT = str(REPOSITORY / "examples" / "run_image_classification.py")
NAMES = ["blue", "green", "red"]
# Nothing that takes time, and all of the augmentation.
FLAGS = [
    "--per_device_train_batch_size=4",
    "--logging_steps=1",
    "--disable_tqdm=true",
    "--use_cpu",
    "--dataloader_persistent_workers=false",
    "--max_steps=6",
    "--warmup_epochs=0",
    "--mixup=0.8",
    "--cutmix=1",
    "--random_erasing=0.5",
    "--auto_augment=rand-m9-mstd0.5-inc1",
    "--drop_path_rate=0.3",
    "--eval_strategy=no",
    "--save_strategy=no",
]
VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def write_classes(folder: Path, names=NAMES, number: int = 8) -> Path:
    """Noisy pictures of one colour a class."""
    generator = np.random.default_rng(0)
    for index, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for picture in range(number):
            pixels = generator.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[..., 2 - index % 3] += 120
            Image.fromarray(pixels).save(folder / name / f"{picture}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("data") / "train")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(5)
    scrambled(hf_mim.PiLaMIMForPreTraining(tiny_config())).save_pretrained(folder)
    return folder


def fine_tune(data, out, *flags: str) -> int:
    return main([*FLAGS, f"--train_dir={data}", f"--output_dir={out}", *flags])


def noise_data(number: int = 6, **kwargs) -> LabelledDataset:
    pictures = np.random.default_rng(0).integers(0, 256, (number, 16, 16, 3), dtype=np.uint8)
    settings = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 1.0, "seed": 3} | kwargs
    transform = FineTuningTransform((16, 16), [0.5] * 3, [0.25] * 3, **settings)
    return LabelledDataset(ImageDataset(pictures, 3, source="noise"), np.arange(number) % 3, transform)


class TestAugmentation:
    def test_is_a_function_of_seed_epoch_and_index(self):
        torch.manual_seed(0)
        first = noise_data()[1, 4]
        torch.rand(3), np.random.rand(3), random.random()
        again = noise_data()[1, 4]
        assert torch.equal(first["pixel_values"], again["pixel_values"])
        assert first["mixing_seed"] == again["mixing_seed"] and first["labels"] == 1
        others = (noise_data()[0, 4], noise_data()[1, 3], noise_data(seed=4)[1, 4])
        assert all(not torch.equal(first["pixel_values"], other["pixel_values"]) for other in others)
        assert all(first["mixing_seed"] != other["mixing_seed"] for other in others)
        batches = []
        for _ in range(2):
            np.random.rand(3)
            batches.append(MixingCollator(3, mixup=0.8, cutmix=1.0)([noise_data()[0, index] for index in range(4)]))
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])

    def test_leaves_the_global_generators_alone(self):
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        items = [noise_data()[0, index] for index in range(4)]
        MixingCollator(3, mixup=0.8, cutmix=1.0)(items)
        assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())

    def test_each_part_does_something(self):
        plain = noise_data(auto_augment=None, random_erasing=0.0)
        for settings in ({"random_erasing": 0.0}, {"auto_augment": None}):
            changed = [
                not torch.equal(plain[0, index]["pixel_values"], noise_data(**settings)[0, index]["pixel_values"])
                for index in range(6)
            ]
            assert any(changed)

    def test_grey_and_other_channels(self):
        grey = FineTuningTransform((8, 12), [0.5], [0.25], auto_augment="rand-m9-mstd0.5-inc1", random_erasing=1.0)
        picture = torch.randint(0, 256, (1, 20, 30), dtype=torch.uint8)
        assert all(grey(picture, 0, index)["pixel_values"].shape == (1, 8, 12) for index in range(20))
        with pytest.raises(ValueError, match="not of 5.*--auto_augment none"):
            FineTuningTransform((8, 8), [0.5] * 5, [0.25] * 5, auto_augment="rand-m9")
        with pytest.raises(ValueError, match="--auto_augment random"):
            FineTuningTransform((8, 8), [0.5] * 3, [0.25] * 3, auto_augment="random")

    def test_a_broken_picture_s_stand_in_brings_its_own_label(self, tmp_path):
        paths = []
        for index in range(3):
            paths.append(str(tmp_path / f"{index}.png"))
            Image.fromarray(np.full((16, 16, 3), index, dtype=np.uint8)).save(paths[-1])
        Path(paths[1]).write_bytes(b"broken")
        pictures = ImageDataset(paths, 3, source="files")
        transform = FineTuningTransform((16, 16), [0.0] * 3, [1.0] * 3)
        item = LabelledDataset(pictures, np.array([5, 6, 7]), transform, skip_broken=True)[0, 1]
        assert item["labels"] == 7 and item["pixel_values"].mean().item() == pytest.approx(2 / 255, abs=1e-4)


class TestSoftLabels:
    items = [
        {"pixel_values": torch.full((1, 2, 2), float(value)), "labels": torch.tensor(label), "mixing_seed": 1}
        for value, label in ((1, 0), (5, 2))
    ]

    def test_mixup_by_hand(self, monkeypatch):
        monkeypatch.setattr(np.random, "beta", lambda *alphas: 0.25)
        batch = MixingCollator(4, mixup=0.8, label_smoothing=0.2)(self.items)
        assert batch["pixel_values"].flatten(1).tolist() == [[4.0] * 4, [2.0] * 4]
        # 0.8 and 0.2 / 4 for the label, 0.05 for the others; a quarter of one and three quarters of the other.
        expected = [[0.25, 0.05, 0.65, 0.05], [0.65, 0.05, 0.25, 0.05]]
        torch.testing.assert_close(batch["labels"], torch.tensor(expected))

    def test_cutmix_mixes_labels_by_area(self):
        pictures = [
            {"pixel_values": torch.full((1, 8, 8), float(i)), "labels": torch.tensor(i), "mixing_seed": seed}
            for seed in (3,)
            for i in (0, 1)
        ]
        for seed in range(10):
            items = [item | {"mixing_seed": seed} for item in pictures]
            batch = MixingCollator(2, cutmix=1.0)(items)
            share = batch["pixel_values"].mean(dim=(1, 2, 3))
            torch.testing.assert_close(batch["labels"][:, 1], share)

    def test_smoothing_alone_and_none_in_evaluation(self):
        batch = MixingCollator(4, label_smoothing=0.2)(self.items)
        torch.testing.assert_close(batch["labels"], torch.tensor([[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]]))
        held_out = [{name: item[name] for name in ("pixel_values", "labels")} for item in self.items]
        assert MixingCollator(4, mixup=1.0, label_smoothing=0.2)(held_out)["labels"].tolist() == [0, 2]

    @pytest.mark.parametrize("stock", [False, True])
    def test_loss_by_hand(self, tmp_path, stock):
        trainer = tiny_trainer(tmp_path, stock=stock)
        labels = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.5, 0.5]])
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": labels}
        trainer.model.eval()
        loss = trainer.compute_loss(trainer.model, inputs)
        logits = trainer.model(pixel_values=inputs["pixel_values"]).logits
        expected = -(labels * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()
        torch.testing.assert_close(loss, expected)
        # transformers' own loss would have written "multi_label_classification".
        assert trainer.model.config.problem_type is None


def tiny_trainer(out, *, stock: bool = False, data=None, model=None, **changes) -> FineTuningTrainer:
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    if model is None and stock:
        model = ViTForImageClassification(ViTConfig(**VIT, **labels))
    elif model is None:
        model = hf_mim.PiLaMIMForImageClassification(tiny_config(**labels))
    defaults = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "mixup": 0.0,
        "cutmix": 0.0,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
    }
    args = FineTuningArguments(**(defaults | changes))
    data = data or noise_data(auto_augment=None, random_erasing=0.0)
    collator = MixingCollator(3, label_smoothing=0.1)
    return FineTuningTrainer(model=model, args=args, data_collator=collator, train_dataset=data, eval_dataset=data)


class TestLearningRates:
    @pytest.mark.parametrize(
        ("name", "depth"),
        [
            ("encoder.embeddings.cls_token", 0),
            ("vit.embeddings.patch_embeddings.projection.weight", 0),
            ("encoder.layers.0.mlp.fc1.weight", 1),
            ("vit.layers.11.attention.q_proj.bias", 12),
            ("dinov2.encoder.layer.3.norm1.weight", 4),
            ("encoder.embeddings.cls_adapter.fc1.weight", 13),
            ("encoder.layernorm.weight", 13),
            ("classifier.weight", 13),
        ],
    )
    def test_depth(self, name, depth):
        assert parameter_depth(name, 12) == depth

    @pytest.mark.parametrize("stock", [False, True])
    def test_rates_by_hand(self, tmp_path, stock):
        trainer = tiny_trainer(tmp_path, stock=stock, layer_decay=0.5, learning_rate=0.8, weight_decay=0.3)
        optimizer = trainer.create_optimizer()
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        assert found.keys() == set(names.values())
        part = "vit" if stock else "encoder"
        expected = {
            "classifier.weight": (0.8, 0.3),
            "classifier.bias": (0.8, 0.0),
            f"{part}.layernorm.weight": (0.8, 0.0),
            f"{part}.layers.1.mlp.fc2.weight": (0.4, 0.3),
            f"{part}.layers.0.attention.q_proj.weight": (0.2, 0.3),
            f"{part}.layers.0.layernorm_before.weight": (0.2, 0.0),
            f"{part}.embeddings.cls_token": (0.1, 0.0),
            f"{part}.embeddings.patch_embeddings.projection.weight": (0.1, 0.3),
        }
        assert {name: found[name] for name in expected} == {n: pytest.approx(pair) for n, pair in expected.items()}
        # What is logged is the first group's.
        assert optimizer.param_groups[0]["lr"] == 0.8

    def test_frozen_parameters_are_in_no_group(self):
        model = hf_mim.PiLaMIMForImageClassification(tiny_config())
        set_trainable(model, "head")
        groups = layer_decay_groups(
            model, num_layers=2, learning_rate=1.0, layer_decay=0.5, weight_decay=0.0, decayed=set()
        )
        (group,) = groups
        assert len(group["params"]) == 2 and group["lr"] == 1.0

    @pytest.mark.parametrize("stock", [False, True])
    def test_accumulation_equals_one_batch(self, tmp_path, stock):
        weights = []
        for batch, accumulation in ((4, 1), (2, 2)):
            trainer = tiny_trainer(
                tmp_path,
                stock=stock,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                max_steps=1,
                warmup_steps=0,
            )
            trainer.train()
            weights.append(trainer.model.state_dict())
            losses = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
            weights[-1]["norm"] = torch.tensor(losses)
        torch.testing.assert_close(weights[0]["norm"], weights[1]["norm"], rtol=1e-4, atol=0)

    def test_average_by_hand(self, tmp_path):
        trainer = tiny_trainer(tmp_path, ema_decay=0.75, max_steps=2, warmup_steps=0)
        start = trainer.model.classifier.weight.detach().clone()
        seen = []

        class Record(transformers.TrainerCallback):
            def on_optimizer_step(self, args, state, control, model=None, **kwargs):
                seen.append(model.classifier.weight.detach().clone())

        trainer.add_callback(Record())
        trainer.train()
        expected = 0.75 * (0.75 * start + 0.25 * seen[0]) + 0.25 * seen[1]
        torch.testing.assert_close(trainer.average["classifier.weight"], expected)
        with trainer.averaged_weights():
            torch.testing.assert_close(trainer.model.classifier.weight, expected)
        assert torch.equal(trainer.model.classifier.weight, seen[1])


class Fixed(torch.nn.Module):
    """Logits that are the first pixels of a picture."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(to_json_string=lambda: "{}", num_hidden_layers=1)
        self.main_input_name = "pixel_values"
        self.accepts_loss_kwargs = False

    def forward(self, pixel_values, **kwargs):
        return transformers.modeling_outputs.ImageClassifierOutput(logits=pixel_values[:, 0, 0, :6] + self.weight)


class Given(torch.utils.data.Dataset):
    def __init__(self, logits, labels):
        self.logits, self.labels = torch.tensor(logits), torch.tensor(labels)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, epoch_and_index):
        index = epoch_and_index[1]
        return {"pixel_values": self.logits[index].reshape(1, 1, -1), "labels": self.labels[index]}


class TestAccuracy:
    # Six classes; the likeliest of the four pictures are 0, 1, 2, 5.
    logits = [
        [6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
        [5.0, 6.0, 4.0, 3.0, 2.0, 1.0],
        [1.0, 2.0, 6.0, 5.0, 4.0, 3.0],
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    ]

    def test_of_all_and_of_some_classes_by_hand(self, tmp_path):
        trainer = tiny_trainer(tmp_path, model=Fixed(), per_device_eval_batch_size=3)
        data = Given(self.logits, [0, 5, 3, 3])
        metrics = trainer.evaluate(data)
        # Right is the first picture; the second's class is the least likely of all.
        assert metrics["eval_accuracy"] == 25.0 and metrics["eval_top5_accuracy"] == 75.0
        # Among classes 0, 3, 5 the pictures are 0, 0, 3, 5.
        metrics = trainer.evaluate(data, classes=[0, 3, 5], metric_key_prefix="eval_some")
        assert metrics["eval_some_accuracy"] == 50.0
        assert trainer.evaluate(data)["eval_accuracy"] == 25.0

    def test_match_classes(self):
        labels = ["tench, Tinca tinca", "great white shark, white shark", "cock", "T-shirt"]
        assert match_classes(["cock", "Tinca_tinca", "t shirt"], labels) == [2, 0, 3]
        assert match_classes(["tench, Tinca tinca"], labels) == [0]
        for names, message in (
            (["cock", "hen"], "1 of 2 classes.*hen.*tench"),
            (["cock", "Cock"], "cock, Cock are the same"),
            (["n01440764"], "no labels"),
        ):
            with pytest.raises(ValueError, match=message):
                match_classes(names, labels)
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            match_classes(["crane"], ["crane, bird", "crane, machine"])

    def test_match_word_net_ids(self):
        from timm.data import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        labels = [info.index_to_description(label) for label in range(1000)]
        assert match_classes(["n01440764", "n15075141"], labels) == [0, 999]
        assert match_classes(["n01443537"], info.label_names()) == [1]
        with pytest.raises(ValueError, match="no labels"):
            match_classes(["n01440764"], [f"class {label}" for label in range(1000)])


class TestScript:
    def test_from_first_flag_to_last_file(self, data, pretrained, tmp_path, capsys):
        write_classes(tmp_path / "other", ["Red", "blue"], 3)
        flags = ["--eval_strategy=steps", "--eval_steps=3", f"--robustness_sets=odd={tmp_path / 'other'}"]
        assert fine_tune(data, tmp_path / "out", f"--model_name_or_path={pretrained}", *flags) == 0
        out = capsys.readouterr().out
        assert "PiLaMIMForImageClassification: trains" in out and "3 classes of 'label'" in out and "odd: " in out
        for name in ("results.json", "README.md", "loss_curves.png", "preprocessor_config.json", "model.safetensors"):
            assert (tmp_path / "out" / name).is_file(), name
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["num_train"] == 23 and results["num_test"] == 1 and 0 <= results["accuracy"] <= 100
        assert results["robustness"].keys() == {"odd"}
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        assert model.config.id2label == dict(enumerate(NAMES)) and model.config.pooling == "mean"
        assert model.config.drop_path_rate == 0.3
        predictions = pipeline("image-classification", str(tmp_path / "out"))(str(data / "red" / "0.png"))
        assert {prediction["label"] for prediction in predictions} == set(NAMES)
        card = (tmp_path / "out" / "README.md").read_text()
        assert "image-classification" in card and "| odd |" in card

    @pytest.mark.parametrize("kind", ["ours", "vit", "workers"])
    def test_resuming_equals_not_stopping(self, data, pretrained, tmp_path, kind):
        flags = ["--eval_strategy=no", f"--model_name_or_path={pretrained}"]
        if kind == "vit":
            scrambled(ViTForImageClassification(ViTConfig(**VIT))).save_pretrained(tmp_path / "vit")
            flags[1] = f"--model_name_or_path={tmp_path / 'vit'}"
        flags += ["--ema_decay=0.9"] if kind != "vit" else []
        flags += ["--dataloader_num_workers=2"] if kind == "workers" else []
        saving = ["--save_strategy=steps", "--save_steps=2", "--save_total_limit=9"]
        assert fine_tune(data, tmp_path / "a", *flags, *saving) == 0
        flags = [flag for flag in flags if "workers" not in flag]
        # In the middle of the first epoch of five steps, and at a step of the second.
        checkpoint = tmp_path / "a" / ("checkpoint-2" if kind == "ours" else "checkpoint-4")
        assert fine_tune(data, tmp_path / "b", *flags, f"--resume_from_checkpoint={checkpoint}") == 0
        weights = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
        assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
        assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(losses(tmp_path / "a")) == 6

    @pytest.mark.parametrize("kind", ["pretraining", "encoder", "vit", "vit mean", "vit_mae", "masked_vit"])
    def test_begins_with_the_weights(self, data, tmp_path, monkeypatch, kind):
        torch.manual_seed(7)
        mae = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
        source = {
            "pretraining": lambda: hf_mim.PiLaMIMForPreTraining(tiny_config()),
            "encoder": lambda: hf_mim.PiLaMIMModel(tiny_config()),
            "vit": lambda: transformers.ViTModel(ViTConfig(**VIT)),
            "vit mean": lambda: transformers.ViTModel(ViTConfig(**VIT)),
            "vit_mae": lambda: transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**mae)),
            "masked_vit": lambda: hf_mim.MaskedViTModel(hf_mim.MaskedViTConfig(**VIT)),
        }[kind]()
        source = scrambled(source).eval()
        source.save_pretrained(tmp_path / "source")
        model = begun(data, tmp_path, monkeypatch, *(["--pooling=mean"] if kind == "vit mean" else []))
        wanted = {"pretraining": "PiLaMIM", "encoder": "PiLaMIM", "vit": "ViT"}.get(kind, "MaskedViT")
        assert type(model).__name__ == f"{wanted}ForImageClassification"
        pixel_values = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            vit = hf_mim.to_vit(source) if kind not in ("vit", "vit mean") else source
            expected = vit(pixel_values).last_hidden_state
            actual = model.base_model(pixel_values).last_hidden_state
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
            pooled = expected[:, 0] if kind == "vit" else expected[:, 1:].mean(dim=1)
            torch.testing.assert_close(model(pixel_values).logits, model.classifier(pooled), rtol=0, atol=1e-5)
        assert model.classifier.weight.abs().max() < 1e-4 and not model.classifier.bias.any()
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_normalises_as_the_weights_were_trained(self, data, pretrained, tmp_path):
        shutil.copytree(pretrained, tmp_path / "source")
        build_image_processor((16, 16), 3, [0.1, 0.2, 0.3], [0.5] * 3).save_pretrained(tmp_path / "source")
        flags = [f"--model_name_or_path={tmp_path / 'source'}", "--eval_strategy=no"]
        assert fine_tune(data, tmp_path / "a", *flags) == 0
        assert json.loads((tmp_path / "a" / "preprocessor_config.json").read_text())["image_mean"] == [0.1, 0.2, 0.3]
        given = ["--image_mean", "0", "0", "0", "--image_std", "1", "1", "1"]
        assert fine_tune(data, tmp_path / "b", *flags, *given) == 0
        assert json.loads((tmp_path / "b" / "preprocessor_config.json").read_text())["image_mean"] == [0, 0, 0]

    @pytest.mark.parametrize("labels", [NAMES, ["cat", "dog", "fish"], ["cat", "dog"]])
    def test_head_of_a_classifier(self, data, tmp_path, monkeypatch, labels):
        names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        source = scrambled(hf_mim.PiLaMIMForImageClassification(tiny_config(**names)))
        source.save_pretrained(tmp_path / "source")
        model = begun(data, tmp_path, monkeypatch)
        kept = labels == NAMES
        assert torch.equal(model.encoder.layernorm.weight, source.encoder.layernorm.weight)
        assert model.classifier.weight.shape == (3, 32)
        assert (kept and torch.equal(model.classifier.weight, source.classifier.weight)) or (
            not kept and model.classifier.weight.abs().max() < 1e-4
        )
        assert model.config.id2label == dict(enumerate(NAMES)) and model.config.pooling == "cls"

    @pytest.mark.parametrize("model_type", ["pilamim", "vit_mae", "masked_vit"])
    def test_untrained(self, data, tmp_path, model_type):
        flags = [f"--model_type={model_type}", "--preset=tiny", "--image_size=16", "--max_steps=1"]
        assert fine_tune(data, tmp_path, *flags, "--config_overrides=hidden_size=32,num_hidden_layers=1") == 0
        model = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert model.config.model_type == model_type.replace("vit_mae", "masked_vit")
        assert model.config.hidden_size == 32 and model.config.patch_size == [2, 2]

    def test_stock_vit_is_stock_again(self, data, tmp_path):
        ViTForImageClassification(ViTConfig(**VIT)).save_pretrained(tmp_path / "vit")
        assert fine_tune(data, tmp_path / "out", f"--model_name_or_path={tmp_path / 'vit'}") == 0
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        assert type(model) is ViTForImageClassification and model.config.problem_type is None
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert "vit.encoder.layer.0.attention.attention.query.weight" in weights

    def test_scene_labels(self, tmp_path, pretrained, capsys, monkeypatch):
        monkeypatch.setattr(FineTuningTrainer, "train", interrupted)
        common = [*FLAGS, "--max_train_samples=16", "--max_eval_samples=4", f"--output_dir={tmp_path / 'out'}"]
        common += [f"--model_name_or_path={pretrained}", f"--data_cache_dir={tmp_path / 'cache'}"]
        assert main(common) == 1
        assert "count, distance, shape, color: choose one by --label_column_name" in capsys.readouterr().err
        assert main([*common, "--label_column_name=shape"]) == 130
        assert "classes of 'shape'" in capsys.readouterr().out

    def test_best_model_checkpointing_and_bfloat16(self, data, pretrained, tmp_path):
        ViTForImageClassification(ViTConfig(**VIT)).save_pretrained(tmp_path / "vit")
        flags = ["--load_best_model_at_end", "--metric_for_best_model=accuracy", "--gradient_checkpointing"]
        flags += ["--eval_strategy=steps", "--save_strategy=steps", "--eval_steps=2", "--save_steps=2", "--bf16=true"]
        for source in (pretrained, tmp_path / "vit"):
            out = tmp_path / source.name / "out"
            assert fine_tune(data, out, *flags, f"--model_name_or_path={source}", "--save_total_limit=9") == 0
            state = json.loads((out / "trainer_state.json").read_text())
            best = AutoModelForImageClassification.from_pretrained(state["best_model_checkpoint"]).state_dict()
            saved = AutoModelForImageClassification.from_pretrained(out).state_dict()
            assert all(torch.equal(saved[name], value) for name, value in best.items())

    def test_loss_that_is_not_finite(self, data, pretrained, tmp_path, capsys):
        flags = [
            "--learning_rate=1e30",
            "--save_strategy=steps",
            "--save_steps=1",
            f"--model_name_or_path={pretrained}",
        ]
        assert fine_tune(data, tmp_path, *flags) == 1
        assert "is not finite" in (error := capsys.readouterr().err) and "Traceback" not in error

    @pytest.mark.slow
    def test_two_processes(self, data, pretrained, tmp_path):
        flags = [*FLAGS, f"--train_dir={data}", f"--model_name_or_path={pretrained}", "--bf16=false"]
        flags += ["--mixup=0", "--cutmix=0", "--drop_path_rate=0", "--max_steps=3"]
        one = run([SCRIPT, *flags, f"--output_dir={tmp_path / 'one'}"])
        assert one.returncode == 0, one.stderr
        flags += ["--per_device_train_batch_size=2", f"--output_dir={tmp_path / 'two'}"]
        two = run(torchrun(SCRIPT, *flags))
        assert two.returncode == 0, two.stderr
        for (_, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
            assert a == pytest.approx(b, abs=1e-5)
        results = [json.loads((tmp_path / name / "results.json").read_text())["accuracy"] for name in ("one", "two")]
        assert results[0] == results[1]


def interrupted(trainer, *args, **kwargs):
    raise KeyboardInterrupt


def begun(data, tmp_path, monkeypatch, *flags: str):
    """The model with which the script would begin to train, in eval mode."""
    models = []

    def train(trainer, *args, **kwargs):
        models.append(trainer.model.eval())
        raise KeyboardInterrupt

    monkeypatch.setattr(FineTuningTrainer, "train", train)
    assert fine_tune(data, tmp_path / "out", f"--model_name_or_path={tmp_path / 'source'}", *flags) == 130
    return models[0]


class TestTrainable:
    def test_head_alone(self, data, pretrained, tmp_path, capsys):
        flags = [f"--model_name_or_path={pretrained}", "--trainable=head", "--layer_decay=0.5", "--learning_rate=0.1"]
        assert fine_tune(data, tmp_path, *flags) == 0
        assert "trains 99 of" in capsys.readouterr().out
        before = hf_mim.PiLaMIMModel.from_pretrained(pretrained).state_dict()
        after = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(after[f"encoder.{name}"], value) for name, value in before.items())
        assert after["classifier.weight"].abs().max() > 1e-3

    def test_modes_of_the_model(self):
        class Modes(hf_mim.PiLaMIMForImageClassification):
            def trainable_modes(self):
                return ("norms", "head")

            def set_trainable(self, mode):
                self.requires_grad_(False)
                self.encoder.layernorm.requires_grad_(True)

        model = Modes(tiny_config())
        set_trainable(model, "norms")
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            "encoder.layernorm.weight",
            "encoder.layernorm.bias",
        }
        with pytest.raises(ValueError, match="'adapters'.*all, head, norms"):
            set_trainable(model, "adapters")

    @pytest.mark.parametrize("stock", [False, True])
    def test_lora(self, data, pretrained, tmp_path, stock):
        pytest.importorskip("peft")
        source = pretrained
        if stock:
            source = tmp_path / "vit"
            scrambled(ViTForImageClassification(ViTConfig(**VIT))).save_pretrained(source)
        flags = [f"--model_name_or_path={source}", "--lora_rank=2", "--learning_rate=0.01", "--drop_path_rate=0"]
        saving = ["--save_strategy=steps", "--save_steps=3"]
        assert fine_tune(data, tmp_path / "a", *flags, *saving) == 0
        resume = f"--resume_from_checkpoint={tmp_path / 'a' / 'checkpoint-3'}"
        assert fine_tune(data, tmp_path / "b", *flags, resume) == 0
        weights = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
        assert not any("lora" in name or "base_layer" in name for name in weights[0])
        assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "a").state_dict()
        before = AutoModelForImageClassification.from_pretrained(source, num_labels=3, ignore_mismatched_sizes=True)
        for name, value in before.state_dict().items():
            changed = not torch.equal(model[name], value)
            maps = name.endswith(".weight") and any(part in name for part in ("_proj", ".fc"))
            assert changed == (maps or name.startswith("classifier")), name
            if maps:
                assert torch.linalg.matrix_rank(model[name] - value, rtol=1e-3) <= 2

    def test_lora_beside_a_mode(self):
        pytest.importorskip("peft")
        model = hf_mim.PiLaMIMForImageClassification(tiny_config())
        set_trainable(model, "head")
        model.encoder.layernorm.requires_grad_(True)
        add_lora(model, 2)
        trained = {
            name.split(".")[-3 if "lora" in name else -2] for name, p in model.named_parameters() if p.requires_grad
        }
        assert trained == {"classifier", "layernorm", "lora_A", "lora_B"}


class TestBadInput:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--label_smoothing_factor=1"], "label_smoothing_factor is 1.0; expected a number in \\[0, 1\\)"),
            (["--layer_decay=0"], "layer_decay is 0.0"),
            (["--random_erasing=1.5"], "random_erasing is 1.5"),
            (["--mixup=-1"], "mixup is -1.0"),
            (["--ema_decay=1"], "ema_decay is 1.0"),
            (["--per_device_train_batch_size=3"], "in pairs.*is 3"),
            (["--dataloader_drop_last=false"], "dataloader_drop_last"),
            (["--drop_path_rate=1"], "drop_path_rate is 1.0"),
            (["--pooling=max"], "pooling is 'max'"),
            (["--lora_rank=0"], "lora_rank is 0"),
            (["--lora_rank=2", "--ema_decay=0.9"], "leave one out"),
            (["--trainable=adapters"], "'adapters'.*all, head"),
            (["--label_column_name=count"], "the data has the labels label"),
            (["--robustness_sets=nowhere"], "NAME=FOLDER"),
            (["--robustness_sets=a=/nowhere"], "/nowhere does not exist"),
            (["--auto_augment=random"], "auto_augment random"),
            (["--num_channels=1"], "num_channels: 1 is asked for"),
            (["--config_overrides=hidden_size=8"], "for untrained networks"),
            (["--streaming", "--dataset_name=a", "--train_dir="], "leave --streaming out|streaming"),
            (["--preset=bsae"], "preset is 'bsae'; expected one of tiny, mini, small"),
            (["--robustness_sets", "a=/x", "a=/y"], "a name twice: a=/x a=/y"),
        ],
    )
    def test_is_said_before_training(self, data, pretrained, tmp_path, monkeypatch, capsys, flags, message):
        def train(*args, **kwargs):
            raise AssertionError("training began")

        monkeypatch.setattr(FineTuningTrainer, "train", train)
        assert fine_tune(data, tmp_path / "out", f"--model_name_or_path={pretrained}", *flags) == 1
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert "Traceback" not in error

    def test_robustness_set_of_other_classes(self, data, pretrained, tmp_path, capsys):
        write_classes(tmp_path / "other", ["cat", "red"], 1)
        flags = [f"--model_name_or_path={pretrained}", f"--robustness_sets=a={tmp_path / 'other'}"]
        assert fine_tune(data, tmp_path / "out", *flags) == 1
        assert "1 of 2 classes are no labels of the model: cat" in capsys.readouterr().err

    def test_broken_picture_of_a_robustness_set(self, data, pretrained, tmp_path, capsys):
        other = write_classes(tmp_path / "other", NAMES, 2)
        (other / NAMES[1] / "1.png").write_bytes(b"broken")
        flags = [f"--model_name_or_path={pretrained}", f"--robustness_sets=a={other}", "--eval_strategy=no"]
        assert fine_tune(data, tmp_path / "out", *flags, "--save_strategy=no") == 1
        err = capsys.readouterr().err
        assert str(other / NAMES[1] / "1.png") in err and "--skip_broken_images" in err
        # The classifier is not lost.
        AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        assert fine_tune(data, tmp_path / "again", *flags, "--skip_broken_images") == 0
        assert "a" in json.loads((tmp_path / "again" / "results.json").read_text())["robustness"]

    def test_resuming_with_other_classes(self, data, pretrained, tmp_path, capsys):
        flags = [f"--model_name_or_path={pretrained}", "--eval_strategy=no", "--save_strategy=steps", "--save_steps=3"]
        assert fine_tune(data, tmp_path / "out", *flags) == 0
        others = write_classes(tmp_path / "others", ["cat", "dog", "fish"])
        assert fine_tune(others, tmp_path / "out", *flags) == 1
        err = capsys.readouterr().err
        assert f"classes: {', '.join(NAMES)}, ... there, cat, dog, fish, ... here" in err

    @pytest.mark.parametrize(
        ("train", "validation", "message"),
        [
            ({}, {}, "no labels"),
            ({"label": ["a"]}, {"label": ["a"]}, r"one class \(a\)"),
            ({"label": ["a", "b"]}, {"label": ["a", "c"]}, "a, b, .*a, c"),
            ({"label": ["a", "b"]}, {}, "no labels"),
        ],
    )
    def test_labels(self, train, validation, message):
        def pictures(names):
            labels = {name: [0, len(classes) - 1] for name, classes in names.items()}
            return ImageDataset(np.zeros((2, 4, 4)), 1, source="here", labels=labels, label_names=names)

        with pytest.raises(ValueError, match=message):
            choose_label(SimpleNamespace(train=pictures(train), validation=pictures(validation)), None)

    def test_pictures_without_a_label(self):
        def pictures(numbers):
            names = {"label": ["a", "b"]}
            return ImageDataset(np.zeros((3, 4, 4)), 1, source="here", labels={"label": numbers}, label_names=names)

        splits = SimpleNamespace(train=pictures([0, 1, 1]), validation=pictures([-1, 0, -1]))
        with pytest.raises(ValueError, match="2 of 3 pictures of here have no class of 'label'"):
            choose_label(splits, None)

    def test_flat_folder_has_no_labels(self, pretrained, tmp_path, capsys):
        (tmp_path / "flat").mkdir()
        for index in range(4):
            Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(tmp_path / "flat" / f"{index}.png")
        assert fine_tune(tmp_path / "flat", tmp_path / "out", f"--model_name_or_path={pretrained}") == 1
        assert "has no labels to learn" in capsys.readouterr().err

    def test_float_pictures_go_without_rand_augment(self, pretrained, tmp_path, capsys, monkeypatch):
        for name in NAMES:
            (tmp_path / "data" / name).mkdir(parents=True)
            for index in range(4):
                np.save(tmp_path / "data" / name / f"{index}.npy", np.random.rand(16, 16, 3).astype(np.float32))
        monkeypatch.setattr(FineTuningTrainer, "train", interrupted)
        assert fine_tune(tmp_path / "data", tmp_path / "out", f"--model_name_or_path={pretrained}") == 130
        assert "RandAugment is left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "examples" / "recipes").glob("finetune_*")), ids=lambda path: path.stem
)
def test_recipes_can_be_read(path, tmp_path):
    classes = (ClassifierArguments, DataArguments, FineTuningArguments)
    model, _, args = parse_arguments(
        classes, [str(path), f"--output_dir={tmp_path}", "--use_cpu"], FINE_TUNING_PRESETS
    )
    assert model.preset == "base" and args.warmup_epochs in (5, 20) and args.mixup == 0.8
    if model.model_type in METHODS:
        assert finetuning.build_classifier_config(model, (224, 224), 3).drop_path_rate == 0.1


class TestModesOfTEC:
    @pytest.fixture(scope="class")
    def tec(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("tec")
        sizes = {name: getattr(tiny_config(), name) for name in ("image_size", "patch_size", "hidden_size")}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "decoder_num_attention_heads": 2}
        config = hf_mim.TECConfig(**sizes, **heads, decoder_hidden_size=16, adapter_group_size=1)
        torch.manual_seed(5)
        scrambled(hf_mim.TECForPreTraining(config)).save_pretrained(folder)
        return folder

    @pytest.mark.parametrize(
        ("mode", "trained"),
        [
            ("linear", ("classifier.",)),
            ("input_adapter", ("classifier.", "encoder.embeddings.cls_adapter.")),
            ("encoder_adapters", ("classifier.", "encoder.embeddings.cls_adapter.", "encoder_adapter.")),
        ],
    )
    def test_what_is_trained(self, data, tec, tmp_path, capsys, mode, trained):
        assert fine_tune(data, tmp_path, f"--model_name_or_path={tec}", f"--trainable={mode}") == 0
        model = hf_mim.TECForImageClassification.from_pretrained(tmp_path)
        assert f"trains {model.trained_parameters()['total']:,} of" in capsys.readouterr().out
        assert model.config.tuning_mode == mode
        before, after = load_file(tec / "model.safetensors"), load_file(tmp_path / "model.safetensors")
        for name, value in after.items():
            if name.startswith(trained):
                assert name.startswith("classifier.") or not torch.equal(value, before[name]), name
            else:
                assert torch.equal(value, before[name]), name

    def test_unknown_mode_and_lost_adapters(self, data, tec, tmp_path, capsys):
        assert fine_tune(data, tmp_path, f"--model_name_or_path={tec}", "--trainable=adapters") == 1
        assert "input_adapter" in capsys.readouterr().err
        hf_mim.TECModel.from_pretrained(tec).save_pretrained(tmp_path / "encoder")
        flags = [f"--model_name_or_path={tmp_path / 'encoder'}", "--trainable=encoder_adapters"]
        assert fine_tune(data, tmp_path / "out", *flags) == 1
        assert "no encoder adapters to tune" in capsys.readouterr().err


def test_several_labels_a_picture(pretrained, tmp_path, capsys):
    """From a column of lists to mean average precision, a card and a pipeline."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), np.uint8)
    images = [Image.fromarray(picture) for picture in pixels]
    tags = [[["a"], ["a", "b"], [], ["b", "c"]][index % 4] for index in range(24)]
    features = datasets.Features({"image": datasets.Image(), "tags": datasets.List(datasets.Value("string"))})
    table = datasets.Dataset.from_dict({"image": images, "tags": tags}, features=features)
    table.save_to_disk(tmp_path / "data")
    flags = [flag for flag in FLAGS if not flag.startswith("--max_steps")]
    flags += [f"--dataset_name={tmp_path / 'data'}", "--label_column_name=tags", f"--model_name_or_path={pretrained}"]
    assert main([*flags, f"--output_dir={tmp_path / 'out'}", "--max_steps=3", "--validation_fraction=0.25"]) == 0
    out = capsys.readouterr().out
    assert "several a picture" in out and "mixup, cutmix and label smoothing are left out" in out
    assert "Mean average precision: " in out and "F1: " in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 <= results["mean_average_precision"] <= 100 and "accuracy" not in results
    assert "Mean average precision in %" in (tmp_path / "out" / "README.md").read_text()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.problem_type == "multi_label_classification"
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    answers = pipeline("image-classification", model=str(tmp_path / "out"))(images[0])
    # The sigmoid of each, not shares of one.
    assert sum(answer["score"] for answer in answers) != pytest.approx(1.0, abs=1e-3)
