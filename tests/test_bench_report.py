"""The benchmark's charts, and the tables that it writes into the README."""

import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from bench_run import bench, stored_run

from jax_hadacore.bench import plot, store
from jax_hadacore.bench import report as bench_report

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(store.text(stored_run()))
    return path


class TestPlot:
    def test_every_chart(self, stored, tmp_path, capsys):
        out = tmp_path / "charts"
        assert bench("plot", stored, "--out", out) == 0
        names = {
            "a-gpu-roof-bfloat16.png",
            "a-gpu-roof-bfloat16-inplace.png",
            "a-gpu-speedup-hadacore-bfloat16.png",
            "a-gpu-alternatives-bfloat16.png",
        }
        assert {path.name for path in out.iterdir()} == names
        assert set(capsys.readouterr().out.split()) == {str(out / name) for name in names}
        for name in names:
            image = matplotlib.image.imread(out / name)
            assert min(image.shape[:2]) > 200
            assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 50

    def test_axes_are_honest(self):
        data = stored_run()
        rows = [row for row in data["device"] if not row["inplace"]]
        cold, warm = plot.roof(data["environment"], "bfloat16", rows).axes
        assert cold.get_ylim() == warm.get_ylim() == (0, 105)
        assert (cold.get_xscale(), cold.xaxis.get_transform().base) == ("log", 2)
        assert cold.get_title().startswith("cold")
        assert warm.get_title().startswith("warm")
        assert [line.get_ydata()[0] for line in cold.lines] == [80, 80, 100]
        text = cold.figure.get_suptitle() + cold.figure.get_supxlabel()
        for part in ("a GPU", "bfloat16", "a command", "jax 1.2.3"):
            assert part in text

    def test_faster_than_the_copy_is_not_cut_off(self):
        data = stored_run()
        rows = [{**row, "ratio": 1.2} for row in data["device"]]
        (panel, _) = plot.roof(data["environment"], "bfloat16", rows).axes
        assert panel.get_ylim()[1] >= 120

    def test_many_sizes_stay_legible(self):
        sizes = [(1 << bits, "cold") for bits in range(28, 8, -1)]
        drawn = plot._thinned(sizes)
        assert len(drawn) == plot._MOST_LINES
        assert (drawn[0], drawn[-1]) == (sizes[0], sizes[-1])

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "No such file"),
            ("{", "not a JSON file"),
            ("[]", "expected what `jax-hadacore bench --json` writes"),
            ('{"environment": {}}', "found no table of it"),
        ],
    )
    def test_wrong_files(self, tmp_path, capsys, text, message):
        path = tmp_path / "run.json"
        if text is not None:
            path.write_text(text)
        assert bench("plot", path) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"jax-hadacore bench: {path}: ")
        assert message in err

    def test_two_files_with_one_chart(self, stored, tmp_path, capsys):
        assert bench("plot", stored, stored, "--out", tmp_path) == 2
        assert "two of the files have a chart a-gpu-roof-bfloat16.png" in capsys.readouterr().err


class TestReport:
    def test_writes_between_the_markers(self, stored, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n\n{bench_report.BENCH.begin}\nold\n{bench_report.BENCH.end}\nafter\n")
        for _ in range(2):
            assert bench("report", stored, "--readme", readme) == 0
            text = readme.read_text()
            assert text.startswith(f"before\n\n{bench_report.BENCH.begin}\na GPU: percent of the speed")
            assert text.endswith(f"{bench_report.BENCH.end}\nafter\n")
        for line in (
            "|  | elements | 128 | 4096 |",
            "| bfloat16 | 2^28 cold | 80 | 80 |",
            "| decode, Llama-3-8B | 4,096 warm | 5 | 4 |",
            "| x @ H | 2.0 | 64.0 |",
        ):
            assert line in text.splitlines()
        assert "[run.json](run.json)" in text
        (image,) = re.findall(r"!\[.*\]\((.*)\)", text)
        assert 10_000 < (tmp_path / image).stat().st_size < 150_000

    @pytest.mark.parametrize(
        "text",
        [
            "no markers",
            bench_report.BENCH.begin,
            f"{bench_report.BENCH.end}{bench_report.BENCH.begin}",
            f"{bench_report.BENCH.begin}{bench_report.BENCH.begin}{bench_report.BENCH.end}",
        ],
        ids=["none", "begin only", "turned around", "twice"],
    )
    def test_wrong_markers(self, stored, tmp_path, capsys, text):
        readme = tmp_path / "README.md"
        readme.write_text(text)
        assert bench("report", stored, "--readme", readme) == 2
        assert f"{readme}: expected a file with one <!-- bench:begin -->" in capsys.readouterr().err
        assert readme.read_text() == text

    @pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="the source distribution has no stored results")
    @pytest.mark.parametrize("block", bench_report.BLOCKS, ids=lambda block: block.name)
    def test_the_readme_is_what_report_writes(self, block):
        _, _, rest = (ROOT / "README.md").read_text().partition(f"{block.begin}\n")
        text, end, _ = rest.partition(block.end)
        assert end
        links = re.findall(r"Stored in \[(.*?)\]", text)
        # Those of the GPU that the targets are for, where there are any.
        stored = [f"benchmarks/results/{gpu}-{block.name}.json" for gpu in ("h200", "h100")]
        assert links == [path for path in stored if (ROOT / path).exists()][:1]
        assert text == (block.markdown(store.load([ROOT / link for link in links]), links) if links else "")
        for image in re.findall(r"!\[.*\]\((.*)\)", text):
            assert (ROOT / image).stat().st_size < 150_000
