"""What is printed of training, for people: step, epoch, losses, rate, pictures a second, time left."""

import re
from types import SimpleNamespace

from hf_mim.evaluation.report import describe_results, few_pictures
from hf_mim.training.log_lines import LogLinesBesideBar, log_line
from hf_mim.training.speed import duration
from tiny_training import losses, tiny_data, tiny_trainer


def test_lines_of_training(tmp_path, capsys):
    trainer = tiny_trainer(
        tmp_path, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=4, eval_data=tiny_data(6)
    )
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.startswith("{") for line in lines), lines
    number = r"[\d.e+-]+"
    pattern = rf"step 2/4, epoch 0\.40: loss {number}, grad_norm {number}, lr {number}, loss_pixel {number}, "
    pattern += rf"loss_latent {number}, loss_cls {number}, \d+ images/s, "
    pattern += rf"\d+% of the time waiting for data, {number} TFLOP/s, [\d.]+ GiB at most, \d+ s left"
    assert re.fullmatch(pattern, lines[0]), lines[0]
    (held_out,) = [line for line in lines if "held out" in line]
    assert re.match(rf"step 4/4, epoch 0\.80: held out: loss {number}, loss_pixel {number}", held_out)
    assert "runtime" not in held_out
    assert re.fullmatch(rf"step 4/4, epoch 0\.80: trained in \d+ s, mean loss {number}", lines[-2])
    assert re.match(r"Speed: \d+ images/s, .*\. What limits it: .*; what helps: .*--", lines[-1]), lines[-1]
    # For programs, all of it is where it was.
    trainer.save_state()
    assert [step for step, _ in losses(tmp_path)] == [2, 4]


def test_beside_the_bar(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, max_steps=2, disable_tqdm=False)
    assert any(isinstance(callback, LogLinesBesideBar) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    out = capsys.readouterr().out
    assert "step 1/2, epoch 0.20: loss " in out and "images/s" in out and "{" not in out


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 59.6, 200, 7500)] == [
        "0 s",
        "1 min 00 s",
        "3 min 20 s",
        "2 h 05 min",
    ]


def test_what_a_metric_is_called():
    state = SimpleNamespace(global_step=5, max_steps=10)
    logs = {"eval_loss": 1.0, "eval_knn_accuracy": 50.0, "eval_runtime": 3.0, "epoch": 1.0}
    assert log_line(logs, state, {}) == "step 5/10, epoch 1.00: held out: loss 1, knn_accuracy 50"


def test_few_pictures_are_said():
    assert few_pictures(50) == ""
    assert few_pictures(20) == ", which are few: one picture more or less is 5.0 points"
    results = {"num_train": 100, "num_test": 20, "features": {"a": {"knn": {"label": 50.0}}}}
    assert "20 held out, which are few" in describe_results(results)
