"""What was measured, as tables for the terminal."""

from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from .grid import ATTENTION
from .models import MODELS
from .rows import (
    by_kind,
    by_orders,
    by_size,
    copy_time,
    dense_times,
    groups,
    lengths,
    power,
    sizes,
    times_faster,
    with_speedup,
)


def show(console: Console, data: dict) -> None:
    """Prints every table that has rows, and what they were measured with."""
    for part in _parts(data):
        if isinstance(part, Table):
            console.print(part)
        else:
            console.print(part, markup=False, highlight=False)
    console.print(
        "; ".join(f"{key} {value}" for key, value in data["environment"].items()), markup=False, highlight=False
    )


def _parts(data: dict) -> Iterator[str | Table]:
    device = data.get("device", [])
    yield from _device(device)
    yield from _attention(device)
    yield from _peers(with_speedup(data.get("peers", []), device))
    yield from _alternatives(data.get("alternatives", []))
    yield from _program(data.get("program", []))
    if thunks := data.get("thunks"):
        yield "\n  ".join(["Thunks of three transforms with elementwise operations between them:", *thunks]) + "\n"
    if copies := data.get("copies"):
        yield f"Copies in the HLO of a loop: {', '.join(f'{name} {count}' for name, count in copies.items())}\n"
    yield from _axis(data.get("axis", []))
    yield from _errors(data.get("errors", []))
    yield from _dims(data.get("dims", []))
    yield from _fused(data.get("fused", []))
    yield from _two_steps(data.get("two steps", []))
    yield from _layers(data.get("layers", []))


def _device(rows: Sequence[dict]) -> Iterator[str | Table]:
    for dtype, inplace, some in groups(rows, "dtype", "inplace"):
        yield f"{dtype}{', in place' if inplace else ''}: percent of the speed of the best copy; microseconds"
        yield _grid(some, _percent_and_micros)
        yield _largest_error(some)


def _attention(rows: Sequence[dict]) -> Iterator[str | Table]:
    if found := [row for row in rows if (row["n"], row["elements"]) in ATTENTION]:
        yield "Attention with heads of 128: microseconds"
        table = _table("", "dtype", "elements", "", "transform", "best copy")
        for row in found:
            transform = _micros(row["microseconds"]["transform"])
            name = ATTENTION[row["n"], row["elements"]] + (", in place" if row["inplace"] else "")
            table.add_row(name, row["dtype"], f"{row['elements']:,}", row["caches"], transform, _micros(copy_time(row)))
        yield table


def _peers(rows: Sequence[dict]) -> Iterator[str | Table]:
    for peer, dtype, some in groups(rows, "peer", "dtype"):
        yield f"{peer}, {dtype}: how many times as fast this library is; microseconds of {peer}"
        yield _grid(some, lambda row: f"{row['speedup']:.2f}x\n[dim]{_micros(row['microseconds']['transform'])}")
        yield _largest_error(some)


def _alternatives(rows: Sequence[dict]) -> Iterator[str | Table]:
    yield from _calls("A jitted call", rows)


def _axis(rows: Sequence[dict]) -> Iterator[str | Table]:
    for columns, some in groups(rows, "columns"):
        yield from _calls(f"A jitted call on the axis before the last, of {columns}", some)


def _calls(title: str, rows: Sequence[dict]) -> Iterator[str | Table]:
    if rows:
        yield f"{title}: microseconds, and times the transform's"
        names = list(dict.fromkeys(name for row in rows for name in row["microseconds"]))
        ratios = ["of the copy"] if any("ratio" in row for row in rows) else []
        table = _table("dtype", "n", "elements", "", *names, *ratios)
        for row in rows:
            times = row["microseconds"]
            cells = [
                f"{_micros(times[name])} [dim]{times[name] / times['hadamard']:5.1f}x" if name in times else ""
                for name in names
            ]
            percent = [f"{100 * row['ratio']:.0f} %" if "ratio" in row else "-" for _ in ratios]
            table.add_row(*_case(row), *cells, *percent)
        yield table


def _program(rows: Sequence[dict]) -> Iterator[str | Table]:
    if rows:
        yield "In a program: microseconds, hadamard / elementwise"
        table = _table(
            "dtype", "n", "elements", "", "iteration on the device", "dispatch of a call", "call and wait for it"
        )
        for row in rows:
            times = row["microseconds"]
            cells = [
                f"{_micros(times['hadamard'][place])} / {_micros(times['elementwise'][place])}"
                for place in ("device", "dispatch", "call")
            ]
            table.add_row(*_case(row), *cells)
        yield table


