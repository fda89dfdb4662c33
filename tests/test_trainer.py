"""The trainer: what a step does, what is logged, what resuming gives, and how it ends when something goes wrong."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_mim import PiLaMIMForPreTraining
from hf_mim.data.dataset import ImageDataset
from hf_mim.data.pretraining import PretrainingDataset, StreamingPretrainingDataset
from hf_mim.data.transforms import PretrainingTransform
from hf_mim.training import nonfinite
from hf_mim.training.callbacks import SaveOnInterrupt
from hf_mim.training.losses import LossMeter, NonFiniteLossError
from tiny_training import losses, pictures, tiny_config, tiny_data, tiny_trainer


class StopAt(TrainerCallback):
    """Saves and stops after a step, as an interrupt does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def numbers(trainer) -> dict[str, torch.Tensor]:
    """Everything that training changes."""
    found = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    scheduler = trainer.lr_scheduler.state_dict()
    found["scheduler"] = torch.tensor([*scheduler["_last_lr"], scheduler["last_epoch"]])
    return found


def assert_equal(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, different


def logged(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "loss" in log]


class TestResuming:
    # 5 steps an epoch without accumulation; 20 pictures.
    @pytest.mark.parametrize(
        ("stop", "settings"),
        [
            (2, {}),
            (7, {}),
            (5, {}),
            (7, {"dataloader_num_workers": 2}),
            (5, {"dataloader_num_workers": 2}),
            (4, {"gradient_accumulation_steps": 2}),
            (3, {"gradient_accumulation_steps": 2}),
        ],
        ids=["mid", "later", "boundary", "workers", "boundary-workers", "accumulation", "boundary-accumulation"],
    )
    def test_equals_not_stopping_to_the_bit(self, tmp_path, stop, settings):
        config = tiny_config(drop_path_rate=0.5)
        settings = {
            "num_train_epochs": 3,
            "eval_strategy": "epoch",
            "config": config,
            "eval_data": tiny_data(6),
        } | settings
        unbroken = tiny_trainer(tmp_path / "a", **settings)
        unbroken.train()
        first = tiny_trainer(tmp_path / "b", callbacks=[StopAt(stop)], **settings)
        first.train()
        assert first.state.global_step == stop
        torch.manual_seed(17)
        resumed = tiny_trainer(tmp_path / "b", **settings)
        with torch.no_grad():
            for parameter in resumed.model.parameters():
                parameter.add_(1.0)
        resumed.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{stop}"))
        assert_equal(numbers(resumed), numbers(unbroken))
        assert logged(resumed) == logged(unbroken)
        assert resumed.state.global_step == unbroken.state.global_step == unbroken.state.max_steps

    @pytest.mark.slow  # torch takes 5 seconds to end each of them
    def test_persistent_workers_change_nothing(self, tmp_path):
        """They live through the epochs, so that fewer iterators are built than after resuming."""
        config = tiny_config(drop_path_rate=0.5)
        persistent = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
        unbroken = tiny_trainer(tmp_path / "a", config=config, num_train_epochs=3, **persistent)
        unbroken.train()
        tiny_trainer(tmp_path / "b", config=config, num_train_epochs=3, callbacks=[StopAt(5)]).train()
        resumed = tiny_trainer(tmp_path / "b", config=config, num_train_epochs=3)
        resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-5"))
        assert_equal(numbers(resumed), numbers(unbroken))

    def test_workers_change_nothing(self, tmp_path):
        trainers = [tiny_trainer(tmp_path, num_train_epochs=2, dataloader_num_workers=workers) for workers in (0, 2)]
        for trainer in trainers:
            trainer.train()
        assert_equal(*map(numbers, trainers))

    def test_epochs_differ_and_every_picture_is_seen_once_in_each(self, tmp_path):
        seen = []

        class Recording(PretrainingTransform):
            def __call__(self, picture, epoch, index):
                seen.append((epoch, index))
                return super().__call__(picture, epoch, index)

        data = tiny_data()
        data.transform = Recording((16, 16), 16, [0.5] * 3, [0.25] * 3, seed=0)
        tiny_trainer(tmp_path, data=data, num_train_epochs=3).train()
        assert sorted(seen) == list(itertools.product(range(3), range(20)))
        orders = [[index for epoch, index in seen if epoch == number] for number in range(3)]
        assert orders[0] != orders[1] != orders[2]

    @pytest.mark.parametrize("max_steps", [5, 7])
    def test_finished_run_trains_no_further(self, tmp_path, max_steps):
        settings = {"max_steps": max_steps, "save_strategy": "steps", "save_steps": 100}
        first = tiny_trainer(tmp_path, **settings)
        first.train()
        again = tiny_trainer(tmp_path, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{max_steps}"))
        assert again.state.global_step == max_steps
        assert_equal(numbers(again), numbers(first))

    def test_beginning_anew_sets_old_checkpoints_aside(self, tmp_path):
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
        tiny_trainer(tmp_path, **settings).train()
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
        second = tiny_trainer(tmp_path, callbacks=[StopAt(2)], **settings)
        second.train()
        # Otherwise the next run would go on from the first one's step 6.
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
        assert sorted(path.name for path in tmp_path.glob("_old-checkpoint-*")) == [
            "_old-checkpoint-4",
            "_old-checkpoint-6",
        ]

    def test_streaming_resumes(self, tmp_path):
        def trainer(name, **changes):
            transform = PretrainingTransform((16, 16), 16, [0.5] * 3, [0.25] * 3, seed=0)
            data = StreamingPretrainingDataset(Stream(), transform)
            return tiny_trainer(tmp_path / name, data=data, max_steps=8, **changes)

        unbroken = trainer("a")
        unbroken.train()
        trainer("b", callbacks=[StopAt(3)]).train()
        resumed = trainer("b")
        resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
        assert_equal(numbers(resumed), numbers(unbroken))


class Stream:
    """20 pictures in a row."""

    def __init__(self, rows=range(20)):
        self.rows = rows

    def set_epoch(self, epoch):
        pass

    def shard(self, num_shards, index):
        return Stream(self.rows[index::num_shards])

    def __iter__(self):
        source = torch.from_numpy(pictures()).permute(0, 3, 1, 2)
        return iter([source[row] for row in self.rows])


class TestAveragedTarget:
    def test_after_each_optimizer_step_by_hand(self, tmp_path):
        """3 steps of 2 micro-batches move the target 3 times, towards the encoder as it is after the step."""
        config = tiny_config(ema_momentum=0.5, ema_momentum_end=0.9)
        trainer = tiny_trainer(tmp_path, config=config, max_steps=3, gradient_accumulation_steps=2)
        encoders, momenta = [], []
        target = [parameter.clone() for parameter in trainer.model.target_encoder.parameters()]
        stepped = trainer.model.after_optimizer_step

        def recording(step, num_steps):
            encoders.append([parameter.detach().clone() for parameter in trainer.model.encoder.parameters()])
            momenta.append((step, num_steps))
            stepped(step, num_steps)

        trainer.model.after_optimizer_step = recording
        trainer.train()
        assert momenta == [(0, 3), (1, 3), (2, 3)]
        assert not torch.equal(encoders[1][0], encoders[2][0])
        for momentum, encoder in zip((0.5, 0.5 + 0.4 / 3, 0.5 + 0.8 / 3), encoders, strict=True):
            target = [momentum * old + (1 - momentum) * new for old, new in zip(target, encoder, strict=True)]
        for wanted, got in zip(target, trainer.model.target_encoder.parameters(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
        assert not any(parameter.requires_grad for parameter in trainer.model.target_encoder.parameters())

    def test_schedule_goes_on_after_resuming(self, tmp_path):
        tiny_trainer(tmp_path, max_steps=6, callbacks=[StopAt(4)]).train()
        trainer = tiny_trainer(tmp_path, max_steps=6)
        calls = []
        trainer.model.after_optimizer_step = lambda *call: calls.append(call)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert calls == [(4, 6), (5, 6)]

    def test_not_where_the_optimizer_skipped_its_step(self, tmp_path, monkeypatch):
        trainer = tiny_trainer(tmp_path, max_steps=4)
        calls = []
        trainer.model.after_optimizer_step = lambda *call: calls.append(call)
        # As a gradient scaler does when float16 overflows.
        skipped = property(lambda optimizer: trainer.state.global_step == 2)
        monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", skipped)
        trainer.train()
        assert calls == [(0, 4), (1, 4), (3, 4)]


PARTS = ("loss_pixel", "loss_latent", "loss_cls")


class TestLosses:
    # 19 pictures: 4 micro-batches an epoch, so that 3 make an epoch of one whole and one partial step.
    @pytest.mark.parametrize(("accumulation", "every"), [(1, 2), (2, 1), (2, 2), (3, 1), (3, 2)])
    def test_parts_are_averages_over_micro_batches(self, tmp_path, accumulation, every):
        trainer = tiny_trainer(
            tmp_path,
            data=tiny_data(19),
            gradient_accumulation_steps=accumulation,
            logging_steps=every,
            max_steps=4,
        )
        seen = []
        trainer.model.register_forward_hook(
            lambda module, inputs, outputs: seen.append([outputs[name].item() for name in PARTS])
        )
        trainer.train()
        if accumulation == 3:
            steps = [torch.tensor(step).mean(0) for step in (seen[0:3], seen[3:4], seen[4:7], seen[7:8])]
        else:
            steps = torch.tensor(seen).unflatten(0, (-1, accumulation)).mean(1)
        wanted = torch.stack(list(steps)).unflatten(0, (-1, every)).mean(1)
        logs = logged(trainer)
        got = torch.tensor([[log[name] for name in PARTS] for log in logs])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor([log["loss"] for log in logs]), wanted.sum(1), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("number", [3, 6])
    def test_held_out_losses(self, tmp_path, number):
        """Every held-out picture counts once, in the last and smaller batch too, or where there is no other."""
        trainer = tiny_trainer(tmp_path, eval_data=tiny_data(number, seed=1), per_device_eval_batch_size=4)
        metrics = trainer.evaluate()
        items = [tiny_data(number, seed=1)[0, index] for index in range(number)]
        with torch.no_grad():
            trainer.model.eval()
            each = [trainer.model(**trainer.data_collator([item])) for item in items]
        for name in PARTS:
            wanted = torch.stack([outputs[name] for outputs in each]).mean().item()
            assert metrics[f"eval_{name}"] == pytest.approx(wanted, rel=1e-5)
        assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_{name}"] for name in PARTS), abs=1e-4)

    def test_evaluating_does_not_mix_with_training(self, tmp_path):
        settings = {"num_train_epochs": 1, "logging_steps": 5}
        plain = tiny_trainer(tmp_path, **settings)
        plain.train()
        evaluated = tiny_trainer(tmp_path, eval_data=tiny_data(6), eval_strategy="steps", eval_steps=2, **settings)
        evaluated.train()
        assert logged(evaluated) == logged(plain)

    def test_meter_reads_and_forgets(self, tmp_path):
        accelerator = tiny_trainer(tmp_path).accelerator
        meter = LossMeter()
        assert meter.average(accelerator) == {}
        meter.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)}, weight=3)
        meter.add({"a": torch.tensor(5.0), "b": torch.tensor(1.0)})
        assert meter.average(accelerator) == {"a": 2.0, "b": 4.0}
        assert meter.average(accelerator) == {}


class TestNoSync:
    def count_reads(self, trainer, monkeypatch) -> list[tuple[int, str]]:
        """(step, method) of every time that the host asks a tensor for its value."""
        reads = []

        def counted(name, method):
            def call(tensor, *args, **kwargs):
                reads.append((trainer.state.global_step, name))
                return method(tensor, *args, **kwargs)

            return call

        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
        return reads

    def test_between_logs_no_value_is_read(self, tmp_path, monkeypatch):
        settings = {"max_steps": 9, "logging_steps": 4, "gradient_accumulation_steps": 2}
        trainer = tiny_trainer(tmp_path, data=tiny_data(80), **settings)
        # As on a GPU, where a loss that is not finite is found later.
        monkeypatch.setattr(nonfinite, "READS_AT_ONCE", ())
        reads = self.count_reads(trainer, monkeypatch)
        trainer.train()
        monkeypatch.undo()
        # By the number of steps that had ended. At 0 an epoch begins; at 3 and 7 the gradients' norm is computed.
        steps = {step for step, name in reads}
        assert {4, 8, 9} <= steps, "logging reads the losses"
        assert steps <= {0, 3, 4, 7, 8, 9}, reads

    def test_stock_trainer_reads_at_every_step(self, tmp_path, monkeypatch):
        """What `_get_grad_norm` and `logging_nan_inf_filter` spare us, so that the test above can fail."""
        trainer = tiny_trainer(tmp_path, max_steps=9, logging_steps=4, logging_nan_inf_filter=True)
        reads = self.count_reads(trainer, monkeypatch)
        trainer.train()
        monkeypatch.undo()
        assert set(range(9)) <= {step for step, name in reads}

    def test_gradient_norm_is_computed_when_logged(self, tmp_path, monkeypatch):
        steps = []
        stock = Trainer._get_grad_norm

        def recording(self, model, grad_norm=None):
            steps.append(self.state.global_step + 1)
            return stock(self, model, grad_norm)

        monkeypatch.setattr(Trainer, "_get_grad_norm", recording)
        trainer = tiny_trainer(tmp_path, max_steps=9, logging_steps=4)
        trainer.train()
        assert steps == [4, 8]
        assert all(log["grad_norm"] > 0 for log in logged(trainer))


class TestOptimisation:
    def test_decay_is_for_matrices(self, tmp_path):
        trainer = tiny_trainer(tmp_path, config=tiny_config(position_embedding="learned"))
        trainer.create_optimizer()
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        groups = {
            group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]}
            for group in trainer.optimizer.param_groups
        }
        assert groups.keys() == {0.05, 0.0}
        trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        assert groups[0.05] | groups[0.0] == trained and not groups[0.05] & groups[0.0]
        assert groups[0.05] == {
            f"{name}.weight"
            for name, module in trainer.model.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith("target_encoder.")
        }
        for spared in (
            "encoder.embeddings.cls_token",
            "encoder.embeddings.position_embeddings",
            "encoder.layernorm.weight",
            "encoder.embeddings.patch_embeddings.projection.bias",
            "pixel_decoder.mask_token",
            "pixel_decoder.head.bias",
        ):
            assert spared in groups[0.0]
        assert "encoder.embeddings.patch_embeddings.projection.weight" in groups[0.05]
        assert isinstance(trainer.optimizer, torch.optim.AdamW)
        assert trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.95)

    def rates(self, tmp_path, **changes) -> list[float]:
        """The learning rate of every step, from the log."""
        trainer = tiny_trainer(tmp_path, learning_rate=1.0, **changes)
        trainer.create_optimizer()
        trainer.create_scheduler(changes.get("max_steps", -1))
        optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
        rates = []
        for _ in range(changes["max_steps"]):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return [*rates, optimizer.param_groups[0]["lr"]]

    def test_half_a_cosine_to_zero_at_every_step(self, tmp_path):
        rates = self.rates(tmp_path, max_steps=100, warmup_steps=0)
        wanted = 0.5 * (1 + torch.cos(torch.linspace(0, torch.pi, 101)))
        torch.testing.assert_close(torch.tensor(rates), wanted, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        ("settings", "steps"),
        [
            ({"warmup_epochs": 2}, 10),
            ({"warmup_epochs": 2, "gradient_accumulation_steps": 2}, 5),
            ({"warmup_epochs": 0.01}, 1),
            ({"warmup_epochs": 0}, 0),
            ({"warmup_epochs": 2, "warmup_steps": 50}, 10),
            ({"warmup_steps": 30}, 30),
            ({"warmup_steps": 0.25}, 25),
            ({}, 5),
        ],
    )
    def test_warmup(self, tmp_path, settings, steps):
        rates = self.rates(tmp_path, max_steps=100, **settings)
        assert rates[: steps + 1] == pytest.approx([step / max(1, steps) for step in range(steps)] + [1.0])
        assert rates[steps + 1] < 1

    def test_warmup_epochs_need_a_length(self, tmp_path):
        data = StreamingPretrainingDataset(Stream(), tiny_data().transform)
        trainer = tiny_trainer(tmp_path, data=data, max_steps=2, warmup_epochs=1)
        with pytest.raises(ValueError, match="--warmup_steps"):
            trainer.train()

    def test_fewer_pictures_than_a_step_needs(self, tmp_path):
        trainer = tiny_trainer(tmp_path, data=tiny_data(7), gradient_accumulation_steps=2)
        with pytest.raises(ValueError, match="7 pictures, fewer than the 8 of one step"):
            trainer.train()

    def test_bfloat16_is_close_and_weights_stay_float32(self, tmp_path):
        trainers = [tiny_trainer(tmp_path, max_steps=5, bf16=bf16) for bf16 in (False, True)]
        inner = []
        layer = trainers[1].model.encoder.layers[0]
        # Products are of 16 bits, the residual stream is not.
        for module in (layer.attention.q_proj, layer):
            module.register_forward_hook(lambda module, inputs, output: inner.append(output))
        for trainer in trainers:
            trainer.train()
        exact, rounded = (torch.tensor([log["loss"] for log in logged(trainer)]) for trainer in trainers)
        assert not torch.equal(exact, rounded)
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
        assert inner[0].dtype == torch.bfloat16 and inner[1].dtype == torch.float32
        assert {value.dtype for value in trainers[1].model.state_dict().values()} == {torch.float32}


