"""What examples do with stored results: a table, a chart, and both between the markers of a document."""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax_hadacore.bench import store

Part = Callable[[dict], Iterator[str]]


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str], *, chart: bool = True) -> argparse.Namespace:
    """The options, with --json, --markdown and, where there is a chart, --png."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the results")
    parser.add_argument("--markdown", type=Path, metavar="DOCUMENT", help="write what FILE stores into a document")
    if chart:
        parser.add_argument("--png", type=Path, metavar="IMAGE", help="draw the chart of what FILE stores")
    parser.set_defaults(png=None)
    options = parser.parse_args(arguments)
    if (options.markdown or options.png) and not options.json:
        parser.error(f"{'--markdown and --png show' if chart else '--markdown shows'} what --json FILE stores")
    return options


def command(script: str, arguments: Sequence[str]) -> str:
    """What has made results, with files and folders by their names alone."""
    return " ".join(["python", script, *(Path(word).name if Path(word).is_absolute() else word for word in arguments)])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, which can be read as it is."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = [[f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def show(parts: Sequence[Part], data: dict, path: Path | None = None) -> None:
    """Prints results, and stores them where there is a path."""
    print("\n\n".join(text for part in parts for text in part(data)))
    if path:
        path.write_text(store.text(data))


def publish(
    options: argparse.Namespace,
    name: str,
    parts: Sequence[Part],
    title: str = "",
    draw: Callable[[dict], Any] | None = None,
) -> None:
    """Draws the chart, and writes the parts between the markers of the name, with the chart images/NAME.png."""
    from jax_hadacore.bench import plot, report  # noqa: PLC0415 - needs matplotlib

    data = json.loads(options.json.read_text())
    chart = report.Chart(title, Path("images", f"{name}.png"), draw(data)) if draw else None
    if options.png and chart:
        plot.save(chart.figure, options.png)
    if options.markdown:
        block = report.Block(name, (), parts, lambda data: chart)
        link = Path(os.path.relpath(options.json, options.markdown.parent)).as_posix()
        text = block.replaced(options.markdown.read_text(), block.markdown([data], [link]))
        if chart:
            target = options.markdown.parent / chart.path
            target.parent.mkdir(exist_ok=True)
            plot.save(chart.figure, target)
        options.markdown.write_text(text)
