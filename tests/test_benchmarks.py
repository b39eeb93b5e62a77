"""The machinery of the benchmarks: what may be timed, how a race goes, what is kept and drawn.

That every benchmark works is tested by tests/cli/test_bench.py, on the shapes of the smoke set.
"""

from __future__ import annotations

import csv
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import harness, problem, render, work
from benchmarks.figure import digest, save, times_figure
from benchmarks.floors import floors
from benchmarks.harness import Row, percentiles, race, read_rows, write_rows
from benchmarks.inputs import CrossAttention, PoolBag, TokensAttendBag
from benchmarks.peers import Layout, _weights_obstacle, peers
from benchmarks.problem import FLOOR
from benchmarks.shapes import CrossShape, PoolShape, TokensShape, cases, skip_if_too_long

SHAPE = PoolShape(3, "smoke batch", 16)


@pytest.fixture
def pool() -> PoolBag:
    return PoolBag(SHAPE, torch.float32, "cpu")


class TestWhatMayBeTimed:
    def test_everything_right_races_and_a_floor(self, pool: PoolBag) -> None:
        contenders, left_out = pool.contenders("both")
        assert next(iter(contenders)) == "survfuse"
        assert {"survfuse tiled", "plain torch", "SDPA", "SDPA math", FLOOR} <= set(contenders)
        assert not set(contenders) & set(left_out)
        for contender in contenders.values():
            contender()

    def test_a_wrong_peer_is_left_out_and_how_wrong_it_is(self, pool: PoolBag) -> None:
        right = pool.ways["plain torch"]
        pool.add("plain torch", lambda: right() * 1.001)
        contenders, left_out = pool.contenders("forward")
        assert "plain torch" not in contenders
        assert left_out["plain torch"] == (True, "the result is wrong: relative error 1.0e-03")

    def test_a_wrong_gradient_counts(self, pool: PoolBag) -> None:
        def way() -> torch.Tensor:
            out = pool.sides()[1].sum() * 0 + pool.ours()
            return out + 0.01 * (pool.inputs["rows"].sum() - pool.inputs["rows"].sum().detach())

        pool.add("SDPA", way)
        assert "SDPA" in pool.contenders("forward")[0]
        assert "d_rows is wrong" in pool.contenders("both")[1]["SDPA"][1]

    def test_what_fails_without_a_gradient_is_not_tried_with_one(self, pool: PoolBag) -> None:
        calls = []

        def way() -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            raise RuntimeError("no kernel for this\nand a long story")

        pool.add("SDPA", way)
        for mode in ("forward", "both"):
            assert pool.contenders(mode)[1]["SDPA"] == (True, "no kernel for this")
        assert calls == [False]

    def test_ours_wrong_stops_everything(self, pool: PoolBag) -> None:
        pool.add("survfuse", lambda: pool.ours("reference") + 1)
        with pytest.raises(AssertionError, match="survfuse: the result is wrong"):
            pool.contenders("forward")

    def test_torch_says_in_a_warning_why_it_has_no_kernel(self, pool: PoolBag) -> None:
        def way() -> torch.Tensor:
            for text in ("Flash attention kernel not used because:", "it needs fp16 or bf16"):
                warnings.warn(text, stacklevel=1)
            raise RuntimeError("No available kernel. Aborting execution.")

        pool.add("SDPA flash", way)
        assert pool.contenders("forward")[1]["SDPA flash"] == (True, "it needs fp16 or bf16")

    def test_a_result_of_another_shape_is_wrong(self, pool: PoolBag) -> None:
        pool.add("SDPA", lambda: pool.ours()[0])
        assert "has shape" in pool.contenders("forward")[1]["SDPA"][1]

    def test_the_bag_is_frozen_or_trained_as_the_mode_says(self, pool: PoolBag) -> None:
        for mode, names in (("both", {"rows"}), ("both, trained", {"rows", "bag"})):
            pool.contenders(mode)
            assert set(pool.wanted()) == names

    def test_the_backward_alone_runs_on_a_graph_that_is_kept(self, pool: PoolBag) -> None:
        contenders, _ = pool.contenders("backward, trained")
        first, second = contenders["survfuse"](), contenders["survfuse"]()
        assert [t.shape for t in first] == [(3, 3, 16), (104, 16)]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_time_to_compile_is_limited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        own = PoolBag(SHAPE, torch.float32, "cpu")
        monkeypatch.setattr(problem.COMPILING, "spent", 91.0)
        monkeypatch.setattr(problem.COMPILING, "limit", 90.0)
        own.add("FlexAttention", lambda: pytest.fail("it compiled"))
        reason = own.contenders("forward")[1]["FlexAttention"][1]
        assert reason == "the 90 s for compiling in this set are spent"

    @pytest.mark.parametrize("shape", [("smoke batch", 5), (5, "smoke"), ("smoke", "smoke")])
    def test_exact_is_the_formula(self, shape: tuple) -> None:
        own = CrossAttention(CrossShape(*shape, 2, 8), torch.float32, "cpu")
        exact = own.exact()
        inputs = (t.double() for t in own.inputs.values())
        by_torch = peers("cpu")[0][1].attend(*inputs, own.layout)
        torch.testing.assert_close(exact, by_torch)

    def test_rows_too_many_for_a_cpu_are_skipped(self) -> None:
        with pytest.raises(pytest.skip.Exception, match="1000000 rows are for GPUs"):
            TokensAttendBag(TokensShape(6, 1, 256, "1M", 1024), torch.float32, "cpu")
        with pytest.raises(pytest.skip.Exception, match=r"1e\+10 pairs are for GPUs"):
            CrossAttention(CrossShape("100k", "100k", 1, 8), torch.float32, "cpu")
        skip_if_too_long(1_000_000, "cuda", 10**12)


