"""PiLaMIM against the released implementation's numbers, and what these cannot show."""

import argparse

import pytest
import safetensors.torch
import torch

import hf_mim
from golden import Golden, block_grad_norms
from hf_mim import PiLaMIMConfig, PiLaMIMForPreTraining
from hf_mim.models.pilamim.convert_pilamim import original_config
from tiny import scrambled, tiny_batch, tiny_model


def grad_norms(model) -> dict[str, float]:
    encoder = model.encoder
    norms = {
        "encoder.cls_token": encoder.embeddings.cls_token.grad.norm(),
        # The release's encoder has no position for [CLS]; ours has, and loads it as zero.
        "encoder.pos_embedding": encoder.embeddings.position_embeddings.grad[:, 1:].norm(),
        "encoder.patchify.weight": encoder.embeddings.patch_embeddings.projection.weight.grad.norm(),
        "encoder.patchify.bias": encoder.embeddings.patch_embeddings.projection.bias.grad.norm(),
        "encoder.layer_norm.weight": encoder.layernorm.weight.grad.norm(),
        "encoder.layer_norm.bias": encoder.layernorm.bias.grad.norm(),
    } | block_grad_norms(encoder.layers, "encoder.transformer")
    for decoder, name, embed, head in (
        (model.pixel_decoder, "decoder", "decoder_embed", "head"),
        (model.latent_decoder, "target_decoder", "decoder_latent_embed", "head_latent"),
    ):
        norms |= {
            f"{name}.mask_token": decoder.mask_token.grad.norm(),
            f"{name}.pos_embedding": decoder.position_embeddings.grad.norm(),
            f"{embed}.weight": decoder.embed.weight.grad.norm(),
            f"{embed}.bias": decoder.embed.bias.grad.norm(),
            f"{name}.{head}.weight": decoder.head.weight.grad.norm(),
            f"{name}.{head}.bias": decoder.head.bias.grad.norm(),
        } | block_grad_norms(decoder.layers, f"{name}.transformer")
    return {name: float(norm) for name, norm in norms.items()}


def test_golden():
    golden = Golden("pilamim")
    model = hf_mim.from_original(golden.state, "pilamim", config=golden.config).train()
    outputs = model(golden.input["pixel_values"], noise=golden.input["noise"])
    golden.assert_numbers(outputs)
    assert outputs.mask.mean().item() == golden.numbers["masked_fraction"]
    golden.assert_tensor("predicted_cls", outputs.predicted_latents[:, 0])
    golden.assert_tensor("predicted_latents", outputs.predicted_latents[:, 1:])
    golden.assert_tensor("target_cls", outputs.target_latents[:, 0])
    golden.assert_tensor("target_latents", outputs.target_latents[:, 1:])
    mask, pixels = model.reconstruct(golden.input["pixel_values"], golden.input["noise"])
    golden.assert_tensor("predicted_pixels_image", pixels)
    outputs.loss.backward()
    golden.assert_grad_norms(grad_norms(model))


def test_original_config_is_read_off_the_weights():
    golden = Golden("pilamim")
    heads = {name: golden.config[name] for name in ("num_attention_heads", "decoder_num_attention_heads")}
    model = hf_mim.from_original(golden.state, "pilamim", config=heads)
    for name, value in golden.config.items():
        expected = [value, value] if name in ("image_size", "patch_size") else value
        assert getattr(model.config, name) == expected, name
    outputs = model(golden.input["pixel_values"], noise=golden.input["noise"])
    golden.assert_numbers(outputs)
    assert not torch.isnan(outputs.loss)


def tiny_pretraining(**fields):
    return tiny_model("pilamim", "ForPreTraining", **fields)


# ---- The losses, number by number


