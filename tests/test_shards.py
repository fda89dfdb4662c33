"""Pictures in many shards: their order, going on from a number of pictures seen, and shards that fail."""

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, get_worker_info
from transformers import TrainerCallback

from hf_mim.data.dataset import ImageDataset
from hf_mim.data.pretraining import WINDOW_SHARDS, EpochSampler, PretrainingDataset, pretraining_collator
from hf_mim.data.sources import packed
from hf_mim.data.transforms import PretrainingTransform
from hf_mim.jobs import pack
from test_distributed import torchrun
from test_pack import opened
from tiny_training import losses, run, tiny_config, tiny_trainer, write_pictures

ROWS, SHARDS, BATCH = 2_000_000, 500, 64


class VirtualRows:
    """Rows of many shards, whose pixels are functions of their numbers."""

    def __init__(self, rows=ROWS, shards=SHARDS):
        random = np.random.default_rng(0)
        cuts = np.sort(random.choice(np.arange(1, rows), shards - 1, replace=False))
        self.ends = np.append(cuts, rows)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, row):
        return np.random.default_rng(row).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def virtual_data() -> PretrainingDataset:
    pictures = ImageDataset(VirtualRows(), 3, source="virtual").select(np.arange(0, ROWS - 1000))
    return PretrainingDataset(pictures, PretrainingTransform((8, 8), 4, [0.5] * 3, [0.25] * 3))


def indices(sampler: EpochSampler, epoch: int) -> np.ndarray:
    sampler.set_epoch(epoch)
    items = np.array(list(sampler))
    assert (items[:, 0] == epoch).all()
    return items[:, 1]


def test_windows_of_shards():
    ends = VirtualRows(20_000, 50).ends
    sampler = EpochSampler(20_000, seed=3, shard_ends=ends)
    first, second = indices(sampler, 0), indices(sampler, 1)
    assert np.array_equal(np.sort(first), np.arange(20_000)) and (first != second).mean() > 0.99
    shard = np.searchsorted(ends, first, side="right")
    # The next shards that are new begin a window: all of them, whole, before any other.
    sizes, place = np.diff(ends, prepend=0), 0
    for number in (13, 13, 12, 12):
        window = list(dict.fromkeys(shard[place:]))[:number]
        end = place + sizes[window].sum()
        assert set(shard[place:end]) == set(window) and number <= WINDOW_SHARDS
        # Shuffled: neighbours are seldom of the same shard.
        assert (np.diff(shard[place:end]) == 0).mean() < 0.4
        place = end
    assert place == len(shard)


def test_few_shards_are_in_the_order_of_files():
    ends = VirtualRows(1000, WINDOW_SHARDS).ends
    assert np.array_equal(indices(EpochSampler(1000, shard_ends=ends), 2), indices(EpochSampler(1000), 2))


@pytest.mark.parametrize("settings", [{}, {"shuffle": False}, {"shard_ends": VirtualRows(150_000, 60).ends}])
def test_going_on_draws_the_rest(settings):
    sampler, whole = EpochSampler(150_000, **settings), indices(EpochSampler(150_000, **settings), 1)
    for start in (0, 1, 70_001, 149_999, 150_000):
        sampler.start = start
        assert np.array_equal(indices(sampler, 1)[start:], whole[start:]) and len(sampler) == 150_000


def test_only_pictures_in_the_order_of_shards_have_shards():
    pictures = ImageDataset(VirtualRows(100, 4), 3, source="virtual")
    ends = pictures.shard_ends
    assert ends[-1] == 100
    rows = np.arange(0, 100, 3)
    assert pictures.select(rows).shard_ends.tolist() == [(rows < end).sum() for end in ends]
    assert pictures.select(rows[::-1]).shard_ends is None
    assert ImageDataset(np.zeros((3, 8, 8, 3), np.uint8), 3, source="array").shard_ends is None


