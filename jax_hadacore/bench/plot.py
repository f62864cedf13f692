"""Charts of stored results: percent of the copy's speed against n, and grids of speed-ups."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .rows import by_kind, by_orders, by_size, groups, sizes, with_speedup
from .store import StoreError

_MARKERS = "os^Dv<>pPX*hd"  # a line is told by its marker where colours are not
_CACHES = {
    "cold": "cold: buffers that exceed the caches take turns",
    "warm": "warm: the same buffers every time",
}
_MOST_LINES = 8  # in one panel

# What a line is called, and its percents by n.
_Lines = Mapping[str, Mapping[int, float]]


def write(results: Sequence[dict], folder: Path) -> list[Path]:
    """Draws every chart that the results have rows for, and returns the paths of the PNG files.

    Raises:
        StoreError: two charts would have the same name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for data in results:
        for name, figure in _figures(data):
            path = folder / file_name(data["environment"], name)
            if path in paths:
                raise StoreError(f"two of the files have a chart {path.name}: draw them into folders of their own")
            save(figure, path)
            paths.append(path)
    return paths


def file_name(environment: dict, name: str) -> str:
    """Of a chart."""
    return f"{_slug(environment['device'])}-{_slug(name)}.png"


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG file whose bytes depend on the chart alone."""
    figure.savefig(path, dpi=110, metadata={"Software": None}, pil_kwargs={"optimize": True})


def roof(environment: dict, dtype: str, rows: Sequence[dict], *, inplace: bool = False) -> Figure:
    """Percent of the speed of the best copy against n, a line for each number of elements; cold and warm apart."""
    panels = {
        _CACHES[caches]: {
            _power(size[0]): _percents(row for row in some if (row["elements"], caches) == size)
            for size in _thinned(sizes(some))
        }
        for caches, some in sorted(groups(rows, "caches"))
    }
    figure = _against_n(panels, "elements", "percent of the speed of the best copy")
    _entitle(figure, environment, f"{dtype}{', in place' if inplace else ''}: the transform beside a copy of its bytes")
    return figure


def fused(environment: dict, dtype: str, rows: Sequence[dict]) -> Figure:
    """Percent of the speed of a kernel that moves the same bytes against n, a power of two, a line for each format."""
    rows = by_kind(rows)[0]
    panels = {
        f"{_power(elements)} elements, {caches}": {name: _percents(line) for name, line in groups(some, "format")}
        for elements, caches, some in groups(rows, "elements", "caches")
    }
    figure = _against_n(panels, "codes", "percent of the speed of moving the bytes")
    _entitle(figure, environment, f"{dtype} to codes: the transform beside a kernel that moves its bytes")
    return figure


def dims(environment: dict, dtype: str, rows: Sequence[dict]) -> Figure:
    """Percent of the speed of the best copy at the dimensions of models, a bar for each, side by side by orders."""
    parts = list(by_orders(rows))
    figure = Figure(figsize=(0.16 * (len(rows) + len(parts)) + 2, 4.2), layout="constrained")
    axes = figure.subplots()
    start, places, names = 0, [], []
    for index, (order, some) in enumerate(parts):
        at = range(start, start + len(some))
        axes.bar(at, [100 * row["ratio"] for row in some], color=("tab:blue", "tab:cyan")[index % 2])
        middle = (at[0] + at[-1]) / 2
        axes.annotate(order, (middle, 1), xycoords=("data", "axes fraction"), rotation=90, ha="center", va="bottom")
        places += at
        names += [row["n"] for row in some]
        start += len(some) + 1
    axes.axhline(100, color="black", lw=0.8, ls=":")
    axes.set_ylim(0, max(105, 102 * max(row["ratio"] for row in rows)))
    axes.set_xlim(-1, start - 1)
    axes.set_xticks(places, names, rotation=90, size=7)
    axes.set_ylabel("percent of the speed of the best copy")
    axes.set_xlabel("n, the length of a transform; above, the orders of its factors")
    _entitle(figure, environment, f"{dtype}: the transform at dimensions of models beside a copy of its bytes")
    return figure


def _figures(data: dict) -> Iterator[tuple[str, Figure]]:
    environment = data["environment"]
    for dtype, inplace, rows in groups(data["device"], "dtype", "inplace"):
        yield f"roof-{dtype}{'-inplace' if inplace else ''}", roof(environment, dtype, rows, inplace=inplace)
    for peer, dtype, rows in groups(with_speedup(data["peers"], data["device"]), "peer", "dtype"):
        cells = {
            (f"{_power(size)} {caches}", n): value
            for ((size, caches), n), value in by_size(rows, lambda row: row["speedup"]).items()
        }
        order = [f"{_power(size)} {caches}" for size, caches in sizes(rows)]
        yield f"speedup-{peer}-{dtype}", _speedups(environment, f"{dtype}: speed-up over {peer}", order, cells)
    for dtype, rows in groups(data["alternatives"], "dtype"):
        cells = {
            (f"{name}, {_power(row['elements'])} {row['caches']}", row["n"]): time / row["microseconds"]["hadamard"]
            for row in rows
            for name, time in row["microseconds"].items()
            if name not in {"hadamard", "elementwise"}
        }
        order = list(dict.fromkeys(label for label, _ in cells))
        title = f"{dtype}: speed-up over XLA's alternatives"
        yield f"alternatives-{dtype}", _speedups(environment, title, order, cells)
    for dtype, rows in groups(data["dims"], "dtype"):
        yield f"dims-{dtype}", dims(environment, dtype, rows)
    for dtype, rows in groups(data["fused"], "dtype"):
        yield f"fused-{dtype}", fused(environment, dtype, rows)


def _percents(rows: Iterable[dict]) -> dict[int, float]:
    return {row["n"]: 100 * row["ratio"] for row in sorted(rows, key=lambda row: row["n"])}


def _against_n(panels: Mapping[str, _Lines], legend: str, ylabel: str) -> Figure:
    """Panels side by side, by their titles."""
    figure = Figure(figsize=(5.2 * len(panels) + 0.6, 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        _lines_panel(panel, lines)
        panel.set_title(title, size=10)
    axes[0].set_ylabel(ylabel)
    if len(panels) > 1 and len({tuple(lines) for lines in panels.values()}) == 1:
        figure.legend(*axes[0].get_legend_handles_labels(), title=legend, loc="outside right center", fontsize=9)
    else:
        for panel in axes:
            panel.legend(title=legend, loc="lower left", fontsize=9)
    return figure


def _lines_panel(panel: Axes, lines: _Lines) -> None:
    colours = colormaps["viridis"](np.linspace(0, 0.88, len(lines)))
    for (name, line), colour, marker in zip(lines.items(), colours, _MARKERS, strict=False):
        panel.plot(*zip(*line.items(), strict=True), color=colour, marker=marker, ms=5, lw=1.5, label=name)
    panel.axhline(100, color="black", lw=0.8, ls=":")
    panel.set_ylim(0, max(105, *(1.02 * max(line.values()) for line in lines.values())))
    panel.set_xscale("log", base=2)
    ticks = sorted({n for line in lines.values() for n in line})
    panel.set_xticks(ticks, [_power(n) for n in ticks])
    panel.minorticks_off()
    panel.set_xlabel("n, the length of a transform")
    panel.grid(alpha=0.25)


def _speedups(environment: dict, title: str, labels: Sequence[str], cells: dict[tuple[str, int], float]) -> Figure:
    """A grid of colours with their numbers: times as fast, on a scale that is even in ratios around 1."""
    ns = sorted({n for _, n in cells})
    values = np.array([[cells.get((label, n), np.nan) for n in ns] for label in labels])
    limit = max(1.5, float(np.nanmax(np.maximum(values, 1 / values))))
    norm = LogNorm(1 / limit, limit)
    figure = Figure(figsize=(0.75 * len(ns) + 3, 0.36 * len(labels) + 1.8), layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, cmap="PuOr", norm=norm, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            light = 0.25 < norm(value) < 0.75
            text = f"{value:.2f}x" if value < 10 else f"{value:.0f}x"
            axes.text(j, i, text, ha="center", va="center", size=9, color="black" if light else "white")
    axes.set_xticks(range(len(ns)), [_power(n) for n in ns])
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("n, the length of a transform (purple: this library is faster, orange: slower)")
    _entitle(figure, environment, title)
    return figure


def _entitle(figure: Figure, environment: dict, title: str) -> None:
    figure.suptitle(f"{environment['device']}, {title}", size=12)
    figure.supxlabel(f"{environment['command']}: {versions(environment)}", size=7, color="dimgray")


def versions(environment: dict) -> str:
    """What the numbers of a chart or a table depend on, beside the device and the command."""
    keys = ("jax_hadacore", "commit", "jax", "driver")
    return ", ".join(f"{key} {environment[key]}" for key in keys if key in environment)


def _thinned(sizes: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """At most _MOST_LINES, evenly, the first and the last among them."""
    if len(sizes) <= _MOST_LINES:
        return list(sizes)
    return [sizes[round(i * (len(sizes) - 1) / (_MOST_LINES - 1))] for i in range(_MOST_LINES)]


def _power(value: int) -> str:
    """In matplotlib's notation."""
    return f"$2^{{{value.bit_length() - 1}}}$"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