class TestPeers:
    def test_weights_that_do_not_fit_are_not_formed(self) -> None:
        layout = Layout((1_000_000,), (1_000_000,), "cpu")
        assert "its weights alone need" in _weights_obstacle(layout, 8, torch.float32)
        assert _weights_obstacle(Layout((6,), (100,), "cpu"), 1, torch.float32) is None

    def test_a_cpu_names_what_it_lacks(self) -> None:
        found, absent = peers("cpu")
        assert found[0].name == "SDPA"
        assert absent["varlen_attn"] == "needs a GPU"
        assert not {peer.name for peer in found} & set(absent)

    def test_offsets(self) -> None:
        layout = Layout((2, 3), (4, 1), "cpu")
        assert [t.tolist() for t in layout.offsets] == [[0, 2, 5], [0, 4, 5]]
        assert all(t.dtype == torch.int32 for t in layout.offsets)
        assert (layout.longest, layout.pairs) == ((3, 4), 11)


class TestRace:
    def test_a_slow_contender_takes_fewer_turns_spread_over_the_race(self) -> None:
        order = []

        def slow() -> None:
            order.append("slow")
            time.sleep(0.02)

        ways = {"slow": slow, "quick": lambda: order.append("quick")}
        once = {"slow": 1.0, "quick": 1e-6}
        samples = race(ways, "cpu", 9, seconds=0.1, once=once)
        assert {name: len(times) for name, times in samples.items()} == {"slow": 3, "quick": 9}
        places = [place for place, name in enumerate(order) if name == "slow"]
        assert places[0] < 4
        assert places[-1] == len(order) - 2

    def test_rounds_that_are_asked_for_are_taken(self) -> None:
        ways = {"a": lambda: time.sleep(0.002), "b": lambda: None}
        assert [len(times) for times in race(ways, "cpu", 4).values()] == [4, 4]

    def test_percentiles_are_in_milliseconds(self) -> None:
        assert percentiles([0.001 * n for n in range(1, 12)]) == pytest.approx((3.0, 6.0, 9.0))


def row(backend: str = "survfuse", ms: float = 1.0, **changes) -> Row:
    key = {"op": "pool_bag", "mode": "both", "shape": "R=1", "dtype": "float32", "device": "x"}
    numbers = {"peak_mb": 1.0, "gbytes": 2.0, "gflop": 3.0, "bandwidth_fraction": 0.5}
    times = {"p20_ms": ms, "p50_ms": ms, "p80_ms": ms, "speedup": 1.0}
    return Row(**key | {"backend": backend} | numbers | times | changes)


