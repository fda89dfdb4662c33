"""From Python, as users of transformers write it: any data into `MIMTrainer`, and our models in the plain Trainer."""

import ast
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining, Trainer, TrainingArguments

import hf_mim
from hf_mim.data.plain import open_images
from hf_mim.registry import METHODS, MODEL_TYPES, method_class
from tiny import TINY, tiny_batch, tiny_model
from tiny_training import FORCED_BF16, SIZES, losses, pictures, tiny_arguments, tiny_config, write_pictures

NUMBER = 20


def pil_images() -> list:
    return [Image.fromarray(picture) for picture in pictures(NUMBER)]


class Pairs(torch.utils.data.Dataset):
    """As torchvision's data sets: (image, label)."""

    def __len__(self):
        return NUMBER

    def __getitem__(self, index):
        return pil_images()[index], index % 3


def as_folder(tmp_path):
    for index, picture in enumerate(pil_images()):
        picture.save(tmp_path / f"{index:02d}.png")
    return tmp_path


def as_table(tmp_path):
    features = datasets.Features({"label": datasets.ClassLabel(num_classes=3), "scan": datasets.Image()})
    return datasets.Dataset.from_dict({"scan": pil_images(), "label": [0, 1] * 10}, features=features)


KINDS = {
    "folder": as_folder,
    "paths": lambda tmp_path: sorted(as_folder(tmp_path).iterdir()),
    "PIL images": lambda tmp_path: pil_images(),
    "array": lambda tmp_path: pictures(NUMBER),
    "arrays": lambda tmp_path: list(pictures(NUMBER)),
    "tensors": lambda tmp_path: [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures(NUMBER)],
    "pairs": lambda tmp_path: Pairs(),
    "dicts": lambda tmp_path: [{"label": 1, "image": image} for image in pil_images()],
    "table": as_table,
}


def trainer(tmp_path, data, **kwargs) -> "hf_mim.MIMTrainer":
    torch.manual_seed(0)
    changes = {"max_steps": 3, **kwargs.pop("changes", {})}
    model = hf_mim.PiLaMIMForPreTraining(tiny_config())
    return hf_mim.MIMTrainer(model, tiny_arguments(tmp_path, **changes), train_dataset=data, **kwargs)


@pytest.fixture(scope="module")
def of_array(tmp_path_factory):
    out = tmp_path_factory.mktemp("array")
    job = trainer(out, pictures(NUMBER))
    job.train()
    job.save_state()
    return losses(out)


class TestAnyData:
    @pytest.mark.parametrize("kind", KINDS)
    def test_same_images_give_the_same_run(self, kind, tmp_path, of_array):
        (tmp_path / "data").mkdir()
        job = trainer(tmp_path / "out", KINDS[kind](tmp_path / "data"))
        job.train()
        job.save_state()
        assert losses(tmp_path / "out") == of_array

    def test_model_and_image_processor_are_saved_and_held_out_loss_is_there(self, tmp_path):
        job = trainer(tmp_path, Pairs(), eval_dataset=pil_images()[:5])
        job.train()
        found = job.evaluate()
        assert found["eval_loss"] == pytest.approx(sum(v for k, v in found.items() if k.startswith("eval_loss_")))
        assert found["eval_loss"] == pytest.approx(job.evaluate(pictures(5))["eval_loss"])
        job.save_model()
        processor, model = AutoImageProcessor.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
        batch = processor(pil_images()[0], return_tensors="pt")
        assert model(**batch).pooler_output.shape == (1, 32)

    def test_a_stream(self, tmp_path):
        job = trainer(
            tmp_path, as_table(tmp_path).to_iterable_dataset(), eval_dataset={"a": pictures(4), "b": Pairs()}
        )
        job.train()
        assert job.state.global_step == 3
        assert {"eval_a_loss", "eval_b_loss"} <= job.evaluate().keys()

    def test_other_channels_get_a_computed_normalisation(self, tmp_path):
        data = np.random.default_rng(0).random((NUMBER, 16, 16, 5), dtype=np.float32)
        model = hf_mim.OCLForPreTraining(hf_mim.OCLConfig(**_encoder_sizes(), num_channels=5))
        job = hf_mim.MIMTrainer(model, tiny_arguments(tmp_path, max_steps=2), train_dataset=data)
        job.train()
        assert job.processing_class.image_mean == pytest.approx(data.mean(axis=(0, 1, 2)).tolist(), rel=1e-4)

    def test_images_that_the_user_transformed_are_left_as_they_are(self, tmp_path):
        table = as_table(tmp_path).with_transform(
            lambda rows: {"pixel_values": [torch.full((3, 16, 16), 0.5) for _ in rows["scan"]]}
        )
        job = trainer(tmp_path, table)
        first, again, later = (job.train_dataset[key] for key in ((0, 3), (0, 3), (1, 3)))
        assert (first["pixel_values"] == 0.5).all()
        assert torch.equal(first["noise"], again["noise"]) and not torch.equal(first["noise"], later["noise"])
        job.train()

    def test_resuming_equals_not_stopping_to_the_bit(self, tmp_path):
        settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
        table = as_table(tmp_path)
        whole = trainer(tmp_path / "run", table, changes=settings)
        whole.train()
        resumed = trainer(tmp_path / "run", table, changes=settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
        for name, weight in whole.model.state_dict().items():
            assert torch.equal(weight, resumed.model.state_dict()[name]), name

    def test_a_base_sees_the_images_as_it_was_trained(self, tmp_path):
        base = tiny_model("pilamim", "Model", **_encoder_sizes(), num_channels=3)
        config = hf_mim.TECConfig(
            **_encoder_sizes(), adapter_group_size=2, decoder_hidden_size=16, decoder_num_attention_heads=2
        )
        config.attention_top_k = 4
        config.base_image_mean, config.base_image_std = [0.5] * 3, [0.5] * 3
        model = hf_mim.TECForPreTraining.from_base(base, config)
        assert not model.base.pixels.known
        hf_mim.MIMTrainer(model, tiny_arguments(tmp_path), train_dataset=pictures(NUMBER))
        assert model.base.pixels.known and model.config.image_mean == pytest.approx([0.485, 0.456, 0.406])

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([], "is empty"),
            ([3, 4], "Items are of type int; expected an image"),
            ([(1, 2)], "tuples of int, int; expected an image"),
            ([{"label": 1}], r"hold no image .* label \(int\)"),
            ([{"a": np.zeros((4, 4)), "b": np.zeros((4, 4))}], r"several values .* a \(ndarray\), b \(ndarray\)"),
            (iter([1]), "no length or no items"),
            ("nowhere", "does not exist"),
        ],
    )
    def test_what_holds_no_images(self, data, message):
        with pytest.raises(ValueError, match=message):
            open_images(data, 3)

    def test_channels_of_the_model(self, tmp_path):
        with pytest.raises(ValueError, match="channels"):
            trainer(tmp_path, np.zeros((NUMBER, 16, 16, 5), dtype=np.uint8))

    def test_chosen_key(self):
        images = open_images([{"a": np.zeros((4, 4)), "b": np.ones((4, 4))}], 1, image_column="b")
        assert (images[0] == 1).all()
        with pytest.raises(ValueError, match="image_column is 'c'"):
            open_images([{"a": np.zeros((4, 4))}], 1, image_column="c")


