"""Does learning rotations help? W4A4KV4 perplexity of small Llamas before and after, paired over seeds.

    python benchmarks/learning.py [--tiny] [--json FILE] [--folder FOLDER] [--data-seed SEED] [--budget SECONDS]

Each data seed is a Llama of bytes that is trained from scratch, with two outlier channels from the start
(examples/training.py). Its perplexities per byte, on fixed batches of files that it was not trained on, are

- unquantised, and in W4A4KV4 without a rotation;
- in W4A4KV4 with R1; R1 and R2; R1, R2, R3 and R4, for several seeds of the random signs;
- with all four, R1 and R2 learned from there: by SpinQuant's recipe, and by that with one thing changed at a time.

SpinQuant's recipe is cross-entropy, a learning rate of 1.5 with a cosine, gradients clipped to 1, 100 steps, with
weights unquantised while learning. A learned model is compared with its own start, the same model with the same signs,
so that what the seeds do cancels out; beside it stands what another draw of the signs does. R3 and R4 are not learned.

Results are stored row by row. With --folder, a second call goes on where the first stopped: trained models are kept
there, and compiled programs. What the budget has no time for is left out, and the table counts what it is from. On
several GPUs, a process on each studies the model of one --data-seed; they share the folder, and a call without a seed
puts together what they have found.

Sources: Liu et al., SpinQuant (2024, arXiv:2405.16406); Ashkboos et al., QuaRot (2024, arXiv:2404.00456).
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from jax_hadacore.bench import store
from jax_hadacore.bench.environment import environment
from jax_hadacore.bench.store import Results
from jax_hadacore.rotations import Rotation, cayley_sgd, learn_rotations

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import llama
import stored
import training

ALL = ("R1", "R2", "R3", "R4")
ROTATED = (("R1",), ("R1", "R2"), ALL)
TABLES = ("models", "starts", "learned")
COMPILERS = 4  # programs that are compiled at a time, on a GPU; a CPU is busy with one


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sizes of a study; the steps are of learning, with the batches of training."""

    size: training.Size
    steps: int
    data_seeds: int
    rotation_seeds: int

    @property
    def tokens(self) -> int:
        """Of a minibatch."""
        return self.size.recipe.batch * self.size.recipe.length


