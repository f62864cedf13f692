"""`jax-hadacore bench dims`: its cases and rows, its table, charts, and block of the README."""

import json
import re

import fake_gpu
import jax
import matplotlib.image
import numpy as np
import pytest
from bench_run import bench
from cases import DTYPES
from oracle import bound, decompose

from jax_hadacore import _ffi
from jax_hadacore.bench import command, dims, grid, plot, report, store
from jax_hadacore.bench.grid import Case
from jax_hadacore.bench.models import MODELS

_, BFLOAT16, FLOAT32, _ = DTYPES


@pytest.fixture
def cpu(monkeypatch):
    """Small arrays on the CPU, where a test on a GPU's machine measures, too."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setitem(dims._ELEMENTS, "cpu", 1 << 12)
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture
def gpu(monkeypatch):
    """Small arrays on what looks like a GPU, and what its timings were asked for."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_ffi, "problem", lambda platform: "")
    monkeypatch.setattr(grid, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(grid, "_WARM_ELEMENTS", 1 << 11)
    monkeypatch.setitem(dims._ELEMENTS, "gpu", 1 << 12)
    calls = fake_gpu.install(monkeypatch)
    with jax.default_device(jax.devices("cpu")[0]):
        yield calls


class TestCases:
    @pytest.mark.parametrize("platform", ["gpu", "cpu"])
    def test_every_dimension(self, platform):
        cases = dims.cases(platform, None)
        assert [case.n for case in cases if case.dtype == BFLOAT16] == sorted(MODELS)
        assert {case.n for case in cases if case.dtype == FLOAT32} == {
            n for n in MODELS if all(k <= 28 for k in decompose(n)[:-1])
        }
        most = {"gpu": 1 << 25, "cpu": 1 << 22}[platform]
        for case in cases:
            rows, rest = divmod(case.elements, case.n)
            assert (rest, rows % 8) == (0, 0)
            assert most - 8 * case.n < case.elements <= most

    def test_named_lengths(self):
        found = [(case.dtype, case.n, case.elements // case.n) for case in dims.cases("gpu", [7168, 344, 1 << 24, 344])]
        assert found == [
            (BFLOAT16, 344, 97536),
            (BFLOAT16, 7168, 4680),
            (BFLOAT16, 1 << 24, 8),
            (FLOAT32, 7168, 4680),
            (FLOAT32, 1 << 24, 8),
        ]

    def test_whole_rows_are_checked(self):
        for n, checked in ((128, 1 << 16), (12, 65532), (53248, 53248), (73728, 73728)):
            assert Case(BFLOAT16, n, 8 * n * (1 + (1 << 16) // n)).checked == checked

    def test_a_gpu_takes_buffers_in_turn(self):
        """Together they exceed the caches at every length."""
        assert {grid.Replays.of(case).sets for case in dims.cases("gpu", None) if case.dtype == BFLOAT16} == {8}


class TestRows:
    def test_cpu(self, cpu, tmp_path, capsys):
        path = tmp_path / "run.json"
        assert bench("dims", "--lengths", "48,896,344", "--json", path) == 0
        data = json.loads(path.read_text())
        assert list(data) == ["environment", "dims"]
        assert data["environment"]["command"] == "jax-hadacore bench dims --lengths 48,896,344 --json run.json"
        found = [(row["dtype"], row["n"], row["elements"], "calls" in row) for row in data["dims"]]
        assert found == [
            ("bfloat16", 48, 3840, False),
            ("bfloat16", 344, 2752, False),
            ("bfloat16", 896, 7168, False),
            ("float32", 48, 3840, True),
            ("float32", 896, 7168, True),
        ]
        for row in data["dims"]:
            assert row["bound"] == pytest.approx(bound(np.dtype(getattr(jax.numpy, row["dtype"])), row["n"]), rel=1e-4)
            assert 0.5 < row["error"] <= row["bound"]
            assert row["ratio"] == pytest.approx(
                row["microseconds"]["memcpy"] / row["microseconds"]["transform"], rel=1e-3
            )
        printed = capsys.readouterr().out
        assert re.search(r"28 +896 +7,168 +warm +\d+ % +.* <= 3.94 +\d+\.\dx +Qwen2.5-0.5B", printed)
        assert max(map(len, printed.splitlines())) <= 132

    def test_gpu(self, gpu, monkeypatch):
        monkeypatch.setattr(dims, "MODELS", {64: (), 96: (), 1872: ()})
        monkeypatch.setattr(dims, "_DENSE_LENGTHS", (96,))
        cases = dims.cases("gpu", None)
        rows = list(dims.rows("gpu", cases, None))
        assert [(row["dtype"], row["n"], row["elements"], row["sets"]) for row in rows] == [
            ("bfloat16", 64, 4096, 4),
            ("bfloat16", 96, 3840, 4),
            ("bfloat16", 1872, 14976, 1),
            ("float32", 64, 4096, 2),
            ("float32", 96, 3840, 2),
        ]
        assert {(row["caches"], row["inplace"]) for row in rows} == {("cold", False)}
        assert all(row["error"] == pytest.approx(1, abs=0.02) for row in rows)
        assert [set(row.get("calls", ())) for row in rows] == [set(), {"hadamard", "x @ H"}, set(), set(), set()]

    def test_the_dense_product_is_the_transform(self, cpu, monkeypatch):
        """The times are of both on the same rows."""
        results = {}

        def keep(function, x, *arguments, chained):
            results[len(results)] = function(x, *arguments)
            return 1.0

        monkeypatch.setattr(dims.alternatives, "microseconds", keep)
        with jax.default_matmul_precision("highest"):
            assert dims.alternatives.beside_dense(Case(FLOAT32, 3072, 8 * 3072)) == {"hadamard": 1, "x @ H": 1}
        np.testing.assert_allclose(*results.values(), atol=1e-4)

    def test_a_large_error_is_a_failure(self, cpu, monkeypatch):
        monkeypatch.setattr(dims, "error_bound", lambda dtype, n: 0.5)
        assert bench("dims", "--lengths", 48) == 1

    def test_no_kernel(self, cpu, monkeypatch, capsys):
        monkeypatch.setattr(_ffi, "problem", lambda platform: f"no {platform} kernel")
        assert bench("dims") == 2
        assert "the dims table needs the native kernel: no cpu kernel" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("lengths", "message"),
        [
            ("13696", "size 13696 = 107 * 2^7; no Hadamard matrix of order 107"),
            ("48,many", "'many'"),
            ("48,0", "it must have at least one element"),
        ],
    )
    def test_wrong_lengths(self, lengths, message, capsys):
        with pytest.raises(SystemExit, match="2"):
            bench("dims", "--lengths", lengths)
        assert message in capsys.readouterr().err.replace("\n", " ")


def stored_run():
    """Results of round numbers: 90 percent of the copy for order 12, 80 for others, 70 in float32."""

    def row(dtype, n, ratio, **rest):
        times = {"transform": 5.0, "copy kernel": 5 * ratio, "cudaMemcpyAsync": 6.0}
        measured = {"sets": 8, "microseconds": times, "ratio": ratio, "error": 1.0, "bound": 1.05}
        return {"dtype": dtype, "n": n, "elements": 8 * n, "caches": "cold", "inplace": False, **measured, **rest}

    return {
        "environment": {"platform": "gpu", "device": "a GPU", "command": "a command", "jax": "1.2.3"},
        "dims": [
            row("bfloat16", 128, 0.8),
            row("bfloat16", 3072, 0.9, calls={"hadamard": 2.0, "x @ H": 50.0}),
            row("bfloat16", 10944, 0.8),
            row("bfloat16", 12288, 0.85),
            row("bfloat16", 11008, 0.8),
            row("bfloat16", 48, 0.95),
            row("float32", 3072, 0.7),
        ],
    }


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(store.text(stored_run()))
    return path


class TestWhatIsMadeOfThem:
    def test_the_table(self, capsys):
        command.tables.show(command._console(), stored_run())
        printed = capsys.readouterr().out
        assert re.search(r"12 +3072 +24,576 +cold +90 % +5 +1.000 <= 1.05 +25.0x +Llama-3.2-3B, Gemma-7B", printed)
        orders = re.findall(r"^ (\S+|\d+ \* \d+) +\d+ +[\d,]+ +cold", printed, re.MULTILINE)
        assert orders == ["2^m", "12", "12", "12", "344", "36 * 76", "12"]

    def test_charts(self, stored, tmp_path, capsys):
        assert bench("plot", stored, "--out", tmp_path / "charts") == 0
        paths = sorted((tmp_path / "charts").iterdir())
        assert [path.name for path in paths] == ["a-gpu-dims-bfloat16.png", "a-gpu-dims-float32.png"]
        assert set(capsys.readouterr().out.split()) == set(map(str, paths))
        assert min(matplotlib.image.imread(paths[0]).shape[:2]) > 200

    def test_bars(self):
        data = stored_run()
        (axes,) = plot.dims(data["environment"], "bfloat16", data["dims"][:-1]).axes
        assert [bar.get_height() for bar in axes.patches] == pytest.approx([80, 95, 90, 85, 80, 80])
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["128", "48", "3072", "12288", "11008", "10944"]
        assert [text.get_text() for text in axes.texts] == ["2^m", "12", "344", "36 * 76"]
        assert axes.get_ylim() == (0, 105)

    def test_a_chart_of_all_is_small(self, tmp_path):
        row = stored_run()["dims"][0]
        rows = [{**row, "n": n} for n in MODELS]
        plot.save(plot.dims(stored_run()["environment"], "bfloat16", rows), tmp_path / "all.png")
        assert (tmp_path / "all.png").stat().st_size < 150_000

    def test_the_report_leaves_other_blocks_alone(self, stored, tmp_path):
        readme = tmp_path / "README.md"
        other = f"before\n{report.BENCH.begin}\nold\n{report.BENCH.end}\n"
        readme.write_text(f"{other}{report.DIMS.begin}\nold\n{report.DIMS.end}\nafter\n")
        for _ in range(2):
            assert bench("report", stored, "--readme", readme) == 0
            text = readme.read_text()
            assert text.startswith(f"{other}{report.DIMS.begin}\na GPU, dimensions of models")
            assert text.endswith(f"{report.DIMS.end}\nafter\n")
        lines = text.splitlines()
        for line in (
            "| order | n | bfloat16 | float32 | models |",
            "| 12 | 48 to 12288 | 85 to 95 | 70 | Llama-3.2-3B, Gemma-7B, Qwen3-8B, Mistral-Large |",
            "| 36 * 76 | 10944 | 80 |  | DeepSeek-V2-Lite, GLM-4.5-Air |",
            "| x @ H | 25.0 |",
        ):
            assert line in lines
        assert "[run.json](run.json), measured by `a command`" in text
        (image,) = re.findall(r"!\[.*\]\((.*)\)", text)
        assert (tmp_path / image).exists()

    def test_a_readme_without_the_block(self, stored, tmp_path, capsys):
        readme = tmp_path / "README.md"
        readme.write_text(f"{report.BENCH.begin}{report.BENCH.end}")
        assert bench("report", stored, "--readme", readme) == 2
        assert "expected a file with one <!-- dims:begin -->" in capsys.readouterr().err
