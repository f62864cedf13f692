"""The benchmark: its choice of cases, rows, files and tables for the terminal, and its errors."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_gpu
import fake_torch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_run import bench, stored_run
from oracle import transform

from jax_hadacore import _cli, _ffi
from jax_hadacore.bench import alternatives, axis, command, device, environment, errors, grid, peers, program, store
from jax_hadacore.bench.grid import Case, Replays, Selection

BFLOAT16 = np.dtype(jnp.bfloat16)
FLOAT32 = np.dtype(np.float32)


@pytest.fixture
def cpu(monkeypatch):
    """A CPU whose native timings take no time, and what they were asked for."""
    calls = []

    def measure(problem, x, y, threads, repetitions):
        calls.append((problem, x == y, threads, repetitions))
        return {"transform": [0.001, 0.002, 0.009], "memcpy": [0.002, 0.001, 0.001]}

    native = SimpleNamespace(Dtype=fake_gpu.Dtype, Problem=fake_gpu.problem, measure=measure, isa=lambda: "a fake")
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(_ffi, "CPU", _ffi.NativeModule(native))
    monkeypatch.setattr(_ffi, "problem", lambda platform: "")
    return calls


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose memory is the host's, and what its timings were asked for."""
    calls = fake_gpu.install(monkeypatch)
    with jax.default_device(jax.devices("cpu")[0]):
        yield calls


def cases_of(selection):
    return {(case.dtype.name, case.n, case.elements) for case in selection.device()}


class TestGrid:
    def test_full_is_the_grid_of_the_paper_and_more(self):
        full = cases_of(Selection("gpu", full=True))
        assert full >= {
            (dtype, 1 << n, 1 << elements)
            for dtype in ("float16", "bfloat16", "float32")
            for n in range(7, 16)
            for elements in range(12, 29)
            if n <= elements
        }
        assert ("bfloat16", 1 << 20, 1 << 28) in full

    @pytest.mark.parametrize("full", [False, True])
    def test_attention_is_always_among_them(self, full):
        found = {(n, elements) for _, n, elements in cases_of(Selection("gpu", full=full))}
        assert found >= set(grid.ATTENTION)

    def test_a_selection_replaces_the_choice(self):
        selection = Selection("gpu", True, dtypes=["float32"], lengths=[64, 512], elements=[256, 1024])
        assert cases_of(selection) == {("float32", 64, 256), ("float32", 64, 1024), ("float32", 512, 1024)}
        assert {case.n for case in selection.alternatives()} == {64, 512}

    def test_how_a_gpu_is_timed(self):
        """Cold above 2^21 elements, by buffers of a gibibyte together; warm below."""
        plans = {1 << bits: Replays.of(Case(BFLOAT16, 128, 1 << bits)) for bits in range(12, 31)}
        assert {elements for elements, plan in plans.items() if plan.cold} == {1 << bits for bits in range(22, 31)}
        assert plans[1 << 30] == plans[1 << 28] == Replays(True, 1, 4, 12)
        assert plans[1 << 25] == Replays(True, 8, 16, 15)
        assert plans[1 << 23] == Replays(True, 32, 48, 15)
        assert plans[1 << 21] == Replays(False, 1, 200, 15)
        assert plans[1 << 15] == plans[1 << 12] == Replays(False, 1, 500, 9)
        assert Replays.of(Case(FLOAT32, 128, 1 << 25)).sets == 4


class TestDevice:
    def test_cpu(self, cpu):
        (row,) = device.rows("cpu", [Case(FLOAT32, 16, 1 << 10)], inplace=False)
        error = row.pop("error")
        assert 0.5 < error < 3
        assert row == {
            **{"dtype": "float32", "n": 16, "elements": 1024, "caches": "warm", "inplace": False, "threads": 1},
            "microseconds": {"transform": 2.0, "memcpy": 1.0},
            "ratio": 0.5,
        }
        ((asked, inplace, threads, repetitions),) = cpu
        assert (asked.dtype, asked.n, asked.rows, asked.scale) == ("float32", 16, 64, 0.25)
        assert (inplace, threads, repetitions) == (False, 1, 100)

    def test_cpu_in_place(self, cpu):
        (row,) = device.rows("cpu", [Case(FLOAT32, 16, 1 << 10)], inplace=True)
        assert row["inplace"]
        ((_, inplace, _, _),) = cpu
        assert inplace

    @pytest.mark.parametrize("inplace", [False, True])
    def test_gpu(self, gpu, monkeypatch, inplace):
        monkeypatch.setattr(grid, "COLD_BYTES", 1 << 16)
        monkeypatch.setattr(grid, "CHECKED", 1 << 10)
        monkeypatch.setattr(grid, "_WARM_ELEMENTS", 1 << 11)
        cases = [Case(BFLOAT16, 64, 1 << 12), Case(BFLOAT16, 2048, 1 << 11), Case(FLOAT32, 64, 1 << 12)]
        rows = list(device.rows("gpu", cases, inplace=inplace))
        assert [(row["dtype"], row["n"], row["caches"], row["sets"]) for row in rows] == [
            ("bfloat16", 64, "cold", 4),
            ("bfloat16", 2048, "warm", 1),
            ("float32", 64, "cold", 2),
        ]
        for row in rows:
            assert row["inplace"] == inplace
            assert row["ratio"] == pytest.approx(0.75 if inplace else 0.5)  # in place there is no cudaMemcpyAsync
            assert ("cudaMemcpyAsync" in row["microseconds"]) != inplace
            assert row["error"] == pytest.approx(1, abs=0.01)
        assert gpu == [(inplace, 4, 500, 9), (inplace, 1, 500, 9), (inplace, 2, 500, 9)]


