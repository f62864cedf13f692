"""MMLU with your Llama: the accuracy with attention in bfloat16, in FP8, and in FP8 with rotated queries and keys.

    python examples/fp8_attention_eval.py CHECKPOINT_DIR QUESTIONS_DIR [--limit N] [--json FILE]

CHECKPOINT_DIR is a folder of Hugging Face with config.json, .safetensors files and tokenizer.json; QUESTIONS_DIR has
MMLU's dev/SUBJECT_dev.csv and test/SUBJECT_test.csv. Beside the extra `flax` this needs `pip install tokenizers`.

A prompt has five examples and a question. The answer is the letter with the largest logit, of " A", " B", " C" and
" D", for the token after "Answer:". Weights, and what is not attention, are in bfloat16 throughout; in

    o = softmax(q k^T / sqrt(d)) v

FP8 multiplies float8_e4m3fn codes in both products, as examples/fp8_attention.py does, whose kinds of scales --scales
has. Largest entries are those of one prompt, without its padding, so that an answer depends on no other prompt. The
rotation H along d leaves the scores as they are, (q H)(k H)^T = q k^T; it is fused with the quantisation. Values are
not rotated here, but are in a checkpoint of `jax-hadacore rotate`, which has R2 in its weights, and is read as well.

With --json a run that was stopped continues when it is repeated. Several devices share the model: see
examples/checkpoint.py.

Source: Table 1 of HadaCore (https://pytorch.org/blog/hadacore/), for Llama-3.1-8B: 65.38 % in FP16, 64.40 % in FP8,
and 65.09 % in FP8 with rotation.
"""

import argparse
import functools
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import checkpoint
import fp8_attention
import jax
import jax.numpy as jnp
import llama
import mmlu
import numpy as np
import stored
from checkpoint import Checkpoint, CheckpointError
from flax import nnx
from terminal import progress

from jax_hadacore.bench.environment import environment
from jax_hadacore.bench.store import Results, StoreError

BASELINE = "bfloat16"
VARIANTS = {BASELINE: None, "FP8": False, "FP8, rotated": True}  # whether FP8 is rotated
SHORTEST = 256  # tokens: prompts are padded to this or to a larger power of two, each of which is compiled once
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def attention_of(lengths: jax.Array, scales: str, rotate: bool | None):
    """The attention of a variant, for prompts of these lengths: one after the other, as scores are large."""

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        def of_one(prompt):
            *arrays, length = prompt
            if rotate is None:
                return llama.attention(*(x[None] for x in arrays))[0]
            return fp8(*arrays, length, scales=scales, rotate=rotate)

        return jax.lax.map(of_one, (q, k, v, mask, lengths))

    return attention


