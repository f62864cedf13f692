"""The command line of `jax-hadacore rotate`: its arguments, what it plans for a checkpoint, and its report."""

import argparse
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from .. import CONVENTION
from .._table import plural, table
from . import plans
from ._checkpoint import Checkpoint, Task, open_checkpoint
from ._plan import Plan
from ._progress import progress
from ._record import KEY, record
from ._rotation import Rotation
from ._safetensors import CheckpointError

_DESCRIPTION = """\
Folds random rotations into the weights of a Hugging Face checkpoint: R1 of the residual stream
and R2 of the values of each head. The new checkpoint is read by what reads the given one, and
its logits are the same, to the rounding of its weights.
"""
_EPILOG = """\
A run that was stopped continues when it is repeated. Weights are read and written one tensor
at a time, .safetensors only. A head that is tied to the embedding becomes one of its own.

exit status:
  0    done
  2    a file cannot be used, or the arguments are wrong
  130  interrupted; the same command continues
"""
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_TIED = "tie_word_embeddings"
_FREQUENCIES = "**.rotary_emb.inv_freq"  # old checkpoints have these constants
_INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


@dataclass(frozen=True)
class _Model:
    """A plan, the model_type of the checkpoints that it is for, and the rotations that cost nothing."""

    plan: Callable[..., Plan]
    types: tuple[str, ...]
    rotations: tuple[str, ...] = ("R1", "R2")


# Other models with the same names of tensors are others: Gemma's norms, in the names of Llama's, multiply by 1 + w.
_MODELS = {
    "llama": _Model(plans.llama, ("llama", "mistral")),
    "qwen2": _Model(plans.qwen2, ("qwen2",)),
    "qwen3": _Model(plans.qwen3, ("qwen3", "qwen3_moe")),
    "gemma3": _Model(plans.gemma3, ("gemma3", "gemma3_text"), ("R2",)),
}