def _encoder_sizes() -> dict:
    return {name: value for name, value in SIZES.items() if not name.startswith("decoder")}


class TestEveryMethod:
    """What a user of `MIMTrainer` may count on, whatever the method."""

    @pytest.mark.parametrize("method", TINY)
    def test_trains_logs_saves_and_loads(self, method, tmp_path):
        model = tiny_model(method, "ForPreTraining", scramble=False)
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        data = np.random.default_rng(0).random((10, *model.config.image_size, 5), dtype=np.float32)
        job = hf_mim.MIMTrainer(
            model, tiny_arguments(tmp_path, max_steps=3), train_dataset=data[:8], eval_dataset=data[8:]
        )
        job.train()

        history = [log for log in job.state.log_history if "loss" in log]
        assert [log["step"] for log in history] == [1, 2, 3]
        for log in history:
            parts = {name: value for name, value in log.items() if name.startswith("loss_")}
            assert parts and all(map(np.isfinite, parts.values()))
            assert log["loss"] == pytest.approx(sum(parts.values()), rel=1e-4)
        moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        averaged = {name for name in before if name.startswith("target_encoder.")}
        # Softmax cancels a bias of the keys.
        assert {name for name in trained | averaged if "k_proj.bias" not in name} <= moved <= trained | averaged

        found = job.evaluate()
        job.save_model()
        # What a baseline saves is transformers' own by the Auto classes.
        stock = method not in METHODS
        loaded = (type(model) if stock else AutoModelForPreTraining).from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name
        processor = AutoImageProcessor.from_pretrained(tmp_path)
        encoder = (method_class(method, "Model") if stock else AutoModel).from_pretrained(tmp_path)
        assert all(torch.equal(encoder.state_dict()[k], weight) for k, weight in model.encoder.state_dict().items())
        assert encoder(**processor(data[0], return_tensors="pt")).pooler_output.shape == (1, 32)
        assert processor.image_mean == pytest.approx(data[:8].mean(axis=(0, 1, 2)).tolist(), rel=1e-4)
        again = hf_mim.MIMTrainer(
            loaded, tiny_arguments(tmp_path), eval_dataset=data[8:], processing_class=processor
        ).evaluate()
        assert np.isfinite(found["eval_loss"]) and again["eval_loss"] == pytest.approx(found["eval_loss"], abs=1e-6)


class PixelValues(torch.utils.data.Dataset):
    """What examples of transformers make: items with `pixel_values` alone."""

    def __init__(self, config, number=8):
        self.pixel_values = tiny_batch(config, batch_size=number)["pixel_values"]

    def __len__(self):
        return len(self.pixel_values)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index]}