class TestRows:
    def test_the_newest_row_of_a_key_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "x.csv"
        write_rows(path, [row(ms=1.0), row("SDPA", ms=3.0)])
        write_rows(
            path, [row(ms=2.0), Row.absent("op", "flash", "*", "*", "*", device="x", note="no")]
        )
        found = {r["backend"]: r for r in read_rows(path)}
        assert (found["survfuse"]["p50_ms"], found["SDPA"]["p50_ms"]) == ("2", "3")
        assert (found["flash"]["p50_ms"], found["flash"]["note"]) == ("nan", "no")
        assert [p.name for p in path.parent.iterdir()] == ["x.csv"]

    def test_files_of_before_a_column_was_added_are_read(self, tmp_path: Path) -> None:
        path = tmp_path / "old.csv"
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(harness.KEY))
            writer.writeheader()
            writer.writerow(dict.fromkeys(harness.KEY, "a"))
        assert read_rows(path)[0]["note"] == ""
        write_rows(path, [row()])
        assert len(read_rows(path)) == 2

    def test_an_installed_package_has_a_version_and_no_commit(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(harness, "ROOT", tmp_path)
        # the environment lies in somebody else's repository
        monkeypatch.setattr(harness, "_git", lambda *_: str(tmp_path.parent))
        assert harness.commit.__wrapped__().startswith("survfuse-")


class TestCases:
    def test_sets(self) -> None:
        rows = [("a", "core"), ("b", "core both"), ("c",), ("d", "smoke")]
        modes = ("forward", "both", "backward, trained", "both, trained")
        marked: dict[str, set] = {}
        for case in cases(rows, modes):
            shape, _, mode = case.values
            for mark in case.marks:
                marked.setdefault(f"{shape} {mark.name}", set()).add(mode)
        assert marked == {
            "a core": {"forward", "both", "both, trained"},
            "b core": {"both"},
            "d smoke": set(modes),
        }

    def test_the_modes_of_a_problem_follow_each_other(self) -> None:
        keys = [case.values[:2] for case in cases([("a",), ("b",)], ("forward", "both"))]
        assert keys == sorted(keys, key=lambda key: (key[0], key[1] != "fp32"))


class TestFloors:
    """docs/design.md, section 2, and the same arithmetic by hand."""

    @pytest.mark.parametrize(
        ("passes", "forward", "both"),
        [
            (CrossShape(6, "1M", 1, 256).minimum(2), 238, 714),
            (TokensShape(6, 1, 256, "1M", 1024).attending(2)[0], 476, 952),
        ],
        ids=["keys given", "absorbed"],
    )
    def test_of_memory(self, passes: work.Passes, forward: float, both: float) -> None:
        for mode, expected in (("forward", forward), ("both", both)):
            microseconds = 1e6 * work.of_mode(passes, mode).n_bytes / 4.3e12
            assert microseconds == pytest.approx(expected, rel=2e-3)

    def test_operations(self) -> None:
        n, d, r = 97, 24, 5
        passes = PoolShape(5, "smoke", 24).minimum(4)
        found = [passes[name].operations for name in (work.FORWARD, work.BACKWARD, work.TRAINED)]
        assert found == [4 * n * d * r, 6 * n * d * r, 10 * n * d * r]
        absorbed, formed = TokensShape(5, 2, 8, "smoke", 24).spreading(4)
        # absorbing costs 2 R D d once
        assert absorbed[work.FORWARD].operations == 2 * n * 10 * (24 + 8) + 2 * 10 * 24 * 8
        assert formed[work.FORWARD].operations == 2 * n * 24 * 16 + 4 * n * 5 * 16

    def test_every_op_stands_there_and_says_that_it_is_not_measured(self) -> None:
        text = floors()
        for op in ("pool_bag", "tokens_attend_bag", "cross_attention, few keys"):
            assert f"### {op}: lower bounds, not measured" in text
        assert "N=97" not in text


class TestPictures:
    @pytest.fixture
    def rows(self, tmp_path: Path) -> list[dict[str, str]]:
        path = tmp_path / "x.csv"
        absent = Row.absent("pool_bag", "flash-attn 2", "*", "*", "*", device="x", note="none")
        write_rows(path, [row(), row("SDPA", ms=20.0), row("somebody's", ms=5.0), absent])
        return read_rows(path)

    def test_the_same_rows_give_the_same_bytes(self, rows, tmp_path: Path) -> None:
        for name in ("a.svg", "b.svg", "c.png"):
            save(times_figure(rows, "x"), tmp_path / name, about=digest(rows))
        first, second = ((tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
        assert first == second
        assert digest(rows).encode() in first
        assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"

    def test_another_number_is_another_digest(self, rows) -> None:
        changed = [r | {"p50_ms": "7"} if r["backend"] == "SDPA" else r for r in rows]
        assert digest(changed) != digest(rows)

    def test_nothing_measured_is_nothing_to_draw(self, rows) -> None:
        with pytest.raises(ValueError, match="no measured row"):
            times_figure([r for r in rows if r["note"]], "x")


class TestPage:
    @pytest.fixture
    def house(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        results, page = tmp_path / "results", tmp_path / "docs" / "performance.md"
        page.parent.mkdir()
        page.write_text(
            "before\n<!-- models begin -->\n<!-- models end -->\n"
            "<!-- results begin -->\nold\n<!-- results end -->\n"
            "<!-- floors begin -->\n<!-- floors end -->\nafter\n"
        )
        absent = Row.absent("pool_bag", "xformers", "*", "*", "*", device="x", note="not installed")
        write_rows(results / "x.csv", [row(), row("SDPA", ms=2.0), absent])
        for name, value in (("RESULTS", results), ("PAGE", page), ("ROOT", tmp_path)):
            monkeypatch.setattr(render, name, value)
        monkeypatch.setattr(render, "FIGURES", page.parent / "performance")
        return tmp_path

    def test_is_written_and_then_agrees(self, house: Path, capsys) -> None:
        assert render.main(["--check"]) == 1
        assert "docs/performance.md is not what benchmarks/results holds" in capsys.readouterr().out
        assert render.main([]) == 0
        assert render.main(["--check"]) == 0
        page = (house / "docs/performance.md").read_text()
        assert page.startswith("before\n")
        assert page.endswith("after\n")
        assert "| R=1 | float32 | both | survfuse | 1 / 1 / 1 | 1.00x | 2e+03 | 50 % | 1 |" in page
        assert "* xformers: not installed" in page
        assert "(performance/x/pool_bag.svg)" in page
        assert (house / "docs/performance/x/pool_bag.svg").is_file()

    def test_models_have_tables_of_their_own(self, house: Path) -> None:
        path = house / "results" / "x.csv"
        shapes = {n: f"paper, N={n} D=1024" for n in (20000, 5000)}
        rows = []
        for n, shape in shapes.items():
            key = {"op": "training step, MCAT", "shape": shape}
            rows += [row(**key, ms=2.0), row("plain torch", **key, ms=n / 1000, peak_mb=3.0)]
        rows.append(row(op="training step, MCAT", shape=shapes[5000], dtype="bfloat16"))
        key = ("training step, MCAT", "survfuse reference", "both", shapes[20000], "float32")
        absent = Row.absent(*key, device="x", note="would need about 30 GB")
        write_rows(path, [*rows, absent])
        assert render.main([]) == 0
        page = (house / "docs/performance.md").read_text()
        models, ops = page.split("<!-- results begin -->")
        lines = [line for line in models.splitlines() if line.startswith("| ")]
        assert lines[1:] == [
            "| 5000 | float32 | survfuse | 2 / 2 / 2 | 2.50x | 1 | 3.00x |",
            "| 5000 | float32 | plain torch | 5 / 5 / 5 | 1.00x | 3 | 1.00x |",
            "| 5000 | bfloat16 | survfuse | 1 / 1 / 1 | - | 1 | - |",
            "| 20000 | float32 | survfuse | 2 / 2 / 2 | 10.00x | 1 | 3.00x |",
            "| 20000 | float32 | plain torch | 20 / 20 / 20 | 1.00x | 3 | 1.00x |",
        ]
        assert "* survfuse reference: would need about 30 GB" in models
        assert "MCAT" not in ops
        assert not list((house / "docs/performance/x").glob("training*"))

    def test_other_numbers_are_noticed(self, house: Path) -> None:
        render.main([])
        write_rows(house / "results" / "x.csv", [row(ms=4.0)])
        assert render.main(["--check"]) == 1
        assert render.stale_figures() == [house / "docs/performance/x/pool_bag.svg"]

    def test_a_picture_of_nothing_is_removed(self, house: Path) -> None:
        render.main([])
        stray = house / "docs/performance/y/pool_bag.svg"
        stray.parent.mkdir()
        stray.touch()
        assert render.main(["--check"]) == 1
        assert render.main([]) == 0
        assert not stray.exists()


def test_the_page_of_this_repository_is_what_the_results_say(capsys) -> None:
    assert render.main(["--check"]) == 0, capsys.readouterr().out