def test_losses_by_hand():
    model = tiny_pretraining()
    batch = tiny_batch(model.config, batch_size=2)
    with torch.no_grad():
        outputs = model(**batch)
        # Both encoders differ here, so that the target can only be the target encoder's.
        target = model.target_encoder(batch["pixel_values"]).last_hidden_state
        assert not torch.allclose(target, model.encoder(batch["pixel_values"]).last_hidden_state, atol=1e-2)
    torch.testing.assert_close(outputs.target_latents, target)

    pixel_errors, latent_errors, cls_errors = [], [], []
    for sample in range(2):
        # 12 of 48 patches, those with the smallest noise, are seen.
        order = sorted(range(48), key=lambda patch, sample=sample: batch["noise"][sample, patch].item())
        assert outputs.mask[sample].nonzero().flatten().tolist() == sorted(order[12:])
        for patch in order[12:]:
            row, column = divmod(patch, 12)
            predicted = outputs.predicted_pixels[sample, patch].tolist()
            pixels = batch["pixel_values"][sample, :, 8 * row : 8 * row + 8, 4 * column : 4 * column + 4]
            place = 0
            for y in range(8):
                for x in range(4):
                    for channel in range(5):
                        pixel_errors.append((predicted[place] - pixels[channel, y, x].item()) ** 2)
                        place += 1
            difference = outputs.predicted_latents[sample, 1 + patch] - target[sample, 1 + patch]
            latent_errors += [d**2 for d in difference.tolist()]
        cls_errors += [d**2 for d in (outputs.predicted_latents[sample, 0] - target[sample, 0]).tolist()]
    assert len(pixel_errors) == 2 * 36 * 160 and len(latent_errors) == 2 * 36 * 32 and len(cls_errors) == 2 * 32

    for name, errors in (("loss_pixel", pixel_errors), ("loss_latent", latent_errors), ("loss_cls", cls_errors)):
        assert outputs[name].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5), name
    assert outputs.loss.item() == pytest.approx(
        sum(sum(errors) / len(errors) for errors in (pixel_errors, latent_errors, cls_errors)), rel=1e-5
    )


def test_latent_of_patch_i_is_compared_with_patch_i():
    model = tiny_pretraining()
    batch = tiny_batch(model.config)
    with torch.no_grad():
        outputs = model(**batch)
        predicted, target = outputs.predicted_latents[:, 1:], outputs.target_latents[:, 1:]
        shuffled = target[:, torch.randperm(48, generator=torch.Generator().manual_seed(0))]
        right, wrong = (model.masked_mean_square(predicted - t, outputs.mask) for t in (target, shuffled))
        assert outputs.loss_latent.item() == pytest.approx(right.item(), rel=1e-6)
        assert abs(wrong.item() - right.item()) > 1e-3 * right.item()

        # Were the latent decoder to say what the target says, each in its own place, nothing would be lost.
        model.latent_decoder.forward = lambda *_: outputs.target_latents
        perfect = model(**batch)
    assert perfect.loss_latent.item() == 0.0 and perfect.loss_cls.item() == 0.0


def test_targets_see_the_whole_picture_and_predictions_do_not():
    model = tiny_pretraining()
    batch = tiny_batch(model.config, batch_size=1)
    with torch.no_grad():
        before = model(**batch)
        hidden = int(before.mask[0].nonzero()[0])
        row, column = divmod(hidden, 12)
        batch["pixel_values"][:, :, 8 * row : 8 * row + 8, 4 * column : 4 * column + 4] += 1.0
        after = model(**batch)
    assert torch.equal(after.predicted_pixels, before.predicted_pixels)
    assert torch.equal(after.predicted_latents, before.predicted_latents)
    assert not torch.equal(after.target_latents, before.target_latents)
    assert after.loss_pixel.item() != before.loss_pixel.item()


def test_without_the_cls_loss():
    model, ablated = tiny_pretraining(), tiny_pretraining(use_cls_loss=False)
    batch = tiny_batch(model.config)
    whole, outputs = model(**batch), ablated(**batch)
    assert outputs.loss_cls is None and "loss_cls" not in outputs
    assert outputs.loss_pixel.item() == whole.loss_pixel.item()
    assert outputs.loss_latent.item() == whole.loss_latent.item()
    assert outputs.loss.item() == pytest.approx(whole.loss_pixel.item() + whole.loss_latent.item(), rel=1e-6)
    outputs.loss.backward()
    assert all(p.grad is not None for p in ablated.parameters() if p.requires_grad)


def test_targets_carry_no_gradient():
    outputs = tiny_pretraining().train()(**tiny_batch(tiny_pretraining().config))
    assert not outputs.target_latents.requires_grad
    assert outputs.predicted_latents.requires_grad and outputs.predicted_pixels.requires_grad


# ---- The target encoder


def test_target_starts_as_the_encoder():
    model = tiny_model("pilamim", "ForPreTraining", scramble=False)
    encoder, target = model.encoder.state_dict(), model.target_encoder.state_dict()
    assert encoder.keys() == target.keys()
    for name in encoder:
        assert torch.equal(encoder[name], target[name]), name
        assert encoder[name].data_ptr() != target[name].data_ptr(), f"{name} is shared"


def test_target_is_a_moving_average():
    model = tiny_pretraining(ema_momentum=0.9, ema_momentum_end=1.0)
    expected = {name: p.detach().clone() for name, p in model.target_encoder.named_parameters()}
    # Of 4 steps, m is 0.9, 0.925, 0.95 and 0.975: from ema_momentum at step 0 towards ema_momentum_end.
    for step, momentum in enumerate((0.9, 0.925, 0.95, 0.975)):
        scrambled(model.encoder)
        sources = {name: p.detach().clone() for name, p in model.encoder.named_parameters()}
        model.after_optimizer_step(step, 4)
        for name, parameter in model.target_encoder.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * sources[name]
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-6, msg=f"{name}, {step}")
            assert torch.equal(model.encoder.get_parameter(name), sources[name]), f"{name} of the encoder moved"