def _errors(rows: Sequence[dict]) -> Iterator[str | Table]:
    if rows:
        yield "Error in roundings, and what is allowed"
        dtypes = [dtype for dtype, _ in groups(rows, "dtype")]
        table = _table("n", *dtypes)
        for n in lengths(rows):
            found = {row["dtype"]: row for row in rows if row["n"] == n}
            table.add_row(str(n), *(_error(found[dtype]) if dtype in found else "" for dtype in dtypes))
        yield table


def _dims(rows: Sequence[dict]) -> Iterator[str | Table]:
    for dtype, some in groups(rows, "dtype"):
        yield f"{dtype}, dimensions of models: percent of the speed of the best copy; a call of x @ H, times hadamard's"
        table = _table("order", "n", "elements", "", "of the copy", "microseconds", "error", "x @ H", "models")
        for order, group in by_orders(some):
            for row in group:
                table.add_row(
                    order,
                    str(row["n"]),
                    f"{row['elements']:,}",
                    row["caches"],
                    f"{100 * row['ratio']:.0f} %",
                    _micros(row["microseconds"]["transform"]),
                    _error(row),
                    f"{dense_times(row):.1f}x" if "calls" in row else "",
                    ", ".join(MODELS.get(row["n"], ())),
                )
        yield table


def _fused(rows: Sequence[dict]) -> Iterator[str | Table]:
    for dtype, elements, caches, some in groups(rows, "dtype", "elements", "caches"):
        yield (
            f"{dtype} to codes, {power(elements)} elements, {caches}: percent of the speed of a kernel that moves the "
            "same bytes; microseconds"
        )
        for kind in by_kind(some):
            table = _table("format", *map(str, lengths(kind)))
            for name, group in groups(kind, "format"):
                cells = {row["n"]: _percent_and_micros(row) for row in group}
                table.add_row(name, *(cells.get(n, "-") for n in lengths(kind)))
            yield table


def _two_steps(rows: Sequence[dict]) -> Iterator[str | Table]:
    if rows:
        yield "A jitted call with a scale per row: microseconds, and times hadamard_quantize's"
        table = _table("format", "dtype", "n", "elements", "", "hadamard_quantize", "hadamard, then XLA's quantiser")
        for row in rows:
            times, slower = row["microseconds"], times_faster(row, "hadamard_quantize", "two steps")
            fused, two_steps = _micros(times["hadamard_quantize"]), _micros(times["two steps"])
            table.add_row(row["format"], *_case(row), fused, f"{two_steps} [dim]{slower:5.1f}x")
        yield table


def _layers(rows: Sequence[dict]) -> Iterator[str | Table]:
    if rows:
        yield "A jitted linear layer, x @ w, and rotated and quantised: microseconds, and times as fast"
        others = [name for name in rows[0]["microseconds"] if name != "x @ w"]
        table = _table("dtype", "tokens", "n", "outputs", "x @ w", *others)
        for row in rows:
            times = row["microseconds"]
            cells = [f"{_micros(times[name])} [dim]{times_faster(row, name, 'x @ w'):5.2f}x" for name in others]
            shape = (str(row[name]) for name in ("tokens", "n", "outputs"))
            table.add_row(row["dtype"], *shape, _micros(times["x @ w"]), *cells)
        yield table


def _percent_and_micros(row: dict) -> str:
    return f"{100 * row['ratio']:.0f} %\n[dim]{_micros(row['microseconds']['transform'])}"


def _error(row: dict) -> str:
    return f"{row['error']:.3f} {'<=' if row['error'] <= row['bound'] else '[bold]EXCEEDS[/]'} {row['bound']:.2f}"


def _largest_error(rows: Sequence[dict]) -> str:
    return f"Largest error: {max(row['error'] for row in rows):.3f} roundings\n"


def _grid(rows: Sequence[dict], cell: Callable[[dict], str]) -> Table:
    table = _table("elements", "n =", *map(power, lengths(rows)))
    cells = by_size(rows, cell)
    for size in sizes(rows):
        elements, caches = size
        table.add_row(power(elements), caches, *(cells.get((size, n), "") for n in lengths(rows)))
    return table


def _case(row: dict) -> tuple[str, str, str, str]:
    return row["dtype"], str(row["n"]), power(row["elements"]), row["caches"]


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _micros(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
