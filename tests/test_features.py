"""Features of any ViT: poolings, caching, processes, and what is refused."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from hf_mim import PiLaMIMForPreTraining, PiLaMIMModel
from hf_mim.data.dataset import ImageDataset
from hf_mim.data.image_processing import build_image_processor
from hf_mim.data.loading import ImageSplits
from hf_mim.data.sources.folder import from_folder
from hf_mim.evaluation.encoders import FeatureEncoder, RawPixels, blocks_read, load_encoder, untrained_encoder
from hf_mim.evaluation.features import extract_features, labelled_splits, shared_labels
from hf_mim.models.vit.position import sincos_position_table
from tiny_training import pictures, tiny_config, write_pictures

VIT = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VIT["intermediate_size"] = 48
MODELS = {
    "pilamim": lambda: PiLaMIMModel(tiny_config(num_hidden_layers=3)),
    "vit": lambda: ViTModel(ViTConfig(**VIT)),
    "vit_mae": lambda: ViTMAEModel(ViTMAEConfig(**VIT)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**VIT)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VIT, num_register_tokens=2)),
    "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT, num_register_tokens=2)),
    "clip_vision_model": lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)),
}
REGISTERS = {"dinov2_with_registers": 2, "dinov3_vit": 2}
POOLINGS = ["cls", "mean", "last_2"]


def saved(name: str, folder):
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def noise_pictures(number: int = 11, seed: int = 0) -> ImageDataset:
    return ImageDataset(pictures(number, seed), 3, source="noise")


def processor(size=(16, 16), mean=0.5):
    return build_image_processor(size, 3, [mean] * 3, [0.25] * 3)


class TestEncoders:
    @pytest.mark.parametrize("name", MODELS)
    def test_poolings_and_attention_of_every_kind(self, name, tmp_path):
        encoder = load_encoder(saved(name, tmp_path))
        model, registers = encoder.model, REGISTERS.get(name, 0)
        torch.manual_seed(1)
        pixel_values = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            outputs = model(pixel_values, output_hidden_states=True)
        norm = {"dinov3_vit": "norm", "clip_vision_model": "post_layernorm"}.get(name, "layernorm")
        blocks = [getattr(model, norm)(states).detach() for states in outputs.hidden_states[1:]]
        found = encoder.features(pixel_values, POOLINGS)
        torch.testing.assert_close(found["cls"], blocks[2][:, 0])
        torch.testing.assert_close(found["mean"], blocks[2][:, 1 + registers :].mean(dim=1))
        torch.testing.assert_close(found["last_2"], torch.cat([blocks[1][:, 0], blocks[2][:, 0]], dim=1))
        if name not in ("vit", "vit_mae", "clip_vision_model"):
            torch.testing.assert_close(found["cls"], outputs.last_hidden_state[:, 0])
        patches = encoder.patches(pixel_values)
        assert patches.shape == (2, 4, 4, 32)
        torch.testing.assert_close(patches.flatten(1, 2), blocks[2][:, 1 + registers :])
        attention = encoder.cls_attention(pixel_values)
        assert attention.shape == (2, 2, 4, 4)
        total = attention.sum(dim=(2, 3))
        assert (total > 0.3).all() and (total < 1).all()  # [CLS] itself and the registers have the rest
        assert model.config._attn_implementation == "sdpa"
        # Every patch matters, in its own place.
        moved = encoder.patches(torch.flip(pixel_values, dims=[3]))
        assert not torch.allclose(patches, moved) and not torch.allclose(patches, moved.flip(2))

    def test_masking_is_off(self, tmp_path):
        model = ViTMAEModel(ViTMAEConfig(**VIT, mask_ratio=0.75))
        model.save_pretrained(tmp_path)
        encoder = load_encoder(tmp_path)
        pixel_values = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(encoder.features(pixel_values, ["mean"]), encoder.features(pixel_values, ["mean"]))
        assert encoder.patches(pixel_values).shape == (2, 4, 4, 32)
        with pytest.raises(ValueError, match="sees the whole picture"):
            FeatureEncoder(model.eval()).features(pixel_values, ["cls"])

    def test_pretraining_checkpoint_and_whole_clip(self, tmp_path):
        model = PiLaMIMForPreTraining(tiny_config())
        model.save_pretrained(tmp_path / "ours")
        encoder = load_encoder(tmp_path / "ours")
        assert type(encoder.model) is PiLaMIMModel and not encoder.model.training
        weights = model.encoder.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in encoder.model.state_dict().items())
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=VIT))
        clip.save_pretrained(tmp_path / "clip")
        found = load_encoder(tmp_path / "clip").features(torch.ones(1, 3, 16, 16), ["cls"])["cls"]
        assert torch.allclose(found, clip.eval().vision_model(torch.ones(1, 3, 16, 16)).pooler_output, atol=1e-6)

    def test_other_sizes_interpolate(self, tmp_path):
        encoder = load_encoder(saved("vit", tmp_path))
        pixel_values = torch.randn(1, 3, 24, 16)
        assert encoder.patches(pixel_values).shape == (1, 6, 4, 32)
        expected = encoder.model(pixel_values, interpolate_pos_encoding=True).last_hidden_state[:, 0].detach()
        torch.testing.assert_close(encoder.features(pixel_values, ["cls"])["cls"], expected)

    def test_untrained_twin(self, tmp_path):
        encoder = load_encoder(saved("vit_mae", tmp_path))
        state = torch.random.get_rng_state()
        twin, again = untrained_encoder(encoder, 3), untrained_encoder(encoder, 3)
        assert torch.equal(state, torch.random.get_rng_state())
        assert twin.digest() == again.digest() != encoder.digest() != untrained_encoder(encoder, 4).digest()
        torch.testing.assert_close(twin.model.embeddings.position_embeddings.data, sincos_position_table(4, 4, 32))

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])), "patch_size"),
            (lambda: BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)), "Vision"),
        ],
    )
    def test_no_vit(self, model, message, tmp_path):
        model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            load_encoder(tmp_path)

    def test_no_cls(self):
        config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
        with pytest.raises(ValueError, match="expected 64 tokens and at most 2 before"):
            FeatureEncoder(SwinModel(config).eval()).features(torch.zeros(1, 3, 32, 32), ["cls"])

    @pytest.mark.parametrize(
        ("model_class", "config_class"), [(IJepaModel, IJepaConfig), (SiglipVisionModel, SiglipVisionConfig)]
    )
    def test_patches_alone(self, model_class, config_class, tmp_path):
        torch.manual_seed(0)
        model_class(config_class(**VIT)).save_pretrained(tmp_path)
        encoder = load_encoder(tmp_path)
        pixel_values = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            tokens = model_class.from_pretrained(tmp_path).eval()(pixel_values).last_hidden_state
        torch.testing.assert_close(encoder.features(pixel_values, ["mean"])["mean"], tokens.mean(dim=1))
        torch.testing.assert_close(encoder.patches(pixel_values), tokens.unflatten(1, (4, 4)))
        assert encoder.cls_attention(pixel_values) is None
        assert encoder.poolings == ("mean",)
        with pytest.raises(ValueError, match="has no .CLS., which pooling cls reads: use mean"):
            encoder.features(pixel_values, ["cls"])

    def test_two_tokens_before_the_patches(self, tmp_path):
        DeiTModel(DeiTConfig(**VIT)).save_pretrained(tmp_path)
        encoder = load_encoder(tmp_path)
        pixel_values = torch.randn(2, 3, 16, 16)
        tokens = encoder.model(pixel_values).last_hidden_state.detach()
        assert encoder.poolings == ("cls", "mean")
        found = encoder.features(pixel_values, encoder.poolings)
        torch.testing.assert_close(found["cls"], tokens[:, 0])
        torch.testing.assert_close(found["mean"], tokens[:, 2:].mean(dim=1))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_encoder(str(tmp_path / "nowhere"))

    def test_names_of_poolings(self):
        assert [blocks_read(name) for name in ("cls", "mean", "last_1", "last_12")] == [1, 1, 1, 12]
        for name in ("max", "last_0", "last_", "last_-1", "CLS"):
            with pytest.raises(ValueError, match="expected cls"):
                blocks_read(name)

    def test_too_many_blocks(self, tmp_path):
        with pytest.raises(ValueError, match="the model has 3"):
            load_encoder(saved("vit", tmp_path)).features(torch.zeros(1, 3, 16, 16), ["last_4"])

    def test_digest_is_of_what_is_computed(self, tmp_path):
        encoder = load_encoder(saved("vit", tmp_path))
        digest = encoder.digest()
        assert load_encoder(tmp_path).digest() == digest
        with torch.no_grad():
            encoder.model.layers[1].mlp.fc1.bias[3] += 1e-6
        assert encoder.digest() != digest
        encoder = load_encoder(tmp_path)
        encoder.model.config.layer_norm_eps = 1e-3
        assert encoder.digest() != digest

    def test_raw_pixels(self):
        small = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
        assert torch.equal(RawPixels().features(small)["pixels"], small.flatten(1))
        large = RawPixels().features(torch.ones(1, 3, 64, 40) * torch.arange(64.0).view(1, 1, 64, 1))["pixels"]
        assert large.shape == (1, 3 * 32 * 32)
        torch.testing.assert_close(large.view(3, 32, 32)[0, :, 0], torch.arange(0.5, 64, 2))


class TestExtraction:
    def test_several_encoders_in_one_pass(self, tmp_path):
        encoders = {name: load_encoder(saved(name, tmp_path / name)) for name in ("pilamim", "vit")}
        data = noise_pictures()
        found = extract_features(encoders | {"raw": RawPixels()}, data, processor(), POOLINGS, batch_size=4)
        assert {name: list(pooled) for name, pooled in found.items()} == {
            "pilamim": POOLINGS,
            "vit": POOLINGS,
            "raw": ["pixels"],
        }
        pixel_values = torch.stack([(data[index].float() / 255 - 0.5) / 0.25 for index in range(11)])
        torch.testing.assert_close(found["raw"]["pixels"], pixel_values.flatten(1))
        for name, encoder in encoders.items():
            for pooling, values in encoder.features(pixel_values, POOLINGS).items():
                torch.testing.assert_close(found[name][pooling], values)

    def test_cache(self, tmp_path, monkeypatch):
        encoder = load_encoder(saved("vit", tmp_path / "vit"))
        cache = tmp_path / "cache"
        runs = []
        stock = FeatureEncoder.features
        monkeypatch.setattr(
            FeatureEncoder,
            "features",
            lambda self, batch, poolings: runs.append(poolings) or stock(self, batch, poolings),
        )

        def extract(encoder=encoder, data=None, processor_=None, poolings=("cls",), **kwargs):
            runs.clear()
            data = noise_pictures() if data is None else data
            found = extract_features(
                {"a": encoder}, data, processor_ or processor(), poolings, cache_dir=cache, **kwargs
            )
            return found["a"], len(list(cache.iterdir())), list(runs)

        first, files, ran = extract()
        assert files == 1 and ran == [["cls"]]
        again, files, ran = extract(load_encoder(tmp_path / "vit"))
        assert files == 1 and not ran and torch.equal(first["cls"], again["cls"])
        # Only what is missing is computed, and the order is the one asked for.
        both, files, ran = extract(poolings=("mean", "cls"))
        assert list(both) == ["mean", "cls"] and files == 2 and ran == [["mean"]]
        # Whatever changes the features is a miss.
        other = load_encoder(tmp_path / "vit")
        with torch.no_grad():
            other.model.embeddings.cls_token += 0.1
        misses = [
            {"encoder": other},
            {"data": noise_pictures(seed=1)},
            {"data": noise_pictures().select(np.arange(11)[::-1].copy())},
            {"processor_": processor(mean=0.4)},
            {"bf16": True},
        ]
        for number, miss in enumerate(misses):
            found, files, ran = extract(**miss)
            assert files == 3 + number and ran, miss
            assert not torch.equal(found["cls"], first["cls"]), miss
        reversed_, _, ran = extract(**misses[2])
        assert not ran
        torch.testing.assert_close(reversed_["cls"].flip(0), first["cls"])
        key = None
        for path in cache.iterdir():
            assert load_file(path)["features"].shape == (11, 32) and not path.name.endswith(".tmp")
            key = path
        # A damaged file is computed anew.
        for path in cache.iterdir():
            path.write_bytes(path.read_bytes()[:50])
        found, files, ran = extract()
        assert ran and torch.equal(found["cls"], first["cls"]) and key.exists()

    def test_fingerprints_of_files_and_columns(self, tmp_path):
        import datasets
        from PIL import Image

        from hf_mim.data.sources.datasets import from_datasets

        folder = write_pictures(tmp_path / "pictures", 4)
        first = from_folder([str(folder)], 3)[0].fingerprint()
        assert from_folder([str(folder)], 3)[0].fingerprint() == first
        np.save(folder / "002.npy", np.zeros((16, 16, 3), dtype=np.float32))
        assert from_folder([str(folder)], 3)[0].fingerprint() != first

        def column(value):
            images = [Image.new("RGB", (4, 4), (value, i, 0)) for i in range(3)]
            split = datasets.Dataset.from_dict(
                {"image": images}, features=datasets.Features({"image": datasets.Image()})
            )
            split.save_to_disk(str(tmp_path / f"saved{value}"))
            return lambda: from_datasets(
                {"train": datasets.load_from_disk(str(tmp_path / f"saved{value}"))}, 3, source="x"
            )["train"].fingerprint()

        one, two = column(1), column(2)
        assert one() == one() != two()
        # Pictures of another kind are read for it.
        values = list(pictures(3))
        first = ImageDataset(values, 3, source="x").fingerprint()
        assert ImageDataset(values, 3, source="y").fingerprint() == first
        assert ImageDataset([*values[:2], values[0]], 3, source="x").fingerprint() != first

    def test_no_pictures(self, tmp_path):
        with pytest.raises(ValueError, match="no pictures"):
            extract_features({"raw": RawPixels()}, noise_pictures(0), processor())
        with pytest.raises(ValueError, match="expected cls"):
            extract_features({"raw": RawPixels()}, noise_pictures(), processor(), ["median"])

    def test_two_processes_get_what_one_gets(self, tmp_path, processes):
        """Eleven pictures over two processes: in order, none lost, the cache written once and found by both."""
        saved("vit", tmp_path / "vit")
        script = tmp_path / "extract.py"
        script.write_text("""