def with_bad_picture(index: int, number: int = 20, value: float = float("inf")) -> PretrainingDataset:
    """Float pictures of which one is infinite, in the order 0, 1, 2, ..."""
    source = torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    source[index] = value
    data = tiny_data(number)
    data.pictures = source
    return data


class TestNonFiniteLoss:
    def trainer(self, tmp_path, monkeypatch, bad: int, **changes):
        monkeypatch.setattr(
            "hf_mim.data.pretraining.EpochSampler.__iter__", lambda self: iter([(0, i) for i in range(20)])
        )
        settings = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1} | changes
        return tiny_trainer(tmp_path, data=with_bad_picture(bad), **settings)

    @pytest.mark.parametrize(
        ("bad", "settings", "step", "kept"),
        [
            (9, {}, 3, "checkpoint-2"),
            (9, {"logging_steps": 100}, 3, "checkpoint-2"),
            (9, {"save_steps": 2, "logging_steps": 100}, 3, "checkpoint-2"),
            (0, {"logging_steps": 100}, 1, None),
            (19, {"logging_steps": 100, "save_strategy": "no"}, 5, None),
            (9, {"logging_steps": 100, "gradient_accumulation_steps": 2}, 2, "checkpoint-1"),
        ],
        ids=["logged", "saved-first", "saved-later", "first", "at-the-end", "micro-batch"],
    )
    def test_stops_and_keeps_the_last_good_checkpoint(self, tmp_path, monkeypatch, bad, settings, step, kept):
        trainer = self.trainer(tmp_path, monkeypatch, bad, **settings)
        with pytest.raises(NonFiniteLossError, match=f"loss of step {step} is not finite") as error:
            trainer.train()
        checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
        if kept is None:
            assert not checkpoints and "No checkpoint had been written" in str(error.value)
        else:
            assert checkpoints[-1] == kept and kept in str(error.value)
            good = PiLaMIMForPreTraining.from_pretrained(tmp_path / kept)
            assert all(value.isfinite().all() for value in good.state_dict().values())
        with pytest.raises(NonFiniteLossError):
            trainer.save_model()
        assert not (tmp_path / "model.safetensors").exists()

    def test_weights_that_are_not_finite_are_not_saved(self, tmp_path):
        """The loss shows it one step later, which is too late for a checkpoint in between."""
        trainer = tiny_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, logging_steps=100)

        class Overflow(TrainerCallback):
            def on_optimizer_step(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    with torch.no_grad():
                        trainer.model.pixel_decoder.head.bias[0] = float("nan")

        trainer.add_callback(Overflow())
        with pytest.raises(NonFiniteLossError, match="after step 2.*pixel_decoder.head.bias"):
            trainer.train()
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]

    def test_a_new_run_of_the_same_trainer_starts_clean(self, tmp_path, monkeypatch):
        trainer = self.trainer(tmp_path, monkeypatch, 9)
        with pytest.raises(NonFiniteLossError):
            trainer.train()
        trainer.model.load_state_dict(tiny_trainer(tmp_path).model.state_dict())
        trainer.train_dataset.pictures = tiny_data().pictures
        trainer.optimizer = None
        trainer.train()
        assert trainer.state.global_step == 5


