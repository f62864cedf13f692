"""learn_rotations: what is learned is what rounding does, however the work is divided, and resumed."""

import dataclasses
import doctest
import functools
import importlib
import io
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal, rng
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import Mesh

from jax_hadacore.rotations import Axes, Fuse, Plan, cayley_sgd, fake_quant, learn_rotations, rotate
from jax_hadacore.rotations import _learn as learn

pytestmark = pytest.mark.usefixtures("usual_promotion", "exact_products", "on_cpu")  # optax's schedules need the first


@pytest.fixture
def on_cpu():
    """What is tested is a loop, and its results bit for bit, which a GPU's additions in any order do not repeat."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


VOCAB, HIDDEN, INNER, LAYERS = 24, 16, 32, 2
PLAN = Plan(
    {
        "R1": Axes(["embed@1", "layers/*/(gate|up)@0", "layers/*/down@1", "head@0"]),
        "R4": Axes(["layers/*/down@0"], per_layer=True),
    },
    fuse=[Fuse("layers/*/norm", into=["layers/*/(gate|up)@0"]), Fuse("norm", into=["head@0"])],
)


def matrix(*shape):
    return normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))


@pytest.fixture(scope="module")
def params():
    layers = [
        {
            "norm": 1 + 0.3 * normal((HIDDEN,), np.float32, i),
            "gate": matrix(HIDDEN, INNER),
            "up": matrix(HIDDEN, INNER)[::-1],
            "down": matrix(INNER, HIDDEN),
        }
        for i in range(LAYERS)
    ]
    embed = 3 * normal((VOCAB, HIDDEN), np.float32)
    embed[:, 3] *= 10  # an outlier channel
    return {
        "embed": embed,
        "layers": layers,
        "norm": 1 + 0.3 * normal((HIDDEN,), np.float32),
        "head": matrix(HIDDEN, VOCAB),
    }


@pytest.fixture(scope="module")
def rotations(params):
    return PLAN.init(jax.random.key(0), params, learn=["R1", "R4"])


def model(turns, bits, **options):
    """apply(params, tokens) with activations of so many bits, or as they are, and R4 online."""
    quantise = (lambda x: x) if bits is None else (lambda x: fake_quant(x, bits, symmetric=False, **options))

    def norm(x, weight):
        return quantise(x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True)) * weight)

    def apply(params, tokens):
        x = params["embed"][tokens]
        for i, layer in enumerate(params["layers"]):
            h = norm(x, layer["norm"])
            h = jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])
            if turns is not None:
                h = turns["R4"][i].apply(h)
            x = x + quantise(h) @ layer["down"]
        return norm(x, params["norm"]) @ params["head"]

    return apply


def batches(i, size=8):
    return rng("tokens", i).integers(0, VOCAB, (size, 12)).astype(np.int32)


def only_r1(rotations):
    """R4 has to be online as it is learned: here it stays what it is."""
    return {"R1": rotations["R1"], "R4": dataclasses.replace(rotations["R4"], q=None)}


@pytest.fixture(scope="module")
def turns(rotations):
    return only_r1(rotations)


@pytest.fixture(scope="module")
def quantised(turns):
    return model(turns, 3)


def assert_same(state, other, **tolerance):
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or {"rtol": 0}))


def moved(state):
    q = state.rotations["R1"].q
    return float(jnp.linalg.norm(q - jnp.eye(len(q))))


class TestWhatIsLearned:
    @pytest.mark.parametrize("bits", [None, 3])
    def test_the_gradient_on_the_group_is_that_of_rounding(self, params, turns, bits):
        def loss(q):
            rotated = rotate(params, PLAN, {**turns, "R1": dataclasses.replace(turns["R1"], q=q)})
            logits = jax.nn.log_softmax(model(turns, bits)(rotated, tokens))
            return -jnp.mean(jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1))

        tokens = batches(0)
        q = np.linalg.qr(normal((HIDDEN, HIDDEN), np.float64))[0].astype(np.float32)
        with jax.default_matmul_precision("highest"):
            product = q.T @ np.asarray(jax.grad(loss)(jnp.asarray(q)))
        skew = np.abs(product - product.T).max() / np.abs(product).max()
        assert np.abs(product).max() > 1e-2  # the gradient itself is not zero
        assert skew < 1e-4 if bits is None else skew > 0.05

    def test_the_start_is_the_hadamard_rotation(self, params, rotations):
        """Bit for bit: a product with the identity rounds nothing."""
        plain = {name: dataclasses.replace(r, q=None) for name, r in rotations.items()}
        assert_same(rotate(params, PLAN, rotations), rotate(params, PLAN, plain))

    def test_the_loss_falls_and_the_matrices_stay_orthogonal(self, params, turns):
        losses = []
        state = learn_rotations(
            model(turns, 3, detach_scale=False),
            params,
            PLAN,
            turns,
            lambda i: batches(0, 32),  # so that losses can be compared
            steps=60,
            optimizer=cayley_sgd(0.05, trust_region=True),
            objective="kl",
            teacher=model(None, None),
            on_step=lambda state: losses.append(float(state.loss)),
        )
        assert len(losses) == 60
        assert np.mean(losses[-10:]) < 0.9 * losses[0]
        q = np.asarray(state.rotations["R1"].q, np.float64)
        assert np.abs(q @ q.T - np.eye(HIDDEN)).max() < 5e-6
        assert state.distance == pytest.approx(moved(state) / np.sqrt(HIDDEN), rel=1e-5)
        assert_same(state.rotations["R4"], turns["R4"])
        np.testing.assert_array_equal(state.rotations["R1"].signs, turns["R1"].signs)

    def test_the_first_loss_is_the_objective(self, params, turns, quantised):
        tokens = batches(0)
        rotated = rotate(params, PLAN, turns)
        new, old = (
            np.asarray(jax.nn.log_softmax(logits.astype(jnp.float64)))
            for logits in (quantised(rotated, tokens), model(None, None)(params, tokens))
        )
        first = lambda **options: learn_rotations(quantised, params, PLAN, turns, batches, steps=1, **options).loss  # noqa: E731
        picked = np.take_along_axis(new[:, :-1], tokens[:, 1:, None], axis=-1)
        assert first() == pytest.approx(-picked.mean(), rel=1e-5)
        kl = np.mean(np.sum(np.exp(old) * (old - new), axis=-1))
        assert first(objective="kl", teacher=model(None, None)) == pytest.approx(kl, rel=1e-4)

    def test_nothing_to_learn_without_rounding(self, params, turns):
        state = learn_rotations(
            model(turns, None), params, PLAN, turns, batches, steps=5, objective="kl", teacher=model(None, None)
        )
        assert abs(state.loss) < 1e-5
        assert moved(state) < 1e-4

    def test_the_default_is_spinquants(self, params, turns, quantised):
        recipe = cayley_sgd(optax.cosine_decay_schedule(1.5, 4), clip=1.0)
        one, other = (
            learn_rotations(quantised, params, PLAN, turns, batches, steps=4, optimizer=o) for o in (None, recipe)
        )
        assert_same(one.rotations, other.rotations)

    def test_a_batch_of_rotations_and_blocks(self, params):
        turns = PLAN.init(jax.random.key(1), params, learn=["R1", "R4"], block={"R1": 4, "R4": 8})

        def apply(rotated, tokens):
            return model({"R4": turns["R4"]}, 3)(rotated, tokens)

        optimizer = cayley_sgd(0.1, trust_region=True)
        state = learn_rotations(apply, params, PLAN, turns, batches, steps=2, optimizer=optimizer)
        assert state.rotations["R1"].q.shape == (4, 4, 4)
        assert state.rotations["R4"].q.shape == (LAYERS, 4, 8, 8)
        for name in turns:
            q = np.asarray(state.rotations[name].q)
            np.testing.assert_allclose(q @ q.swapaxes(-1, -2), np.broadcast_to(np.eye(q.shape[-1]), q.shape), atol=5e-6)
            assert np.abs(q - np.eye(q.shape[-1])).max(axis=(-1, -2)).min() > 1e-4  # every one has moved


class TestHowTheWorkIsDivided:
    def test_accumulation_makes_larger_minibatches(self, params, turns, quantised):
        parts = lambda i: batches(0, 32)[8 * (i % 4) : 8 * (i % 4 + 1)]  # noqa: E731
        options = {"steps": 2, "optimizer": cayley_sgd(0.1)}
        one = learn_rotations(quantised, params, PLAN, turns, lambda i: batches(0, 32), **options)
        four = learn_rotations(quantised, params, PLAN, turns, parts, accumulate=4, **options)
        assert_same(four, one, rtol=1e-4, atol=1e-5)

    def test_over_a_mesh(self, params, turns, quantised, cpu_devices):
        optimizer = cayley_sgd(0.1)
        mesh = Mesh(np.array(cpu_devices).reshape(2, 2), ("data", "more"))
        # Both on CPUs, where the default device is a GPU.
        alone = Mesh(np.array(cpu_devices[:1]), ("data",))
        one, four = (
            learn_rotations(quantised, params, PLAN, turns, batches, steps=2, optimizer=optimizer, mesh=m)
            for m in (alone, mesh)
        )
        assert four.rotations["R1"].q.sharding.device_set == set(cpu_devices)
        assert_same(jax.device_get(four), jax.device_get(one), rtol=1e-4, atol=1e-5)

    def test_nothing_of_the_rotation_is_kept_but_its_result(self, params, turns, quantised, capsys):
        task = learn._Task(quantised, None, PLAN, cayley_sgd(0.1))
        print_saved_residuals(
            lambda q: learn._loss(task, {"R1": q}, turns, params, jnp.asarray(batches(0))), turns["R1"].q
        )
        shapes = [
            sorted(map(int, re.match(r"f32\[([\d,]*)\]", line)[1].split(",")))
            for line in capsys.readouterr().out.splitlines()
            if line.startswith("f32[") and not re.search("argument|constant", line)
        ]
        weights = [[HIDDEN, INNER], [1, HIDDEN, INNER], [VOCAB, HIDDEN], [HIDDEN, VOCAB]]
        kept = [shape for shape in shapes if shape in list(map(sorted, weights))]
        assert len(kept) == 3 * LAYERS + 1  # gate, up and down of each layer, and the head

    def test_compiles_once(self, params, turns):
        traced = []

        def apply(rotated, tokens):
            traced.append(1)
            return model(turns, 3)(rotated, tokens)

        for _ in range(2):
            learn_rotations(apply, params, PLAN, turns, batches, steps=3)
        once = len(traced)
        learn_rotations(functools.partial(apply), params, PLAN, turns, batches, steps=3)
        assert len(traced) == 2 * once


class TestResume:
    def test_gives_the_same_trajectory(self, params, turns, quantised):
        options = {"steps": 6, "optimizer": cayley_sgd(optax.cosine_decay_schedule(0.1, 6), momentum=0.9)}
        asked, saved = [], {}

        def noted(i):
            asked.append(i)
            return batches(i)

        def save(state):
            # As a checkpoint does: the leaves alone.
            saved[int(state.step)] = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]

        whole = learn_rotations(quantised, params, PLAN, turns, noted, accumulate=2, on_step=save, **options)
        assert asked == list(range(12))
        start = learn_rotations(quantised, params, PLAN, turns, noted, accumulate=2, **{**options, "steps": 0})
        restored = jax.tree.unflatten(jax.tree.structure(start), saved[3])
        asked.clear()
        resumed = learn_rotations(quantised, params, PLAN, turns, noted, accumulate=2, state=restored, **options)
        assert asked == list(range(6, 12))
        assert_same(resumed, whole)

    def test_of_a_finished_run_is_nothing(self, params, turns, quantised):
        state = learn_rotations(quantised, params, PLAN, turns, batches, steps=2)
        again = learn_rotations(quantised, params, PLAN, turns, batches, steps=2, state=state)
        assert_same(again, state)


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestProgress:
    @pytest.mark.parametrize("progress", [True, False])
    def test_on_a_terminal(self, params, turns, quantised, monkeypatch, progress):
        monkeypatch.setattr(sys, "stderr", Terminal())
        learn_rotations(quantised, params, PLAN, turns, batches, steps=2, progress=progress)
        shown = sys.stderr.getvalue()
        assert ("loss" in shown and "distance" in shown and "2/2" in shown) if progress else not shown

    @pytest.mark.parametrize(("stderr", "count"), [(Terminal, 2), (io.StringIO, 0)])
    def test_only_what_is_shown_is_waited_for(self, turns, monkeypatch, stderr, count):
        waits = []

        class Loss:
            """Of a step that has not ended."""

            def __format__(self, spec):
                waits.append(spec)
                return "0"

        monkeypatch.setattr(sys, "stderr", stderr())
        monkeypatch.setattr(learn, "_step", lambda task, state, *_: dataclasses.replace(state, loss=Loss()))
        learn_rotations(None, None, PLAN, turns, batches, steps=2)
        assert len(waits) == count


def test_errors(params, turns, quantised):
    def call(tokens=None, rotations=turns, **options):
        some = batches(0) if tokens is None else tokens
        return learn_rotations(quantised, params, PLAN, rotations, lambda i: some, steps=1, **options)

    with pytest.raises(ValueError, match=r"learn_rotations: no rotation has a q to learn; .* got rotations \['R1'"):
        call(rotations=PLAN.init(jax.random.key(0), params))
    with pytest.raises(ValueError, match=r"learn_rotations: objective must be .* got 'kl' without one"):
        call(objective="kl")
    with pytest.raises(ValueError, match=r"learn_rotations: objective must be .* got 'cross_entropy' with one"):
        call(teacher=quantised)
    with pytest.raises(ValueError, match=r"learn_rotations: objective must be .* got 'mse'"):
        call(objective="mse")
    for tokens in (np.zeros(4, np.int32), np.zeros((4, 1), np.int32), np.zeros((4, 8), np.float32)):
        with pytest.raises(ValueError, match=r"learn_rotations: a minibatch must be integers .* got .* of shape \(4"):
            call(tokens)
    mesh = Mesh(np.array(jax.devices("cpu")[:3]), ("data",))
    with pytest.raises(ValueError, match=r"learn_rotations: a minibatch must divide over the 3 devices .* got 8"):
        call(mesh=mesh)
    with pytest.raises(ValueError, match="rotate: the plan needs the rotations"):
        call(rotations={"R1": turns["R1"]})


def test_a_loop_of_ones_own(params, turns, quantised):
    """What learn_rotations does can be written with the parts that it is made of."""
    optimizer = cayley_sgd(0.1)

    def loss(q, tokens):
        rotated = rotate(params, PLAN, {**turns, "R1": dataclasses.replace(turns["R1"], q=q)})
        logits = jax.nn.log_softmax(quantised(rotated, tokens))
        return -jnp.mean(jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1))

    q = turns["R1"].q
    state = optimizer.init(q)
    for i in range(3):
        updates, state = optimizer.update(jax.grad(loss)(q, batches(i)), state, q)
        q = optax.apply_updates(q, updates)
    ours = learn_rotations(quantised, params, PLAN, turns, batches, steps=3, optimizer=cayley_sgd(0.1))
    np.testing.assert_allclose(ours.rotations["R1"].q, q, atol=1e-5)
    assert moved(ours) > 1e-3


@pytest.mark.usefixtures("x64_off")
def test_docstrings():
    tested = doctest.testmod(importlib.import_module("jax_hadacore.rotations._learn"))
    assert tested.attempted
    assert not tested.failed