FULL = Settings(training.LARGE, steps=100, data_seeds=3, rotation_seeds=5)
TINY = Settings(
    training.Size(
        dataclasses.replace(training.SMALL.config, hidden=64, inner=128, head_dim=16),
        training.Recipe(150, 16, 64, 4e-3),
        judged=4,
    ),
    steps=10,
    data_seeds=2,
    rotation_seeds=3,
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """SpinQuant's recipe with one thing changed.

    Attributes:
        rate: the learning rate; with a trust region the angle in radians.
        accumulate: minibatches in a step.
        share: of the recipe's steps.
        weights: whether weights are quantised while learning.
    """

    name: str
    rate: float = 1.5
    trust_region: bool = False
    accumulate: int = 1
    share: float = 1.0
    objective: str = "cross_entropy"
    detach_scale: bool = True
    weights: bool = False

    @property
    def cost(self) -> float:
        """Minibatches, those of the recipe being 1."""
        return self.accumulate * self.share


RECIPE = Variant("SpinQuant's recipe")
VARIANTS = (
    RECIPE,
    Variant("4 times the tokens a step, half the steps", accumulate=4, share=0.5),
    Variant("gradient of the scales too", detach_scale=False),
    Variant("KL to the unquantised model", objective="kl"),
    Variant("trust region, angle 0.05", rate=0.05, trust_region=True),
    Variant("weights in 4 bits while learning", weights=True),
    Variant("10 times the learning rate", rate=15.0),
    Variant("a tenth of the learning rate", rate=0.15),
)


class Study:
    """Everything that is measured, in the order of its importance."""

    def __init__(
        self,
        settings: Settings,
        text: training.Text,
        results: Results,
        *,
        data_seeds: Sequence[int],
        ends: float,
        folder: Path | None,
    ):
        self.settings, self.text, self.results, self.ends, self.folder = settings, text, results, ends, folder
        self.data_seeds = data_seeds
        self.batches = training.held_out_batches(text, settings.size)
        self.seconds: dict[str, float] = {}  # of the slowest run of a variant so far
        self.models: dict[int, training.Params] = {}

    def run(self) -> None:
        s = self.settings
        with ThreadPoolExecutor(COMPILERS if jax.default_backend() == "gpu" else 1) as pool:
            start = time.monotonic()
            pool.map(self._compile, VARIANTS)
            for data_seed in self.data_seeds:
                self.models[data_seed] = self._trained(data_seed)
                self._judge_starts(data_seed)
        self._took("models, starts and compilation", start)
        pairs = list(itertools.product(range(s.rotation_seeds), self.data_seeds))
        for rotation_seed, data_seed in pairs:
            self._learn(RECIPE, data_seed, rotation_seed)
        # In rounds over all models and variants, so that a study that stops early has compared like with like.
        for (rotation_seed, data_seed), variant in itertools.product(pairs, VARIANTS[1:]):
            self._learn(variant, data_seed, rotation_seed)

    def _trained(self, data_seed: int) -> training.Params:
        s, start = self.settings, time.monotonic()
        kept = _kept_model(self.folder, data_seed) if self.folder else None
        if kept and kept.exists():
            shapes = jax.eval_shape(functools.partial(training.initial, s.size.config), jax.random.key(0))
            with np.load(kept) as arrays:
                return jax.tree.unflatten(jax.tree.structure(shapes), map(jnp.asarray, arrays.values()))
        params = training.train(s.size, self.text, seed=data_seed)
        row = {
            "data_seed": data_seed,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "unquantised": self._perplexity(llama.EXACT, params),
            **self._quantised((), params),
        }
        self.results.add("models", row)
        self._took(f"model {data_seed}", start)
        if kept:  # after its row: rows without a model are dropped
            part = kept.with_suffix(".part")
            with part.open("wb") as file:
                np.savez(file, *map(np.asarray, jax.tree.leaves(params)))
            part.replace(kept)
        return params

    def _judge_starts(self, data_seed: int) -> None:
        """The model with every set of rotations that are not learned."""
        start, params = time.monotonic(), self.models[data_seed]
        for rotation_seed, names in itertools.product(range(self.settings.rotation_seeds), ROTATED):
            key = {"data_seed": data_seed, "rotation_seed": rotation_seed, "rotations": " ".join(names)}
            if not self._has("starts", key):
                rotations = self._rotations(names, params, rotation_seed)
                self.results.add("starts", key | self._quantised(names, training.rotated(names)(params, rotations)))
        self._took(f"starts of model {data_seed}", start)

    def _learn(self, variant: Variant, data_seed: int, rotation_seed: int) -> None:
        key = {"variant": variant.name, "data_seed": data_seed, "rotation_seed": rotation_seed}
        expected = self.seconds.get(variant.name, variant.cost * self.seconds.get(RECIPE.name, 0))
        if self._has("learned", key) or time.monotonic() + expected > self.ends:
            return
        start, params, losses = time.monotonic(), self.models[data_seed], []
        state = learn_rotations(
            _quantised_model(self.settings.size.config, variant),
            params,
            training.plan(ALL),
            self._rotations(ALL, params, rotation_seed),
            self._minibatches(data_seed, rotation_seed),
            on_step=lambda state: losses.append(state.loss),
            **_options(self.settings, variant),
        )
        row = key | self._quantised(ALL, training.rotated(ALL)(params, state.rotations))
        seconds = time.monotonic() - start
        self.seconds[variant.name] = max(seconds, self.seconds.get(variant.name, 0))
        tenth = max(1, len(losses) // 10)
        row |= {
            "distance": state.distance,
            "first losses": float(np.mean(losses[:tenth])),
            "last losses": float(np.mean(losses[-tenth:])),
            "seconds": seconds,
        }
        self.results.add("learned", row)
        self._took(f"{variant.name}, model {data_seed}, signs {rotation_seed}", start)

    def _compile(self, variant: Variant) -> None:
        """Makes a step of a model that is not trained yet, while another thread trains it. A failure shows in a run."""
        start = time.monotonic()
        params = training.initial(self.settings.size.config, jax.random.key(0))
        options = _options(self.settings, variant) | {"steps": 1}
        rotations = self._rotations(ALL, params, 0)
        apply = _quantised_model(self.settings.size.config, variant)
        state = learn_rotations(apply, params, training.plan(ALL), rotations, self._minibatches(0, 0), **options)
        jax.block_until_ready(state)
        print(f"{time.monotonic() - start:7.1f} s  compilation, {variant.name}", file=sys.stderr)

    def _rotations(self, names: Sequence[str], params: training.Params, seed: int) -> dict[str, Rotation]:
        """With q = I, though nothing is learned of it, where learned ones are judged by the same program."""
        learn = ("R1", "R2") if names == ALL else ()
        return training.plan(names).init(jax.random.key(seed), params, learn=learn)

    def _minibatches(self, data_seed: int, rotation_seed: int) -> Callable[[int], jax.Array]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(data_seed), 1 << 20), rotation_seed)
        recipe = self.settings.size.recipe
        return lambda i: training.windows(
            self.text.train, jax.random.fold_in(key, i), batch=recipe.batch, length=recipe.length
        )

    def _quantised(self, names: Sequence[str], params: training.Params) -> dict[str, float]:
        """The perplexities of a rotated model, with its weights in 4 bits and as they are."""
        numerics = training.a4kv4(tuple(names))
        return {
            "w4a4kv4": self._perplexity(numerics, training.with_rounded_weights(params)),
            "a4kv4": self._perplexity(numerics, params),
        }

    def _perplexity(self, numerics: llama.Numerics, params: training.Params) -> float:
        return training.perplexity(training.model(self.settings.size.config, numerics), params, self.batches)

    def _has(self, name: str, key: dict) -> bool:
        return any(key.items() <= row.items() for row in self.results.data.get(name, []))

    def _took(self, what: str, start: float) -> None:
        seconds = time.monotonic() - start
        self.results.note("seconds", self.results.data.get("seconds", {}) | {what: round(seconds, 1)})
        if self.folder:
            kept = self.folder / f"results-{'-'.join(map(str, self.data_seeds))}.json"
            part = kept.with_suffix(".part")
            part.write_text(store.text(self.results.data))
            part.replace(kept)
        print(f"{seconds:7.1f} s  {what}", file=sys.stderr)


