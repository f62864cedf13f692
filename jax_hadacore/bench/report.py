"""The README's tables and chart, written from stored results between two markers."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import plot
from .grid import ATTENTION
from .rows import by_size, copy_time, groups, lengths, power, sizes
from .store import StoreError, load

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_IMAGES = Path("docs", "images")
_DTYPES = ("bfloat16", "float32")
_ELEMENTS = (1 << 28, 1 << 25)
_LENGTHS = [1 << bits for bits in range(7, 17)]


def write(files: Sequence[Path], readme: Path) -> list[Path]:
    """Rewrites the README between the markers, draws its chart, and returns the paths of both.

    Raises:
        StoreError: a file cannot be used.
    """
    results = load(files)
    try:
        before, after = _around_markers(readme.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{readme}: expected a file with one {BEGIN} and, behind it, one {END}: {error}") from error
    image = readme.parent / _image(results[0])
    image.parent.mkdir(parents=True, exist_ok=True)
    written = [readme]
    if figure := _chart(results[0]):
        plot.save(figure, image)
        written.append(image)
    links = [Path(os.path.relpath(file, readme.parent)).as_posix() for file in files]
    readme.write_text(f"{before}{BEGIN}\n{markdown(results, links)}{END}{after}")
    return written


def markdown(results: Sequence[dict], links: Sequence[str]) -> str:
    """What stands between the markers: each file's tables, and the chart of the first."""
    parts = []
    for index, (data, link) in enumerate(zip(results, links, strict=True)):
        parts += _device(data)
        if index == 0 and data["device"]:
            parts.append(f"![Percent of the copy's speed against n]({_image(data).as_posix()})")
        parts += _attention(data)
        parts += _alternatives(data)
        command, versions = data["environment"]["command"], plot.versions(data["environment"])
        parts.append(f"Stored in [{link}]({link}), measured by `{command}` ({versions}).")
    return "\n\n".join(parts) + "\n"


def _around_markers(text: str) -> tuple[str, str]:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError("found none, or several")
    return before, after


def _image(data: dict) -> Path:
    return _IMAGES / plot.file_name(data["environment"], f"roof-{_charted(data)}")


def _charted(data: dict) -> str:
    """The dtype of the chart: the first of those measured."""
    return next((dtype for dtype, _ in groups(_shown(data["device"]), "dtype")), _DTYPES[0])


def _chart(data: dict):
    rows = [row for row in _out_of_place(data["device"]) if row["dtype"] == _charted(data)]
    return plot.roof(data["environment"], _charted(data), rows) if rows else None


def _device(data: dict) -> Iterator[str]:
    shown = _shown(data["device"])
    if not shown:
        return
    ns = [n for n in _LENGTHS if n in lengths(shown)]
    lines = []
    for dtype, rows in groups(shown, "dtype"):
        cells = by_size(rows, lambda row: f"{100 * row['ratio']:.0f}")
        lines += [
            [dtype, f"{power(size[0])} {size[1]}", *(cells.get((size, n), "") for n in ns)] for size in sizes(rows)
        ]
    yield f"{data['environment']['device']}: percent of the speed of the best copy of the same bytes, by n."
    yield _table(["", "elements", *map(str, ns)], lines)


def _attention(data: dict) -> Iterator[str]:
    rows = [row for row in _out_of_place(data["device"]) if (row["n"], row["elements"]) in ATTENTION]
    if shown := [row for row in rows if row["dtype"] == _charted(data)]:
        yield f"Attention with heads of 128, {_charted(data)}: microseconds on the device, back to back."
        yield _table(
            ["", "elements", "transform", "best copy"],
            [
                [
                    ATTENTION[row["n"], row["elements"]],
                    f"{row['elements']:,} {row['caches']}",
                    f"{row['microseconds']['transform']:.3g}",
                    f"{copy_time(row):.3g}",
                ]
                for row in shown
            ],
        )


def _alternatives(data: dict) -> Iterator[str]:
    rows = [row for row in data["alternatives"] if row["dtype"] == _charted(data)]
    if not rows:
        return
    elements, caches = sizes(rows)[0]
    some = {row["n"]: row["microseconds"] for row in rows if row["elements"] == elements}
    names = dict.fromkeys(name for times in some.values() for name in times if name not in {"hadamard", "elementwise"})
    yield (
        f"XLA's alternatives, {_charted(data)}, {power(elements)} elements, {caches}: "
        "time of a jitted call, times that of `hadamard`, by n."
    )
    yield _table(
        ["", *map(str, sorted(some))],
        [
            [name, *(f"{t[name] / t['hadamard']:.1f}" if name in t else "" for _, t in sorted(some.items()))]
            for name in names
        ],
    )


def _out_of_place(rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if not row["inplace"]]


def _shown(rows: Sequence[dict]) -> list[dict]:
    """Rows of the README's dtypes and lengths: of its sizes where they are cold, else of the largest."""
    rows = [row for row in _out_of_place(rows) if row["dtype"] in _DTYPES and row["n"] in _LENGTHS]
    cold = [row for row in rows if row["caches"] == "cold" and row["elements"] in _ELEMENTS]
    return cold or [row for row in rows if row["elements"] == sizes(rows)[0][0]]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
