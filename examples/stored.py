"""What examples do with stored results: a table, a chart, and both between the markers of a document."""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Part = Callable[[dict], Iterator[str]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """--json, --markdown and --png."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the results")
    parser.add_argument("--markdown", type=Path, metavar="DOCUMENT", help="write what FILE stores into a document")
    parser.add_argument("--png", type=Path, metavar="IMAGE", help="draw the chart of what FILE stores")


def command(script: str, arguments: Sequence[str]) -> str:
    """What has made results, with files and folders by their names alone."""
    return " ".join(["python", script, *(Path(word).name if Path(word).is_absolute() else word for word in arguments)])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, which can be read as it is."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = [[f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def shown(parts: Sequence[Part], data: dict) -> str:
    """Results for the terminal."""
    return "\n\n".join(text for part in parts for text in part(data))


def publish(options: argparse.Namespace, name: str, parts: Sequence[Part], title: str, draw: Callable[[dict], Any]):
    """Draws the chart, and writes the parts between the markers of the name, with the chart images/NAME.png."""
    from jax_hadacore.bench import plot, report  # noqa: PLC0415 - needs matplotlib

    data = json.loads(options.json.read_text())
    if options.png:
        plot.save(draw(data), options.png)
    if options.markdown:
        image = Path("images", f"{name}.png")
        block = report.Block(name, (), parts, lambda data: report.Chart(title, image, draw(data)))
        link = Path(os.path.relpath(options.json, options.markdown.parent)).as_posix()
        text = block.replaced(options.markdown.read_text(), block.markdown([data], [link]))
        target = options.markdown.parent / image
        target.parent.mkdir(exist_ok=True)
        plot.save(draw(data), target)
        options.markdown.write_text(text)