import os, sys
sys.path.insert(0, "tests")
import torch
from accelerate import PartialState
from test_features import noise_pictures, processor
from hf_mim.evaluation.encoders import FeatureEncoder, load_encoder
from hf_mim.evaluation.features import extract_features
folder = sys.argv[1]
state = PartialState(cpu=True)
encoder = load_encoder(f"{folder}/vit")
pictures_seen = []
stock = FeatureEncoder.features
def features(self, batch, poolings):
    pictures_seen.append(len(batch))
    return stock(self, batch, poolings)
FeatureEncoder.features = features
settings = {"poolings": ["cls", "mean"], "batch_size": 4, "cache_dir": f"{folder}/cache"}
found = [extract_features({"a": encoder}, noise_pictures(), processor(), **settings)["a"] for _ in range(2)]
torch.save((found, pictures_seen), f"{folder}/rank{state.process_index}.pt")
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort at the interpreter's end
""")
        result = processes([str(script), str(tmp_path)], 2)
        assert result.returncode == 0, result.stderr
        expected = extract_features(
            {"a": load_encoder(tmp_path / "vit")}, noise_pictures(), processor(), ["cls", "mean"], batch_size=4
        )["a"]
        for rank in range(2):
            (first, second), seen = torch.load(tmp_path / f"rank{rank}.pt")
            assert seen == [4, 2]  # its share, once
            for pooling, values in expected.items():
                assert first[pooling].shape == (11, 32)
                torch.testing.assert_close(first[pooling], values, rtol=0, atol=1e-5)
                assert torch.equal(first[pooling], second[pooling])
        assert len(list((tmp_path / "cache").iterdir())) == 2
        assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".safetensors"}


class TestSplits:
    def test_limits_and_labels(self):
        def split(number, labels):
            return ImageDataset(pictures(number), 3, source="noise", labels=labels)

        train = split(20, {"a": np.arange(20), "b": np.zeros(20)})
        test = split(10, {"b": np.arange(10), "c": np.zeros(10)})
        found = labelled_splits(ImageSplits(train, test), 8, 100)
        assert [len(part) for part in found] == [8, 10]
        again = labelled_splits(ImageSplits(train, test), 8, 100)
        assert found[0].labels["a"].tolist() == again[0].labels["a"].tolist() != list(range(8))
        train_labels, test_labels = shared_labels(*found)
        assert list(train_labels) == list(test_labels) == ["b"]
        hidden = split(10, {"a": np.full(10, -1), "b": np.arange(10) - 1})
        assert list(shared_labels(train, hidden)[1]) == ["b"]
        assert sorted(test_labels["b"].tolist()) == list(range(10)) and test_labels["b"].dtype == torch.int64


def test_files_replaced_by_others_that_look_alike_have_another_fingerprint(tmp_path):
    """Of the same names, sizes and times, as copying tools leave them."""
    for index in range(4):
        np.save(tmp_path / f"{index}.npy", np.full((8, 8, 3), index, dtype=np.uint8))
    (before,) = from_folder([str(tmp_path)], 3)
    first, stat = before.fingerprint(), os.stat(tmp_path / "2.npy")
    np.save(tmp_path / "2.npy", np.full((8, 8, 3), 99, dtype=np.uint8))
    os.utime(tmp_path / "2.npy", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (after,) = from_folder([str(tmp_path)], 3)
    assert os.stat(tmp_path / "2.npy").st_size == stat.st_size
    assert after.fingerprint() != first


def test_several_labels_a_picture_are_there_where_they_are_wanted():
    labels = {"one": np.arange(4) % 2, "tags": np.array([[1, 0], [0, 0], [1, 1], [-1, -1]])}
    names = {"one": ["a", "b"], "tags": ["x", "y"]}
    data = ImageDataset(np.zeros((4, 8, 8, 3), np.uint8), 3, source="made", labels=labels, label_names=names)
    assert list(shared_labels(data, data)[0]) == ["one"]
    assert shared_labels(data, data, multi_label=True)[0]["tags"].shape == (4, 2)
