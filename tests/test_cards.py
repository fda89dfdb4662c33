"""What cards tell the Hub: metadata, where weights are from, and under which licence."""

import pytest
from huggingface_hub import ModelCard

from hf_mim.hub.cards import CardContext, write_card, write_classifier_card, write_segmenter_card
from hf_mim.hub.origin import Origin, read_origin
from tiny import tiny_config

RESULTS = {
    "num_train": 60,
    "num_test": 60,
    "notes": [],
    "features": {
        "raw pixels": {"knn": {"count": 20.0}, "linear": {"count": 30.0}, "rank_me": None},
        "trained, [CLS]": {"knn": {"count": 50.5}, "linear": {"count": None}, "rank_me": 3.0},
    },
}


def folder_with_card(path, metadata: str) -> str:
    path.mkdir(parents=True)
    (path / "README.md").write_text(f"---\n{metadata}\n---\n\n# A model\n")
    return str(path)


class TestOrigin:
    def test_names_on_the_hub_and_nothing_else(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs" / "mine").mkdir(parents=True)
        origin = read_origin("you/start", "facebook/dino", dataset_name="you/pictures")
        assert origin == Origin(base_models=["you/start", "facebook/dino"], datasets=["you/pictures"])
        for path in ("runs/mine", "/no/such/folder", "untrained", None):
            assert read_origin(path) == Origin()
        assert read_origin(dataset_name="torchvision:CIFAR10").datasets == []
        assert read_origin(dataset_name="runs/mine").datasets == []

    def test_what_a_folder_s_card_tells_goes_on(self, tmp_path):
        run = folder_with_card(tmp_path / "run", "base_model: you/start\nlicense: apache-2.0")
        base = folder_with_card(tmp_path / "base", "license: mit")
        assert read_origin(run) == Origin(base_models=["you/start"], license="apache-2.0")
        # Of two that differ none is chosen; what is asked for is.
        assert read_origin(run, base).license is None
        assert read_origin(run, base, license="mit").license == "mit"

    @pytest.mark.parametrize("license", ["cc-by-nc-4.0", "cc-by-nc-sa-4.0", "other", "unknown"])
    def test_terms_are_not_forgotten(self, license, tmp_path):
        base = folder_with_card(tmp_path / "base", f"license: {license}")
        # Asking for another does not make them go away.
        for asked in (None, "apache-2.0"):
            (told,) = read_origin(base, license=asked).restricted
            assert base in told
            assert ("forbids commercial use" in told) == ("-nc" in license)


def read(path) -> ModelCard:
    card = ModelCard.load(path)
    # As the Hub has it: what is written is read as the same.
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    return card


class TestCard:
    ORIGIN = Origin(["you/start"], ["you/pictures"], "cc-by-nc-4.0", ["you/start is under cc-by-nc-4.0."])

    def test_metadata_of_an_encoder(self, tmp_path):
        context = CardContext(self.ORIGIN, "you/pictures", {"decides": {"seed": 7}}, ["loss_curves.png"], "vit")
        config = tiny_config("pilamim", num_channels=3)
        card = read(write_card(tmp_path, "me/mine", config, {"steps": "7"}, RESULTS, None, context))
        data = card.data
        assert (data.library_name, data.pipeline_tag) == ("transformers", "image-feature-extraction")
        assert (data.base_model, data.base_model_relation) == (["you/start"], "finetune")
        assert (data.license, data.datasets, data.model_name) == ("cc-by-nc-4.0", ["you/pictures"], "mine")
        # Of what was trained, where there is a number.
        (result,) = data.eval_results
        assert (result.task_type, result.metric_type, result.metric_value) == (
            "image-classification",
            "accuracy",
            50.5,
        )
        assert result.dataset_type == "you/pictures" and "count" in result.metric_name and "k-NN" in result.metric_name
        for text in ("you/start is under", '"seed": 7', "![loss_curves](loss_curves.png)", "hf_mim.PiLaMIMModel"):
            assert text in card.text
        code = card.text.split("```python\n")[1].split("```")[0].strip()
        assert len(code.splitlines()) == 4 and "hf_mim" not in code

    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    @pytest.mark.parametrize("num_channels", [3, 5])
    def test_code_for_all(self, pooling, num_channels, tmp_path):
        config = tiny_config("tec", num_channels=num_channels, pooling=pooling, num_register_tokens=2)
        text = read(write_card(tmp_path, "me/mine", config, {}, None, None, CardContext(form="dinov2"))).text
        assert ("tokens[:, 3:].mean(dim=1)" in text) == (pooling == "mean")
        assert ("AutoImageProcessor" in text) == (num_channels == 3)

    def test_nothing_that_is_not_known(self, tmp_path):
        data = read(write_card(tmp_path, "out", tiny_config("ocl"), {}, None)).data.to_dict()
        assert set(data) == {"library_name", "pipeline_tag", "tags"}

    def test_metadata_of_classifier_and_segmenter(self, tmp_path):
        config = tiny_config("ocl", num_labels=2)
        results = {"accuracy": 90.0, "num_test": 10, "robustness": {"odd": {"accuracy": 70.0}}}
        card = read(
            write_classifier_card(tmp_path, "me/mine", config, {}, results, CardContext(self.ORIGIN, form="vit"))
        )
        values = [(one.dataset_name, one.metric_value) for one in card.data.eval_results]
        assert values == [("the training data", 90.0), ("odd", 70.0)]
        assert card.data.pipeline_tag == "image-classification" and "import hf_mim" not in card.text
        assert "import hf_mim" in read(write_classifier_card(tmp_path, "me/mine", config, {}, results)).text
        scores = {"miou": 40.0, "mean_accuracy": 50.0, "pixel_accuracy": 60.0, "iou": {"a": None}, "num_test": 3}
        card = read(write_segmenter_card(tmp_path, "me/mine", config, {}, scores))
        assert {one.metric_type: one.metric_value for one in card.data.eval_results} == {
            "mean_iou": 40.0,
            "mean_accuracy": 50.0,
            "accuracy": 60.0,
        }
        assert "import hf_mim" in card.text and "| a |  |" in card.text
