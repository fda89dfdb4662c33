"""The papers' linear probe: LARS by hand, heads side by side against heads alone, crops and cached features, CLEVR."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import hf_mim
from hf_mim.data.arguments import DataArguments
from hf_mim.data.loading import load_images
from hf_mim.data.sources.clevr import clevr_tasks
from hf_mim.evaluation.linear_probe import LinearProbe, learning_rate_factor, train_probes
from hf_mim.jobs.linear_probe import PRESETS, ProbeArguments, main, probe_table
from hf_mim.training.command import parse_arguments
from tiny_training import REPOSITORY, pictures, tiny_config, write_pictures

SCRIPT = str(REPOSITORY / "examples" / "run_linear_probe.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of twelve pictures each, one brighter than the other."""
    root = tmp_path_factory.mktemp("classes")
    for number, name in enumerate("abc"):
        (root / name).mkdir()
        for index, picture in enumerate(pictures(12, number)):
            np.save(root / name / f"{index:02d}.npy", picture.astype(np.float32) / (255 + 100 * number))
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder")
    hf_mim.PiLaMIMModel(tiny_config()).save_pretrained(path)
    return path


def separable(number: int = 240, dim: int = 6):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % 3
    return 2.0 * nn.functional.one_hot(labels, dim) + torch.randn(number, dim, generator=generator), labels


class TestHeads:
    def test_step_by_hand(self):
        """MAE's LARS: the weights' gradient times 0.001 |w| / |g|, the biases' as it is; then momentum."""
        features, labels = separable(12)
        probe = LinearProbe(6, 3, [2.0], momentum=0.9)
        weight, bias = probe.weights[0].detach().clone(), probe.biases[0].detach().clone()
        steps = [torch.zeros(3, 6), torch.zeros(3)]
        norm = nn.BatchNorm1d(6, affine=False, eps=1e-6)
        for factor in (0.5, 1.0, 0.25):
            weight.requires_grad_(True), bias.requires_grad_(True)
            loss = nn.functional.cross_entropy(norm(features) @ weight.T + bias, labels)
            gradients = torch.autograd.grad(loss, [weight, bias])
            ratio = 0.001 * weight.detach().norm() / gradients[0].norm()
            steps = [0.9 * steps[0] + ratio * gradients[0], 0.9 * steps[1] + gradients[1]]
            weight = (weight - 2.0 * factor * steps[0]).detach()
            bias = (bias - 2.0 * factor * steps[1]).detach()
            found = probe.step(features, labels, factor)
            assert found.item() == pytest.approx(loss.item(), rel=1e-5)
            torch.testing.assert_close(probe.weights[0].detach(), weight, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(probe.biases[0].detach(), bias, rtol=1e-5, atol=1e-7)

    def test_each_head_is_the_head_trained_alone(self):
        # In float64: what differs is the order of sums, which 30 steps at rate 50 make much of.
        features, labels = separable()
        features = features.double()
        rates = [0.1, 3.0, 50.0]

        def trained(rates):
            probe = LinearProbe(6, 3, rates).double()
            for step in range(30):
                rows = slice(step % 4 * 60, step % 4 * 60 + 60)
                probe.step(features[rows], labels[rows], learning_rate_factor(step / 4, 8, 1))
            return probe

        together = trained(rates)
        assert not torch.allclose(together.weights[0], together.weights[2], atol=1e-3)
        for head, rate in enumerate(rates):
            alone = trained([rate])
            torch.testing.assert_close(together.weights[head], alone.weights[0], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(together.biases[head], alone.biases[0], rtol=1e-4, atol=1e-6)
            assert together.accuracies(features, labels)[head] == alone.accuracies(features, labels)[0]

    def test_schedule(self):
        assert [learning_rate_factor(epoch, 10, 2) for epoch in (0, 0.5, 2, 6)] == pytest.approx([0, 0.25, 1, 0.5])
        assert learning_rate_factor(0, 10, 0) == 1.0
        assert learning_rate_factor(9.5, 10, 2) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7.5 / 8)))

    def test_pictures_without_a_label_count_for_nothing(self):
        features, labels = separable(12)
        missing = labels.clone()
        missing[::2] = -1
        probe = LinearProbe(6, 3, [1.0])
        logits = probe(features)[0]
        loss = probe.step(features, missing, 1.0)
        assert loss.item() == pytest.approx(nn.functional.cross_entropy(logits[1::2], labels[1::2]).item(), rel=1e-5)
        predicted = probe.eval()(features)[0].argmax(1)
        expected = 100 * (predicted == labels)[1::2].double().mean().item()
        running = probe.norm.running_mean.clone()
        assert probe.train().accuracies(features, missing) == pytest.approx([expected])
        assert torch.equal(probe.norm.running_mean, running)
        assert all(weight.isfinite().all() for weight in probe.weights)
        assert probe.train().step(features, torch.full_like(labels, -1), 1.0).item() == 0.0

    def test_learns_and_tells_last_and_best(self):
        features, labels = separable()

        def batches(epoch):
            order = torch.randperm(240, generator=torch.Generator().manual_seed(epoch))
            return ((features[rows], {"a": labels[rows]}) for rows in order.split(60))

        probes = {"a": LinearProbe(6, 3, [1e-4, 3.0])}
        seen = []
        results = train_probes(
            probes,
            batches,
            4,
            features,
            {"a": labels},
            num_epochs=40,
            warmup_epochs=1,
            on_epoch=lambda epoch, now: seen.append(now["a"]),
        )["a"]
        assert [head["learning_rate"] for head in results] == [1e-4, 3.0]
        for number, head in enumerate(results):
            assert head["accuracies"] == [row[number] for row in seen] and len(seen) == 40
            assert head["last"] == head["accuracies"][-1]
            assert head["best"] == max(head["accuracies"]) == head["accuracies"][head["best_epoch"] - 1]
        assert results[1]["last"] > 75 and results[1]["loss"] < results[0]["loss"]
        (head, *rows) = probe_table({"a": results})
        assert head == ["learning rate", "a"] and [row[0] for row in rows] == ["0.0001", "3"]


