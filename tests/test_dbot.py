"""dBOT against the released implementation's numbers, and what these cannot show."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

import hf_mim
from golden import Golden, block_grad_norms
from hf_mim import DBOTConfig, DBOTForPreTraining
from hf_mim.models.dbot.convert_dbot import original_config
from hf_mim.training.command import ClassifierArguments
from hf_mim.training.task_models import build_classifier, build_classifier_config
from tiny import tiny_batch, tiny_config, tiny_model


def grad_norms(model) -> dict[str, float]:
    encoder, decoder = model.encoder, model.decoder
    norms = {
        "cls_token": encoder.embeddings.cls_token.grad.norm(),
        "mask_token": decoder.mask_token.grad.norm(),
        "patch_embed.proj.weight": encoder.embeddings.patch_embeddings.projection.weight.grad.norm(),
        "patch_embed.proj.bias": encoder.embeddings.patch_embeddings.projection.bias.grad.norm(),
        "norm.weight": encoder.layernorm.weight.grad.norm(),
        "norm.bias": encoder.layernorm.bias.grad.norm(),
    }
    for theirs, ours in (("embed", "embed"), ("norm", "layernorm"), ("predp", "head")):
        for kind in ("weight", "bias"):
            norms[f"decoder_{theirs}.{kind}"] = decoder.get_parameter(f"{ours}.{kind}").grad.norm()
    norms |= block_grad_norms(encoder.layers, "blocks") | block_grad_norms(decoder.layers, "decoder_blocks")
    return {name: float(norm) for name, norm in norms.items()}


def golden_model(golden):
    return hf_mim.from_original(golden.state, "dbot", config=golden.config, teacher=golden.teacher)


def golden_outputs(golden, model):
    return model(golden.input["pixel_values"], noise=golden.input["noise"])


class TestGolden:
    def test_losses_outputs_and_gradients(self):
        golden = Golden("dbot")
        model = golden_model(golden).train()
        outputs = golden_outputs(golden, model)
        golden.assert_numbers(outputs)
        assert outputs.loss_distillation is outputs.loss
        golden.assert_tensor("prediction", outputs.predictions)
        golden.assert_tensor("teacher_features", model.teacher(golden.input["pixel_values"]).last_hidden_states[-1])
        assert torch.equal(outputs.mask, golden.expected["mask"][:, 1:])
        outputs.loss.backward()
        golden.assert_grad_norms(grad_norms(model))

    def test_sizes_are_read_off_the_weights(self):
        golden = Golden("dbot")
        heads = {name: golden.config[name] for name in ("num_attention_heads", "decoder_num_attention_heads")}
        teacher = original_config(golden.state, golden.teacher)["teacher_config"]
        config = heads | {"teacher_config": teacher | {"num_attention_heads": 4}, "drop_path_rate": 0.0}
        model = hf_mim.from_original(golden.state, "dbot", config=config, teacher=golden.teacher)
        for name, value in golden.config.items():
            expected = [value, value] if name in ("image_size", "patch_size") else value
            if name != "teacher_config":
                assert getattr(model.config, name) == expected, name
        assert len(model.teacher.network.layers) == 4
        golden.assert_numbers(golden_outputs(golden, model))

    def test_without_the_teacher_the_student_is_the_releases(self):
        golden = Golden("dbot")
        model = hf_mim.from_original(golden.state, "dbot", config=golden.config)
        golden.assert_tensor("prediction", golden_outputs(golden, model).predictions)

    def test_saved_and_exported(self, tmp_path):
        golden = Golden("dbot")
        model = golden_model(golden)
        model.save_pretrained(tmp_path)
        loaded = DBOTForPreTraining.from_pretrained(tmp_path)
        assert loaded.config.teacher_config["num_hidden_layers"] == 4
        with torch.no_grad():
            golden.assert_numbers(golden_outputs(golden, loaded))
            expected = model.encoder(golden.input["pixel_values"]).last_hidden_state
            exported = hf_mim.to_vit(model)(golden.input["pixel_values"]).last_hidden_state
        torch.testing.assert_close(exported, expected, rtol=0, atol=1e-5)

    def test_wrong_checkpoint_names_what_it_lacks(self):
        with pytest.raises(ValueError, match="(?s)mask_token.*dbot release.*encoder.patchify.weight"):
            hf_mim.from_original({"encoder.patchify.weight": torch.zeros(3)}, "dbot")


class TestLoss:
    def test_by_hand(self):
        model = tiny_model("dbot", "ForPreTraining", smooth_l1_beta=0.5)
        batch = tiny_batch(model.config, batch_size=2)
        with torch.no_grad():
            outputs = model(**batch)
            # The teacher differs from the student here, so that the target can only be the teacher's.
            features = model.teacher.network(batch["pixel_values"], output_hidden_states=True).hidden_states[-1]
        losses = []
        for sample in range(2):
            # 12 of 48 patches, those with the smallest noise, are seen; [CLS] counts as a hidden one.
            order = sorted(range(48), key=lambda patch, sample=sample: batch["noise"][sample, patch].item())
            for token in [0] + [1 + patch for patch in order[12:]]:
                feature = features[sample, token].tolist()
                mean = sum(feature) / 32
                std = math.sqrt(sum((value - mean) ** 2 for value in feature) / 31 + 1e-6)
                total = 0.0
                for value, predicted in zip(feature, outputs.predictions[sample, token].tolist(), strict=True):
                    difference = abs(predicted - (value - mean) / std)
                    total += 0.5 * difference**2 / 0.5 if difference < 0.5 else difference - 0.25
                losses.append(total / 32)
        assert len(losses) == 2 * 37
        assert outputs.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    @pytest.mark.parametrize(("difference", "expected"), [(1.0, 0.25), (2.0, 1.0), (5.0, 4.0), (-5.0, 4.0)])
    def test_of_one_difference_with_the_papers_beta(self, difference, expected):
        model = tiny_model("dbot", "ForPreTraining")
        targets = torch.zeros(3, 49, 32)
        loss = model.masked_smooth_l1(targets + difference, targets, torch.ones(3, 48))
        assert loss.item() == pytest.approx(expected)

    def test_seen_patches_count_nothing_and_cls_as_one_hidden_patch(self):
        model = tiny_model("dbot", "ForPreTraining")
        mask = torch.zeros(1, 48)
        mask[0, :3] = 1
        targets = torch.zeros(1, 49, 32)
        for token, share in ((0, 1 / 4), (1, 1 / 4), (3, 1 / 4), (4, 0.0), (48, 0.0)):
            predictions = targets.clone()
            predictions[0, token] = 2.0
            assert model.masked_smooth_l1(predictions, targets, mask).item() == pytest.approx(share), token

    def test_targets_have_no_scale_and_no_gradient(self):
        outputs = tiny_model("dbot", "ForPreTraining").train()(**tiny_batch(tiny_config("dbot")))
        assert not outputs.targets.requires_grad and outputs.predictions.requires_grad
        torch.testing.assert_close(outputs.targets.mean(dim=-1), torch.zeros(3, 49), rtol=0, atol=1e-5)
        torch.testing.assert_close(outputs.targets.var(dim=-1), torch.ones(3, 49), rtol=0, atol=1e-3)


class TestTeacher:
    GRID = {"image_size": 32, "patch_size": 8, "num_channels": 3}
    SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}

    def pixel_values(self):
        return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    # The layers that the last block's output is got from in another way.
    @pytest.mark.parametrize(
        ("model_class", "config_class", "fields"),
        [
            (ViTModel, ViTConfig, {}),
            (ViTMAEModel, ViTMAEConfig, {"mask_ratio": 0.0}),
            (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {"num_register_tokens": 3}),
            (DINOv3ViTModel, DINOv3ViTConfig, {"num_register_tokens": 2, "num_attention_heads": 3}),
            (CLIPVisionModel, CLIPVisionConfig, {}),
        ],
        ids=["vit", "vit_mae", "dinov2_with_registers", "dinov3", "clip"],
    )
    def test_any_vit(self, tmp_path, model_class, config_class, fields):
        torch.manual_seed(0)
        fields = self.SIZES | {"image_size": 32, "patch_size": 8} | fields
        teacher = model_class(config_class(**fields)).eval()
        config = tiny_config("dbot", **self.GRID)
        model = DBOTForPreTraining.from_teacher(teacher, config)
        outputs = model(self.pixel_values())
        assert outputs.predictions.shape == outputs.targets.shape == (2, 17, 24)
        assert len(model.encoder.layers) == 3 and config.teacher_config is None
        kwargs = {"noise": torch.arange(16.0).expand(2, -1)} if model_class is ViTMAEModel else {}
        with torch.no_grad():
            hidden_states = teacher(self.pixel_values(), output_hidden_states=True, **kwargs).hidden_states[-1]
        tokens = torch.cat((hidden_states[:, :1], hidden_states[:, -16:]), dim=1)
        tokens = tokens - tokens.mean(dim=-1, keepdim=True)
        expected = tokens / (tokens.square().sum(dim=-1, keepdim=True) / 23 + 1e-6).sqrt()
        torch.testing.assert_close(outputs.targets, expected, rtol=0, atol=1e-4)

        model.save_pretrained(tmp_path)
        # As the Trainer does when it resumes.
        assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
        loaded = DBOTForPreTraining.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded.teacher_targets(self.pixel_values()), outputs.targets)
        assert not any(parameter.requires_grad for parameter in loaded.teacher.parameters())

    def test_of_the_same_family_by_path(self, tmp_path):
        teacher = tiny_model("pilamim", "ForPreTraining", hidden_size=48, num_attention_heads=4, num_hidden_layers=2)
        teacher.save_pretrained(tmp_path)
        model = DBOTForPreTraining.from_teacher(str(tmp_path), tiny_config("dbot"))
        batch = tiny_batch(model.config)
        with torch.no_grad():
            features = teacher.encoder(batch["pixel_values"], output_hidden_states=True).hidden_states[-1]
            (mine,) = model.teacher(batch["pixel_values"]).last_hidden_states
        torch.testing.assert_close(mine, features, rtol=0, atol=1e-5)
        assert model(**batch).predictions.shape == (3, 49, 48)

    def test_sizes_by_default_are_the_teachers(self):
        teacher = ViTModel(ViTConfig(**self.SIZES, image_size=32, patch_size=8))
        model = DBOTForPreTraining.from_teacher(teacher)
        assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.grid_size) == (24, 2, (4, 4))

    def test_pixels_are_normalised_as_it_wants_them(self):
        config = tiny_config(
            "dbot",
            **self.GRID,
            image_mean=[0.1, 0.2, 0.3],
            image_std=[0.5, 0.5, 0.5],
            teacher_image_mean=[0.5, 0.5, 0.5],
            teacher_image_std=[0.25, 0.2, 0.1],
        )
        torch.manual_seed(0)
        model = DBOTForPreTraining(config).eval()
        pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5]))
        wanted_mean, wanted_std = (torch.tensor(numbers).view(3, 1, 1) for numbers in ([0.5] * 3, [0.25, 0.2, 0.1]))
        with torch.no_grad():
            (seen,) = model.teacher((pixels - mean) / std).last_hidden_states
            hidden = model.teacher.network((pixels - wanted_mean) / wanted_std, output_hidden_states=True)
        torch.testing.assert_close(seen, hidden.hidden_states[-1], rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"image_size": (64, 32)}, "8 x 4 patches.*the student into 4 x 4"),
            ({"patch_size": (8, 16)}, "4 x 2 patches.*the student into 4 x 4"),
        ],
    )
    def test_of_other_proportions_is_refused(self, fields, message):
        teacher = ViTModel(ViTConfig(**(self.SIZES | {"image_size": 32, "patch_size": 8} | fields)))
        with pytest.raises(ValueError, match=f"(?s){message}"):
            DBOTForPreTraining.from_teacher(teacher, tiny_config("dbot", **self.GRID))


class TestNextStage:
    def test_teacher_is_the_student_and_the_student_is_new(self):
        teacher_config = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2}
        model = tiny_model(
            "dbot",
            "ForPreTraining",
            teacher_config=teacher_config,
            image_mean=[0.5] * 5,
            image_std=[0.2] * 5,
            teacher_image_mean=[0.4] * 5,
            teacher_image_std=[0.1] * 5,
        )
        torch.manual_seed(3)
        following = model.next_stage()
        config = following.config
        assert config.teacher_config is None and config.teacher_image_mean is None and config.image_mean == [0.5] * 5
        assert model.config.teacher_config == teacher_config
        teacher, student = following.teacher.network.state_dict(), model.encoder.state_dict()
        assert teacher.keys() == student.keys()
        assert all(torch.equal(teacher[name], value) for name, value in student.items())
        assert following.decoder.head.weight.shape == (32, 48) and model.decoder.head.weight.shape == (16, 48)
        weight = "layers.1.mlp.fc1.weight"
        assert not torch.equal(following.encoder.state_dict()[weight], student[weight])
        assert not any(parameter.requires_grad for parameter in following.teacher.parameters())

        torch.manual_seed(3)
        again = model.next_stage()
        for name, value in following.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name

    def test_learned_positions_and_attention_go_along(self):
        model = tiny_model("dbot", "ForPreTraining", position_embedding="learned")
        model.set_attn_implementation("eager")
        following = model.next_stage()
        assert following.config._attn_implementation == "eager"
        positions = following.teacher.network.embeddings.position_embeddings
        assert torch.equal(positions, model.encoder.embeddings.position_embeddings)
        assert not positions.requires_grad

    def test_other_methods_have_none(self):
        with pytest.raises(ValueError, match="pilamim is not trained in stages"):
            tiny_config("pilamim").for_next_stage()


class TestConfig:
    def test_default_sizes_are_the_papers(self):
        config = DBOTConfig()
        assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
        assert (config.decoder_num_hidden_layers, config.decoder_hidden_size) == (8, 512)
        assert (config.decoder_num_attention_heads, config.mask_ratio, config.num_keep) == (16, 0.75, 49)
        assert (config.smooth_l1_beta, config.drop_path_rate, config.teacher_config) == (2.0, 0.2, None)
        with torch.device("meta"):
            model = DBOTForPreTraining(config)
        assert model.encoder.num_parameters() == model.teacher.network.num_parameters() == 85_647_360
        assert model.decoder.head.weight.shape == (768, 512)

    def test_stochastic_depth_rises_in_encoder_and_decoder_and_not_in_the_teacher(self):
        model = tiny_model("dbot", "ForPreTraining", drop_path_rate=0.4)

        def rates(layers):
            return [getattr(layer.drop_path, "p", 0.0) for layer in layers]

        assert rates(model.encoder.layers) == pytest.approx([0.0, 0.2, 0.4])
        assert rates(model.decoder.layers) == pytest.approx([0.0, 0.4])
        assert rates(model.teacher.network.layers) == [0.0] * 3

    @pytest.mark.parametrize("rate", [0.0, 0.1, 0.2])
    def test_fine_tuning_has_the_stochastic_depth_that_it_asks_for(self, rate, tmp_path):
        """Also where it is that of pretraining, which a classifier does not take over."""
        tiny_model("dbot", "ForPreTraining", drop_path_rate=0.2).save_pretrained(tmp_path)
        args = ClassifierArguments(model_name_or_path=str(tmp_path), drop_path_rate=rate)
        config = build_classifier_config(args, None, None)
        model = build_classifier(args, config)
        assert model.config.drop_path_rate == rate
        assert getattr(model.encoder.layers[-1].drop_path, "p", 0.0) == rate

    def test_teacher_is_kept_as_a_dict(self):
        config = DBOTConfig(teacher_config=ViTConfig(hidden_size=384, num_attention_heads=6))
        assert config.teacher_config["model_type"] == "vit" and config.teacher_config["hidden_size"] == 384

    @pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
    def test_beta_that_makes_no_loss_is_refused(self, beta):
        with pytest.raises(ValueError, match=f"smooth_l1_beta is {beta}"):
            DBOTConfig(smooth_l1_beta=beta)
