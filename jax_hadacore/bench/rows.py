"""What tables, charts and the report ask of stored rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from .._orders import orders


def groups(rows: Iterable[dict], *keys: str) -> Iterator[tuple]:
    """The values of the keys, in the order of their first appearance, each with the list of the rows that have them."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return ((*values, some) for values, some in found.items())


def lengths(rows: Iterable[dict]) -> list[int]:
    """Every n, in order."""
    return sorted({row["n"] for row in rows})


def sizes(rows: Iterable[dict]) -> list[tuple[int, str]]:
    """Every number of elements with its caches, the largest first."""
    return sorted({(row["elements"], row["caches"]) for row in rows}, reverse=True)


def by_size(rows: Iterable[dict], cell: Callable) -> dict:
    """cell(row) of each row, by ((elements, caches), n)."""
    return {((row["elements"], row["caches"]), row["n"]): cell(row) for row in rows}


def by_orders(rows: Iterable[dict]) -> Iterator[tuple[str, list[dict]]]:
    """The rows of the lengths that contain the same orders, by n, with the name of these; single orders first."""
    ordered = sorted(rows, key=lambda row: (len(orders(row["n"])), orders(row["n"]), row["n"]))
    for found, some in groupby(ordered, key=lambda row: orders(row["n"])):
        yield " * ".join(map(str, found)) or "2^m", list(some)


def by_kind(rows: Iterable[dict]) -> list[list[dict]]:
    """The rows of powers of two, and those of other lengths, where there are some."""
    kinds = [row for row in rows if not orders(row["n"])], [row for row in rows if orders(row["n"])]
    return [some for some in kinds if some]


def copy_time(row: dict) -> float:
    """Microseconds of the best copy in a device row."""
    return min(value for name, value in row["microseconds"].items() if name != "transform")


def dense_times(row: dict) -> float:
    """How many times as long as the transform a dense product takes, in a row of dims that has both."""
    return row["calls"]["x @ H"] / row["calls"]["hadamard"]


def times_faster(row: dict, fast: str, slow: str) -> float:
    """How many times as long as `fast` `slow` takes."""
    return row["microseconds"][slow] / row["microseconds"][fast]


def with_speedup(peers: Sequence[dict], device: Sequence[dict]) -> list[dict]:
    """The peers' rows that have a counterpart, with 'speedup': how many times as fast this library is."""
    own = {_case(row): row["microseconds"]["transform"] for row in device if not row["inplace"]}
    return [
        {**row, "speedup": row["microseconds"]["transform"] / own[_case(row)]} for row in peers if _case(row) in own
    ]


def power(value: int) -> str:
    """2^25 for 33554432."""
    return f"2^{value.bit_length() - 1}"


def _case(row: dict) -> tuple:
    return row["dtype"], row["n"], row["elements"]
