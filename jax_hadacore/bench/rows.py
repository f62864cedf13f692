"""What tables, charts and the report ask of stored rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence


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


def copy_time(row: dict) -> float:
    """Microseconds of the best copy in a device row."""
    return min(value for name, value in row["microseconds"].items() if name != "transform")


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
