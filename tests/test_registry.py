"""What `import hf_mim` does, in processes of their own, and what it leaves alone."""

import pytest
import transformers

import hf_mim
from hf_mim.data.image_processing import MIMImageProcessor, build_image_processor
from hf_mim.registry import METHODS, method_class, method_module
from tiny import tiny_model
from tiny_training import run

SUFFIXES = (
    "Config",
    "Model",
    "ForPreTraining",
    "ForImageClassification",
    "ForSemanticSegmentation",
    "ForDepthEstimation",
    "ForObjectDetection",
    "Backbone",
)


# What a process has imported after some code.
MODULES = "\nimport sys\nprint(*sys.modules, sep='\\n')"


def test_importing_costs_nothing():
    """Transformers' Auto classes learn of ours when they are imported themselves."""
    names = {name.split(".")[0] for name in run(["-c", f"import hf_mim{MODULES}"]).stdout.split()}
    assert "hf_mim" in names
    assert not names & {"torch", "transformers", "numpy", "huggingface_hub"}


def test_auto_classes_know_ours_in_all_orders(fork, tmp_path):
    tiny_model("ocl", "Model").save_pretrained(tmp_path)
    load = f"AutoModel.from_pretrained({str(tmp_path)!r})"
    codes = [
        f"import hf_mim\nfrom transformers import AutoModel\nprint(type({load}).__name__)",
        f"from transformers import AutoModel\nimport hf_mim\nprint(type({load}).__name__)",
        "import hf_mim\nfrom transformers import AutoConfig\n"
        f"print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)",
    ]
    assert [fork(code).strip() for code in codes] == ["OCLModel", "OCLModel", "OCLConfig"]


def test_importing_costs_no_model_and_no_data_library(fork):
    stock = "from transformers import AutoModel, PreTrainedConfig"
    plain, ours = (set(fork(code + MODULES).split()) for code in (stock, f"{stock}\nimport hf_mim"))
    added = ours - plain
    assert not [name for name in added if ".modeling_" in name]
    assert not [name for name in added if name.split(".")[0] in ("datasets", "evaluate", "torchvision", "matplotlib")]
    assert {name.split(".")[0] for name in added} <= {"hf_mim"} | {name.split(".")[0] for name in plain}
    for model_type in METHODS:
        assert f"hf_mim.models.{model_type}.configuration_{model_type}" in added


def test_what_is_trained_is_not_made_of_transformers_own_modules(fork):
    """These are renamed and merged from one version to the next; what another network is read with needs them."""
    loaded = set(fork(f"import hf_mim; hf_mim.PiLaMIMForPreTraining; hf_mim.OCLForPreTraining{MODULES}").split())
    assert "hf_mim.models.vit.modeling_vit" in loaded
    own = [name for name in loaded if name.startswith("transformers.models.") and ".modeling_" in name]
    assert [name for name in own if ".auto." not in name] == []


def test_public_names_resolve():
    for model_type, prefix in METHODS.items():
        for suffix in SUFFIXES:
            resolved = getattr(hf_mim, prefix + suffix)
            assert resolved is method_class(model_type, suffix) and resolved.__name__ == prefix + suffix
            assert prefix + suffix in dir(hf_mim)
    assert callable(hf_mim.from_original) and callable(hf_mim.to_vit)
    for name in hf_mim.__all__:
        assert getattr(hf_mim, name) is not None
    with pytest.raises(AttributeError, match="hf_mim.*NoSuchThing"):
        _ = hf_mim.NoSuchThing


@pytest.mark.parametrize("model_type", METHODS)
def test_mappings_give_the_real_classes(model_type):
    for auto, suffix in (
        ("AutoModel", "Model"),
        ("AutoModelForPreTraining", "ForPreTraining"),
        ("AutoModelForImageClassification", "ForImageClassification"),
        ("AutoModelForSemanticSegmentation", "ForSemanticSegmentation"),
        ("AutoModelForDepthEstimation", "ForDepthEstimation"),
        ("AutoModelForObjectDetection", "ForObjectDetection"),
        ("AutoBackbone", "Backbone"),
    ):
        mapping, config_class = getattr(transformers, auto)._model_mapping, method_class(model_type, "Config")
        found = mapping[config_class]
        assert found is method_class(model_type, suffix) and issubclass(found, transformers.PreTrainedModel)
        assert mapping.get(config_class, None) is found and config_class in mapping
        assert dict(mapping._extra_content)[config_class] is found


