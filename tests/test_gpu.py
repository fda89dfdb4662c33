"""What needs a GPU: `examples/gpu_check.sh` runs these, and the default tests leave them out."""

import copy
import json

import pytest
import torch
from PIL import Image

from hf_mim.data.scenes import render_scene
from hf_mim.evaluation.knn import knn_predict
from hf_mim.jobs import pretraining
from hf_mim.models.presets import preset_config
from hf_mim.registry import method_class
from tiny import TINY, tiny_batch, tiny_model
from tiny_training import FLAGS, tiny_data, tiny_trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Compiling takes most of the time: once a method.
WAYS = pytest.mark.parametrize(("precision", "compiled"), [("bf16", False), ("fp16", False), ("bf16", True)])


@pytest.fixture(autouse=True)
def exact_products():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()


def on_gpu(model, batch):
    """A copy of the model in training, and the batch."""
    return copy.deepcopy(model).cuda().train(), {name: value.cuda() for name, value in batch.items()}


@pytest.mark.parametrize("method", TINY)
def test_loss_and_gradient_are_the_cpus(method):
    model = tiny_model(method, "ForPreTraining").train()
    batch = tiny_batch(model.config, batch_size=8)
    other, moved = on_gpu(model, batch)
    expected, actual = model(**batch).loss, other(**moved).loss
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)
    expected.backward()
    actual.backward()
    gradients = {name: p.grad for name, p in other.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].cpu(), parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@WAYS
@pytest.mark.parametrize("method", TINY)
def test_half_precision(method, precision, compiled):
    model, batch = on_gpu(tiny_model(method, "ForPreTraining"), tiny_batch(tiny_model(method, "Model").config, 8))
    expected = model(**batch).loss.item()
    forward = torch.compile(model, fullgraph=True) if compiled else model
    with torch.autocast("cuda", dtype=HALF[precision]):
        loss = forward(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=0.03)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("method", TINY)
def test_a_step_does_not_wait_for_the_device(method, tmp_path):
    """Host and device meet when something is logged, and at no other step."""
    config = method_class(method, "Config")(**preset_config(method, "tiny", (16, 16), [4]))
    settings = {"use_cpu": False, "bf16": True, "logging_steps": 100, "dataloader_pin_memory": True}
    trainer = tiny_trainer(
        tmp_path, config=config, model_class=method_class(method, "ForPreTraining"), max_steps=1, **settings
    )
    trainer.train()
    batch = trainer.data_collator([tiny_data()[0, index] for index in range(4)])
    batch = {name: value.pin_memory().to("cuda", non_blocking=True) for name, value in batch.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.training_step(trainer.model, batch)
        trainer.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ocl_at_9600_with_and_without_chunks():
    config = method_class("ocl", "Config")(**preset_config("ocl", "tiny", None))
    torch.manual_seed(0)
    model = method_class("ocl", "ForPreTraining")(config).cuda().train()
    batch = {
        "pixel_values": torch.randn(9600, 3, *config.image_size, device="cuda"),
        "noise": torch.rand(9600, config.num_patches, device="cuda"),
    }
    found = []
    for chunk_size in (None, 960):
        model.chunk_size = chunk_size
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.item(), model.encoder.embeddings.patch_embeddings.projection.weight.grad.clone()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)


def test_knn_is_the_cpus():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(number, 32, generator=generator) for number in (500, 100))
    labels = torch.randint(0, 7, (500,), generator=generator)
    expected = knn_predict(train, labels, test)
    assert torch.equal(knn_predict(train.cuda(), labels.cuda(), test.cuda()).cpu(), expected)


@WAYS
def test_pictures_to_features(precision, compiled, tmp_path, capsys):
    """From JPEG files through workers, pinned memory and bytes to a model, its evaluation, and the same resumed."""
    (tmp_path / "pictures").mkdir()
    for i in range(64):
        Image.fromarray(render_scene(i, image_size=64)[0]).save(tmp_path / "pictures" / f"{i:02}.jpg")
    flags = [*(flag for flag in FLAGS if flag != "--use_cpu" and not flag.startswith("--bf16"))]
    flags += [f"--train_dir={tmp_path / 'pictures'}", f"--output_dir={tmp_path / 'run'}", f"--{precision}=true"]
    flags += ["--num_train_epochs=2", "--save_strategy=epoch", "--dataloader_num_workers=2", "--warmup_steps=0"]
    flags += [f"--torch_compile={compiled}"]
    assert pretraining.main(flags) == 0
    out = capsys.readouterr().out
    assert "on cuda" in out and "What limits it" in out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["also"]["device"] == "cuda"