class TestFlags:
    def parse(self, *flags):
        return parse_arguments(
            (ProbeArguments, DataArguments),
            ["--model_name_or_path=x", "--output_dir=y", "--use_cpu", *flags],
            PRESETS,
        )

    def test_presets(self):
        args, data_args = self.parse("--preset=pilamim")
        assert (args.learning_rate, args.num_train_epochs, args.warmup_epochs, args.batch_size) == (
            [3.0],
            100,
            10,
            1024,
        )
        assert (
            args.augment
            and data_args.crop_scale_min == 0.08
            and not data_args.horizontal_flip
            and args.weight_decay == 0
            and args.momentum == 0.9
        )
        args, _ = self.parse("--preset=tec")
        assert args.learning_rate == [0.1 * 16384 / 256] and args.num_train_epochs == 90
        args, _ = self.parse("--preset=pilamim", "--base_learning_rate", "0.1", "0.2")
        assert args.learning_rate == pytest.approx([0.4, 0.8])
        args, _ = self.parse("--preset=tec", "--learning_rate", "5", "--batch_size=512")
        assert args.learning_rate == [5.0]

    def test_warmup_follows_the_epochs(self):
        assert self.parse("--num_train_epochs=2")[0].warmup_epochs == 0.2
        assert self.parse("--preset=ocl_large")[0].warmup_epochs == 10
        with pytest.raises(ValueError, match=r"below --num_train_epochs \(5\), got 10 \(of the preset tec"):
            self.parse("--preset=tec", "--num_train_epochs=5")

    @pytest.mark.parametrize(
        ("flag", "message"),
        [
            ("--preset=vast", "expected one of tiny, pilamim"),
            ("--pooling=max", "last_N"),
            ("--probe=deep", "expected linear or attentive"),
            ("--learning_rate=-1", "above 0"),
            ("--warmup_epochs=99", "below --num_train_epochs"),
            ("--max_steps=5", "--num_train_epochs instead"),
            ("--batch_size=1", "at least 2"),
        ],
    )
    def test_mistakes(self, flag, message):
        with pytest.raises(ValueError, match=message):
            self.parse(flag)