class TestPlainTrainer:
    def train(self, model, tmp_path, callbacks, steps=3):
        settings = {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
        args = TrainingArguments(str(tmp_path), **settings, use_cpu=True, save_strategy="no", disable_tqdm=True)
        data = PixelValues(model.config)
        job = Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks)
        job.train()
        return job

    @pytest.mark.parametrize("method", TINY)
    def test_trains_and_has_a_held_out_loss(self, method, tmp_path, caplog):
        model = tiny_model(method, "ForPreTraining", scramble=False)
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        with caplog.at_level(logging.WARNING, "hf_mim"):
            job = self.train(model, tmp_path, [hf_mim.MIMCallback()])
        assert np.isfinite(job.evaluate()["eval_loss"])
        assert "after_optimizer_step was not called" not in caplog.text
        moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
        assert any(name.startswith(f"{model.base_model_prefix}.") for name in moved)
        assert any(name.startswith("target_encoder.") for name in moved) == (method in ("pilamim", "ijepa"))

    def test_temperature_is_kept_within_its_limit(self, tmp_path):
        model = tiny_model("ocl", "ForPreTraining")
        model.temperature.log_temperature.data.fill_(-9.0)
        self.train(model, tmp_path, [hf_mim.MIMCallback()], steps=1)
        assert model.temperature.log_temperature.item() == pytest.approx(np.log(0.01))

    def test_without_the_callback_it_is_said_once(self, tmp_path, caplog):
        model = tiny_model("pilamim", "ForPreTraining", scramble=False)
        self.train(model, tmp_path, [], steps=4)
        assert caplog.text.count("callbacks=[hf_mim.MIMCallback()]") == 1

    def test_methods_that_need_nothing_warn_of_nothing(self, tmp_path, caplog):
        self.train(tiny_model("dbot", "ForPreTraining"), tmp_path, [])
        assert "MIMCallback" not in caplog.text

    def test_a_target_is_moved_once_a_step_whoever_gives_the_callback(self, tmp_path):
        runs = [trainer(tmp_path, pictures(NUMBER), callbacks=c) for c in (None, [hf_mim.MIMCallback()])]
        for run in runs:
            run.train()
        first, second = (run.model.target_encoder.state_dict() for run in runs)
        assert all(torch.equal(weight, second[name]) for name, weight in first.items())


class TestNames:
    def test_type_checkers_see_what_is_public(self):
        tree = ast.parse(Path(hf_mim.__file__).read_text())
        (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        seen = {}
        for statement in block.body:
            for alias in statement.names:
                seen[alias.asname] = statement.module
        assert sorted(seen) == sorted(hf_mim.__all__)
        for name, module in seen.items():
            assert getattr(hf_mim, name).__module__ == f"hf_mim.{module}"
        assert (Path(hf_mim.__file__).parent / "py.typed").is_file()

    def test_all_names_are_there(self):
        assert {"MIMTrainer", "MIMTrainingArguments", "FineTuningTrainer", "FineTuningArguments"} <= set(
            hf_mim.__all__
        )
        for name in hf_mim.__all__:
            assert getattr(hf_mim, name) is not None
        with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
            hf_mim.Nothing  # noqa: B018

    @pytest.mark.parametrize("method", MODEL_TYPES)
    def test_configs_from_presets(self, method):
        config = method_class(method, "Config").from_preset("tiny", image_size=32, num_channels=1)
        assert (config.hidden_size, config.num_hidden_layers, config.num_channels) == (128, 4, 1)
        assert config.grid_size == (8, 8)
        mini = method_class(method, "Config").from_preset("mini", image_size=48)
        assert mini.hidden_size == 192 and mini.grid_size == (12, 12)
        other = method_class(method, "Config").from_preset("small", image_size=(64, 64), patch_size=8, hidden_size=96)
        assert other.hidden_size == 96 and other.grid_size == (8, 8)
        with pytest.raises(ValueError, match="preset is 'medium'"):
            method_class(method, "Config").from_preset("medium")


def test_a_few_lines_are_enough(tmp_path):
    """As README prints them."""
    bf16 = {} if FORCED_BF16 is None else {"bf16": FORCED_BF16}
    folder = write_pictures(tmp_path / "pictures", NUMBER)
    model = hf_mim.PiLaMIMForPreTraining(hf_mim.PiLaMIMConfig.from_preset("tiny", image_size=16))
    args = hf_mim.MIMTrainingArguments(
        str(tmp_path / "mine"), per_device_train_batch_size=4, max_steps=2, use_cpu=True, disable_tqdm=True, **bf16
    )
    hf_mim.MIMTrainer(model=model, args=args, train_dataset=folder).train()
    assert load_file(tmp_path / "mine" / "checkpoint-2" / "model.safetensors")


def test_a_data_set_that_draws_by_chance_is_the_same_run():
    class Noise(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return torch.rand(3, 16, 16)

    assert len({open_images(Noise(), 3).content_fingerprint() for _ in range(3)}) == 1
    lists = [[np.full((4, 4, 3), value, dtype=np.uint8)] * 3 for value in (0, 0, 1)]
    first, same, other = (open_images(images, 3).content_fingerprint() for images in lists)
    assert first == same != other