class TestOtherTables:
    @pytest.mark.parametrize("n", [2, 64])
    def test_alternatives_are_the_transform(self, n):
        case = Case(FLOAT32, n, 4 * n)
        x = np.random.default_rng(n).standard_normal((4, n)).astype(np.float32)
        for name, (function, arguments) in alternatives._operations("cpu", case).items():
            with jax.default_matmul_precision("highest"):  # a GPU's default has fewer bits
                y = jax.jit(function)(x, *arguments)
            np.testing.assert_allclose(y, -x if name == "elementwise" else transform(x), atol=1e-5, err_msg=name)

    def test_rows_of_alternatives(self):
        (row,) = alternatives.rows("cpu", [Case(BFLOAT16, 64, 1 << 10)])
        names = {"hadamard", "elementwise", "butterfly", "two factors", "x @ H"}
        assert set(row["microseconds"]) == names
        assert row["caches"] == "warm"
        assert min(row["microseconds"].values()) > 0
        long = alternatives._operations("gpu", Case(FLOAT32, 1 << 16, 1 << 16))
        assert set(long) == names - {"x @ H"}  # the matrix would take 16 GiB

    def test_rows_of_another_axis(self):
        (row,) = axis.rows("cpu", [Case(BFLOAT16, 64, 1 << 14)])
        assert (row["n"], row["columns"]) == (64, 128)
        assert "ratio" not in row
        assert set(row["microseconds"]) == {"hadamard", "transposed", "elementwise"}
        assert min(row["microseconds"].values()) > 0

    def test_cases_of_another_axis_have_all_columns(self):
        selection = Selection("gpu", dtypes=["float32"], elements=[1 << 13])
        assert [case.n for case in selection.axis()] == [8, 16, 32, 64]

    def test_device_times_of_columns(self, gpu):
        (row,) = axis.rows("gpu", [Case(BFLOAT16, 64, 1 << 14)])
        assert row["ratio"] == pytest.approx(0.5)
        assert len(gpu) == 1
        (row,) = axis.rows("gpu", [Case(BFLOAT16, 512, 1 << 17)])
        assert "ratio" not in row

    def test_program(self, monkeypatch):
        monkeypatch.setattr(program, "_CALLS", 30)
        monkeypatch.setattr(program, "_LOOP_ELEMENTS", {"cpu": 1 << 12})
        (row,) = program.rows("cpu", [Case(FLOAT32, 64, 1 << 9)])
        assert set(row["microseconds"]) == {"hadamard", "elementwise"}
        for times in row["microseconds"].values():
            assert set(times) == {"device", "dispatch", "call"}
            assert min(times.values()) > 0
        assert set(program.loop_copies()) == {"hadamard", "elementwise"}

    @pytest.mark.parametrize("name", ["hadamard", "elementwise"])
    def test_a_call_copies_nothing(self, name):
        compiled = jax.jit(program._OPERATIONS[name]).lower(jnp.ones((8, 64))).compile()
        assert " copy" not in compiled.as_text()

    def test_thunks_of_a_dump(self, monkeypatch):
        def dump(command, *, env, cwd, **_):
            assert f"--xla_dump_to={cwd}" in env["XLA_FLAGS"]
            compile(command[-1], "the dumped program", "exec")
            Path(cwd, "module.thunk_sequence.txt").write_text("000: kCommandBuffer\n  001: kCustomCall   x\nend\n")
            return SimpleNamespace(returncode=0)

        monkeypatch.setattr(subprocess, "run", dump)
        assert program.thunks() == ["000: kCommandBuffer", " 001: kCustomCall x"]

    def test_thunks_that_cannot_be_dumped(self, monkeypatch):
        failed = SimpleNamespace(returncode=1, stderr="a trace\nno memory\n")
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
        assert program.thunks() == ["not dumped: no memory"]

    def test_errors(self):
        before = jax.config.jax_enable_x64
        rows = list(errors.rows(errors.cases(None, [1, 8])))
        assert jax.config.jax_enable_x64 == before
        assert {(row["dtype"], row["n"]) for row in rows} == {
            (dtype, n) for dtype in ("float16", "bfloat16", "float32", "float64") for n in (1, 8)
        }
        assert all(row["error"] <= row["bound"] for row in rows)
        assert len(errors.cases(None, None)) == 100

    def test_environment(self, monkeypatch):
        found = environment.environment("the command")
        assert found["command"] == "the command"
        assert {"device", "jax", "jaxlib", "python", "date"} <= set(found)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(environment, "_output", lambda *_: "")  # neither nvidia-smi nor git
        found = environment.environment("the command")
        assert found["driver"] == "unknown"
        assert "commit" not in found