def steps(data, seen: int, number: int, processes: int, workers: int) -> list[list[bytes]]:
    """The pictures of so many steps after `seen` pictures, as the Trainer and accelerate deal them out."""
    found = []
    for process in range(processes):
        sampler = EpochSampler(len(data), seed=5, shard_ends=data.pictures.shard_ends)
        sampler.start = seen
        size = BATCH // processes
        loader = DataLoader(
            data, size, sampler=sampler, num_workers=workers, drop_last=True, collate_fn=pretraining_collator
        )
        loader = prepare_data_loader(loader, num_processes=processes, process_index=process, put_on_device=False)
        batches = iter(skip_first_batches(loader, seen // BATCH))
        # Stopped in between, with others under way.
        found.append([next(batches) for _ in range(number)])
        del batches
    # A step is a sum over its pictures.
    return [
        sorted(x.numpy().tobytes() for shares in step for x in shares["pixel_values"])
        for step in zip(*found, strict=True)
    ]


def test_two_million_rows_go_on_with_other_processes_and_workers():
    data = virtual_data()
    # By one process without workers, at the beginning and far within.
    straight = {seen: steps(data, seen * BATCH, 6, 1, 0) for seen in (0, 20_000)}
    for seen, whole in straight.items():
        pieces, done = [], 0
        for processes, workers, number in ((1, 3, 2), (2, 1, 1), (2, 0, 2), (1, 2, 1)):
            pieces += steps(data, (seen + done) * BATCH, number, processes, workers)
            done += number
        assert pieces == whole


def test_a_run_goes_on_within_an_epoch(tmp_path, monkeypatch):
    config = {"data": virtual_data(), "config": tiny_config(image_size=8), "max_steps": 5}
    config |= {"save_strategy": "steps", "save_steps": 3}
    trainer = tiny_trainer(tmp_path / "whole", **config)
    trainer.train()
    assert trainer.train_sampler.shard_ends is not None and trainer.train_sampler.start == 0
    trainer.save_state()
    starts = []
    windows = EpochSampler._windows
    monkeypatch.setattr(
        EpochSampler, "_windows", lambda self, epoch, start: [starts.append(start), windows(self, epoch, start)][1]
    )
    resumed = tiny_trainer(tmp_path / "whole", dataloader_num_workers=2, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert starts == [12]
    assert [log["loss"] for log in resumed.state.log_history if "loss" in log] == [
        loss for _, loss in losses(tmp_path / "whole")
    ]


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from transformers import TrainerCallback
from test_shards import virtual_data
from tiny_training import tiny_config, tiny_trainer

folder, killed, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == killed:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = tiny_trainer(
    folder, data=virtual_data(), config=tiny_config(image_size=8), callbacks=[Kill()], max_steps=9,
    per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)), dataloader_num_workers=workers,
    save_strategy="steps", save_steps=2,
)
trainer.train(resume_from_checkpoint=os.path.isdir(folder + "/checkpoint-2") or None)
trainer.save_state()
"""


@pytest.mark.slow
def test_killed_on_one_two_and_one_processes(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    assert run([str(script), str(tmp_path / "whole"), "0", "0"]).returncode == 0
    folder = str(tmp_path / "killed")
    assert run([str(script), folder, "3", "2"]).returncode == -signal.SIGKILL
    assert run(torchrun(str(script), folder, "7", "1")).returncode != 0
    assert {"checkpoint-4", "checkpoint-6"} <= set(os.listdir(folder))
    result = run([str(script), folder, "0", "3"])
    assert result.returncode == 0, result.stderr
    whole, pieces = losses(tmp_path / "whole"), losses(folder)
    assert [step for step, _ in pieces] == list(range(1, 10))
    assert [loss for _, loss in pieces] == pytest.approx([loss for _, loss in whole], abs=1e-5)


# --- shards that fail


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Four shards of six pictures."""
    random = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(24):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        np.save(tmp_path / "pictures" / f"{i:02}.npy", pixels)
    flags = ["--num_workers=0", "--rows_per_shard=6"]
    assert pack.main([str(tmp_path / "pictures"), str(tmp_path / "packed"), *flags]) == 0
    monkeypatch.setattr(packed, "_RETRY_SECONDS", (0.0, 0.0))
    return tmp_path / "packed"


def test_as_many_files_are_open_as_are_read_from(shards, monkeypatch):
    monkeypatch.setattr(packed, "WINDOW_SHARDS", 2)
    pictures = opened(shards)
    whole = [pictures[i] for i in range(24)]
    assert len(pictures._values._files) == 2
    assert all((pictures[i] == whole[i]).all() for i in (0, 23, 7, 1))


def test_many_shards_are_packed_in_a_mixed_order(tmp_path, monkeypatch, capsys):
    for i in range(24):
        folder = tmp_path / "pictures" / f"class{i // 6}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i:02}.npy", np.full((8, 8, 3), i, np.uint8))
    flags = ["--num_workers=0", "--rows_per_shard=6"]
    monkeypatch.setattr(pack, "WINDOW_SHARDS", 3)
    assert pack.main([str(tmp_path / "pictures"), str(tmp_path / "packed"), *flags]) == 0
    pictures = opened(tmp_path / "packed")
    numbers = [int(pictures[i][0, 0, 0]) for i in range(24)]
    assert sorted(numbers) == list(range(24)) and pictures.labels["label"].tolist() == [i // 6 for i in numbers]
    # Of each shard several classes.
    assert all(len(set(pictures.labels["label"][first : first + 6])) > 1 for first in range(0, 24, 6))
    monkeypatch.setattr(pack, "WINDOW_SHARDS", 4)
    assert pack.main([str(tmp_path / "pictures"), str(tmp_path / "packed"), *flags]) == 1
    assert "other pictures or settings" in capsys.readouterr().err


def test_a_shard_that_is_away_for_a_moment(shards, monkeypatch, caplog):
    shard, pictures = sorted(shards.glob("*.parquet"))[2], opened(shards)
    whole = opened(shards)[13]
    shard.rename(shards / "away")
    monkeypatch.setattr(packed, "time", SimpleNamespace(sleep=lambda seconds: (shards / "away").rename(shard)))
    assert (pictures[13] == whole).all() and "Trying again" in caplog.text


def test_an_index_of_other_shards(shards):
    index = json.loads((shards / "index.json").read_text())
    index["splits"]["train"][1]["rows"] += 2
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has 6 rows, where index.json says 8"):
        opened(shards)[7]
    for damage in ('{"format": "hf_mim', "[]"):
        (shards / "index.json").write_text(damage)
        with pytest.raises(ValueError, match="start the same `hf_mim pack` again"):
            opened(shards)
    (shards / "index.json").unlink()
    with pytest.raises(ValueError, match="is missing, and there are shards"):
        opened(shards)


@pytest.mark.parametrize("cut", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_shard_that_goes_during_training(shards, tmp_path, cut):
    """What is trained until then is saved, and goes on to the same end when the shard is back."""
    shard = sorted(shards.glob("*.parquet"))[1]
    data, pictures = shard.read_bytes(), opened(shards)

    class Lose(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                if cut:
                    os.truncate(shard, 100)
                else:
                    shard.unlink()
                    pictures._values._files.clear()

    def trainer(name, **kwargs):
        dataset = PretrainingDataset(pictures, PretrainingTransform((16, 16), 16, [0.5] * 3, [0.25] * 3))
        return tiny_trainer(tmp_path / name, data=dataset, max_steps=6, **kwargs)

    whole = trainer("whole")
    whole.train()
    failing = trainer("lost", callbacks=[Lose()])
    with pytest.raises(OSError, match="can no longer be read"):
        failing.train()
    step = failing.state.global_step
    assert 2 <= step < 6 and (tmp_path / "lost" / f"checkpoint-{step}").is_dir()
    shard.write_bytes(data)
    resumed = trainer("lost")
    resumed.train(resume_from_checkpoint=True)
    logged = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (whole, resumed)]
    assert logged[0] == logged[1] and len(logged[0]) == 6


@pytest.mark.slow
def test_a_worker_that_is_ended(tmp_path):
    """As by a system that runs out of memory: what is trained until then is saved, and goes on to the same end."""
    marker = tmp_path / "end"

    class Mortal(VirtualRows):
        def __getitem__(self, row):
            if get_worker_info() is not None and marker.exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(row)

    class End(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                marker.touch()

    def trainer(name, **kwargs):
        pictures = ImageDataset(Mortal(200, 20), 3, source="virtual")
        data = PretrainingDataset(pictures, PretrainingTransform((8, 8), 4, [0.5] * 3, [0.25] * 3))
        config = tiny_config(image_size=8)
        return tiny_trainer(
            tmp_path / name, data=data, config=config, max_steps=20, dataloader_num_workers=1, **kwargs
        )

    whole, ended = trainer("whole"), trainer("ended", callbacks=[End()])
    whole.train()
    with pytest.raises(RuntimeError, match="worker"):
        ended.train()
    step = ended.state.global_step
    assert 2 <= step < 20 and (tmp_path / "ended" / f"checkpoint-{step}").is_dir()
    marker.unlink()
    resumed = trainer("ended")
    resumed.train(resume_from_checkpoint=True)
    logged = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (whole, resumed)]
    assert logged[0] == logged[1] and len(logged[0]) == 20


def test_a_full_disk_while_a_shard_is_written(tmp_path, monkeypatch, capsys):
    import pyarrow.parquet as pq

    write = pq.write_table

    def half(table, path, **kwargs):
        write(table.slice(0, 2), path, **kwargs)
        raise OSError(28, "No space left on device", str(path))

    folder = write_pictures(tmp_path / "pictures", 0)
    for i in range(8):
        np.save(folder / f"{i}.npy", np.full((8, 8, 3), i, np.uint8))
    flags = [str(folder), str(tmp_path / "packed"), "--num_workers=0", "--rows_per_shard=4"]
    monkeypatch.setattr(pq, "write_table", half)
    assert pack.main(flags) == 1 and "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "packed").glob("*"))
    monkeypatch.setattr(pq, "write_table", write)
    assert pack.main(flags) == 0 and len(opened(tmp_path / "packed")) == 8
