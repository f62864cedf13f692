"""learn_rotations: the matrices of rotations, learned by gradient against the quantised model."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._cayley import cayley_sgd
from ._plan import Plan
from ._progress import on_terminal
from ._progress import progress as progress_bar
from ._rotate import rotate
from ._rotation import Rotation

Apply = Callable[[Any, jax.Array], jax.Array]
Objective = Literal["cross_entropy", "kl"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("rotations", "opt_state", "step", "loss"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class LearningState:
    """Where learning is: a pytree, all of what has to be saved to go on.

    Attributes:
        rotations: as they are now.
        opt_state: the optimiser's state.
        step: how many steps have been made.
        loss: of the last step's minibatches, before it; NaN before the first.
    """

    rotations: dict[str, Rotation]
    opt_state: Any
    step: jax.Array
    loss: jax.Array

    @property
    def distance(self) -> float:
        """How far the learned matrices are from the identity: the root mean square over all of |Q - I|_F / sqrt(n)."""
        moved = [
            np.asarray(jnp.mean(jnp.sum((q - jnp.eye(q.shape[-1], dtype=q.dtype)) ** 2, axis=(-1, -2)))) / q.shape[-1]
            for q in _learned(self.rotations).values()
        ]
        return float(np.sqrt(np.mean(moved)))


def learn_rotations(
    apply: Apply,
    params: Any,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    batches: Callable[[int], jax.typing.ArrayLike],
    *,
    steps: int,
    optimizer: optax.GradientTransformation | None = None,
    objective: Objective = "cross_entropy",
    teacher: Apply | None = None,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    state: LearningState | None = None,
    on_step: Callable[[LearningState], None] | None = None,
    progress: bool = True,
) -> LearningState:
    """Learns the matrices q of rotations by gradient, with all parameters of the model constant.

    Each step minimises, over the q of all rotations that have one,

        cross_entropy: mean of -log p(next token), p the quantised model's
        kl:            mean of sum p_t log(p_t / p), p_t those of the unquantised model, the teacher

    with p = softmax(apply(rotate(params, plan, rotations), tokens)). Without quantisation every rotation gives the same
    p and the gradient vanishes: what is learned is what rounding does.

    Args:
        apply: the quantised model, apply(params, tokens) -> logits (batch, length, vocab), differentiable, with
            `fake_quant` or `hadamard_fake_quantize` where it rounds. A deep one should use `jax.checkpoint` on each
            layer; what the rotation of the weights is made of is computed again in the backward pass in any case.
        params: of the unrotated model, as for `rotate`.
        plan: which axes the rotations turn.
        rotations: the start: `plan.init(..., learn=[...])` gives the named rotations a q = I.
        batches: the i-th minibatch of tokens (batch, length), integers, all of one shape, always the same for the same
            i: a resumed run goes on where it was.
        steps: how many to make in all, those of a `state` that is given included.
        optimizer: of the tree of q; by default SpinQuant's, cayley_sgd(cosine_decay_schedule(1.5, steps), clip=1.0).
        objective: "cross_entropy" or "kl".
        teacher: the unquantised model, for "kl"; called with `params`.
        accumulate: minibatches whose gradients make one step. SpinQuant's steps see 16 thousand tokens.
        mesh: devices to divide each minibatch over, the parameters being copied to each unless they are on them.
        state: where an earlier call was.
        on_step: called with the state after each step, to save it or to look at it.
        progress: show a bar with the loss and the distance, if on a terminal.

    Returns:
        The last state; its `rotations` are for `rotate`.

    Raises:
        ValueError: no rotation has a q; objective and teacher do not fit; tokens are no minibatch, or do not divide
            over the mesh; as `rotate`.

    Calls with the same apply, teacher, plan and optimizer compile once.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax_hadacore.rotations import Plan, fake_quant, learn_rotations
        >>> keys = jax.random.split(jax.random.key(0), 4)
        >>> params = {"embed": jax.random.normal(keys[0], (16, 8)), "head": jax.random.normal(keys[1], (8, 16))}
        >>> plan = Plan({"R1": ["embed@1", "head@0"]})
        >>> rotations = plan.init(keys[2], params, learn=["R1"])
        >>> model = lambda p, tokens: fake_quant(p["embed"][tokens], 4) @ fake_quant(p["head"], 4, axis=0)
        >>> batches = lambda i: jax.random.randint(jax.random.fold_in(keys[3], i), (4, 32), 0, 16)
        >>> state = learn_rotations(model, params, plan, rotations, batches, steps=3)
        >>> int(state.step), state.distance > 0
        (3, True)

    Learned rotations are SpinQuant's (Liu et al., 2024, arXiv:2405.16406).
    """
    if not _learned(rotations):
        raise ValueError(
            'learn_rotations: no rotation has a q to learn; Plan.init(..., learn=["R1"]) gives one, got rotations '
            f"{list(rotations)} without."
        )
    if objective not in get_args(Objective) or (teacher is None) != (objective == "cross_entropy"):
        raise ValueError(
            'learn_rotations: objective must be "cross_entropy", or "kl" with a teacher, got '
            f"{objective!r} {'without' if teacher is None else 'with'} one."
        )
    optimizer = _spinquant(steps) if optimizer is None else optimizer
    now = state or LearningState(
        dict(rotations),
        optimizer.init(_learned(rotations)),
        jnp.zeros((), jnp.int32),
        jnp.full((), jnp.nan, jnp.float32),
    )
    if mesh is not None:
        now, params = jax.tree.map(functools.partial(_on, mesh), (now, params))
    task = _Task(apply, teacher, plan, optimizer)
    first = int(now.step)
    with progress_bar(steps) if progress and on_terminal() else contextlib.nullcontext() as made:
        if made:
            made("", first)
        for i in range(first, steps):
            minibatches = [_tokens(batches(i * accumulate + j), mesh) for j in range(accumulate)]
            now = _step(task, now, params, minibatches)
            if made:  # waits for the step
                made(f"loss {now.loss:.4f}, distance {now.distance:.2g}", 1)
            if on_step is not None:
                on_step(now)
    return now


class _Task(NamedTuple):
    """What is static in a step. Equal if of the same objects, so that a compiled step is found again."""

    apply: Apply
    teacher: Apply | None
    plan: Plan
    optimizer: optax.GradientTransformation

    def __hash__(self) -> int:
        return hash(tuple(map(id, self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Task) and all(a is b for a, b in zip(self, other, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _step(task: _Task, state: LearningState, params: Any, minibatches: list[jax.Array]) -> LearningState:
    """One step, of gradients that are summed minibatch by minibatch."""
    learned: Any = _learned(state.rotations)

    def add(total, tokens):
        new = jax.value_and_grad(functools.partial(_loss, task))(learned, state.rotations, params, tokens)
        return jax.tree.map(jnp.add, total, new), None

    zero = jax.tree.map(jnp.zeros_like, (state.loss, learned))
    total, _ = jax.lax.scan(add, zero, jnp.stack(minibatches))
    loss, gradients = jax.tree.map(lambda x: x / len(minibatches), total)
    updates, opt_state = task.optimizer.update(gradients, state.opt_state, learned)
    learned = optax.apply_updates(learned, updates)
    return LearningState(_with_learned(state.rotations, learned), opt_state, state.step + 1, loss)


def _loss(task: _Task, learned: dict[str, jax.Array], rotations: dict[str, Rotation], params, tokens) -> jax.Array:
    """The mean loss of a token of the minibatch."""
    # Of the rotation only the result is kept: a transform more costs less than its float32 intermediates.
    rotated = jax.checkpoint(lambda learned: rotate(params, task.plan, _with_learned(rotations, learned)))
    logits = jax.nn.log_softmax(task.apply(rotated(learned), tokens).astype(jnp.float32))
    if task.teacher is None:
        return -jnp.mean(jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1))
    known = jax.nn.log_softmax(jax.lax.stop_gradient(task.teacher(params, tokens)).astype(jnp.float32))
    return jnp.mean(jnp.sum(jnp.exp(known) * (known - logits), axis=-1))


def _learned(rotations: Mapping[str, Rotation]) -> dict[str, jax.Array]:
    """The matrices that are learned."""
    return {name: rotation.q for name, rotation in rotations.items() if rotation.q is not None}


def _with_learned(rotations: Mapping[str, Rotation], learned: Mapping[str, jax.Array]) -> dict[str, Rotation]:
    return {name: dataclasses.replace(r, q=learned.get(name)) for name, r in rotations.items()}


def _tokens(batch: jax.typing.ArrayLike, mesh: Mesh | None) -> jax.Array:
    tokens = jnp.asarray(batch)
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            "learn_rotations: a minibatch must be integers (batch, length), of length 2 or more, got "
            f"{tokens.dtype.name} of shape {tokens.shape}."
        )
    if mesh is None:
        return tokens
    if tokens.shape[0] % mesh.size:
        raise ValueError(
            f"learn_rotations: a minibatch must divide over the {mesh.size} devices of the mesh, got {len(tokens)} "
            "sequences."
        )
    return jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def _on(mesh: Mesh, array: jax.Array) -> jax.Array:
    """The array on the devices of the mesh: as it is if it is on them, else a copy on each."""
    if isinstance(array, jax.Array) and array.sharding.device_set == set(mesh.devices.flat):
        return array
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec()))


@functools.cache
def _spinquant(steps: int) -> optax.GradientTransformation:
    return cayley_sgd(optax.cosine_decay_schedule(1.5, steps), clip=1.0)
