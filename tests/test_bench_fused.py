"""`jax-hadacore bench fused`: its cases and rows, its tables, chart, and block of the README."""

import json
import re

import fake_gpu
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import quantize_oracle
from bench_run import bench
from cases import rng
from oracle import transform

from jax_hadacore import _ffi, _formats
from jax_hadacore.bench import command, fused, grid, plot, report, store
from jax_hadacore.bench.grid import Case

BFLOAT16 = np.dtype(jnp.bfloat16)
# The quantiser of each format that the benchmark names, with the group in rows of 4096.
FORMATS = {
    "float8_e4m3fn": ("float8_e4m3fn", "float32", 4096),
    "int8": ("int8", "float32", 4096),
    "int4": ("int4", "float32", 4096),
    "int4 asymmetric": ("int4", "float32", 4096),
    "mxfp8": ("float8_e4m3fn", "float8_e8m0fnu", 32),
    "mxfp4": ("float4_e2m1fn", "float8_e8m0fnu", 32),
    "nvfp4": ("float4_e2m1fn", "float8_e4m3fn", 16),
    "int8, given scale": ("int8", "given", 4096),
    "float8_e4m3fn by 128": ("float8_e4m3fn", "float32", 128),
}
SMALL = fused.Layer(8, 64, 32)


@pytest.fixture
def cpu(monkeypatch):
    """Small arrays on the CPU, where a test on a GPU's machine measures, too."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setitem(fused.LAYERS, "cpu", [SMALL])
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture
def gpu(monkeypatch):
    """Small arrays on what looks like a GPU, and what its timings were asked for."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_ffi, "problem", lambda platform: "")
    monkeypatch.setattr(grid, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(grid, "_WARM_ELEMENTS", 1 << 11)
    monkeypatch.setitem(fused.LAYERS, "gpu", [SMALL])
    calls = fake_gpu.install(monkeypatch)
    with jax.default_device(jax.devices("cpu")[0]):
        yield calls


class TestCases:
    def test_all_that_is_fused(self):
        found = {}
        for name, case in fused.cases(None, None):
            assert case.dtype == BFLOAT16
            found.setdefault((name, case.elements), []).append(case.n)
        assert {elements for _, elements in found} == {1 << 28, 1 << 25}
        for (name, _), ns in found.items():
            first = 128 if name.endswith("128") else 32
            last = 16384 if FORMATS[name][2] < 4096 else 32768
            assert ns == [n for n in fused._LENGTHS if first <= n <= last or n.bit_count() > 1]
        assert {name for name, _ in found} == set(FORMATS)

    def test_a_choice(self):
        assert {(case.n, case.elements) for _, case in fused.cases([16, 64, 1 << 20], [1 << 13])} == {(64, 1 << 13)}
        chosen = fused.two_steps_cases("gpu", [64], [1 << 13])
        assert [name for name, _ in chosen] == ["float8_e4m3fn", "int8", "int4"]
        assert {case for _, case in chosen} == {Case(BFLOAT16, 64, 1 << 13)}

    def test_two_steps_are_cold_on_a_gpu(self):
        assert all(case.exceeds_caches for _, case in fused.two_steps_cases("gpu", None, None))


class TestRows:
    def test_cpu(self, cpu, tmp_path, capsys):
        path = tmp_path / "run.json"
        assert bench("fused", "--n", 64, "--elements", "2^13", "--json", path) == 0
        data = json.loads(path.read_text())
        assert list(data) == ["environment", "two steps", "layers"]
        assert data["environment"]["command"] == "jax-hadacore bench fused --n 64 --elements 2^13 --json run.json"
        for name, row in zip(("float8_e4m3fn", "int8", "int4"), data["two steps"], strict=True):
            assert min(row.pop("microseconds").values()) > 0
            assert row == {"dtype": "float32", "n": 64, "elements": 1 << 13, "caches": "warm", "format": name}
        (row,) = data["layers"]
        assert (row["dtype"], row["tokens"], row["n"], row["outputs"]) == ("float32", *SMALL)
        assert set(row["microseconds"]) == {"x @ w", "float8_e4m3fn", "int8"}
        printed = capsys.readouterr().out
        assert re.search(r"int8 +float32 +64 +2\^13 +warm +[\d,.]+ +[\d,.]+ +\d+\.\dx", printed)
        assert re.search(r"float32 +8 +64 +32 +[\d,.]+ +[\d,.]+ +\d+\.\d\dx", printed)
        assert max(map(len, printed.splitlines())) <= 132

    def test_gpu(self, gpu, tmp_path):
        """The module is asked for each format, with its own results on buffers that hold them."""
        path = tmp_path / "run.json"
        assert bench("fused", "--n", 4096, "--elements", "2^13", "--json", path) == 0
        data = json.loads(path.read_text())
        assert list(data) == ["environment", *store.FUSED]
        for name, row, asked in zip(FORMATS, data["fused"], gpu, strict=True):
            assert row == {
                **{"dtype": "bfloat16", "n": 4096, "elements": 1 << 13, "caches": "cold", "format": name, "sets": 2},
                "microseconds": {"transform": 4.0, "one vector": 3.0, "two vectors": 2.0},
                "ratio": 0.5,
            }
            problem, quantization, _, results, *plan = asked
            assert (problem.dtype, problem.n, problem.rows, problem.scale) == ("bfloat16", 4096, 2, 1 / 64)
            assert quantization[:3] == FORMATS[name]
            assert plan == [2, 500, 9]
            given = "given" in name
            assert (quantization.given != 0, results.scales == 0) == (given, given)
            assert quantization.asymmetric == (results.zero_points != 0) == ("asymmetric" in name)

    def test_other_lengths(self, gpu, tmp_path):
        """They have whole rows, as many as timings take, and tables of their own."""
        path = tmp_path / "run.json"
        assert bench("fused", "--n", 4096, 7168, "--elements", "2^17", "--json", path) == 0
        rows = json.loads(path.read_text())["fused"]
        assert {(row["n"], row["elements"]) for row in rows} == {(4096, 1 << 17), (7168, 1 << 17)}
        assert {(problem.n, problem.rows) for problem, *_ in gpu} == {(4096, 32), (7168, 16)}
        (data,) = store.load([path])
        headers = [line for text in report._fused(data) for line in text.splitlines() if line.startswith("| codes")]
        assert headers == ["| codes | elements | 4096 |", "| codes | elements | 7168 |"]

    def test_buffers_hold_every_set(self, gpu):
        cases = fused.cases([32, 1024], [1 << 13, 1 << 12])
        timed = fused._Gpu([case for _, case in cases])
        for name, case in cases:
            sets = grid.Replays.of(case).sets
            quantizer = fused._FORMS[name].quantizer(case.n)
            groups = sets * case.elements // quantizer.group
            assert timed._x.nbytes >= 2 * sets * case.elements
            assert timed._codes.nbytes >= sets * case.elements
            assert timed._scales.nbytes >= groups * quantizer.format.scale_dtype.itemsize
            assert timed._zero_points.nbytes >= groups

    @pytest.mark.parametrize("name", fused._TWO_STEPS_FORMS)
    def test_two_steps_are_the_quantiser(self, name):
        x = rng("two steps", name).standard_normal((4, 128)).astype(np.float32)
        x[1] = 0
        codes, scales = fused._two_steps(jnp.asarray(x), format=_formats.parse(name))
        w = transform(x).astype(np.float32)
        expected, units, _ = quantize_oracle.quantize(w, quantize_oracle.Format(name), 128)
        np.testing.assert_allclose(np.delete(scales, 1, 0), np.delete(units, 1, 0), rtol=1e-5)
        different = np.asarray(codes).astype(np.float32) != expected.astype(np.float32)
        assert codes.dtype == expected.dtype
        assert different.mean() < 0.01  # a division rounds otherwise than a product with the inverse

    def test_layers_are_the_product(self, cpu, monkeypatch):
        """The times are of products with the same numbers."""
        results = []

        def keep(function, x, *arguments, chained):
            assert not chained
            results.append(np.asarray(function(x, *arguments)))
            return 1.0

        monkeypatch.setattr(fused.alternatives, "microseconds", keep)
        (row,) = fused.layer_rows("cpu", [SMALL])
        exact, *others = results
        assert len(others) == 2
        for other in others:
            assert np.std(other - exact) < 0.05 * np.std(exact)
        assert row["elements"] == 8 * 64

    def test_no_kernel(self, cpu, monkeypatch, capsys):
        monkeypatch.setattr(_ffi, "problem", lambda platform: f"no {platform} kernel")
        assert bench("fused") == 2
        assert "the fused table needs the native kernel: no cpu kernel" in capsys.readouterr().err

    def test_too_few_elements(self, capsys):
        with pytest.raises(SystemExit, match="2"):
            bench("fused", "--elements", "2^12")
        assert "expected a power of two from 8192 to 2^30, got '2^12'" in capsys.readouterr().err


def stored_run():
    """Results of round numbers: 90 percent at 2^28, 80 at 2^25; 2.5 times as fast as two steps, 1.6 as x @ w."""

    def row(n, elements, name, ratio):
        times = {"transform": 10.0, "one vector": 10 * ratio, "two vectors": 11.0}
        case = {"dtype": "bfloat16", "n": n, "elements": elements, "caches": "cold"}
        return {**case, "format": name, "sets": 1, "microseconds": times, "ratio": ratio}

    two_steps = {"microseconds": {"hadamard_quantize": 200.0, "two steps": 500.0}}
    layer = {"tokens": 16384, "outputs": 14336, "microseconds": {"x @ w": 1600.0, "int8": 1000.0}}
    return {
        "environment": {"platform": "gpu", "device": "a GPU", "command": "a command", "jax": "1.2.3"},
        "fused": [
            row(n, elements, name, ratio)
            for elements, ratio in ((1 << 28, 0.9), (1 << 25, 0.8))
            for n in (128, 4096)
            for name in ("int8", "mxfp4")
            if (n, name) != (4096, "mxfp4")
        ],
        "two steps": [
            {"dtype": "bfloat16", "n": n, "elements": 1 << 28, "caches": "cold", "format": "int8", **two_steps}
            for n in (128, 4096)
        ],
        "layers": [{"dtype": "bfloat16", "n": 4096, "elements": 1 << 26, "caches": "warm", **layer}],
    }


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(store.text(stored_run()))
    return path


class TestWhatIsMadeOfThem:
    def test_the_tables(self, capsys):
        command.tables.show(command._console(), stored_run())
        printed = capsys.readouterr().out
        assert "bfloat16 to codes, 2^28 elements, cold" in printed
        for line in (
            r"int8 +90 % +90 %\s*$",
            r"mxfp4 +80 % +-\s*$",
            r"int8 +bfloat16 +128 +2\^28 +cold +200 +500 +2\.5x",
            r"bfloat16 +16384 +4096 +14336 +1,600 +1,000 +1\.60x",
        ):
            assert re.search(line, printed, re.MULTILINE)

    def test_a_full_table_fits(self, capsys):
        row = stored_run()["fused"][0]
        rows = [{**row, "n": n, "format": name} for n in fused._LENGTHS for name in FORMATS]
        command.tables.show(command._console(), {**stored_run(), "fused": rows})
        printed = capsys.readouterr().out
        assert "..." not in printed
        assert max(map(len, printed.splitlines())) <= 132

    def test_the_chart(self, stored, tmp_path, capsys):
        assert bench("plot", stored, "--out", tmp_path / "charts") == 0
        (path,) = (tmp_path / "charts").iterdir()
        assert path.name == "a-gpu-fused-bfloat16.png"
        assert capsys.readouterr().out.split() == [str(path)]
        assert min(matplotlib.image.imread(path).shape[:2]) > 200

    def test_lines(self):
        data = stored_run()
        large, small = plot.fused(data["environment"], "bfloat16", data["fused"]).axes
        assert [line.get_label() for line in large.lines[:2]] == ["int8", "mxfp4"]
        assert [list(line.get_xdata()) for line in small.lines[:2]] == [[128, 4096], [128]]
        assert [list(line.get_ydata()) for line in small.lines[:2]] == [[80, 80], [80]]
        assert large.get_ylim() == small.get_ylim() == (0, 105)
        assert "2^{28}" in large.get_title()

    def test_the_report(self, stored, tmp_path):
        readme = tmp_path / "README.md"
        other = f"before\n{report.DIMS.begin}\nold\n{report.DIMS.end}\n"
        readme.write_text(f"{other}{report.QUANTISED.begin}\n{report.QUANTISED.end}\nafter\n")
        for _ in range(2):
            assert bench("report", stored, "--readme", readme) == 0
            text = readme.read_text()
            assert text.startswith(f"{other}{report.QUANTISED.begin}\na GPU, bfloat16 to codes")
            assert text.endswith(f"{report.QUANTISED.end}\nafter\n")
        lines = text.splitlines()
        for line in (
            "| codes | elements | 128 | 4096 |",
            "| int8 | 2^28 cold | 90 | 90 |",
            "| mxfp4 | 2^25 cold | 80 | - |",
            "| int8 | 2.5 | 2.5 |",
            "| 16384 x 4096 | 4096 x 14336 | 1600 | 1000 (1.60) |",
        ):
            assert line in lines
        (image,) = re.findall(r"!\[.*\]\((.*)\)", text)
        assert (tmp_path / image).stat().st_size < 150_000

    def test_results_of_a_cpu_have_no_chart(self, tmp_path):
        """And a report of them is of what there is."""
        data = {name: rows for name, rows in stored_run().items() if name != "fused"}
        path, readme = tmp_path / "run.json", tmp_path / "README.md"
        path.write_text(store.text(data))
        readme.write_text(f"{report.QUANTISED.begin}\n{report.QUANTISED.end}\n")
        assert bench("report", path, "--readme", readme) == 0
        assert "![" not in readme.read_text()
        assert "| int8 | 2.5 | 2.5 |" in readme.read_text()
