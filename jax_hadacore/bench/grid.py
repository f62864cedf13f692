"""Which problems the benchmark measures, and how often: a quick choice, and the grid of the HadaCore paper."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

DTYPES = ("float16", "bfloat16", "float32")
COLD_BYTES = 1 << 30  # of operands and results together: several times what the L2 cache of any GPU holds
CHECKED = 1 << 16  # elements of a timed result that are compared with the definition, or one row

# (n, elements) of the query or key rotation in attention, heads of 128: what the HadaCore paper looks at.
ATTENTION = {
    (128, 1 << 25): "prefill, Llama-2-70B and Llama-3-8B",
    (128, 1 << 13): "decode, Llama-2-70B",
    (128, 1 << 12): "decode, Llama-3-8B",
}


@dataclass(frozen=True)
class Case:
    """A contiguous array of elements // n rows."""

    dtype: np.dtype
    n: int
    elements: int

    @property
    def bytes(self) -> int:
        """Of the operand; the result has as many."""
        return self.elements * self.dtype.itemsize

    @property
    def exceeds_caches(self) -> bool:
        """Whether one operand and its result are cold for lack of room, whatever was done before."""
        return 2 * self.bytes >= COLD_BYTES

    @property
    def checked(self) -> int:
        """How many elements of the result are compared with the definition."""
        return max(1, min(self.elements, CHECKED) // self.n) * self.n

    def row(self, *, cold: bool) -> dict:
        """What every stored row begins with."""
        return {
            "dtype": self.dtype.name,
            "n": self.n,
            "elements": self.elements,
            "caches": "cold" if cold else "warm",
        }


@dataclass(frozen=True)
class Replays:
    """How a GPU's times are taken: graphs of `launches` launches that take `sets` buffers in turn, replayed.

    Cold: the buffers together exceed the L2 cache several times. Warm: the same buffers every time.
    """

    cold: bool
    sets: int
    launches: int
    replays: int

    @classmethod
    def of(cls, case: Case) -> "Replays":
        """Long enough for the clock, and several seconds for a table."""
        cold = case.elements > _WARM_ELEMENTS
        sets = max(1, COLD_BYTES // (2 * case.bytes)) if cold else 1
        launches, replays = next((value for most, value in _LAUNCHES.items() if case.elements <= most), (4, 12))
        return cls(cold, sets, launches, replays)


_WARM_ELEMENTS = 1 << 21  # the largest warm case
# Elements, at most -> launches in a graph, and replays.
_LAUNCHES = {1 << 15: (500, 9), 1 << 21: (200, 15), 1 << 23: (48, 15), 1 << 25: (16, 15)}


@dataclass(frozen=True)
class Choice:
    """The dtypes, lengths and element counts of a table, all combined."""

    dtypes: Sequence[str]
    lengths: Sequence[int]
    elements: Sequence[int]

    def cases(self) -> list[Case]:
        """The combinations that hold at least one row, one dtype after the other."""
        return [
            Case(np.dtype(dtype), n, elements)
            for dtype in self.dtypes
            for elements in self.elements
            for n in self.lengths
            if n <= elements
        ]


def _powers(first: int, last: int) -> list[int]:
    return [1 << bits for bits in range(first, last + 1)]


_PAPER = Choice(DTYPES, _powers(7, 15), _powers(12, 28)[::-1])
_BEYOND = Choice(DTYPES, [2, 16, 64, 1 << 16, 1 << 17, 1 << 20], [1 << 28, 1 << 25, 1 << 21])
_SHORT = [128, 1024, 4096, 8192, 32768]
_DEVICE = {
    ("gpu", False): [Choice(["bfloat16", "float32"], _SHORT, [1 << 28, 1 << 25, 1 << 21, 1 << 13, 1 << 12])],
    ("gpu", True): [_PAPER, _BEYOND],
    ("cpu", False): [Choice(["float32", "bfloat16"], _SHORT, [1 << 22, 1 << 15])],
    ("cpu", True): [replace(_PAPER, dtypes=["float32", "bfloat16"])],
}
# XLA's alternatives are slow, and each is compiled anew for each case.
_ALTERNATIVES = {
    ("gpu", False): Choice(["bfloat16"], [128, 1024, 4096], [1 << 28]),
    ("gpu", True): Choice(["bfloat16"], _powers(7, 15), [1 << 28, 1 << 25]),
    ("cpu", False): Choice(["float32"], [128, 1024, 4096], [1 << 20]),
    ("cpu", True): Choice(["float32", "bfloat16"], _powers(6, 13), [1 << 22]),
}
_AXIS = {
    "gpu": [Choice(["bfloat16"], _powers(3, 8), [1 << 28, 1 << 25]), Choice(["float32"], _powers(3, 7), [1 << 28])],
    "cpu": [Choice(["float32"], [32, 64], [1 << 20])],
}
COLUMNS = 128  # that lie behind an axis which is not the last, as the numbers of a head do behind the heads
_PROGRAM = {
    False: [(128, 1 << 13), (128, 1 << 12), (8192, 1 << 13), (4096, 1 << 21)],
    True: [(128, 1 << 13), (128, 1 << 12), (8192, 1 << 13), (4096, 1 << 21), (128, 1 << 25)],
}


@dataclass(frozen=True)
class Selection:
    """What the command line asks for; None where it leaves a choice to the defaults."""

    platform: str  # gpu, cpu
    full: bool = False
    dtypes: Sequence[str] | None = None
    lengths: Sequence[int] | None = None
    elements: Sequence[int] | None = None

    def device(self) -> list[Case]:
        """The cases of the native timings."""
        choices = _DEVICE[self.platform, self.full]
        if self.lengths or self.elements:
            choices = choices[:1]
        cases = [case for choice in choices for case in self._narrowed(choice).cases()]
        return sorted(cases, key=lambda case: case.dtype.name)  # buffers serve one dtype at a time

    def alternatives(self) -> list[Case]:
        """The cases of XLA's alternatives."""
        return self._narrowed(_ALTERNATIVES[self.platform, self.full]).cases()

    def axis(self) -> list[Case]:
        """The cases of an axis that is not the last, whole tables of its columns."""
        cases = [case for choice in _AXIS[self.platform] for case in self._narrowed(choice).cases()]
        return [case for case in dict.fromkeys(cases) if case.elements >= case.n * COLUMNS]

    def program(self) -> list[Case]:
        """The cases of the jitted programs."""
        dtypes = self.dtypes or _ALTERNATIVES[self.platform, False].dtypes
        return [Case(np.dtype(dtype), n, elements) for dtype in dtypes for n, elements in _PROGRAM[self.full]]

    def _narrowed(self, choice: Choice) -> Choice:
        return Choice(self.dtypes or choice.dtypes, self.lengths or choice.lengths, self.elements or choice.elements)