def main(argv: Sequence[str]) -> int:
    """Runs `jax-hadacore rotate` with the arguments after `rotate`; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except CheckpointError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or arguments.out}: {error.strerror}"
    except KeyboardInterrupt:
        print("jax-hadacore rotate: interrupted; the same command continues", file=sys.stderr)
        return _INTERRUPTED
    print(f"jax-hadacore rotate: {problem}", file=sys.stderr)
    return 2


def _run(arguments: argparse.Namespace) -> int:
    source, out = arguments.checkpoint, arguments.out
    _check_folders(source, out)
    checkpoint = open_checkpoint(source)
    task = _task(checkpoint, arguments.model, seed=arguments.seed, r4=arguments.r4)
    with progress(task.size, in_bytes=True) as wrote:
        kept = task.run(out, wrote=wrote)
    _report(task, out, kept)
    return 0


def _check_folders(source: Path, out: Path) -> None:
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise CheckpointError(f"{out}: must not be {source} or in it")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: must be a folder")


def _task(checkpoint: Checkpoint, name: str, *, seed: int, r4: bool) -> Task:
    """What is to be done to a checkpoint.

    Raises:
        CheckpointError: it is not one of the model, or cannot be rotated.
    """
    model, config = _MODELS[name], checkpoint.config
    _check_config(checkpoint, name)
    chosen = [*model.rotations, *["R4"] * r4]
    options: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    if config["model_type"].endswith("_moe"):
        options["moe"] = True
    if "R1" in chosen and config.get(_TIED):
        changes[_TIED] = False
        if _HEAD in checkpoint.places:
            _check_same_head(checkpoint)
        else:
            options["tied"] = "untie"
    shapes = checkpoint.shapes()
    try:
        plan = model.plan(naming="hf", rotations=chosen, head_dim=_head_dim(checkpoint), **options)
        plan = Plan(plan.rotate, fuse=plan.fuse, untie=plan.untie, keep=[*plan.keep, _FREQUENCIES])
        folds = plan.folds(shapes)
        rotations = plan.init(jax.random.key(seed), shapes)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}: does not fit --model {name}: {error}") from error
    changes[KEY] = record(rotations, seed=seed, online=["R4"] * r4)
    return Task(checkpoint, folds, rotations, {**config, **changes})


def _check_config(checkpoint: Checkpoint, name: str) -> None:
    path, config, types = checkpoint.folder / "config.json", checkpoint.config, _MODELS[name].types
    if config.get("model_type") not in types:
        fitting = [other for other, model in _MODELS.items() if config.get("model_type") in model.types]
        advice = f"; use --model {fitting[0]}" if fitting else ""
        raise CheckpointError(
            f"{path}: for --model {name}, model_type must be {' or '.join(types)}, "
            f"got {config.get('model_type')!r}{advice}"
        )
    if KEY in config:
        raise CheckpointError(f"{path}: the checkpoint is rotated already: it has the key {KEY!r}")
    if config.get("quantization_config"):
        raise CheckpointError(f"{path}: the checkpoint is quantised, see quantization_config; rotate it before that")


def _check_same_head(checkpoint: Checkpoint) -> None:
    """A head that is stored though it is tied must be the embedding: loaders do not agree which of them they take."""
    shapes = checkpoint.shapes()
    same = shapes.get(_EMBEDDING) == shapes[_HEAD]
    if not same or not all(map(operator.eq, checkpoint.chunks(_EMBEDDING), checkpoint.chunks(_HEAD))):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: has {_TIED}, but {_HEAD} is not {_EMBEDDING}; set it to false, or "
            f"remove {_HEAD}"
        )


def _head_dim(checkpoint: Checkpoint) -> int:
    """From the norms of queries if there are some, else from config.json."""
    for name, shape in checkpoint.shapes().items():
        if name.endswith(".self_attn.q_norm.weight") and len(shape.shape) == 1:
            return shape.shape[0]
    config = checkpoint.config
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    found = config.get("head_dim")
    if found is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        found = hidden // heads
    if not isinstance(found, int) or found < 1:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: must have head_dim, or hidden_size and num_attention_heads, got "
            f"{config.get('head_dim')!r}, {hidden!r} and {heads!r}"
        )
    return found


def _report(task: Task, out: Path, kept: int) -> None:
    given, folds = task.checkpoint, task.folds
    turned = [name for name, fold in folds.items() if fold.rotations and name in given.places]
    fused = [name for name, fold in folds.items() if fold.recipe.fill is not None]
    untied = given.config.get(_TIED) != task.config.get(_TIED)
    unchanged = [name for name in given.places if name not in folds]
    left = [path.name for path in given.left_out]
    rows = [
        ("rotated", len(turned), "tensors: " + ", ".join(map(_described, task.rotations, task.rotations.values()))),
        ("fused", len(fused), "norms, into what reads their results; their own weights are neutral now"),
        ("untied", int(untied), f"{_HEAD}, now a tensor of its own; {_TIED} is false"),
        ("copied", len(unchanged), "tensors"),
        ("carried", len(given.others), f"other files: {_some([path.name for path in given.others])}"),
        ("left out", len(left), f"files and folders: {_some(left)}"),
        ("kept", kept, "shards of an earlier run"),
    ]
    shards = plural(len(given.shards), "shard")
    size = sum((out / shard).stat().st_size for shard in given.shards)
    print(f"{given.folder}: {shards}, {_size(given.size)}")
    print(table([(what, f"{count:,}", of) for what, count, of in rows if count], align="<><"))
    print(f"{out}: {shards}, {_size(size)}")
    if r4 := task.rotations.get("R4"):
        print(
            f"R4 needs an online transform: down_proj must read hadamard(act(gate) * up), of {r4.size} elements,\n"
            f"in CONVENTION {CONVENTION}. Without it the logits are others."
        )


def _described(name: str, rotation: Rotation) -> str:
    count = f"{rotation.batch[0]} of " if rotation.batch else ""
    return f"{name} ({count}size {rotation.size})"


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-hadacore rotate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_DIR", help="config.json and .safetensors files")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="a folder that is empty or absent")
    parser.add_argument(
        "--model",
        required=True,
        choices=_MODELS,
        help="the architecture; " + "; ".join(f"{name}: {', '.join(model.types)}" for name, model in _MODELS.items()),
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the signs; default: 0")
    parser.add_argument(
        "--r4", action="store_true", help="rotate what down_proj reads, too; the model must transform it online"
    )
    return parser


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 32):
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 2^32 - 1, got {text!r}")
    return int(text)
