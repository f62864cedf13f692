"""cayley_sgd: orthogonal for good, SpinQuant's update by its equations, and a transformation like any of optax."""

import doctest
import importlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal, rng

from jax_hadacore.rotations import cayley_sgd

F64 = np.float64


def orthogonal(n, *key):
    q, _ = np.linalg.qr(rng("orthogonal", n, *key).standard_normal((n, n)))
    return q


def spinquant(r, g, rate, iterations):
    """One step of SGDG (arXiv:2002.01113, algorithm 1) on the rows of r, by its own equations, in float64.

    The fixed point is iterated on until it is one; SpinQuant stops after five iterations.
    """
    v = -g.T
    w_hat = v @ r - r.T @ (r @ v @ r) / 2
    w = w_hat - w_hat.T
    alpha = min(rate, 1 / (np.max(np.sum(np.abs(w), axis=0)) + 1e-8))
    y = r.T + alpha * v
    for _ in range(iterations):
        y = r.T + alpha / 2 * w @ (r.T + y)
    return y.T


def step(optimizer, r, g, state=None):
    state = optimizer.init(r) if state is None else state
    updates, state = optimizer.update(g, state, r)
    return optax.apply_updates(r, updates), state


def angles(r, s):
    """The angles of the rotation from r to s."""
    return np.abs(np.angle(np.linalg.eigvals(np.asarray(r).T @ np.asarray(s))))


class TestAgainstSpinQuant:
    @pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 10.0])
    def test_is_its_update(self, size):
        r, g = orthogonal(64), size * normal((64, 64), F64, "g")
        ours, _ = step(cayley_sgd(1.5), jnp.asarray(r), g)
        np.testing.assert_allclose(ours, spinquant(r, g, 1.5, 60), atol=1e-8)  # its norm has + 1e-8
        in_float32, _ = step(cayley_sgd(1.5), jnp.asarray(r, jnp.float32), g.astype(np.float32))
        np.testing.assert_allclose(in_float32, spinquant(r, g, 1.5, 60), atol=1e-6)

    def test_and_its_five_iterations_come_close(self):
        r, g = orthogonal(64), 0.01 * normal((64, 64), F64, "g")
        ours, _ = step(cayley_sgd(1.5), jnp.asarray(r), g)
        np.testing.assert_allclose(ours, spinquant(r, g, 1.5, 5), atol=1e-6)


@pytest.mark.usefixtures("usual_promotion")  # optax's schedules need it
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"trust_region": True}, {"clip": 1.0}], ids=str)
@pytest.mark.parametrize("shape", [(32, 32), (3, 16, 16), (2, 4, 8, 8)], ids=str)
def test_stays_orthogonal(options, shape):
    n = shape[-1]
    start = np.broadcast_to(orthogonal(n), shape).astype(np.float32)
    target = np.broadcast_to(orthogonal(n, "target"), shape).astype(np.float32)
    rates = optax.cosine_decay_schedule(0.3, 100)
    optimizer = cayley_sgd(rates, **options)
    weights = np.broadcast_to(np.arange(1, n + 1, dtype=np.float32) / n, shape)
    loss = lambda r: jnp.sum((r - target) ** 2 * weights)  # noqa: E731
    r, state, before = jnp.asarray(start), None, loss(jnp.asarray(start))
    advance = jax.jit(lambda r, state: step(optimizer, r, jax.grad(loss)(r), state))
    state = optimizer.init(r)
    for _ in range(100):
        r, state = advance(r, state)
    assert r.dtype == np.float32
    exact = np.asarray(r, F64)
    assert np.abs(exact @ exact.swapaxes(-1, -2) - np.eye(n)).max() < 5e-6
    assert np.linalg.det(exact).ravel() == pytest.approx(np.linalg.det(start.astype(F64)).ravel(), abs=1e-4)
    assert loss(r) < 0.9 * before


class TestStepSize:
    def test_is_bounded(self):
        """Of a large gradient by 1 / |A|_1, so that no vector turns by more than one radian."""
        r = jnp.asarray(orthogonal(32))
        moved, _ = step(cayley_sgd(1e3), r, 1e3 * normal((32, 32), F64, "g"))
        assert 0.05 < angles(r, moved).max() < 1

    @pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
    def test_of_a_trust_region_does_not_depend_on_the_gradient(self, size):
        r = jnp.asarray(orthogonal(32))
        moved, _ = step(cayley_sgd(0.1, trust_region=True), r, size * normal((32, 32), F64, "g"))
        expected, _ = step(cayley_sgd(0.1, trust_region=True), r, normal((32, 32), F64, "g"))
        assert 0.01 < angles(r, moved).max() < 0.1
        np.testing.assert_allclose(moved, expected, atol=1e-10)

    def test_schedule(self):
        r, g = jnp.asarray(orthogonal(8)), 0.01 * normal((8, 8), F64, "g")
        optimizer = cayley_sgd(lambda count: jnp.where(count == 0, 0.5, 0.0))
        first, state = step(optimizer, r, g)
        np.testing.assert_allclose(first, step(cayley_sgd(0.5), r, g)[0], atol=1e-12)
        second, _ = step(optimizer, first, g, state)
        np.testing.assert_allclose(second, first, atol=1e-12)

    def test_no_gradient(self):
        r = jnp.asarray(orthogonal(8))
        for optimizer in (cayley_sgd(1.0), cayley_sgd(1.0, trust_region=True), cayley_sgd(1.0, momentum=0.9, clip=1.0)):
            np.testing.assert_allclose(step(optimizer, r, jnp.zeros((8, 8)))[0], r, atol=1e-12)


