"""Plain-text tables for the command line."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], *, align: str) -> str:
    """The rows as indented, aligned lines; `align` has '<' or '>' for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    )


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """'1 tensor', '2 tensors'."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