class TestScript:
    def flags(self, encoder, folder, out, *flags):
        return [
            f"--model_name_or_path={encoder}",
            f"--train_dir={folder}",
            "--validation_fraction=0.25",
            f"--output_dir={out}",
            f"--feature_cache_dir={out}/features",
            *("--batch_size=8", "--num_train_epochs=3", "--warmup_epochs=1", "--use_cpu", "--bf16=false"),
            *("--learning_rate", "1", "30", *flags),
        ]

    def results(self, out):
        return json.loads((out / "linear_probe.json").read_text())

    @pytest.mark.parametrize("augment", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_two_processes_equal_one(self, encoder, folder, tmp_path, capsys, augment, processes):
        flags = [f"--augment={augment}", "--per_device_train_batch_size=3", "--pooling=last_2"]
        assert main(self.flags(encoder, folder, tmp_path / "one", *flags)) == 0
        assert "last epoch / best epoch" in capsys.readouterr().out
        result = processes([SCRIPT, *self.flags(encoder, folder, tmp_path / "two", *flags)], 2)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("last epoch / best epoch") == 1
        one, two = (self.results(tmp_path / name)["results"]["label"] for name in ("one", "two"))
        assert [head["learning_rate"] for head in one] == [1.0, 30.0]
        for a, b in zip(one, two, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["accuracies"] == pytest.approx(b["accuracies"])
        assert len(list((tmp_path / "one" / "features").iterdir())) == (1 if augment else 2)

    def test_attentive(self, encoder, folder, tmp_path, capsys):
        flags = ["--preset=attentive", "--batch_size=8", "--num_train_epochs=2", "--learning_rate", "0.001", "0.01"]
        given = [flag for flag in self.flags(encoder, folder, tmp_path) if "learning_rate" not in flag][:-2]
        assert main([*given, *flags]) == 0
        assert "Attentive probe of" in capsys.readouterr().out
        found = self.results(tmp_path)
        assert found["probe"] == "attentive" and found["weight_decay"] == 0.01 and not found["augment"]
        assert [head["learning_rate"] for head in found["results"]["label"]] == [0.001, 0.01]
        assert main([*given, *flags, "--augment=true", f"--output_dir={tmp_path / 'crops'}"]) == 0
        losses = [
            [head["loss"] for head in self.results(out)["results"]["label"]] for out in (tmp_path, tmp_path / "crops")
        ]
        assert losses[0] != losses[1]

    def test_another_run_in_the_folder_is_refused(self, encoder, folder, tmp_path, capsys):
        model, out = shutil.copytree(encoder, tmp_path / "model"), tmp_path / "out"
        flags = self.flags(model, folder, out, "--augment=false", "--num_train_epochs=1", "--warmup_epochs=0")

        def refused() -> str:
            assert main(flags) == 1
            err = capsys.readouterr().err
            assert "another --output_dir" in err and "Traceback" not in err
            return err

        assert main(flags) == 0
        record, found = json.loads((out / "run.json").read_text())["decides"], self.results(out)
        assert {found[name] == record[name] for name in ("seed", "pooling", "momentum", "warmup_epochs")} == {True}
        assert (found["num_train"], found["num_test"]) == (record["num_pictures"], record["num_held_out"]) == (27, 9)
        # The same once more is no other run; neither is the batch of the encoder.
        assert main([*flags, "--per_device_train_batch_size=3"]) == 0
        flags.append("--momentum=0.5")
        assert "momentum: 0.9 there, 0.5 here" in refused() and self.results(out)["momentum"] == 0.9
        # Other weights under the same name.
        flags.pop()
        torch.manual_seed(1)
        hf_mim.PiLaMIMModel(tiny_config()).save_pretrained(model)
        assert "(weights: " in refused()
        assert main([*flags, "--resume_from_checkpoint=false"]) == 0
        assert (out / "_old-run.json").is_file() and (out / "_old-linear_probe.json").is_file()
        assert main(flags) == 0
        # The folder of a training, whose record names no job where it is of the first versions.
        for job in ({}, {"job": "training"}):
            images = {name: record[name] for name in ("data", "num_pictures", "fingerprint")}
            (out / "run.json").write_text(json.dumps({"decides": images | job}))
            assert "job: 'training' there, 'probe' here" in refused()

    def test_recipe_and_help(self, encoder, folder, tmp_path, processes):
        recipe = tmp_path / "recipe.json"
        recipe.write_text(json.dumps({"preset": "tiny", "pooling": "mean", "learning_rate": [7.0]}))
        flags = self.flags(encoder, folder, tmp_path)[:-3]
        assert main([str(recipe), *flags]) == 0
        found = self.results(tmp_path)
        assert found["pooling"] == "mean" and [head["learning_rate"] for head in found["results"]["label"]] == [7.0]
        result = processes([SCRIPT, "--help"])
        assert result.returncode == 0 and "--pooling" in result.stdout

    def test_mistakes_are_said_before_work_starts(self, encoder, folder, tmp_path, capsys):
        unlabelled = write_pictures(tmp_path / "unlabelled", 12)

        def fails(*args) -> str:
            assert main(self.flags(*args)) == 1
            err = capsys.readouterr().err
            assert "\nError: " in err and "Traceback" not in err
            return err

        out = tmp_path / "out"
        assert "has no labels" in fails(encoder, unlabelled, out)
        assert "nowhere" in fails(tmp_path / "nowhere", folder, out)
        assert "fewer than the 512" in fails(encoder, folder, out, "--batch_size=512")
        assert "multiple of the patches" in fails(encoder, folder, out, "--image_size=18")
        assert "needs 9 blocks" in fails(encoder, folder, out, "--pooling=last_9")
        assert not out.exists()
        broken = hf_mim.PiLaMIMModel.from_pretrained(encoder)
        next(broken.parameters()).data.fill_(float("nan"))
        broken.save_pretrained(tmp_path / "broken")
        assert "are not finite: there is nothing to probe" in fails(tmp_path / "broken", folder, out)

    def test_what_the_numbers_do_not_tell_is_said(self, encoder, tmp_path, capsys):
        for place in ("train/a", "train/b", "same/b"):
            write_pictures(tmp_path / place, 8)
        given = self.flags(encoder, tmp_path / "train", tmp_path / "out", f"--validation_dir={tmp_path / 'same'}")
        assert main([flag for flag in given if "validation_fraction" not in flag]) == 0
        note = "All held-out pictures have the same 'label': how often it is told says nothing."
        assert note in capsys.readouterr().out
        found = self.results(tmp_path / "out")
        assert found["notes"] == [note] and len(found["results"]["label"]) == 2


class TestCLEVR:
    def test_tasks(self):
        def coords(nearest, number=3):
            return [[0.0, 0.0, 20.0]] * (number - 1) + [[1.0, 2.0, nearest]]

        distances = [5, 8, 8.01, 8.7, 9.2, 9.6, 10.5]
        assert [clevr_tasks(coords(nearest))["distance"] for nearest in distances] == [0, 0, 1, 2, 3, 4, 5]
        assert [clevr_tasks(coords(9, number))["count"] for number in (3, 10)] == [0, 7]
        with pytest.raises(ValueError, match="11 objects"):
            clevr_tasks(coords(9, 11))

    def test_archive(self, tmp_path):
        (tmp_path / "scenes").mkdir()
        for split, number in (("train", 4), ("val", 2)):
            (tmp_path / "images" / split).mkdir(parents=True)
            scenes = []
            for index in range(number):
                name = f"CLEVR_{split}_{index:06d}.png"
                Image.new("RGB", (12, 8), (index, 0, 0)).save(tmp_path / "images" / split / name)
                objects = [{"pixel_coords": [1, 2, 8.2 + index], "color": "red"}] * (3 + index)
                scenes.append({"image_filename": name, "objects": objects})
            (tmp_path / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": scenes}))
        found = load_images(DataArguments(train_dir=str(tmp_path)))
        assert found.train.labels["count"].tolist() == [0, 1, 2, 3]
        assert found.train.labels["distance"].tolist() == [1, 3, 5, 5]
        assert found.train.label_names["count"][:2] == ["3", "4"]
        assert len(found.validation) == 2 and found.train[3][0, 0, 0] == 3
        (tmp_path / "scenes" / "CLEVR_val_scenes.json").write_text("{}")
        with pytest.raises(ValueError, match="CLEVR's annotations"):
            load_images(DataArguments(train_dir=str(tmp_path)))

    @pytest.mark.parametrize("form", ["list", "columns"])
    def test_annotations_of_a_data_set(self, tmp_path, form):
        import datasets

        coords = [[[1.0, 2.0, 7.0]] * 3, [[1.0, 2.0, 9.7]] * 5]
        feature = {"pixel_coords": datasets.Sequence(datasets.Value("float32"))}
        if form == "list":
            objects, feature = [[{"pixel_coords": c} for c in scene] for scene in coords], datasets.List(feature)
        else:
            objects = [{"pixel_coords": scene} for scene in coords]
            feature = {"pixel_coords": datasets.List(datasets.List(datasets.Value("float32")))}
        split = datasets.Dataset.from_dict(
            {"image": [Image.new("RGB", (4, 4))] * 2, "objects": objects},
            features=datasets.Features({"image": datasets.Image(), "objects": feature}),
        )
        datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "clevr"))
        found = load_images(DataArguments(dataset_name=str(tmp_path / "clevr")))
        assert {name: column.tolist() for name, column in found.train.labels.items()} == {
            "count": [0, 2],
            "distance": [0, 4],
        }
        assert len(found.validation.label_names["count"]) == 8
