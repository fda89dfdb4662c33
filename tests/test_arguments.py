"""Flags, presets and recipes; defaults of training; and which errors are said without a stack."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import ViTConfig, ViTModel

from hf_mim.data.arguments import DataArguments
from hf_mim.data.images import BrokenImageError
from hf_mim.models.pilamim.modeling_pilamim import PiLaMIMModel
from hf_mim.models.presets import PRESETS, preset_config
from hf_mim.registry import METHODS
from hf_mim.training.arguments import MIMTrainingArguments
from hf_mim.training.building import build_config, describe_frozen
from hf_mim.training.command import ModelArguments, parse_arguments
from hf_mim.training.config_overrides import parse_overrides
from hf_mim.training.errors import plain_message
from hf_mim.training.losses import NonFiniteLossError
from hf_mim.training.presets import preset_training
from tiny_training import REPOSITORY, tiny_arguments, tiny_config, tiny_trainer

CLASSES = (ModelArguments, DataArguments, MIMTrainingArguments)


def parse(*argv: str, tmp_path="/tmp/unused"):
    return parse_arguments(CLASSES, [*argv, f"--output_dir={tmp_path}"])


def recipe(folder, text, suffix="yaml") -> str:
    path = folder / f"recipe.{suffix}"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return str(path)


class TestDefaults:
    def test_fit_masked_image_modelling(self, tmp_path):
        args = MIMTrainingArguments(output_dir=str(tmp_path))
        wanted = {
            "max_grad_norm": 0.0,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "weight_decay": 0.05,
            "lr_scheduler_type": "cosine",
            "dataloader_drop_last": True,
            "remove_unused_columns": False,
            "ddp_find_unused_parameters": False,
            "logging_nan_inf_filter": False,
            "report_to": [],
        }
        assert {name: getattr(args, name) for name in wanted} == wanted

    def test_learning_rate_scales_with_the_effective_batch(self, tmp_path, monkeypatch):
        settings = {"base_learning_rate": 1e-3, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 2}
        args = tiny_arguments(tmp_path, **settings)
        assert args.effective_batch_size == 128
        assert args.learning_rate == pytest.approx(5e-4)
        monkeypatch.setattr(MIMTrainingArguments, "world_size", property(lambda args: 8))
        assert tiny_arguments(tmp_path, **settings).learning_rate == pytest.approx(4e-3)

    def test_explicit_learning_rate_wins(self, tmp_path):
        assert tiny_arguments(tmp_path, learning_rate=0.125).learning_rate == 0.125
        assert tiny_arguments(tmp_path, learning_rate=0.0).learning_rate == 0.0

    def test_batch_size_that_is_looked_for_has_no_scaled_rate(self, tmp_path):
        with pytest.raises(ValueError, match="Give learning_rate"):
            tiny_arguments(tmp_path, auto_find_batch_size=True)
        assert tiny_arguments(tmp_path, auto_find_batch_size=True, learning_rate=1e-3).learning_rate == 1e-3


class TestPrecision:
    @pytest.fixture(autouse=True)
    def no_launcher(self, monkeypatch):
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        # Arguments under a launcher choose the number of threads of the whole process.
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)

    @pytest.mark.parametrize("supported", [True, False])
    def test_follows_the_hardware_if_not_asked(self, tmp_path, monkeypatch, supported):
        monkeypatch.setattr("hf_mim.training.arguments.supports_bf16", lambda use_cpu: supported)
        args = MIMTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        assert args.bf16 is supported
        assert args.mixed_precision == ("bf16" if supported else "no")

    @pytest.mark.parametrize("where", ["", "checkpoint-4", "stage-0"])
    @pytest.mark.parametrize("began", ["bfloat16", "float32"])
    def test_a_run_goes_on_as_it_began(self, tmp_path, monkeypatch, began, where):
        monkeypatch.setattr("hf_mim.training.arguments.supports_bf16", lambda use_cpu: began == "float32")
        monkeypatch.setattr("hf_mim.training.checkpoints.find_damage", lambda folder: None)
        (tmp_path / where).mkdir(exist_ok=True)
        (tmp_path / where / "run.json").write_text(json.dumps({"decides": {"precision": began}}))
        args = {"output_dir": str(tmp_path), "use_cpu": True}
        assert MIMTrainingArguments(**args).precision == began
        # Asked for, or begun anew: no longer as it was.
        assert MIMTrainingArguments(**args, resume_from_checkpoint="false").precision != began
        assert MIMTrainingArguments(**args, bf16=began == "float32").precision != began

    @pytest.mark.parametrize("wanted", [True, False])
    def test_asked_for(self, tmp_path, monkeypatch, wanted):
        monkeypatch.setattr("hf_mim.training.arguments.supports_bf16", lambda use_cpu: not wanted)
        args = parse(f"--bf16={wanted}", "--use_cpu", tmp_path=tmp_path)[2]
        assert args.bf16 is wanted and args.mixed_precision == ("bf16" if wanted else "no")

    @pytest.mark.parametrize(
        ("launched", "asked", "precision"),
        [("no", None, "bf16"), ("bf16", None, "bf16"), ("bf16", False, "no"), ("fp16", None, "fp16")],
    )
    def test_the_launcher_is_asked_next(self, tmp_path, monkeypatch, launched, asked, precision):
        monkeypatch.setattr("hf_mim.training.arguments.supports_bf16", lambda use_cpu: True)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        args = MIMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=asked)
        assert args.mixed_precision == precision
        assert args.bf16 is (precision == "bf16")

    def test_cpu_instructions_decide(self, monkeypatch):
        from hf_mim.training.arguments import supports_bf16

        for avx512, amx in ((False, False), (True, False), (False, True)):
            monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=avx512: answer)
            monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda answer=amx: answer)
            assert supports_bf16(use_cpu=True) is (avx512 or amx)


class TestRecipes:
    def test_defaults_then_preset_then_recipe_then_flags(self, tmp_path):
        path = recipe(tmp_path, "preset: small\nnum_train_epochs: 5\nweight_decay: 1e-3\nmask_ratio: 0.6\n")
        model, data, training = parse(path, "--weight_decay=0.2", tmp_path=tmp_path)
        small = preset_training("small", "pilamim")
        assert (model.preset, model.mask_ratio) == ("small", 0.6)
        assert training.num_train_epochs == 5 != small["num_train_epochs"]
        assert training.per_device_train_batch_size == small["per_device_train_batch_size"]
        assert training.weight_decay == 0.2
        assert training.adam_beta2 == 0.95
        assert data.crop_scale_min == 0.8

    def test_preset_of_a_flag_beats_the_recipes(self, tmp_path):
        model, _, training = parse(recipe(tmp_path, "preset: small"), "--preset", "tiny", tmp_path=tmp_path)
        assert model.preset == "tiny"
        assert training.num_train_epochs == preset_training("tiny", "pilamim", scenes=True)["num_train_epochs"]

    def test_values_are_read_as_flags_are(self, tmp_path):
        text = """
        base_learning_rate: 1e-3
        image_size: 32
        patch_size: [8, 4]
        label_column_names: colour
        horizontal_flip: false
        dataloader_num_workers: 0
        config_overrides: {hidden_size: 48, decoder_final_norm: false, hidden_act: relu}
        image_mean: auto
        image_std: [0.5, 1e-1, -0]
        bf16: yes
        run_name: --odd
        """.replace("-0]", "0.2]")
        model, data, training = parse(recipe(tmp_path, text), tmp_path=tmp_path)
        assert training.base_learning_rate == 1e-3 and training.bf16 is True and training.run_name == "--odd"
        assert data.image_size == [32] and data.image_mean == "auto" and data.image_std == [0.5, 0.1, 0.2]
        assert data.label_column_names == ["colour"] and data.horizontal_flip is False
        assert model.patch_size == [8, 4]
        config = build_config(model, data.image_height_width, data.num_channels)
        assert (config.hidden_size, config.decoder_final_norm, config.hidden_act) == (48, False, "relu")
        assert config.patch_size == [8, 4]

    def test_json_is_the_same(self, tmp_path):
        settings = {"preset": "small", "image_size": [32, 64], "max_steps": 7, "config_overrides": {"hidden_size": 48}}
        by_json = parse(recipe(tmp_path, settings, "json"), tmp_path=tmp_path)
        by_yaml = parse(recipe(tmp_path, settings, "yaml"), tmp_path=tmp_path)
        assert by_json == by_yaml
        assert by_json[1].image_size == [32, 64] and by_json[2].max_steps == 7

    def test_null_is_the_default(self, tmp_path):
        training = parse(recipe(tmp_path, "preset: tiny\nlogging_steps: null"), tmp_path=tmp_path)[2]
        assert training.logging_steps == 50 != preset_training("tiny", "pilamim")["logging_steps"]

    def test_crops_are_smaller_of_other_pictures_than_the_scenes(self, tmp_path):
        assert parse(tmp_path=tmp_path)[1].crop_scale_min == 0.8
        assert parse("--train_dir=a", tmp_path=tmp_path)[1].crop_scale_min == 0.2
        assert parse("--dataset_name=a", tmp_path=tmp_path)[1].crop_scale_min == 0.2

    def test_scenes_have_a_schedule_of_their_own(self, tmp_path):
        scenes, tiny = (preset_training("tiny", "pilamim", scenes) for scenes in (True, False))
        assert scenes["per_device_train_batch_size"] < tiny["per_device_train_batch_size"]
        folder = recipe(tmp_path, "train_dir: a")
        for argv, expected in (
            ([], scenes),
            (["--train_dir=a"], tiny),
            (["--dataset_name=a"], tiny),
            ([folder], tiny),
        ):
            training = parse(*argv, tmp_path=tmp_path)[2]
            assert training.per_device_train_batch_size == expected["per_device_train_batch_size"]
            assert training.num_train_epochs == expected["num_train_epochs"]
            assert parse(*argv, tmp_path=tmp_path)[0].mask_ratio == expected.get("mask_ratio")
        # What it was tried with; a rate that is typed is the rate of any batch; other sizes are for other machines.
        assert parse("--model_type=ocl", tmp_path=tmp_path)[2].per_device_train_batch_size == 256
        typed = parse("--base_learning_rate=4e-3", "--per_device_train_batch_size=64", tmp_path=tmp_path)[2]
        assert typed.learning_rate == pytest.approx(1e-3)
        assert parse("--preset=small", tmp_path=tmp_path)[2].per_device_train_batch_size == 64

    def test_held_out_pictures_come_in_batches_of_training(self, tmp_path):
        training = parse("--model_type=ocl", "--per_device_train_batch_size=6", tmp_path=tmp_path)[2]
        assert training.per_device_eval_batch_size == 6
        assert parse("--per_device_eval_batch_size=3", tmp_path=tmp_path)[2].per_device_eval_batch_size == 3

    def test_one_process_uses_one_gpu(self, tmp_path, monkeypatch):
        monkeypatch.setattr(MIMTrainingArguments, "n_gpu", property(lambda args: args.__dict__.get("_n_gpu") or 4))
        training = parse("--per_device_train_batch_size=6", tmp_path=tmp_path)[2]
        assert training.n_gpu == 1 and training.train_batch_size == 6

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("learning_rat: 1\nbatch: 3", "unknown flags: batch, learning_rat"),
            ("- 1\n- 2", "not a table"),
            ("a: [1", "cannot be read"),
            ("max_steps: 2.5", "--max_steps.*invalid int value: '2.5'"),
            ("image_size: [a]", "--image_size.*invalid int value: 'a'"),
            ("bf16: perhaps", "perhaps"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path, text, message):
        with pytest.raises(ValueError, match=message):
            parse(recipe(tmp_path, text))

    def test_own_data_takes_the_place_of_the_recipes(self, tmp_path):
        path = recipe(tmp_path, "dataset_name: ILSVRC/imagenet-1k")
        data = parse(path, "--train_dir=mine", tmp_path=tmp_path)[1]
        assert (data.train_dir, data.dataset_name) == ("mine", None)
        assert parse(path, "--dataset_name=other", tmp_path=tmp_path)[1].dataset_name == "other"
        data = parse(recipe(tmp_path, "train_dir: theirs"), "--dataset_name=mine", tmp_path=tmp_path)[1]
        assert (data.train_dir, data.dataset_name) == (None, "mine")
        # A torchvision data set has both.
        path = recipe(tmp_path, "dataset_name: torchvision:CIFAR10\ntrain_dir: root")
        data = parse(path, "--train_dir=elsewhere", tmp_path=tmp_path)[1]
        assert (data.train_dir, data.dataset_name) == ("elsewhere", "torchvision:CIFAR10")

    def test_recipe_that_comes_late(self):
        with pytest.raises(ValueError, match="A recipe comes first: mine.yaml"):
            parse("--preset=tiny", "mine.yaml")

    def test_recipe_that_is_not_there(self):
        with pytest.raises(ValueError, match="no recipe nowhere.yaml"):
            parse("nowhere.yaml")

    @pytest.mark.parametrize(
        "path",
        # test_finetuning.py, test_segmentation_run.py and test_detection.py read the others.
        [
            path
            for path in sorted((REPOSITORY / "examples" / "recipes").iterdir())
            if not path.stem.startswith(("finetune", "segment", "detect"))
        ],
        ids=lambda path: path.stem,
    )
    def test_ours_can_be_read(self, path, tmp_path):
        model, data, _ = parse(str(path), tmp_path=tmp_path)
        build_config(model, data.image_height_width, data.num_channels)

    # Whoever types the weaker of two flags means it.
    @pytest.mark.parametrize(
        ("text", "flags", "wanted"),
        [
            ("preset: small", ["--warmup_steps=10"], {"warmup_epochs": None, "warmup_steps": 10}),
            ("preset: small\nwarmup_steps: 10", [], {"warmup_epochs": None, "warmup_steps": 10}),
            ("warmup_epochs: 2", ["--warmup_steps=10"], {"warmup_epochs": None, "warmup_steps": 10}),
            ("warmup_epochs: 2\nwarmup_steps: 10", [], {"warmup_epochs": 2, "warmup_steps": 10}),
            ("warmup_steps: 2", ["--warmup_epochs=1"], {"warmup_epochs": 1, "warmup_steps": 2}),
            (
                "learning_rate: 1.0",
                ["--base_learning_rate=2.56", "--per_device_train_batch_size=1"],
                {"learning_rate": 0.01},
            ),
            ("learning_rate: 1.0", [], {"learning_rate": 1.0}),
            ("max_steps: 7", ["--num_train_epochs=3"], {"max_steps": -1, "num_train_epochs": 3}),
            ("num_train_epochs: 3", ["--max_steps=7"], {"max_steps": 7}),
        ],
    )
    def test_flag_beats_what_would_take_precedence_over_it(self, tmp_path, text, flags, wanted):
        training = parse(recipe(tmp_path, text), *flags, tmp_path=tmp_path)[2]
        assert {name: getattr(training, name) for name in wanted} == pytest.approx(wanted)


class TestFlags:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--learning_rat=1"], "no flag --learning_rat=1"),
            (["--learning-rat", "1"], "no flag --learning-rat 1"),
            (["stray"], "no flag stray"),
            (["--max_steps=many"], "--max_steps.*'many'"),
            (["--config_overrides"], "expected one argument"),
            (["--streaming"], "needs --dataset_name"),
        ],
    )
    def test_mistakes_are_one_line(self, flags, message):
        with pytest.raises(ValueError, match=message) as error:
            parse(*flags)
        assert "\n" not in str(error.value) and "usage" not in str(error.value)

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as exit_:
            parse("--help")
        assert exit_.value.code == 0
        out = capsys.readouterr().out
        assert all(
            f"--{flag}" in out for flag in ("model_type", "preset", "train_dir", "base_learning_rate", "max_steps")
        )

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("preset", PRESETS)
    def test_presets(self, preset, method):
        model, data, training = parse(f"--preset={preset}", f"--model_type={method}")
        config = build_config(model, data.image_height_width, data.num_channels)
        config.check_sizes()
        for name, value in preset_training(preset, method, scenes=True).items():
            (owner,) = [arguments for arguments in (model, data, training) if hasattr(arguments, name)]
            assert getattr(owner, name) == value, name


class TestConfigOfFlags:
    def config(self, *flags: str):
        model, data, _ = parse(*flags)
        config = build_config(model, data.image_height_width, data.num_channels)
        if model.base_model_name_or_path or model.teacher_model_name_or_path:
            describe_frozen(model, config, data.num_channels)
        return config

    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            (None, {}),
            ("a=1", {"a": 1}),
            ("a=1,b=[2,3],c=mean", {"a": 1, "b": [2, 3], "c": "mean"}),
            ("a=False, b=true,c=None,d=1e-3", {"a": False, "b": True, "c": None, "d": 1e-3}),
            ('{"a": [1, 2], "b": null}', {"a": [1, 2], "b": None}),
        ],
    )
    def test_overrides(self, text, wanted):
        assert parse_overrides(text) == wanted

    def test_flags_reach_the_config(self):
        flags = ["--image_size", "32", "64", "--patch_size=8", "--mask_ratio=0.5", "--num_channels=2"]
        config = self.config(*flags, "--config_overrides=hidden_size=48,pooling=mean")
        assert (config.image_size, config.patch_size) == ([32, 64], [8, 8])
        assert (config.mask_ratio, config.num_channels, config.hidden_size, config.pooling) == (0.5, 2, 48, "mean")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--preset=gigantic"], "preset is 'gigantic'; expected one of tiny, mini, small"),
            (["--model_type=mae"], "model_type is 'mae'; expected one of pilamim, ocl"),
            (["--config_overrides=hidden_sise=3"], "PiLaMIMConfig has no field hidden_sise"),
            (["--config_overrides=hidden_size"], "expected name=value"),
            (["--config_overrides={hidden_size: 3}"], "--config_overrides.*not JSON"),
            (["--config_overrides=hidden_size=wide"], "hidden_size"),
            (["--config_overrides=hidden_size=192,num_attention_heads=5"], "192.*5|5.*192"),
            (["--image_size=30", "--patch_size=4"], "30.*4|4.*30"),
            (["--mask_ratio=1"], "mask_ratio is 1"),
            (["--mask_ratio=0.999"], "mask_ratio"),
        ],
    )
    def test_mistakes_are_named(self, flags, message):
        with pytest.raises(ValueError, match=message) as error:
            self.config(*flags)
        assert "\n" not in str(error.value)

    @pytest.fixture
    def vit(self, tmp_path):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        ViTModel(ViTConfig(image_size=16, patch_size=4, **sizes)).save_pretrained(tmp_path / "vit")
        return str(tmp_path / "vit")

    def test_sizes_of_the_weights(self, vit):
        config = self.config(f"--model_name_or_path={vit}")
        wanted = (32, 2, 48, 16, 4)
        assert (
            config.hidden_size,
            config.num_hidden_layers,
            config.intermediate_size,
            config.image_size,
            config.patch_size,
        ) == wanted
        assert config.position_embedding == "learned"
        self.config(f"--model_name_or_path={vit}", "--image_size=16", "--patch_size=4", "--num_channels=3")

    def test_channels_are_those_of_the_weights(self, tmp_path):
        tiny_config(num_channels=1).save_pretrained(tmp_path / "weights")
        PiLaMIMModel(tiny_config(num_channels=1)).save_pretrained(tmp_path / "network")
        assert self.config(f"--model_name_or_path={tmp_path / 'weights'}").num_channels == 1
        sizes = ("--image_size=16", "--patch_size=4")
        base = self.config("--model_type=tec", f"--base_model_name_or_path={tmp_path / 'network'}", *sizes)
        assert base.num_channels == 1
        teacher = self.config("--model_type=dbot", f"--teacher_model_name_or_path={tmp_path / 'network'}", *sizes)
        assert teacher.num_channels == 1
        assert self.config("--model_type=dbot").num_channels == 3

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--patch_size=8"], r"patch_size: \(8, 8\) is asked for"),
            (["--config_overrides=num_channels=1"], "num_channels: 1 is asked for.*has 3. Leave num_channels out"),
            (["--config_overrides=hidden_size=64"], "hidden_size: 64 is asked for"),
        ],
    )
    def test_other_sizes_than_the_weights(self, vit, flags, message):
        with pytest.raises(ValueError, match=message):
            self.config(f"--model_name_or_path={vit}", *flags)

    def test_all_of_the_same_methods_weights(self, tmp_path):
        """The decoders too, though the preset has others."""
        tiny_config(mask_ratio=0.5, ema_momentum=0.9).save_pretrained(tmp_path)
        config = self.config(f"--model_name_or_path={tmp_path}", "--config_overrides=ema_momentum=0.95")
        assert (config.decoder_hidden_size, config.decoder_num_hidden_layers, config.mask_ratio) == (16, 1, 0.5)
        assert config.ema_momentum == 0.95
        assert self.config(f"--model_name_or_path={tmp_path}", "--mask_ratio=0.6").mask_ratio == 0.6


def raised(function) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


class TestPlainMessages:
    def test_ours_and_the_systems(self, tmp_path):
        assert "model_type" in plain_message(raised(lambda: TestConfigOfFlags().config("--model_type=x")))
        assert "nowhere" in plain_message(raised((tmp_path / "nowhere").read_text))
        assert plain_message(NonFiniteLossError("step 3")) == "step 3"

    def test_damaged_weights(self, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"0" * 20)
        assert "weights that is to be read is damaged or cut off (" in plain_message(
            raised(lambda: safe_open(tmp_path / "model.safetensors", "pt"))
        )

    def test_bugs_keep_their_stack(self):
        assert plain_message(raised(lambda: torch.zeros(2) + torch.zeros(3))) is None
        assert plain_message(raised(lambda: {}["a"])) is None

    def test_in_training_only_our_own(self, tmp_path):
        def trainer(error):
            found = tiny_trainer(tmp_path, max_steps=1)

            def forward(*args, **kwargs):
                raise error

            found.model.forward = forward
            return found

        # This file is no part of hf_mim: as if torch or transformers had raised it.
        assert plain_message(raised(trainer(ValueError("a bug")).train)) is None
        assert plain_message(raised(trainer(RuntimeError("a bug")).train)) is None
        assert plain_message(raised(trainer(ConnectionResetError(104, "reset")).train)) is None
        full = OSError(28, "No space left on device", "events.out")
        assert plain_message(raised(trainer(full).train)) == "[Errno 28] No space left on device: 'events.out'"
        assert plain_message(raised(trainer(BrokenImageError("a.png: empty.")).train)) == (
            "a.png: empty. Remove it, or pass --skip_broken_images to leave such pictures out. `hf_mim check` with "
            "the same flags lists all of them."
        )
        few = tiny_trainer(tmp_path, per_device_train_batch_size=64)
        assert "20 pictures, fewer than the 64" in plain_message(raised(few.train))

    @pytest.mark.parametrize("bad", [0, float("nan")], ids=["channels", "broken"])
    def test_a_workers_error_is_its_last_line(self, tmp_path, bad):
        from hf_mim.data.dataset import ImageDataset
        from tiny_training import pictures, tiny_data

        values = list(pictures().astype("float32"))
        values[7] = values[7][..., :2] if bad == 0 else values[7] * bad
        data = tiny_data()
        data.pictures = ImageDataset(values, 3, source="list")
        trainer = tiny_trainer(tmp_path, data=data, dataloader_num_workers=1, num_train_epochs=1)
        message = plain_message(raised(trainer.train))
        assert message is not None and "Traceback" not in message and "\n" not in message
        assert "7" in message


@pytest.mark.parametrize("method", METHODS)
def test_mini_is_between_tiny_and_small(method):
    """In width, decoder and all; and of the same schedule as tiny but for its length."""
    sizes = [preset_config(method, preset, (32, 32), [4]) for preset in ("tiny", "mini", "small")]
    for name in ("hidden_size", "decoder_hidden_size", "predictor_hidden_size"):
        widths = [fields[name] for fields in sizes if name in fields]
        assert widths == sorted(set(widths)), name
    assert sizes[0].keys() - {"adapter_group_size"} <= sizes[1].keys()
    tiny, mini = (preset_training(preset, method) for preset in ("tiny", "mini"))
    assert mini["num_train_epochs"] > tiny["num_train_epochs"]
    assert mini["per_device_train_batch_size"] == tiny["per_device_train_batch_size"]


class TestTinyPatches:
    @pytest.mark.parametrize(("size", "patch"), [((28, 28), [4, 4]), ((64, 64), [8, 8]), ((48, 64), [6, 8])])
    def test_follow_the_image(self, size, patch):
        assert preset_config("pilamim", "tiny", size)["patch_size"] == patch

    def test_too_many_are_refused(self):
        with pytest.raises(ValueError, match="97 pixels have no divisor near 12. Choose another --image_size.*96"):
            preset_config("pilamim", "tiny", (64, 97))
        assert preset_config("pilamim", "tiny", (64, 97), [1])["patch_size"] == [1, 1]


class TestFamilies:
    """A number of steps asks for steps, whatever the preset or the recipe counts in."""

    def read(self, tmp_path, *flags):
        return parse_arguments(
            (ModelArguments, DataArguments, MIMTrainingArguments), [*flags, f"--output_dir={tmp_path}"]
        )[2]

    def test_a_number_of_steps_beats_the_presets_epochs(self, tmp_path):
        assert self.read(tmp_path).save_strategy == "epoch"
        args = self.read(tmp_path, "--save_steps=7", "--eval_steps=5")
        assert (args.save_strategy, args.save_steps, args.eval_strategy, args.eval_steps) == ("steps", 7, "steps", 5)
        args = self.read(tmp_path, "--save_steps=7", "--save_strategy=epoch")
        assert args.save_strategy == "epoch"

    def test_in_a_recipe(self, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("save_steps: 7\neval_strategy: epoch\n")
        args = self.read(tmp_path, str(recipe))
        assert (args.save_strategy, args.save_steps, args.eval_strategy) == ("steps", 7, "epoch")
        assert self.read(tmp_path, str(recipe), "--save_strategy=epoch").save_strategy == "epoch"
        args = self.read(tmp_path, str(recipe), "--eval_steps=3")
        assert (args.eval_strategy, args.eval_steps) == ("steps", 3)

    @pytest.mark.parametrize("words", [["--fsdp", "true"], ["--fsdp"], ["--fsdp=True"]])
    def test_fsdp(self, tmp_path, words):
        args = self.read(tmp_path, *words)
        assert args.fsdp is True and args.fsdp_plugin_args["fsdp_version"] == 2
        assert not self.read(tmp_path, "--fsdp=false").fsdp