@functools.cache
def _quantised_model(config: llama.Config, variant: Variant) -> training.Apply:
    """What is learned through. The objects are the same for all seeds: learn_rotations compiles once for them."""
    apply = training.model(config, training.a4kv4(ALL, detach_scale=variant.detach_scale))
    return (lambda p, tokens: apply(training.with_rounded_weights(p), tokens)) if variant.weights else apply


@functools.cache
def _options(settings: Settings, variant: Variant) -> dict[str, Any]:
    steps = round(variant.share * settings.steps)
    schedule = optax.cosine_decay_schedule(variant.rate, steps)
    return {
        "steps": steps,
        "optimizer": cayley_sgd(schedule, trust_region=variant.trust_region, clip=1.0),
        "objective": variant.objective,
        "teacher": training.model(settings.size.config) if variant.objective == "kl" else None,
        "accumulate": variant.accumulate,
        "progress": False,
    }


def changes(data: dict, variant: str, quantised: str = "w4a4kv4") -> dict[int, list[float]]:
    """By how many percent the perplexity of each pair changed, by data seed."""
    starts = {(row["data_seed"], row["rotation_seed"]): row[quantised] for row in _starts(data, ALL)}
    found: dict[int, list[float]] = {}
    for row in data.get("learned", []):
        if row["variant"] == variant:
            before = starts[row["data_seed"], row["rotation_seed"]]
            found.setdefault(row["data_seed"], []).append(100 * (row[quantised] / before - 1))
    return found


def spread(data: dict) -> dict[int, list[float]]:
    """By how many percent the perplexity of each start differs from the mean of its model's."""
    found: dict[int, list[float]] = {}
    for row in _starts(data, ALL):
        found.setdefault(row["data_seed"], []).append(row["w4a4kv4"])
    return {seed: [100 * (v / statistics.fmean(values) - 1) for v in values] for seed, values in found.items()}


