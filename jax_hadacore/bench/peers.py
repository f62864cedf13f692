"""Device time of PyTorch's packages for the same transform, where they are installed, on a GPU."""

import importlib
import importlib.util
import statistics
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

import numpy as np

from .._measure import definition, error_in_roundings
from .grid import Case, Replays

_LONGEST = 1 << 15


@dataclass(frozen=True)
class _Peer:
    """A package: the names its module goes by, the orthonormal transform of a tensor's rows, and what it takes."""

    modules: tuple[str, ...]
    transform: Callable
    dtypes: frozenset[str]

    def name(self) -> str | None:
        """Its module's name, None where it is not installed."""
        return next((name for name in self.modules if importlib.util.find_spec(name)), None)

    def load(self) -> Callable:
        """The transform of the rows of a tensor."""
        module = importlib.import_module(self.name() or self.modules[0])
        return lambda x: self.transform(module, x)

    def takes(self, case: Case) -> bool:
        """Whether the package knows the length and the dtype."""
        return case.n <= _LONGEST and case.dtype.name in self.dtypes


_PEERS = {
    "fast-hadamard-transform": _Peer(
        ("fast_hadamard_transform",),
        lambda module, x: module.hadamard_transform(x, scale=x.shape[-1] ** -0.5),
        frozenset({"float16", "bfloat16", "float32"}),
    ),
    "HadaCore": _Peer(
        ("faster_hadamard_transform", "hadacore"),
        lambda module, x: module.hadamard_transform(x),
        frozenset({"float16", "bfloat16"}),
    ),
}


def installed() -> bool:
    """Whether there is anything to measure."""
    return importlib.util.find_spec("torch") is not None and any(peer.name() for peer in _PEERS.values())


def cases(cases: Iterable[Case]) -> list[tuple[str, Case]]:
    """The cases that a peer takes, with the peer's name."""
    return [(name, case) for name, peer in _PEERS.items() if peer.name() for case in cases if peer.takes(case)]


def rows(cases: Iterable[tuple[str, Case]]) -> Generator[dict]:
    """Times the cases as the native timings do: replayed graphs, buffers taken in turn."""
    torch = importlib.import_module("torch")
    for name, case in cases:
        yield _row(torch, name, case)


def _row(torch, name: str, case: Case) -> dict:
    transform = _PEERS[name].load()
    plan = Replays.of(case)
    shape = (plan.sets, case.elements // case.n, case.n)
    x = torch.randn(shape, dtype=getattr(torch, case.dtype.name), device="cuda")
    error = _error(case, x[0], transform(x[0]))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # As many results are alive as there are operands, so that the allocator takes their memory in turn, too.
    results = deque(maxlen=plan.sets)
    with torch.cuda.graph(graph):
        for launch in range(plan.launches):
            results.append(transform(x[launch % plan.sets]))
    times = [_milliseconds(torch, graph) / plan.launches for _ in range(plan.replays + 1)][1:]
    del graph, results, x
    torch.cuda.empty_cache()
    return {
        "peer": name,
        **case.row(cold=plan.cold),
        "sets": plan.sets,
        "microseconds": {"transform": 1e3 * statistics.median(times)},
        "error": error,
    }


def _milliseconds(torch, graph) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def _error(case: Case, x, y) -> float:
    x, y = (
        np.asarray(tensor.reshape(-1)[-case.checked :].float().cpu()).reshape(-1, case.n).astype(case.dtype)
        for tensor in (x, y)
    )
    return error_in_roundings(y, definition(x))
