"""How far a long run is, as a bar on the terminal; nothing elsewhere."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """Yields a function of what is being done and how much of the total is done since."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda what, done: bar.update(task, description=what, advance=done)
