"""The comparison's table, what is made of it, and which of its cells are run."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tiny_training import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import claims  # noqa: E402
import comparison  # noqa: E402
import results_table  # noqa: E402
from comparison import METHODS, Cell  # noqa: E402


def row(value: float, **changes) -> dict:
    defaults = {"data": "scenes", "method": "MAE", "seed": 0, "images_seen": 100, "metric": "k-NN/[CLS]/count"}
    return defaults | {"value": value, "commit": "abc", "machine": "2 cores, x"} | changes


class TestTable:
    def test_rows_are_added_or_replaced(self, tmp_path):
        path = tmp_path / "results.csv"
        results_table.append([row(1.5), row(2.0, images_seen=None)], path)
        results_table.append([row(1.75), row(3.0, seed=1)], path)
        found = {(r["seed"], r["images_seen"]): r["value"] for r in results_table.read(path)}
        assert found == {(0, 100): 1.75, (0, None): 2.0, (1, 100): 3.0}
        assert results_table.read(path)[0]["machine"] == "2 cores, x"
        assert results_table.read(tmp_path / "none.csv") == []

    def test_none_of_those_who_add_at_once_is_lost(self, tmp_path):
        path = tmp_path / "results.csv"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda seed: results_table.append([row(1.0, seed=seed)], path), range(40)))
        assert len(results_table.read(path)) == 40

    def test_numbers_by_hand(self):
        rows = [row(10.0), row(99.0, images_seen=50), row(14.0, seed=1)]
        rows += [row(30.0, metric="linear/[CLS]/count"), row(50.0, metric="k-NN/count", method="raw pixels")]
        rows += [row(60.0, metric="linear/count", method="raw pixels")]
        found = results_table.scores(rows)
        # After the most images that were seen; the standard deviation of 10 and 14 is the root of 8.
        assert results_table.cell(found["scenes"]["MAE"], "frozen/[CLS]/count") == "12.0 ± 2.8 / 30.0"
        assert results_table.cell(found["scenes"]["raw pixels"], "frozen/[CLS]/count") == "50.0 / 60.0"
        assert results_table.cell(found["scenes"]["MAE"], "RankMe/[CLS]") == ""
        table = results_table.markdown(found, "scenes", ["MAE", "OCL"], {"count": "frozen/[CLS]/count"})
        assert table.splitlines() == ["| | count | seeds |", "|---|---|---|", "| MAE | 12.0 ± 2.8 / 30.0 | 2 |"] + [
            "| OCL |  | 0 |"
        ]

    @pytest.mark.parametrize(
        ("values", "written"),
        # The binary numbers nearest to 28.45 and 0.25 are below and at the half; that to 39.45 is above.
        [([28.45], "28.5"), ([39.45], "39.5"), ([0.25], "0.3"), ([28.4, 28.5], "28.5 ± 0.1"), ([28.44], "28.4")],
    )
    def test_halves_go_up(self, values, written):
        assert results_table.mean_and_spread(values) == written

    def test_order(self):
        names = ["OCL", "dBOT", "untrained", "dBOT, after stage 0", "MAE", "raw pixels"]
        ordered = results_table.order_of(names, ["MAE", "dBOT", "OCL"])
        assert ordered == ["raw pixels", "untrained", "MAE", "dBOT, after stage 0", "dBOT", "OCL"]

    def test_curves(self, tmp_path):
        rows = [row(float(n), images_seen=n, seed=s) for n in (10, 20) for s in (0, 1)]
        rows += [row(n / 5, images_seen=n, seed=s, metric="seconds") for n in (10, 20) for s in (0, 1)]
        rows += [row(5.0, method="raw pixels", images_seen=0, metric="k-NN/count")]
        found = results_table.curves(rows, "scenes")
        assert found["MAE"]["k-NN/[CLS]/count"] == {10: ([10.0, 10.0], [2.0, 2.0]), 20: ([20.0, 20.0], [4.0, 4.0])}
        results_table.draw_curves(rows, "scenes", "count", tmp_path / "curves.png", ["MAE"])
        assert (tmp_path / "curves.png").stat().st_size > 5000


class TestMarkedTables:
    text = (
        "# A\n<!-- comparison: scenes | MAE | count = frozen/[CLS]/count -->\nold\n<!-- end of comparison -->\nrest\n"
    )

    def test_are_written_anew_and_told_when_stale(self, tmp_path):
        found = results_table.scores([row(10.0), row(20.0, metric="linear/[CLS]/count")])
        (tmp_path / "model_cards").mkdir()
        (tmp_path / "benchmarks" / "results").mkdir(parents=True)
        for name in ("README.md", "model_cards/a.md"):
            (tmp_path / name).write_text(self.text)
        assert len(results_table.stale_files(found, ["MAE"], tmp_path)) == 3
        results_table.write_tables(found, ["MAE"], tmp_path)
        assert "| MAE | 10.0 / 20.0 | 1 |\n<!-- end of comparison -->\nrest" in (tmp_path / "README.md").read_text()
        assert results_table.stale_files(found, ["MAE"], tmp_path) == []
        other = results_table.scores([row(11.0), row(20.0, metric="linear/[CLS]/count")])
        assert tmp_path / "README.md" in results_table.stale_files(other, ["MAE"], tmp_path)

    def test_of_this_repository_are_what_the_results_say(self):
        found = results_table.scores(results_table.read())
        stale = results_table.stale_files(found, list(METHODS))
        assert not stale, f"run `python benchmarks/comparison.py --table`: {', '.join(map(str, stale))}"
        assert len(found["scenes"]["MAE"]["k-NN/[CLS]/count"]) == 3


class TestCells:
    def arguments(self, tmp_path, *flags):
        given = ["--next", f"--runs={tmp_path}", f"--results={tmp_path / 'results.csv'}", "--data=scenes", *flags]
        return comparison.parse(given)

    def test_what_is_done_is_not_run_again_and_what_lacks_its_start_is_said(self, tmp_path, monkeypatch, capsys):
        args = self.arguments(tmp_path, "--seeds=0", "--methods", "MAE", "OCL", "TEC (base: MAE)")
        ran = []

        def pretrain(cell, args):
            ran.append(cell.method)
            return [comparison.row(cell, "seconds", 1.0) | {"images_seen": 60_000}]

        monkeypatch.setattr(comparison, "pretrain", pretrain)
        results_table.append([comparison.row(Cell("scenes", "MAE", 0), "seconds", 1.0)], args.results)
        comparison.run_cells(comparison.all_cells(args), args)
        assert ran == ["OCL"] and "left out: scenes, TEC (base: MAE), seed 0" in capsys.readouterr().out
        (tmp_path / "scenes" / "0" / "MAE").mkdir(parents=True)
        (tmp_path / "scenes" / "0" / "MAE" / "model.safetensors").touch()
        comparison.run_cells(comparison.all_cells(args), args)
        assert ran == ["OCL", "TEC (base: MAE)"]
        comparison.run_cells(comparison.all_cells(args), args)
        assert len(ran) == 2

    def test_no_time_no_cell(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(comparison, "pretrain", lambda cell, args: pytest.fail("a cell was run"))
        comparison.main(["--next", "--hours=0", "--data=scenes", f"--runs={tmp_path}", f"--results={tmp_path}/r.csv"])
        out = capsys.readouterr().out
        assert out.startswith("0 of 27 cells are done") and "the time is over" in out

    def test_what_a_cell_starts_from_comes_before_it(self, tmp_path):
        args = self.arguments(tmp_path, "--finetune")
        args.data = list(comparison.DATA)
        cells = comparison.all_cells(args)
        assert len(set(cells)) == len(cells)
        for place, cell in enumerate(cells):
            assert cell.needs() is None or cell.needs() in cells[:place], cell.name

    def test_fine_tuned_beside_training_from_scratch(self, tmp_path, monkeypatch):
        """A cell for each number of labels, of each network and of an untrained one; none of the dear ones."""
        args = self.arguments(tmp_path, "--finetune", "--seeds=0", "--methods", "MAE", "MAE, mini", "supervised")
        args.data, args.cifar10 = ["cifar10"], tmp_path
        cells = [cell for cell in comparison.all_cells(args) if cell.labels]
        assert {(cell.method, cell.labels) for cell in cells} == {
            (method, labels) for method in ("untrained", "MAE") for labels in ("1%", "10%", "all")
        }
        calls = []

        def run(script, flags, args):
            calls.append((script, flags))
            output = (
                tmp_path / "cifar10" / "0" / ("MAE-1" if any("name_or_path" in f for f in flags) else "untrained-1")
            )
            output.mkdir(parents=True)
            (output / "results.json").write_text('{"accuracy": 41.5}')
            return 7.4

        monkeypatch.setattr(comparison, "run", run)
        for method in ("untrained", "MAE"):
            rows = comparison.finetune(Cell("cifar10", method, 0, "1%"), args)
            assert [(r["metric"], r["value"]) for r in rows] == [("fine-tuned/1%", 41.5), ("seconds/fine-tuned/1%", 7)]
        (_, scratch), (_, tuned) = calls
        # The same but for where it starts.
        start = f"--model_name_or_path={tmp_path / 'cifar10' / '0' / 'MAE'}"
        assert [f for f in tuned if not f.startswith("--output_dir")] == [
            start if f.startswith("--model_type") else f for f in scratch if not f.startswith("--output_dir")
        ]
        assert "--max_train_samples=500" in tuned and "--label_column_name=label" in tuned

    @pytest.mark.parametrize("method", ["MAE, mini", "supervised, mini"])
    def test_mini_is_a_cell_of_its_own(self, tmp_path, monkeypatch, method):
        args = self.arguments(tmp_path, "--methods", method)
        args.data, args.cifar10 = ["cifar10"], tmp_path
        (cell,) = comparison.all_cells(args)

        def run(script, flags, args):
            raise RuntimeError(f"{script} {' '.join(flags)}")

        monkeypatch.setattr(comparison, "run", run)
        with pytest.raises(RuntimeError, match="--preset=mini.*_mini"):
            comparison.run_cells([cell], args)

    @pytest.mark.parametrize("steps", [7812, 16, 1953, 8])
    def test_what_is_looked_at_is_a_checkpoint(self, steps):
        every, points = comparison.curve(comparison.DATA["cifar10"].points, steps)
        assert {step % every for step in points} == {0} and len(points) == 4
        assert max(points) == pytest.approx(steps / 2, abs=8 if steps > 8 else 4)
        assert comparison.curve((1.0,), steps) == (steps, set())

    def test_numbers_of_features_json(self):
        scored = {"knn": {"a": 1.0}, "linear": {"a": 2.0}, "rank_me": 3.0}
        features = {"raw pixels": scored | {"rank_me": None}, "trained, [CLS]": scored, "stage 0, mean": scored}
        results = {"features": features, "attentive": {"accuracy": {"trained": {"a": 4.0}, "untrained": {"a": 5.0}}}}
        found = set(comparison.numbers(results))
        assert {("raw pixels", 0, "k-NN/a", 1.0), (None, None, "linear/[CLS]/a", 2.0)} <= found
        assert {("stage 0", None, "RankMe/mean", 3.0), (None, None, "attentive/a", 4.0)} <= found
        assert ("untrained", 0, "attentive/a", 5.0) in found


class TestClaims:
    """Which of the papers' claims the numbers show."""

    claim = claims.Claim("A above B", (claims.Pair("d", "A", ("B", "raw pixels"), ("linear/mean/label",), 2.0),))

    def found(self, **methods) -> dict:
        rows = [
            row(value, data="d", method=name.replace("_", " "), seed=seed, metric=metric)
            for name, (metric, *values) in methods.items()
            for seed, value in enumerate(values)
        ]
        return results_table.scores(rows)

    @pytest.mark.parametrize(
        ("a", "b", "pixels", "verdict"),
        [
            ([13.0], [10.0], [5.0], "seen"),
            ([11.0], [10.0], [5.0], "not seen"),
            # Raw pixels have one number for all kinds of features, and the best of the others counts.
            ([13.0], [10.0], [12.0], "not seen"),
            # Apart by 3, with a standard error of sqrt(16 / 3 + 16 / 3) = 3.3.
            ([9.0, 13.0, 17.0], [6.0, 10.0, 14.0], [5.0], "not seen"),
            ([12.9, 13.0, 13.1], [9.9, 10.0, 10.1], [5.0], "seen"),
        ],
    )
    def test_by_hand(self, a, b, pixels, verdict):
        metric = "linear/mean/label"
        found = self.found(A=(metric, *a), B=(metric, *b), raw_pixels=("linear/label", *pixels))
        assert claims.judge(self.claim, found)[0] == verdict

    def test_a_number_that_is_missing(self):
        assert claims.judge(self.claim, self.found(A=("linear/mean/label", 3.0))) == ("not measured", "")

    def test_every_claim_is_of_methods_that_are_compared(self):
        known = {*METHODS, *results_table.REFERENCES}
        for claim in claims.CLAIMS:
            for pair in claim.pairs:
                assert pair.data in comparison.DATA
                assert {name.partition(", after stage ")[0] for name in (pair.better, *pair.worse)} <= known
                assert pair.better in comparison.DATA[pair.data].methods
        assert "| seen |" not in claims.table({}) and len(claims.table({}).splitlines()) == len(claims.CLAIMS) + 2
