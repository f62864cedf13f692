"""A small Llama, trained from scratch on text at hand, in 4 bits with and without rotations: what each of them saves.

    python examples/tiny_llama.py [--small | --large] [--json FILE]

The text is the Python sources of the standard library, byte by byte; files that the model was not trained on judge it.
All is in 4 bits but the embedding and the head, W4A4KV4:

    weights                     symmetric, a scale for each output channel, which a search chooses
    what linear layers read     asymmetric, a scale for each token; for o_proj for each token and head
    keys and values             asymmetric, a scale for each token and head

The rotations are SpinQuant's: R1 of the residual stream and R2 of the values of each head are folded into the weights;
R3 of queries and keys and R4 of what down_proj reads are online. There, for keys and for down_proj, rotation and
quantiser are one call, `hadamard_fake_quantize(x, "int4", asymmetric=True)`, which has a kernel of its own.

Models of this size have no outlier channels of themselves, and without them R1 has little to do. So two channels of the
embedding get a constant at the start, 25 and -18, where the others have a deviation of 0.7, and the model is trained
with them. `--plain` leaves them out.

Perplexity is per byte: exp of the mean of -log p(next byte).

Sources: Ashkboos et al., QuaRot (2024, arXiv:2404.00456); Liu et al., SpinQuant (2024, arXiv:2405.16406).
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import llama
import stored
import training

from jax_hadacore.bench.environment import environment

ROTATIONS = ((), ("R1",), ("R1", "R2"), ("R1", "R2", "R3", "R4"))
SEEDS = 5  # of the random signs
TITLE = "Perplexity with each set of rotations"


def measure(size: training.Size, text: training.Text, offsets: Sequence[float]) -> Iterator[dict]:
    """Rows of results: the perplexity of the model, and in 4 bits with more and more rotations, one for each seed."""
    batches = training.held_out_batches(text, size)

    def perplexity(numerics, params):
        return round(training.perplexity(training.model(size.config, numerics), params, batches), 4)

    start = time.monotonic()
    params = training.train(size, text, seed=0, offsets=offsets)
    yield {"model": "unquantised", "perplexity": [perplexity(llama.EXACT, params)], "seconds": _since(start)}
    for names in ROTATIONS:
        start, found = time.monotonic(), []
        for seed in range(SEEDS if names else 1):
            rotations = training.plan(names).init(jax.random.key(seed), params)
            rotated = training.rotated(names)(params, rotations)
            found.append(perplexity(training.a4kv4(names), training.with_rounded_weights(rotated)))
        model = " ".join(["W4A4KV4", *names])
        yield {"model": model, "perplexity": found, "seconds": _since(start)}


def _since(start: float) -> float:
    return round(time.monotonic() - start, 1)


def table(data: dict) -> Iterator[str]:
    """What was trained, and the perplexities."""
    s = data["settings"]
    outliers = f"outlier channels of {' and '.join(map(str, s['offsets']))}" if s["offsets"] else "no outlier channels"
    yield (
        f"A Llama of {s['parameters'] / 1e6:.2g} million parameters with {outliers}, trained on "
        f"{s['trained bytes'] / 1e6:.2g} million bytes: perplexity per byte on {s['judged bytes']:,} held-out ones."
    )
    (exact,) = data["rows"][0]["perplexity"]
    lines = []
    for row in data["rows"]:
        found = row["perplexity"]
        several = f"{min(found):.3f} to {max(found):.3f}, {len(found)} seeds" if len(found) > 1 else ""
        mean = statistics.fmean(found)
        name, _, rotations = row["model"].partition(" ")
        lines.append([name, rotations.replace(" ", ", "), f"{mean:.3f}", f"{100 * (mean / exact - 1):+.1f} %", several])
    yield stored.table(["model", "rotations", "perplexity", "increase", "range"], lines)


def draw(data: dict) -> Any:
    """The perplexity of every seed, a row for each set of rotations."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    (exact,), rows = data["rows"][0]["perplexity"], data["rows"][1:]
    figure = Figure(figsize=(7.6, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.axvline(exact, color="black", lw=0.8, ls=":", label="unquantised")
    for place, row in enumerate(rows):
        found, mean = row["perplexity"], statistics.fmean(row["perplexity"])
        axes.plot(found, [place] * len(found), "o", ms=5, color="tab:blue", alpha=0.6)
        axes.annotate(f"{mean:.2f}", (max(found), place), xytext=(8, 0), textcoords="offset points", va="center")
    names = [row["model"].removeprefix("W4A4KV4").strip().replace(" ", ", ") for row in rows]
    axes.set_yticks(range(len(rows)), [name or "no rotation" for name in names])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    ticks = [exact, statistics.fmean(rows[0]["perplexity"])]  # the others stand beside their points
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel("perplexity per byte in W4A4KV4; a point for each draw of the signs")
    axes.legend(loc="lower right", fontsize=8)
    figure.suptitle(f"{data['settings']['parameters'] / 1e6:.2g} million parameters, trained from scratch", size=11)
    return figure


def main(arguments: Sequence[str], size: training.Size | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--small", action="store_true", help="a minute on a CPU; else about five")
    sizes.add_argument("--large", action="store_true", help="32 million parameters, for a GPU")
    parser.add_argument("--plain", action="store_true", help="no outlier channels")
    parser.add_argument("--text", type=Path, metavar="FILE", help="train on this, not on Python's standard library")
    options = stored.parsed(parser, arguments)
    if options.markdown or options.png:
        return stored.publish(options, "tiny-llama", (table,), TITLE, draw)
    size = size or (training.SMALL if options.small else training.LARGE if options.large else training.USUAL)
    text, offsets = training.read_text(options.text), () if options.plain else training.OFFSETS
    tokens = size.recipe.batch * size.recipe.length
    shapes = jax.eval_shape(lambda: training.initial(size.config, jax.random.key(0), offsets))
    settings = {
        "text": text.source,
        "offsets": list(offsets),
        "embedding deviation": training.DEVIATION,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "trained bytes": size.recipe.steps * tokens,
        "judged bytes": size.judged * tokens,
        **dataclasses.asdict(size),
    }
    data = {"environment": environment(stored.command("examples/tiny_llama.py", arguments)), "settings": settings}
    data["rows"] = list(measure(size, text, offsets))
    stored.show((table,), data, options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
