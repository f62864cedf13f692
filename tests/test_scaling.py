"""docs/scaling.md says what compiled programs move between devices."""

import re
from pathlib import Path

import pytest
from scaling import COUNTS, HEADER, SHAPE, mebibytes, row

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "scaling.md").read_text()
TABLE = {int(count): line for line, count in re.findall(r"^(\| (\d+) \|.*)$", TEXT, re.MULTILINE)}


def test_the_table_is_whole():
    assert "\n".join(HEADER) in TEXT
    assert tuple(TABLE) == COUNTS


@pytest.mark.parametrize("count", [2, 4, 8])
def test_rows_are_what_is_compiled(eight_cpu_devices, count):
    assert row(eight_cpu_devices[:count]) == TABLE[count]


@pytest.mark.parametrize("count", COUNTS)
def test_rows_follow_the_formulas(count):
    block = 2 * SHAPE[0] * SHAPE[1] / count
    exchanged = mebibytes(2 * block * (count - 1) / count)
    cells = [count, mebibytes(block), 0, mebibytes(block * (count - 1)), exchanged, exchanged, f"2 / {count}"]
    assert TABLE[count] == f"| {' | '.join(map(str, cells))} |"


def test_the_example_runs(eight_cpu_devices):
    del eight_cpu_devices
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(example, {})