def test_target_of_default_momentum_moves_by_four_thousandths():
    model = tiny_pretraining()
    before, source = model.target_encoder.embeddings.cls_token.clone(), model.encoder.embeddings.cls_token
    model.after_optimizer_step(0, 1000)
    moved = model.target_encoder.embeddings.cls_token - before
    torch.testing.assert_close(moved, 0.004 * (source - before), rtol=1e-3, atol=1e-7)


def test_target_at_constant_momentum_one_stands_still():
    model = tiny_pretraining(ema_momentum=1, ema_momentum_end=1)
    before = model.target_encoder.embeddings.cls_token.clone()
    model.after_optimizer_step(0, 10)
    assert torch.equal(model.target_encoder.embeddings.cls_token, before)


def test_target_that_a_checkpoint_lacks_is_a_copy_of_the_encoder(tmp_path):
    model = tiny_pretraining()
    encoder_and_decoders = {
        name: v for name, v in model.state_dict().items() if not name.startswith("target_encoder.")
    }
    model.save_pretrained(tmp_path, state_dict=encoder_and_decoders)
    loaded = PiLaMIMForPreTraining.from_pretrained(tmp_path)
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(loaded.target_encoder.state_dict()[name], value), name
    for name, value in model.latent_decoder.state_dict().items():
        assert torch.equal(loaded.latent_decoder.state_dict()[name], value), name


def test_target_that_a_checkpoint_has_in_part_is_an_error(tmp_path):
    model = tiny_pretraining()
    name = "target_encoder.layers.1.mlp.fc1.weight"
    model.save_pretrained(tmp_path, state_dict={key: v for key, v in model.state_dict().items() if key != name})
    with pytest.raises(ValueError, match=r"no weights for target_encoder \(1 tensors\)"):
        PiLaMIMForPreTraining.from_pretrained(tmp_path)


def test_target_that_a_checkpoint_has_is_kept(tmp_path):
    model = tiny_pretraining()
    model.save_pretrained(tmp_path)
    loaded = PiLaMIMForPreTraining.from_pretrained(tmp_path)
    for name, value in model.target_encoder.state_dict().items():
        assert torch.equal(loaded.target_encoder.state_dict()[name], value), name


# ---- Pictures


def test_reconstruction_puts_predictions_where_the_patches_are():
    model = tiny_pretraining()
    batch = tiny_batch(model.config, batch_size=2)
    # A decoder that knows the pixels reconstructs the picture.
    targets = model.pixel_targets(batch["pixel_values"])
    model.pixel_decoder.forward = lambda *_: torch.cat((torch.zeros(2, 1, 160), targets), dim=1)
    mask, pixels = model.reconstruct(**batch)
    assert torch.equal(pixels, batch["pixel_values"])
    assert mask.shape == (2, 1, 32, 48)
    with torch.no_grad():
        hidden = model(**batch).mask
    for sample, patch in ((0, 0), (0, 13), (1, 47), (1, 30)):
        row, column = divmod(patch, 12)
        square = mask[sample, 0, 8 * row : 8 * row + 8, 4 * column : 4 * column + 4]
        assert torch.equal(square, hidden[sample, patch].expand(8, 4))


# ---- Sizes


def test_default_sizes_are_the_papers():
    config = PiLaMIMConfig()
    assert (config.decoder_num_hidden_layers, config.decoder_hidden_size, config.decoder_num_attention_heads) == (
        6,
        384,
        12,
    )
    assert (config.mask_ratio, config.ema_momentum, config.ema_momentum_end) == (0.75, 0.996, 1.0)
    assert (config.num_patches, config.num_keep) == (196, 49)
    with torch.device("meta"):
        model = PiLaMIMForPreTraining(config)
    block = 4 * (768 * 768 + 768) + 2 * 4 * 768 * 768 + 5 * 768 + 4 * 768
    encoder = 12 * block + (16 * 16 * 3 * 768 + 768) + 768 + 2 * 768
    assert model.encoder.num_parameters() == model.target_encoder.num_parameters() == encoder == 85_647_360
    block = 4 * (384 * 384 + 384) + 2 * 4 * 384 * 384 + 5 * 384 + 4 * 384
    decoder = 6 * block + (768 * 384 + 384) + 384 + 2 * 384 + (384 * 768 + 768)
    for part in (model.pixel_decoder, model.latent_decoder):
        assert sum(parameter.numel() for parameter in part.parameters()) == decoder