def test_momentum_adds_up_in_the_algebra():
    """Of a constant A: after k steps the sum of the geometric series of A, each turning by its own part."""
    a = normal((6, 6), F64) / 50
    a = a - a.T
    r, state = jnp.eye(6), None
    optimizer = cayley_sgd(1.0, momentum=0.5)
    expected = np.eye(6)
    for k in range(4):
        r, state = step(optimizer, r, r @ a, state)
        m = a * sum(0.5**i for i in range(k + 1))
        expected = expected @ np.linalg.solve(np.eye(6) + m / 2, np.eye(6) - m / 2)
    np.testing.assert_allclose(r, expected, atol=1e-12)


def test_clips_all_matrices_together():
    r = {"a": jnp.asarray(orthogonal(8)), "b": jnp.asarray(orthogonal(8, "b"))}
    g = {"a": normal((8, 8), F64, "g"), "b": 3 * normal((8, 8), F64, "h")}
    norm = np.sqrt(sum(np.sum(x**2) for x in g.values()))
    clipped, _ = step(cayley_sgd(0.1, clip=0.01), r, g)
    scaled, _ = step(cayley_sgd(0.1), r, jax.tree.map(lambda x: x * 0.01 / norm, g))
    for name, matrix in clipped.items():
        np.testing.assert_allclose(matrix, scaled[name], atol=1e-10)


def test_batches_are_updated_one_by_one():
    r = jnp.stack([orthogonal(8), orthogonal(8, "b")])
    g = normal((2, 8, 8), F64) * np.array([1e-3, 1e3])[:, None, None]
    together, _ = step(cayley_sgd(1.0), r, g)
    for i in range(2):
        np.testing.assert_allclose(together[i], step(cayley_sgd(1.0), r[i], g[i])[0], atol=1e-12)


@pytest.mark.usefixtures("usual_promotion")
def test_composes_with_partition():
    params = {"q": jnp.asarray(orthogonal(8)), "scale": jnp.ones(8)}
    optimizer = optax.partition(
        {"turn": cayley_sgd(0.1, momentum=0.9), "adam": optax.adam(1e-2)}, {"q": "turn", "scale": "adam"}
    )
    gradients = {"q": normal((8, 8), F64), "scale": normal(8, F64)}
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)(gradients, state, params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["q"], step(cayley_sgd(0.1), params["q"], gradients["q"])[0], atol=1e-12)
    np.testing.assert_allclose(new["scale"], 1 - 1e-2 * np.sign(gradients["scale"]), atol=1e-4)


_ON_TWO_CORES = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, jax.numpy as jnp
from jax_hadacore.rotations import cayley_sgd
optimizer = cayley_sgd(0.1)
matrices = {name: jnp.broadcast_to(jnp.eye(96), (8, 96, 96)) for name in "abcd"}
gradients = {name: jax.random.normal(jax.random.key(i), (8, 96, 96)) for i, name in enumerate(matrices)}
update = jax.jit(optimizer.update)
for _ in range(30):
    jax.block_until_ready(update(gradients, optimizer.init(matrices), matrices))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux chooses the cores of a process")
def test_batches_do_not_wait_for_each_other_on_the_cpu():
    """The LU of a batch in jaxlib waits, in a thread, for its pool: on two cores two of them would stop for good."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", _ON_TWO_CORES], check=True, cwd="/", env=environment, timeout=240)


def test_errors():
    optimizer = cayley_sgd(0.1)
    r = jnp.eye(4)
    with pytest.raises(ValueError, match="cayley_sgd: update needs the matrices"):
        optimizer.update(r, optimizer.init(r))
    for shape in ((4, 3), (4,)):
        with pytest.raises(ValueError, match=r"cayley_sgd: the matrices must be square, .* got shape \(4"):
            step(optimizer, jnp.ones(shape), jnp.ones(shape))
    with pytest.raises(TypeError, match="cayley_sgd: the matrices must be float32 or float64, got dtype bfloat16"):
        step(optimizer, r.astype(jnp.bfloat16), r.astype(jnp.bfloat16))


@pytest.mark.usefixtures("x64_off", "usual_promotion")
def test_docstrings():
    tested = doctest.testmod(importlib.import_module("jax_hadacore.rotations._cayley"))
    assert tested.attempted
    assert not tested.failed
