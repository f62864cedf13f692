"""Runs `jax-hadacore bench`, and has results of it with round numbers."""

from jax_hadacore import _cli
from jax_hadacore.bench import program


def bench(*arguments):
    return _cli.main(["bench", *map(str, arguments)])


def stored_run():
    """Results with every table, of round numbers."""

    def row(n, elements, caches, **rest):
        return {"dtype": "bfloat16", "n": n, "elements": elements, "caches": caches, **rest}

    sizes = [(1 << 28, "cold"), (1 << 25, "cold"), (1 << 13, "warm"), (1 << 12, "warm")]
    cells = [(n, *size) for size in sizes for n in (128, 4096)]
    times = {"transform": 5.0, "copy kernel": 4.0, "cudaMemcpyAsync": 6.0}
    rest = {"sets": 1, "error": 1.0}
    return {
        "environment": {"platform": "gpu", "device": "a GPU", "command": "a command", "jax": "1.2.3"},
        "device": [row(*c, inplace=p, microseconds=times, ratio=0.8, **rest) for p in (False, True) for c in cells],
        "peers": [row(*c, peer="HadaCore", microseconds={"transform": 15.0}, **rest) for c in cells],
        "alternatives": [
            row(n, 1 << 28, "cold", microseconds={"hadamard": 250.0, "elementwise": 200.0, "x @ H": 500.0 * n / 128})
            for n in (128, 4096)
        ],
        "program": [
            row(
                *(128, 1 << 13, "warm"),
                microseconds={name: dict.fromkeys(("device", "dispatch", "call"), 3.0) for name in program._OPERATIONS},
            )
        ],
        "copies": {"hadamard": 0, "elementwise": 0},
        "thunks": ["kCustomCall [a thunk]"],
        "axis": [
            row(64, 1 << 28, "cold", columns=128, microseconds={"hadamard": 250.0, "transposed": 750.0}, ratio=0.9),
        ],
        "errors": [{"dtype": "bfloat16", "n": 8, "error": 1.0, "bound": 1.02}],
    }