def fp8(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, length: jax.Array, *, scales: str, rotate: bool
) -> jax.Array:
    """FP8 attention of a prompt: q (tokens, heads, d), k and v (tokens, kv_heads, d), a mask (1, tokens, tokens)."""
    tokens, heads, d = q.shape
    kv_heads = k.shape[1]
    real = jnp.arange(tokens)[:, None, None] < length
    by_head = (jnp.where(real, x, 0).swapaxes(0, 1) for x in (q, k, v))
    # Queries that share keys and values are rows of one matrix.
    operands = fp8_attention.operands(*(x.reshape(kv_heads, -1, d) for x in by_head), scales=scales, rotate=rotate)
    mixed = fp8_attention.fp8_attention(*operands, jnp.tile(mask[0], (heads // kv_heads, 1)))
    return mixed.reshape(heads, tokens, d).swapaxes(0, 1).astype(q.dtype)


@functools.partial(jax.jit, static_argnames=("graph", "scales", "rotate"))
def letter_logits(
    parameters: nnx.State,
    prompts: jax.Array,
    lengths: jax.Array,
    letters: jax.Array,
    *,
    graph: nnx.GraphDef,
    scales: str,
    rotate: bool | None,
) -> jax.Array:
    """The logits (batch, 4) of the letters after prompts (batch, tokens), of which `lengths` are not padding."""
    numerics = llama.Numerics(attention=attention_of(lengths, scales, rotate))
    return nnx.merge(graph, parameters)(prompts, numerics, at=lengths - 1)[:, 0, letters]


def batches(prompts: Sequence[Sequence[int]], tokens: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Which prompts are in a batch, their padded tokens, and their lengths.

    Batches of one padded length have the same size, about `tokens`: the last repeats a prompt.
    """
    padded = [max(SHORTEST, 1 << (len(prompt) - 1).bit_length()) for prompt in prompts]
    for length in sorted(set(padded)):
        size = max(1, tokens // length)
        found = [index for index, other in enumerate(padded) if other == length]
        for start in range(0, len(found), size):
            chosen = found[start : start + size]
            array = np.zeros((size, length), np.int32)
            filled = chosen + chosen[-1:] * (size - len(chosen))
            for row, index in zip(array, filled, strict=True):
                row[: len(prompts[index])] = prompts[index]
            yield chosen, array, np.array([len(prompts[index]) for index in filled], np.int32)


class Model:
    """A model that answers multiple-choice questions."""

    def __init__(self, found: Checkpoint, options: argparse.Namespace):
        self.tokenizer = mmlu.open_tokenizer(found.folder / "tokenizer.json")
        self.letters = np.array(mmlu.letter_tokens(self.tokenizer))
        vocab = checkpoint.configuration(found, "bfloat16").vocab
        if self.tokenizer.get_vocab_size() > vocab:
            raise CheckpointError(
                f"{found.folder}: tokenizer.json must have at most the {vocab} tokens of config.json, got "
                f"{self.tokenizer.get_vocab_size()}"
            )
        self.graph, self.parameters = nnx.split(checkpoint.load(found))
        self.length = min(options.length, found.config.get("max_position_embeddings") or options.length)
        self.scales, self.tokens = options.scales, options.tokens

    def rows(self, subject: mmlu.Subject, variants: Sequence[str], answered) -> Iterator[dict]:
        """The results of a subject; `answered` is called with what is done, and how many more questions are."""
        prompts, shortened = mmlu.encoded(self.tokenizer, subject, self.length)
        for variant in variants:
            label = f"{subject.name}, {variant}"
            answered(label, 0)
            chosen = [""] * len(prompts)
            for indices, array, lengths in batches(prompts, self.tokens):
                logits = letter_logits(
                    self.parameters,
                    array,
                    lengths,
                    self.letters,
                    graph=self.graph,
                    scales=self.scales,
                    rotate=VARIANTS[variant],
                )
                for index, best in zip(indices, np.argmax(logits, axis=-1), strict=False):
                    chosen[index] = mmlu.LETTERS[best]
                answered(label, len(indices))
            right = [answer == letter for answer, letter in zip(chosen, subject.answers, strict=True)]
            yield {
                "subject": subject.name,
                "attention": variant,
                "questions": len(right),
                "right": sum(right),
                "shortened": shortened,
                "answers": "".join(chosen),
            }


def evaluate(found: Checkpoint, subjects: Sequence[mmlu.Subject], results: Results, options: argparse.Namespace):
    """Adds the rows that the results lack, each as soon as it is there."""
    done = {(row["subject"], row["attention"]) for row in results.data["rows"]}
    missing = {
        subject: [variant for variant in VARIANTS if (subject.name, variant) not in done] for subject in subjects
    }
    total = sum(len(subject.questions) * len(variants) for subject, variants in missing.items())
    if not total:
        return
    model = Model(found, options)
    with progress(total) as answered:
        for subject, variants in missing.items():
            for row in model.rows(subject, variants, answered):
                results.add("rows", row)


def markdown(results: dict) -> str:
    """A table of all questions, and one of the subjects."""
    by_variant = {
        variant: {row["subject"]: row for row in results["rows"] if row["attention"] == variant} for variant in VARIANTS
    }
    base = by_variant[BASELINE]
    count = sum(row["questions"] for row in base.values())
    shortened = sum(row["shortened"] for row in base.values())
    lines = [["attention", "questions answered right", "mean over subjects", f"answers unlike {BASELINE}'s"]]
    for variant, rows in by_variant.items():
        share = sum(row["right"] for row in rows.values()) / count
        pairs = [pair for name, row in rows.items() for pair in zip(row["answers"], base[name]["answers"], strict=True)]
        lines.append(
            [
                variant,
                f"{100 * share:.2f} ± {100 * math.sqrt(share * (1 - share) / count):.2f} %",
                f"{100 * statistics.fmean(_share(row) for row in rows.values()):.2f} %",
                f"{100 * sum(one != other for one, other in pairs) / count:.2f} %",
            ]
        )
    subjects = [["subject", "questions", *(f"{variant}, %" for variant in VARIANTS)]]
    for name, row in base.items():
        shares = (f"{100 * _share(rows[name]):.1f}" for rows in by_variant.values())
        subjects.append([name, str(row["questions"]), *shares])
    return "\n\n".join(
        [
            f"{count:,} questions, {results['arguments']['shots']}-shot, scales {results['arguments']['scales']}; ± is "
            "the standard error of a share of so many. MMLU's own script reports the share of all questions; the "
            f"model cards of Llama 3.1, the mean over subjects. Prompts that lost examples to fit: {shortened:,}.",
            stored.table(lines[0], lines[1:]),
            stored.table(subjects[0], subjects[1:]),
        ]
    )


def _share(row: dict) -> float:
    return row["right"] / row["questions"]


def described(found: Checkpoint, subjects: Sequence[mmlu.Subject], options: argparse.Namespace) -> dict[str, Any]:
    """All that the results depend on."""
    shards = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in found.shards]
    weights = json.dumps([found.config, shards], sort_keys=True).encode()
    return {
        **{name: getattr(options, name) for name in ("shots", "limit", "length", "scales")},
        "checkpoint": f"{found.folder.resolve().name} {hashlib.sha256(weights).hexdigest()[:16]}",
        "questions": mmlu.fingerprint(subjects),
    }


def stored_rows(path: Path | None, arguments: dict[str, Any]) -> list[dict]:
    """What an earlier run left in a file.

    Raises:
        StoreError: the file is another run's.
    """
    if path is None or not path.exists():
        return []
    try:
        data = json.loads(path.read_text())
        found, rows = data["arguments"], data["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: exists, and has no results of this program") from error
    for name, value in arguments.items():
        if found.get(name) != value:
            raise StoreError(
                f"{path}: has results of another run, with {name} {found.get(name)!r} instead of {value!r}; "
                "continue that one, or store in another file"
            )
    return rows


def run(options: argparse.Namespace, command: str) -> None:
    """Evaluates what is missing, and prints the tables."""
    subjects = mmlu.read(options.questions, shots=options.shots, limit=options.limit)
    found = Checkpoint(options.checkpoint)
    arguments = described(found, subjects, options)
    rows = stored_rows(options.json, arguments)
    results = Results(options.json, environment(command))
    results.data.update(arguments=arguments, rows=rows)
    evaluate(found, subjects, results, options)
    print(markdown(results.data))


def main(arguments: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        run(options, stored.command("examples/fp8_attention_eval.py", arguments))
    except (CheckpointError, mmlu.QuestionsError, StoreError) as error:
        print(f"fp8_attention_eval.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        continues = "; the same command continues" if options.json else ""
        print(f"fp8_attention_eval.py: interrupted{continues}", file=sys.stderr)
        return INTERRUPTED
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    found.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_DIR", help="a Llama of Hugging Face")
    found.add_argument("questions", type=Path, metavar="QUESTIONS_DIR", help="dev and test, MMLU's CSV files")
    found.add_argument("--json", type=Path, metavar="FILE", help="store the results; a run that was stopped continues")
    found.add_argument("--limit", type=whole_number, metavar="N", help="only the first N questions of each subject")
    found.add_argument("--shots", type=whole_number, default=5, metavar="N", help="examples in a prompt; default: 5")
    found.add_argument("--scales", choices=fp8_attention.SCALES, default=fp8_attention.SCALES[0], help="of FP8")
    found.add_argument(
        "--length", type=whole_number, default=4096, metavar="N", help="most tokens of a prompt; default: 4096"
    )
    found.add_argument("--tokens", type=whole_number, default=16384, metavar="N", help="of a batch; default: 16384")
    return found


def whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number that is not negative, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
