"""How far a long call is, on a terminal: a bar where rich is installed, else lines."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator


def on_terminal() -> bool:
    """Whether progress is seen."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def progress(total: int, *, in_bytes: bool = False) -> Iterator[Callable[[str, int], None]]:
    """Yields a function of what is being done and how much of the total is done since; silent without a terminal."""
    if not on_terminal():
        yield lambda what, done: None
    elif importlib.util.find_spec("rich"):
        from rich import console, progress  # noqa: PLC0415 - optional

        columns = (
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.DownloadColumn() if in_bytes else progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
            task = bar.add_task("", total=total)
            yield lambda what, done: bar.update(task, description=what, advance=done)
    else:
        yield _Lines(total)


class _Lines:
    """Prints a line whenever something else is being done."""

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self.what = ""

    def __call__(self, what: str, done: int) -> None:
        if what != self.what:
            print(f"{self.done / self.total:4.0%} {what}", file=sys.stderr)
        self.what = what
        self.done += done