@pytest.fixture
def torch(tmp_path, monkeypatch):
    with fake_torch.installed(monkeypatch, tmp_path):
        yield


class TestPeers:
    def test_rows(self, torch):
        assert peers.installed()
        cases = peers.cases([Case(BFLOAT16, 16, 1 << 8), Case(FLOAT32, 16, 1 << 8), Case(BFLOAT16, 1 << 16, 1 << 16)])
        rows = list(peers.rows(cases))
        assert [(row["peer"], row["dtype"]) for row in rows] == [
            ("fast-hadamard-transform", "bfloat16"),
            ("fast-hadamard-transform", "float32"),
            ("HadaCore", "bfloat16"),
        ]
        for row in rows:
            assert row["microseconds"] == {"transform": 4.5e3 / 500}
            assert (row["caches"], row["sets"]) == ("warm", 1)
        assert rows[0]["error"] == pytest.approx(1, abs=0.05)
        calls = sys.modules["fast_hadamard_transform"].calls
        assert calls[0] == ((16, 16), 0.25)
        assert sys.modules["faster_hadamard_transform"].calls[0] == ((16, 16), None)

    def test_not_installed(self):
        assert not peers.cases([Case(BFLOAT16, 16, 256)])


class TestSweep:
    def test_stores_and_prints(self, cpu, tmp_path, capsys):
        path = tmp_path / "run.json"
        arguments = ("--tables", "errors", "device", "--n", "16", "2^5", "--elements", 32, "--dtype", "float32")
        assert bench(*arguments, "--json", path) == 0
        data = json.loads(path.read_text())
        assert list(data) == ["environment", "device", "errors"]
        assert [row["n"] for row in data["device"]] == [16, 32]
        assert data["environment"]["command"] == (
            "jax-hadacore bench --tables errors device --n 16 2^5 --elements 32 --dtype float32 --json run.json"
        )
        assert list(tmp_path.iterdir()) == [path]
        printed = capsys.readouterr().out
        assert "float32: percent of the speed of the best copy" in printed
        assert re.search(r"2\^5 +warm +50 % +50 %", printed)
        assert re.search(r" 32 +\d\.\d{3} <= 2.94", printed)

    def test_every_default_table(self, cpu, tmp_path, monkeypatch):
        monkeypatch.setattr(program, "_CALLS", 20)
        monkeypatch.setattr(program, "_LOOP_ELEMENTS", {"cpu": 1 << 12})
        monkeypatch.setitem(grid._PROGRAM, False, [(64, 1 << 9)])
        path = tmp_path / "run.json"
        assert bench("sweep", "--n", 64, "--elements", 1024, "--json", path) == 0
        data = json.loads(path.read_text())
        assert list(data) == ["environment", "device", "alternatives", "program", "copies", "thunks"]
        assert {row["dtype"] for row in data["device"]} == {"float32", "bfloat16"}

    def test_on_a_gpu(self, gpu, torch, tmp_path, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(_ffi, "problem", lambda platform: "")
        monkeypatch.setattr(program, "_CALLS", 20)
        monkeypatch.setattr(program, "_LOOP_ELEMENTS", {"gpu": 1 << 12})
        monkeypatch.setattr(program, "thunks", lambda: ["kCommandBuffer"])
        monkeypatch.setitem(grid._PROGRAM, False, [(64, 1 << 9)])
        path = tmp_path / "run.json"
        assert bench("--n", 16, "--elements", 256, "--dtype", "bfloat16", "--json", path) == 0
        (data,) = store.load([path])
        assert [len(data[table]) for table in ("device", "alternatives", "program", "peers")] == [1, 1, 1, 2]
        assert data["thunks"] == ["kCommandBuffer"]
        assert data["environment"]["toolkit"] == 13000

    def test_every_table_is_printed(self, capsys):
        command.tables.show(command._console(), stored_run())
        printed = capsys.readouterr().out
        for text in (
            "bfloat16, in place: percent of the speed of the best copy; microseconds",
            "decode, Llama-3-8B",
            "HadaCore, bfloat16: how many times as fast this library is",
            "3.00x",
            "64.0x",
            "kCustomCall [a thunk]",
            "A jitted call on the axis before the last, of 128: microseconds",
            "3.0x",
            " 90 %",
            "1.000 <= 1.02",
            "device a GPU",
        ):
            assert text in printed
        assert "[dim]" not in printed
        assert max(map(len, printed.splitlines())) <= 132

    def test_an_interrupt_leaves_what_was_measured(self, cpu, tmp_path, monkeypatch, capsys):
        row = {"dtype": "float32", "n": 1, "error": 0.0, "bound": 1.2}

        def rows(*_, **__):
            yield row
            raise KeyboardInterrupt

        monkeypatch.setattr(errors, "rows", rows)
        path = tmp_path / "run.json"
        assert bench("--tables", "errors", "device", "--json", path, "--n", 16, "--elements", 64) == 130
        assert json.loads(path.read_text())["errors"] == [row]
        assert "interrupted" in capsys.readouterr().err

    def test_a_table_that_stops_leaves_the_others(self, cpu, tmp_path, monkeypatch, capsys):
        def rows(*_, **__):
            raise RuntimeError("out of memory")
            yield

        monkeypatch.setattr(device, "rows", rows)
        path = tmp_path / "run.json"
        assert bench("--tables", "errors", "device", "--n", 8, "--elements", 64, "--json", path) == 1
        assert list(json.loads(path.read_text())) == ["environment", "errors"]
        assert "device stopped: out of memory" in capsys.readouterr().err

    def test_a_large_error_is_a_failure(self, cpu, monkeypatch):
        monkeypatch.setattr(errors, "error_bound", lambda dtype, n: 0.5)
        assert bench("--tables", "errors", "--n", 8, "--dtype", "float16") == 1

    def test_an_unwritable_file_is_found_first(self, cpu, tmp_path, capsys):
        for path, reason in ((tmp_path, "found a folder"), (tmp_path / "absent" / "x.json", "No such file")):
            assert bench("--json", path) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert err.startswith(f"jax-hadacore bench: {path}: ")
            assert reason in err
        assert cpu == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--n", 96), "argument --n: expected a power of two from 1 to 2^24, got '96'"),
            (("--n", "2^25"), "expected a power of two from 1 to 2^24, got '2^25'"),
            (("--n", "many"), "got 'many'"),
            (("--elements", 4), "argument --elements: expected a power of two from 8 to 2^30, got '4'"),
            (("--elements", "2^x"), "got '2^x'"),
            (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
            (("--tables", "dims"), "argument --tables: invalid choice: 'dims'"),
            (("dance",), "invalid choice: 'dance'"),
            (("plot",), "the following arguments are required: FILE.json"),
        ],
        ids=str,
    )
    def test_wrong_arguments(self, arguments, message, capsys):
        with pytest.raises(SystemExit, match="2"):
            bench(*arguments)
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--n", 1024, "--elements", 512, "--tables", "device"), "nothing to measure"),
            (("--tables", "peers"), "the peers table needs a GPU, PyTorch, and"),
        ],
        ids=["no row", "no peer"],
    )
    def test_what_cannot_be_measured(self, cpu, arguments, message, capsys):
        assert bench(*arguments) == 2
        assert message in capsys.readouterr().err

    def test_no_kernel(self, cpu, monkeypatch, capsys):
        monkeypatch.setattr(_ffi, "problem", lambda platform: f"no {platform} kernel")
        assert bench() == 2
        assert "the device table needs the native kernel: no cpu kernel" in capsys.readouterr().err

    def test_another_platform(self, monkeypatch, capsys):
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        assert bench() == 2
        assert "JAX's default backend is tpu" in capsys.readouterr().err


class TestWithoutTheExtra:
    @pytest.mark.parametrize(
        ("absent", "arguments"), [("rich", ()), ("matplotlib", ("plot", "x")), ("matplotlib", ("report", "x"))], ids=str
    )
    def test_one_line_says_what_to_install(self, monkeypatch, capsys, absent, arguments):
        find_spec = _cli.bench.importlib.util.find_spec
        monkeypatch.setattr(
            _cli.bench.importlib.util, "find_spec", lambda name: None if name == absent else find_spec(name)
        )
        assert bench(*arguments) == 2
        assert capsys.readouterr().err == (
            f"jax-hadacore bench: {absent} is not installed; pip install 'jax_hadacore[bench]'\n"
        )

    def test_the_other_commands_do_not_import_it(self):
        code = "import sys, jax_hadacore._cli; sys.exit(any(name in sys.modules for name in ('rich', 'matplotlib')))"
        subprocess.run([sys.executable, "-c", code], check=True, cwd="/")

    def test_a_file_named_bench(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert _cli.main(["./bench"]) == 2
        assert "bench: no such file" in capsys.readouterr().err