class TestFailingToSave:
    @pytest.mark.parametrize("broken", ["torch.save", "weights", "state"])
    def test_half_a_checkpoint_is_removed(self, tmp_path, monkeypatch, broken):
        trainer = tiny_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        full = OSError(28, "No space left on device")

        def once_earlier_is_there(function):
            def call(*args, **kwargs):
                if trainer.state.global_step == 4:
                    raise full
                return function(*args, **kwargs)

            return call

        target = {
            "torch.save": "torch.save",
            "weights": "transformers.modeling_utils.safe_save_file",
            "state": "transformers.trainer.TrainerState.save_to_json",
        }[broken]
        module, _, name = target.rpartition(".")
        owner = torch if module == "torch" else None
        if owner is None:
            import transformers.modeling_utils
            import transformers.trainer

            owner = transformers.modeling_utils if broken == "weights" else transformers.trainer.TrainerState
        monkeypatch.setattr(owner, name, once_earlier_is_there(getattr(owner, name)))
        with pytest.raises(OSError, match="checkpoint-4 failed .*No space left.*resumes from .*checkpoint-2") as error:
            trainer.train()
        assert error.value.__cause__ is full
        monkeypatch.undo()
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
        resumed = tiny_trainer(tmp_path, max_steps=4)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert resumed.state.global_step == 4

    def test_bug_is_not_called_a_full_disk(self, tmp_path, monkeypatch):
        trainer = tiny_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)

        def bug(*args):
            raise KeyError("a bug")

        monkeypatch.setattr(trainer, "_save_rng_state", bug)
        with pytest.raises(KeyError, match="a bug"):
            trainer.train()
        assert not list(tmp_path.glob("checkpoint-*"))

    def test_second_interrupt_leaves_no_half_checkpoint(self, tmp_path, monkeypatch):
        trainer = tiny_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)

        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(trainer, "_save_rng_state", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert not list(tmp_path.glob("checkpoint-*"))


class TestInterrupt:
    def test_workers_leave_it_to_the_main_process(self, tmp_path, monkeypatch, capsys):
        interrupt = SaveOnInterrupt(tiny_trainer(tmp_path))
        monkeypatch.setattr("hf_mim.training.callbacks.os.getpid", lambda: -1)
        interrupt._request(2, None)
        assert not interrupt.requested and capsys.readouterr().out == ""

    def test_a_launchers_echo_is_not_a_second_request(self, tmp_path, monkeypatch):
        """torchrun sends the signal once more to processes that had it from the terminal."""
        interrupt = SaveOnInterrupt(tiny_trainer(tmp_path))
        now = [100.0]
        monkeypatch.setattr("hf_mim.training.callbacks.time.monotonic", lambda: now[0])
        interrupt._request(2, None)
        now[0] = 100.5
        try:
            interrupt._request(15, None)
        except KeyboardInterrupt:
            pytest.fail("taken for a second request")
        assert interrupt.requested
        now[0] = 103.0
        with pytest.raises(KeyboardInterrupt):
            interrupt._request(2, None)

    def test_handlers_are_put_back(self, tmp_path):
        import signal

        before = signal.getsignal(signal.SIGINT)
        trainer = tiny_trainer(tmp_path, max_steps=1)
        trainer.add_callback(SaveOnInterrupt(trainer))
        trainer.train()
        assert signal.getsignal(signal.SIGINT) is before


def test_fsdp_version_1_is_refused(tmp_path):
    """Called by hand: accelerate itself fails where there is no accelerator. Version 2 is in test_distributed.py."""
    with pytest.raises(ValueError, match="--fsdp_config '{\"version\": 2}'"):
        tiny_trainer(tmp_path)._prepare_fsdp(SimpleNamespace(fsdp_version=1))


def test_every_trained_weight_changes(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=3)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_checkpoint_holds_what_loading_needs(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    loaded = PiLaMIMForPreTraining.from_pretrained(tmp_path / "checkpoint-2")
    assert_equal(dict(loaded.state_dict()), dict(trainer.model.state_dict()))


class TestWhatOnlyTheJobDoes:
    def test_stages(self, tmp_path):
        with pytest.raises(ValueError, match="num_stages is 2, and a trainer trains one stage"):
            tiny_trainer(tmp_path, num_stages=2, max_steps=1).train()

    @pytest.mark.parametrize("name", ["eval_knn", "online_probe"])
    def test_evaluation_of_features(self, tmp_path, name):
        trainer = tiny_trainer(tmp_path, max_steps=1, **{name: True})
        with pytest.raises(ValueError, match="eval_knn and online_probe need whole pictures with labels"):
            trainer.train()
        trainer.feature_evaluation = lambda encoder: {}
        trainer.train()
        assert trainer.state.global_step == 1


def test_pixels_that_travel_as_bytes_change_nothing(tmp_path):
    """From workers, and so to a GPU, which normalises them. One picture of the data is of floats."""
    values = [*pictures(19), pictures(1, seed=1)[0].astype(np.float32) / 255]
    data = PretrainingDataset(
        ImageDataset(values, 3, source="noise"),
        PretrainingTransform((16, 16), 16, [0.4, 0.5, 0.6], [0.25] * 3, seed=0),
    )
    seen, steps = [], []
    for on_device in (False, True):
        trainer = tiny_trainer(tmp_path / str(on_device), data=data, max_steps=6, dataloader_num_workers=2)
        trainer.normalises_on_device = on_device
        loader = trainer.get_train_dataloader()
        seen.append([batch["pixel_values"].dtype for batch in loader])
        trainer.train()
        trainer.save_state()
        steps.append(losses(tmp_path / str(on_device)))
    assert seen[0] == [torch.float32] * 5
    assert sorted(map(str, seen[1])) == ["torch.float32"] + ["torch.uint8"] * 4
    assert steps[0] == steps[1] and len(steps[0]) == 6
    # The user's own data set still gives what it did.
    assert data[0, 0]["pixel_values"].dtype == torch.float32
