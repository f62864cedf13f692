"""The README's tables and charts, written from stored results between markers."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import plot
from .grid import ATTENTION
from .models import MODELS
from .rows import by_kind, by_orders, by_size, copy_time, dense_times, groups, lengths, power, sizes, times_faster
from .store import FUSED, SWEPT, StoreError, load

_IMAGES = Path("docs", "images")
_DTYPES = ("bfloat16", "float32")
_ELEMENTS = (1 << 28, 1 << 25)
_LENGTHS = [1 << bits for bits in range(7, 17)]


@dataclass(frozen=True)
class Chart:
    """An image in the README: what it says where it cannot be shown, and its path from there."""

    text: str
    path: Path
    figure: plot.Figure


@dataclass(frozen=True)
class Block:
    """What stands between two markers of the README: of each file that has one of the tables, its parts.

    The chart of the first file stands after its first part.
    """

    name: str
    tables: Sequence[str]
    parts: Sequence[Callable[[dict], Iterator[str]]]
    chart: Callable[[dict], Chart | None]

    @property
    def begin(self) -> str:
        """The marker before it."""
        return f"<!-- {self.name}:begin -->"

    @property
    def end(self) -> str:
        """The marker behind it."""
        return f"<!-- {self.name}:end -->"

    def markdown(self, results: Sequence[dict], links: Sequence[str]) -> str:
        """The text between the markers."""
        texts = []
        for index, (data, link) in enumerate(zip(results, links, strict=True)):
            first, *others = self.parts
            texts += first(data)
            if index == 0 and (chart := self.chart(data)):
                texts.append(f"![{chart.text}]({chart.path.as_posix()})")
            for part in others:
                texts += part(data)
            command, versions = data["environment"]["command"], plot.versions(data["environment"])
            texts.append(f"Stored in [{link}]({link}), measured by `{command}` ({versions}).")
        return "\n\n".join(texts) + "\n"

    def replaced(self, text: str, markdown: str) -> str:
        """A README's text with another one between the markers.

        Raises:
            ValueError: the text has not each marker once, in order.
        """
        before, begin, rest = text.partition(self.begin)
        _, end, after = rest.partition(self.end)
        if not begin or not end or self.begin in rest or self.end in after:
            raise ValueError("found none, or several")
        return f"{before}{begin}\n{markdown}{end}{after}"


def write(files: Sequence[Path], readme: Path) -> list[Path]:
    """Rewrites the blocks of the README that the files have tables for, draws their charts, and returns all paths.

    Raises:
        StoreError: a file cannot be used.
    """
    results = load(files)
    links = [Path(os.path.relpath(file, readme.parent)).as_posix() for file in files]
    charts = []
    try:
        text = readme.read_text()
    except OSError as error:
        raise StoreError(f"{readme}: {error.strerror}") from error
    for block in BLOCKS:
        of_files = [index for index, data in enumerate(results) if any(data[table] for table in block.tables)]
        if not of_files:
            continue
        some = [results[index] for index in of_files]
        try:
            text = block.replaced(text, block.markdown(some, [links[index] for index in of_files]))
        except ValueError as error:
            raise StoreError(
                f"{readme}: expected a file with one {block.begin} and, behind it, one {block.end}: {error}"
            ) from error
        charts.append(block.chart(some[0]))
    written = [readme]
    for chart in filter(None, charts):
        image = readme.parent / chart.path
        image.parent.mkdir(parents=True, exist_ok=True)
        plot.save(chart.figure, image)
        written.append(image)
    readme.write_text(text)
    return written


def _charted(data: dict) -> str:
    """The dtype of the chart: the first of those measured."""
    return next((dtype for dtype, _ in groups(_shown(data["device"]), "dtype")), _DTYPES[0])


def _roof(data: dict) -> Chart | None:
    rows = [row for row in _out_of_place(data["device"]) if row["dtype"] == _charted(data)]
    if not rows:
        return None
    path = _IMAGES / plot.file_name(data["environment"], f"roof-{_charted(data)}")
    return Chart("Percent of the copy's speed against n", path, plot.roof(data["environment"], _charted(data), rows))


def _device(data: dict) -> Iterator[str]:
    shown = _shown(data["device"])
    if not shown:
        return
    ns = [n for n in _LENGTHS if n in lengths(shown)]
    lines = [line for dtype, rows in groups(shown, "dtype") for line in _percents(dtype, rows, ns)]
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


def _dims(data: dict) -> Iterator[str]:
    dtypes = [dtype for dtype, _ in groups(data["dims"], "dtype")]
    yield (
        f"{data['environment']['device']}, dimensions of models, by the orders of their factors: percent of the speed "
        "of the best copy of the same bytes."
    )
    lines = []
    for order, rows in by_orders(data["dims"]):
        cells = [_span(f"{100 * row['ratio']:.0f}" for row in rows if row["dtype"] == dtype) for dtype in dtypes]
        models = dict.fromkeys(model for n in lengths(rows) for model in MODELS.get(n, ()))
        lines.append([order, _span(map(str, lengths(rows))), *cells, ", ".join(models)])
    yield _table(["order", "n", *dtypes, "models"], lines)


def _dense(data: dict) -> Iterator[str]:
    for dtype, rows in groups((row for row in data["dims"] if "calls" in row), "dtype"):
        yield f"A jitted dense product `x @ H`, {dtype}: its time, times that of `hadamard`, by n."
        yield _table(["", *(str(row["n"]) for row in rows)], [["x @ H", *(f"{dense_times(row):.1f}" for row in rows)]])


def _dims_bars(data: dict) -> Chart | None:
    dtype, rows = next(groups(data["dims"], "dtype"))
    path = _IMAGES / plot.file_name(data["environment"], f"dims-{dtype}")
    return Chart(
        "Percent of the copy's speed at dimensions of models", path, plot.dims(data["environment"], dtype, rows)
    )


def _fused(data: dict) -> Iterator[str]:
    for dtype, rows in groups(data["fused"], "dtype"):
        yield (
            f"{data['environment']['device']}, {dtype} to codes: percent of the speed of a kernel that moves the same "
            "bytes, by n; a dash where no kernel is fused."
        )
        for kind in by_kind(rows):
            ns = lengths(kind)
            lines = [line for name, some in groups(kind, "format") for line in _percents(name, some, ns, absent="-")]
            yield _table(["codes", "elements", *map(str, ns)], lines)


def _two_steps(data: dict) -> Iterator[str]:
    for dtype, elements, caches, rows in groups(data["two steps"], "dtype", "elements", "caches"):
        lines = []
        for name, some in groups(rows, "format"):
            cells = {row["n"]: f"{times_faster(row, 'hadamard_quantize', 'two steps'):.1f}" for row in some}
            lines.append([name, *(cells.get(n, "") for n in lengths(rows))])
        yield (
            f"A jitted call of `hadamard` with XLA's quantiser behind it, {dtype}, {power(elements)} elements, "
            f"{caches}, a scale per row: its time, times that of `hadamard_quantize`, by n."
        )
        yield _table(["codes", *map(str, lengths(rows))], lines)


def _layers(data: dict) -> Iterator[str]:
    for dtype, rows in groups(data["layers"], "dtype"):
        others = [name for name in rows[0]["microseconds"] if name != "x @ w"]
        lines = []
        for row in rows:
            times, shapes = row["microseconds"], (f"{row['tokens']} x {row['n']}", f"{row['n']} x {row['outputs']}")
            cells = [f"{times[name]:.0f} ({times_faster(row, name, 'x @ w'):.2f})" for name in others]
            lines.append([*shapes, f"{times['x @ w']:.0f}", *cells])
        yield (
            f"A jitted linear layer, {dtype}: microseconds of `x @ w`, and of x rotated, quantised and multiplied by "
            "the codes of w; in brackets, times as fast."
        )
        yield _table(["x", "w", "x @ w", *others], lines)


def _fused_lines(data: dict) -> Chart | None:
    if not data["fused"]:
        return None
    dtype, rows = next(groups(data["fused"], "dtype"))
    path = _IMAGES / plot.file_name(data["environment"], f"fused-{dtype}")
    figure = plot.fused(data["environment"], dtype, rows)
    return Chart("Percent of the speed of a kernel that moves the same bytes, against n", path, figure)


def _span(values: Iterable[str]) -> str:
    """The least and the largest of numbers."""
    ordered = sorted(set(values), key=int)
    return " to ".join(dict.fromkeys((ordered[0], ordered[-1]))) if ordered else ""


def _percents(name: str, rows: Sequence[dict], ns: Sequence[int], absent: str = "") -> list[list[str]]:
    """Lines of a table, one for each size."""
    cells = by_size(rows, lambda row: f"{100 * row['ratio']:.0f}")
    return [[name, f"{power(size[0])} {size[1]}", *(cells.get((size, n), absent) for n in ns)] for size in sizes(rows)]


def _out_of_place(rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if not row["inplace"]]


def _shown(rows: Sequence[dict]) -> list[dict]:
    """Rows of the README's dtypes and lengths: of its sizes where they are cold, else of the largest."""
    rows = [row for row in _out_of_place(rows) if row["dtype"] in _DTYPES and row["n"] in _LENGTHS]
    cold = [row for row in rows if row["caches"] == "cold" and row["elements"] in _ELEMENTS]
    return cold or [row for row in rows if row["elements"] == sizes(rows)[0][0]]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


BENCH = Block("bench", SWEPT, (_device, _attention, _alternatives), _roof)
DIMS = Block("dims", ("dims",), (_dims, _dense), _dims_bars)
QUANTISED = Block("fused", FUSED, (_fused, _two_steps, _layers), _fused_lines)
BLOCKS = (BENCH, DIMS, QUANTISED)