def test_where_a_module_is_may_be_asked_before_it_is_imported(fork, tmp_path):
    tiny_model("ocl", "Model", num_channels=5).save_pretrained(tmp_path)
    build_image_processor((32, 48), 5, [0.5] * 5, [0.5] * 5).save_pretrained(tmp_path)
    printed = fork(
        "import hf_mim, importlib.util\n"
        "assert importlib.util.find_spec('transformers.models.auto.image_processing_auto')\n"
        "from transformers import AutoImageProcessor\n"
        f"print(type(AutoImageProcessor.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    assert printed.strip() == "MIMImageProcessor"


# What a server that only embeds may leave out.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {missing!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
EMBEDDING = """
model = AutoModel.from_pretrained({folder!r})
processor = AutoImageProcessor.from_pretrained({folder!r})
image = np.zeros((40, 50, {channels}), dtype=np.uint8)
print(tuple(model(**processor(image, return_tensors="pt")).pooler_output.shape))
hf_mim.to_vit(model)
"""


def test_embedding_needs_none_of_what_training_needs(fork, tmp_path):
    embeddings = []
    for model_type, channels in [*((method, 5) for method in METHODS), ("tec", 3)]:
        folder = str(tmp_path / f"{model_type}-{channels}")
        tiny_model(model_type, "ForPreTraining", num_channels=channels).save_pretrained(folder)
        build_image_processor((32, 48), channels, [0.5] * channels, [0.5] * channels).save_pretrained(folder)
        embeddings.append(EMBEDDING.format(folder=folder, channels=channels))
    code = WITHOUT.format(missing=["timm", "datasets", "evaluate", "matplotlib", "sklearn", "peft"]) + (
        "import numpy as np, torch\nimport hf_mim\nfrom transformers import AutoImageProcessor, AutoModel"
    )
    assert fork("\n".join([code, *embeddings])).splitlines() == ["(1, 32)"] * len(embeddings)


@pytest.mark.parametrize("first", ["hf_mim", "transformers", "our processor"])
def test_image_processor_in_all_orders(first, fork, tmp_path):
    for model_type in METHODS:
        tiny_model(model_type, "Model", num_channels=5).save_pretrained(tmp_path / model_type)
        build_image_processor((32, 48), 5, [0.5] * 5, [0.5] * 5).save_pretrained(tmp_path / model_type)
    imports = ["import hf_mim", "from transformers import AutoImageProcessor"]
    if first == "transformers":
        imports.reverse()
    elif first == "our processor":  # whose own imports bring transformers' registry in
        imports.insert(0, "import hf_mim.data.image_processing")
    loading = [
        f"processor = AutoImageProcessor.from_pretrained({str(tmp_path / model_type)!r})\n"
        "print(type(processor).__module__, type(processor).__name__, processor.num_channels)"
        for model_type in METHODS
    ]
    printed = fork("\n".join(imports + loading)).splitlines()
    assert printed == [f"{MIMImageProcessor.__module__} MIMImageProcessor 5"] * len(METHODS)


def test_registering_twice_changes_nothing(fork):
    printed = fork(
        "import hf_mim, sys\n"
        "from hf_mim.registry import _AfterImport\n"
        "waiting = lambda: sum(isinstance(finder, _AfterImport) for finder in sys.meta_path)\n"
        "found = [waiting()]\n"
        "hf_mim.register_auto_classes()\n"
        "found.append(waiting())\n"
        "from transformers import AutoImageProcessor, AutoModel\n"
        "found.append(waiting())\n"
        "hf_mim.register_auto_classes()\n"
        "print(found, waiting())"
    )
    assert printed.strip() == "[1, 1, 0] 0"


WANTED = """
import hf_mim
from hf_mim.__main__ import main
for name in ("KNNAccuracy", "FineTuningArguments"):
    try:
        getattr(hf_mim, name)
    except ImportError as error:
        print(error)
import sys
sys.stderr = sys.stdout
print(main(["finetune", "--output_dir=x"]))
"""


def test_what_is_missing_and_wanted_is_said_in_a_line(fork):
    without = WITHOUT.format(missing=["timm", "evaluate"])
    assert fork(without + WANTED).splitlines() == [
        "hf_mim.KNNAccuracy: The package evaluate is wanted for this and is not installed: pip install evaluate",
        "hf_mim.FineTuningArguments: The package timm is wanted for this and is not installed: pip install timm",
        "Error: The package timm is wanted for this and is not installed: pip install timm",
        "1",
    ]


def test_unknown_method_is_named_with_the_known_ones():
    for call in (lambda: method_module("mae", "modeling"), lambda: method_class("mae", "Config")):
        with pytest.raises(ValueError, match="'mae'.*" + ", ".join(METHODS)):
            call()
    with pytest.raises(ValueError, match="'mae'"):
        hf_mim.from_original({}, "mae")