def deviation(groups: dict[int, list[float]]) -> float:
    """The standard deviation within groups, each about its own mean."""
    squares = sum((v - statistics.fmean(values)) ** 2 for values in groups.values() for v in values)
    return math.sqrt(squares / max(1, sum(len(values) - 1 for values in groups.values())))


def interval(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the mean, by Student's t."""
    if len(values) < 2:
        return math.inf
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _starts(data: dict, names: Sequence[str]) -> list[dict]:
    return [row for row in data.get("starts", []) if row["rotations"] == " ".join(names)]


def of_starts(data: dict) -> Iterator[str]:
    """The table of models and rotations that are not learned."""
    models, s = data["models"], data["settings"]
    yield (
        f"Perplexity per byte on {s['judged tokens']:,} held-out tokens of {len(models)} Llamas of "
        f"{models[0]['parameters'] / 1e6:.2g} million parameters, each trained on {s['trained tokens'] / 1e6:.2g} "
        f"million bytes; with rotations the mean of {s['rotation seeds']} draws of the signs ± their deviation."
    )
    header = ["W4A4KV4", *(f"data seed {row['data_seed']}" for row in models)]
    lines = [["unquantised", *(f"{row['unquantised']:.3f}" for row in models)]]
    lines.append(["no rotation", *(f"{row['w4a4kv4']:.3f}" for row in models)])
    for names in ROTATED:
        cells = []
        for row in models:
            found = [start["w4a4kv4"] for start in _starts(data, names) if start["data_seed"] == row["data_seed"]]
            cells.append(f"{statistics.fmean(found):.3f} ± {statistics.stdev(found):.3f}" if len(found) > 1 else "")
        lines.append([", ".join(names), *cells])
    yield stored.table(header, lines)


def of_variants(data: dict) -> Iterator[str]:
    """The table of what learning changed."""
    s = data["settings"]
    yield (
        "R1 and R2 learned from R1 to R4: the change of the perplexity in percent of that of the same model with the "
        "same signs. The mean of all pairs has its 95 % interval by Student's t, of a pair is the deviation of single "
        "ones; A4KV4 is the mean with weights as they are, for which most variants learn. "
        f"The recipe has {s['steps']} steps of {s['tokens']:,} tokens. Distance: |Q - I| / sqrt(n), root mean square "
        "of all matrices, 0 for the start and 1.41 for a random one."
    )
    header = ["learned", "mean", "of a pair", "better", "means of models", "A4KV4", "distance", "seconds"]
    lines = []
    for variant in data["variants"]:
        groups, unquantised_weights = changes(data, variant), changes(data, variant, "a4kv4")
        values = list(itertools.chain.from_iterable(groups.values()))
        rows = [row for row in data.get("learned", []) if row["variant"] == variant]
        if not values:
            lines.append([variant, "not run", *[""] * 6])
            continue
        means = [statistics.fmean(of_model) for of_model in groups.values()]
        lines.append(
            [
                variant,
                f"{statistics.fmean(values):+.2f} ± {interval(values):.2f}",
                f"{deviation({0: values}):.2f}",
                f"{sum(v < 0 for v in values)} of {len(values)}",
                f"{min(means):+.2f} to {max(means):+.2f}",
                f"{statistics.fmean(itertools.chain.from_iterable(unquantised_weights.values())):+.2f}",
                f"{statistics.fmean(row['distance'] for row in rows):.2g}",
                f"{statistics.fmean(row['seconds'] for row in rows):.1f}",
            ]
        )
    yield stored.table(header, lines)
    draws = spread(data)
    lowest = statistics.fmean(min(values) for values in draws.values())
    yield (
        f"Beside it, without learning: another draw of the signs changes the perplexity of the start by "
        f"{deviation(draws):.2f} % (deviation within a model), and the best of {s['rotation seeds']} draws, chosen by "
        f"the same tokens, is {-lowest:.2f} % below their mean."
    )


def chart(data: dict) -> Any:
    """The change of each pair, a row for each variant, beside the spread of the starts."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    draws = spread(data)
    rows = {"another draw of the signs": draws} | {name: changes(data, name) for name in data["variants"]}
    rows = {name: groups for name, groups in rows.items() if groups}
    figure = Figure(figsize=(8.6, 0.46 * len(rows) + 1.9), layout="constrained")
    axes = figure.subplots()
    band = deviation(draws)
    axes.axvspan(-band, band, color="0.92", label="deviation of the draws")
    axes.axvline(0, color="black", lw=0.8)
    for place, groups in enumerate(rows.values()):
        for data_seed, values in groups.items():
            offset = place + 0.16 * (data_seed - (len(draws) - 1) / 2)
            label = f"data seed {data_seed}" if place == 0 else None
            axes.plot(values, [offset] * len(values), "os^Dv"[data_seed % 5], ms=4, color=f"C{data_seed}", label=label)
        values = list(itertools.chain.from_iterable(groups.values()))
        if place and len(values) > 1:
            mean, half = statistics.fmean(values), interval(values)
            axes.errorbar(mean, place, xerr=half, fmt="k|", ms=14, capsize=4, lw=1.4)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel("change of W4A4KV4 perplexity, percent; black: mean and 95 % interval")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    env = data["environment"]
    figure.suptitle(f"{env['device']}: learned rotations against their random Hadamard starts", size=11)
    return figure


PARTS = (of_starts, of_variants)
TITLE = "Change of the perplexity of each pair by learning"


def _described(settings: Settings, text: training.Text) -> dict:
    size = settings.size
    return {
        "text": text.source,
        "judged tokens": size.judged * settings.tokens,
        "trained tokens": size.recipe.steps * settings.tokens,
        "rotation seeds": settings.rotation_seeds,
        "steps": settings.steps,
        "tokens": settings.tokens,
        "offsets": list(training.OFFSETS),
        "embedding deviation": training.DEVIATION,
        **json.loads(json.dumps(dataclasses.asdict(size))),  # with lists for tuples, as they are read again
    }


def _go_on(results: Results, folder: Path, data_seeds: Sequence[int]) -> None:
    """Takes over the rows of earlier calls, of those models that have been kept."""
    seen = []
    for path in sorted(folder.glob("results-*.json")):
        data = json.loads(path.read_text())
        if data.get("settings") != results.data["settings"]:
            continue
        for table in TABLES:
            for row in data.get(table, []):
                key = [table, *(row.get(name) for name in ("data_seed", "rotation_seed", "rotations", "variant"))]
                kept = row["data_seed"] in data_seeds and _kept_model(folder, row["data_seed"]).exists()
                if kept and key not in seen:
                    seen.append(key)
                    results.add(table, row)


def _kept_model(folder: Path, data_seed: int) -> Path:
    return folder / f"model-{data_seed}.npz"


def main(arguments: Sequence[str], settings: Settings | None = None) -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small models, two minutes on a CPU")
    parser.add_argument("--text", type=Path, metavar="FILE", help="train on this, not on Python's standard library")
    parser.add_argument("--folder", type=Path, help="keep models and compiled programs here, and go on from them")
    parser.add_argument(
        "--data-seed", type=int, metavar="SEED", help="only the model of this seed; other calls may share the folder"
    )
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS", help="start no run that ends later"
    )
    options = stored.parsed(parser, arguments)
    if options.markdown or options.png:
        return stored.publish(options, "learning", PARTS, TITLE, chart)
    settings = settings or (TINY if options.tiny else FULL)
    data_seeds = range(settings.data_seeds) if options.data_seed is None else [options.data_seed]
    if options.data_seed not in (None, *range(settings.data_seeds)):
        parser.error(f"--data-seed is one of 0 to {settings.data_seeds - 1}, got {options.data_seed}")
    text = training.read_text(options.text)
    results = Results(options.json, environment(stored.command("benchmarks/learning.py", arguments)))
    results.note("settings", _described(settings, text))
    results.note("variants", {variant.name: dataclasses.asdict(variant) for variant in VARIANTS})
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(options.folder / "compiled"))
        _go_on(results, options.folder, data_seeds)
    ends = began + options.budget
    Study(settings, text, results, data_seeds=data_seeds, ends=ends, folder=options.folder).run()
    stored.show(PARTS, results.data)


if __name__ == "__main__":
    main(sys.argv[1:])