@pytest.mark.parametrize(
    ("start", "end"), [(0.9, 0.8), (-0.1, 1.0), (0.9, 1.1), (float("nan"), 1.0)], ids=lambda value: str(value)
)
def test_momenta_that_make_no_average_are_refused(start, end):
    with pytest.raises(ValueError, match=f"ema_momentum is {start}.*{end}.*expected"):
        PiLaMIMConfig(ema_momentum=start, ema_momentum_end=end)


def test_decoder_sizes_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="decoder_num_attention_heads is 5.*decoder_hidden_size, 48"):
        tiny_pretraining(decoder_num_attention_heads=5)
    with pytest.raises(ValueError, match="decoder_hidden_size is 50.*multiple of 4"):
        tiny_pretraining(decoder_hidden_size=50, decoder_num_attention_heads=5)


# ---- The release's checkpoints


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def saved_checkpoint(golden, kind, folder):
    """The release's weights in one of the forms that they come in."""
    if kind == "safetensors":
        safetensors.torch.save_file(golden.state, folder / "weights.safetensors")
        return folder / "weights.safetensors"
    contents = {
        "plain": golden.state,
        "model": {"model": golden.state, "epoch": 799, "optimizer": {"lr": 1e-3}},
        "state_dict": {"state_dict": golden.state},
        "namespace": {"model": golden.state, "args": argparse.Namespace(lr=1e-3, name="pilamim")},
        "distributed": {"model": {f"module.{name}": value for name, value in golden.state.items()}},
    }
    torch.save(contents[kind], folder / "weights.pth")
    return folder / "weights.pth"


@pytest.mark.parametrize("kind", ["plain", "model", "state_dict", "namespace", "distributed", "safetensors"])
@pytest.mark.parametrize("as_string", [True, False])
def test_checkpoints_are_read_in_every_wrapping(kind, as_string, tmp_path):
    golden = Golden("pilamim")
    path = saved_checkpoint(golden, kind, tmp_path)
    model = hf_mim.from_original(str(path) if as_string else path, "pilamim", config=golden.config)
    with torch.no_grad():
        golden.assert_numbers(model(golden.input["pixel_values"], noise=golden.input["noise"]))


def test_converted_model_can_be_saved_and_used(tmp_path):
    golden = Golden("pilamim")
    model = hf_mim.from_original(golden.state, "pilamim", config=PiLaMIMConfig(**golden_config(golden)))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.target_encoder.parameters())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = PiLaMIMForPreTraining.from_pretrained(tmp_path)
        golden.assert_numbers(loaded(golden.input["pixel_values"], noise=golden.input["noise"]))
        expected = model.encoder(golden.input["pixel_values"]).last_hidden_state
        exported = hf_mim.to_vit(model)(golden.input["pixel_values"]).last_hidden_state
        torch.testing.assert_close(exported, expected, rtol=0, atol=1e-5)


def golden_config(golden):
    """All fields, those that only the weights tell among them."""
    heads = {name: golden.config[name] for name in ("num_attention_heads", "decoder_num_attention_heads")}
    return original_config(golden.state) | heads


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"model": Harmful(str(tmp_path / "harm"))}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth.*could run code"):
        hf_mim.from_original(tmp_path / "weights.pth", "pilamim")
    assert not (tmp_path / "harm").exists()


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth.*safetensors"):
        hf_mim.from_original(tmp_path / "nowhere.pth", "pilamim")


def test_wrong_checkpoint_names_what_it_lacks():
    with pytest.raises(ValueError, match="(?s)encoder.patchify.weight.*pilamim release.*blocks.0.attn.qkv.weight"):
        hf_mim.from_original({"blocks.0.attn.qkv.weight": torch.zeros(3)}, "pilamim")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_damaged_checkpoint_is_named(name, tmp_path):
    golden = Golden("pilamim")
    path = saved_checkpoint(golden, "safetensors" if name.endswith("safetensors") else "plain", tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        hf_mim.from_original(path, "pilamim")


def test_checkpoint_without_names_is_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth holds a list"):
        hf_mim.from_original(tmp_path / "weights.pth", "pilamim")


def test_config_that_does_not_fit_the_weights_names_what_does_not():
    golden = Golden("pilamim")
    with pytest.raises(ValueError, match="(?s)do not fit the config.*encoder.embeddings.position_embeddings"):
        hf_mim.from_original(golden.state, "pilamim", config=golden.config | {"image_size": 64})


def test_incomplete_checkpoint_names_what_it_lacks():
    golden = Golden("pilamim")
    state = {name: value for name, value in golden.state.items() if name != "target_decoder.head_latent.bias"}
    with pytest.raises(ValueError, match="target_decoder.head_latent.bias"):
        hf_mim.from_original(state, "pilamim", config=golden.config)
