"""Rotation, Plan and rotate() by themselves: values, transformations, trees, shardings, and every error."""

import dataclasses
import doctest
import importlib
import subprocess
import sys
import textwrap

import decoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_hadacore import rotations
from jax_hadacore.rotations import Axes, Axis, Fuse, Plan, Rotation, check_invariance, fuse_norms, plans, rotate

PAIR = Plan({"T": ["v@1", "o@0"]})


def signs(n, *batch):
    return jnp.asarray(np.sign(normal((*batch, n), np.float32, "signs")))


def orthogonal(n, *batch):
    return jnp.asarray(np.linalg.qr(normal((*batch, n, n), np.float64, "orthogonal"))[0], jnp.float32)


ROTATIONS = {
    "plain": Rotation(24),
    "signs": Rotation(24, signs(24)),
    "int8 signs": Rotation(24, signs(24).astype(jnp.int8)),
    "block": Rotation(24, signs(24), block=4),
    "learned": Rotation(24, signs(24), orthogonal(24)),
    "learned blocks": Rotation(24, signs(24), orthogonal(12, 2), block=12),
    "no signs": Rotation(16, q=orthogonal(16)),
}
rotation_cases = pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)


@rotation_cases
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_apply_is_the_product_with_its_matrix(rotation, axis):
    p = decoder.matrix(rotation)
    shape = [3, 5, 2]
    shape[axis] = rotation.size
    x = normal(shape, np.float32)
    y = rotation.apply(jnp.asarray(x), axis)
    expected = np.moveaxis(np.moveaxis(x.astype(np.float64), axis, -1) @ p, -1, axis)
    np.testing.assert_allclose(y, expected, atol=3e-6)
    np.testing.assert_allclose(rotation.apply(y, axis, transpose=True), x, atol=3e-6)
    np.testing.assert_allclose(p @ p.T, np.eye(rotation.size), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_a_learned_rotation_rounds_once(dtype):
    rotation = ROTATIONS["learned"]
    x = jnp.asarray(normal((64, 24), np.float64), dtype)
    y = rotation.apply(x)
    assert y.dtype == dtype
    wide = np.asarray(x, np.float64) @ decoder.matrix(rotation)
    # The values of decoder.matrix are float32's; what rounding once does is at most half a unit.
    error = np.abs(np.asarray(y, np.float64) - wide)
    eps = max(float(jnp.finfo(dtype).eps), 1e-6)
    assert np.max(error - 0.51 * eps * np.exp2(np.ceil(np.log2(np.abs(wide))))) < 1e-6


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_batch_of_rotations(layers):
    batch = Rotation(24, signs(24, 3), orthogonal(24, 3))
    shape = [5, 24]
    shape.insert(layers, 3)
    x = jnp.asarray(normal(shape, np.float32))
    axis = shape.index(24)
    for at in axis, axis - 3:
        y = batch.apply(x, at, layers=layers)
        for i in range(3):
            one = jnp.take(x, i, axis=layers)
            np.testing.assert_array_equal(jnp.take(y, i, axis=layers), batch[i].apply(one))
    with pytest.raises(IndexError, match=r"a batch of shape \(3,\) has no rotation 3"):
        batch[3]


def test_a_rotation_of_another_size():
    with pytest.raises(ValueError, match=r"axis 0 must have the rotation's size 24, got shape \(23, 24\)"):
        ROTATIONS["signs"].apply(jnp.ones((23, 24)), 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_a_fold_of_many_steps_rounds_once(dtype):
    params = {
        "norm": jnp.asarray(1 + 0.3 * normal(24, np.float64), dtype),
        "w": jnp.asarray(normal((24, 16), np.float64), dtype),
    }
    plan = Plan({"A": ["w@0"], "B": ["w@1"]}, fuse=[Fuse("norm", ["w@0"])])
    turns = plan.init(jax.random.key(0), params, learn=["A"])
    w = rotate(params, plan, turns)["w"]
    assert w.dtype == dtype
    a, b = decoder.matrix(turns["A"]), decoder.matrix(turns["B"])
    exact = a.T @ (np.asarray(params["norm"], np.float64)[:, None] * np.asarray(params["w"], np.float64)) @ b
    if dtype == jnp.float64:
        np.testing.assert_allclose(w, exact, atol=1e-13)
    else:
        rounded = jnp.asarray(exact.astype(np.float32)).astype(dtype)
        assert np.mean(np.asarray(w) != np.asarray(rounded)) < 0.01  # ties of the float32 sums


def test_every_kind_of_tree():
    v, o = jnp.asarray(normal((3, 8), np.float32)), jnp.asarray(normal((8, 5), np.float32))
    rotation = Rotation(8, signs(8))

    @jax.tree_util.register_pytree_with_keys_class
    class Boxed:
        """A box as Linen and nnx have: its child is its attribute `value`."""

        def __init__(self, value):
            self.value = value

        def tree_flatten_with_keys(self):
            return ((jax.tree_util.GetAttrKey("value"), self.value),), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    trees = {
        "flat": ({"a.0.v": v, "a.0.o": o}, Plan({"T": ["a.*.v@1", "a.*.o@0"]})),
        "nested": ({"a": [{"v": v, "o": o}]}, Plan({"T": ["a/*/v@1", "a/*/o@0"]})),
        "numbered": ({"a": {0: {"v": v, "o": o}}}, Plan({"T": ["a/*/(v|none)@-1", "a/*/o@-2"]})),
        "boxed": ({"a": ({"v": Boxed(v), "o": o},)}, Plan({"T": ["a/*/v@1", "a/*/o@0"]})),
        "value": ({"value": v, "o": o}, Plan({"T": ["value@1", "o@0"]})),
    }
    for name, (tree, plan) in trees.items():
        rotated = rotate(tree, plan, {"T": rotation})
        assert jax.tree.structure(rotated) == jax.tree.structure(tree), name
        found = {x.shape: x for x in jax.tree.leaves(rotated)}
        np.testing.assert_allclose(found[3, 8] @ found[8, 5], v @ o, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(found[3, 8], v @ decoder.matrix(rotation).astype(np.float32), atol=1e-5)


def test_an_untied_head_in_a_nested_tree():
    params = {"model": {"embed": jnp.asarray(normal((6, 4), np.float32))}}
    plan = Plan(
        {"T": ["model/embed@1", "heads/first/w@0"]},
        untie=[rotations.Untie("model/embed", "heads/first/w", transpose=True)],
    )
    rotated = rotate(params, plan, {"T": Rotation(4, signs(4))})
    expected = np.asarray(params["model"]["embed"]) @ decoder.matrix(Rotation(4, signs(4)))
    np.testing.assert_allclose(rotated["model"]["embed"], expected, atol=1e-6)
    np.testing.assert_allclose(rotated["heads"]["first"]["w"], expected.T, atol=1e-6)
    assert list(params) == ["model"]


def test_values_that_are_not_folded_are_the_same_objects():
    params = {"v": jnp.ones((2, 4)), "o": jnp.ones((4, 2)), "step": jnp.array(3), "other": np.ones(3), "rate": 0.5}
    rotated = rotate(params, Plan(PAIR.rotate, keep=["other"]), {"T": Rotation(4)})
    assert rotated["step"] is params["step"]
    assert rotated["other"] is params["other"]


def test_traced_and_differentiated():
    params = {"v": jnp.asarray(normal((3, 8), np.float32)), "o": jnp.asarray(normal((8, 5), np.float32))}
    turns = PAIR.init(jax.random.key(0), params, learn=["T"])
    eager, traced = rotate(params, PAIR, turns), jax.jit(lambda p, t: rotate(p, PAIR, t))(params, turns)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), eager, traced)
    weight = jnp.asarray(normal((3, 8), np.float32, "weight"))

    def loss(turns, params):
        rotated = rotate(params, PAIR, turns)
        return jnp.sum(weight * rotated["v"]), jnp.sum((rotated["v"] @ rotated["o"]) ** 2)

    gradient = jax.grad(lambda t: loss(t, params)[0])(turns)["T"]
    half = np.asarray(params["v"], np.float64) @ decoder.matrix(dataclasses.replace(turns["T"], q=None))
    np.testing.assert_allclose(gradient.q, half.T @ np.asarray(weight), atol=1e-5)  # d/dq of sum(weight * (v D H q))
    np.testing.assert_array_equal(gradient.signs, 0)
    # What the rotation leaves invariant has a gradient in q whose part along the orthogonal group is zero.
    g = jax.grad(lambda t: loss(t, params)[1])(turns)["T"].q
    assert np.max(np.abs(g - g.T)) < 1e-4 * np.max(np.abs(g))
    assert np.max(np.abs(g)) > 1
    jax.grad(lambda p: loss(turns, p)[0])(params)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [P("x", None), P(None, "x"), P("x", "y"), P(None, None)], ids=str)
def test_shardings_stay(eight_cpu_devices, spec, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (kind, kind), devices=eight_cpu_devices)
    sharding = NamedSharding(mesh, spec)
    plain = {"v": normal((8, 32), np.float32), "o": normal((32, 8), np.float32), "norm": normal(8, np.float32)}
    params = {
        name: jax.device_put(x, sharding if x.ndim == 2 else NamedSharding(mesh, P("x"))) for name, x in plain.items()
    }
    plan = Plan(PAIR.rotate, fuse=[Fuse("norm", ["v@0"])])
    turns = plan.init(jax.random.key(0), params, learn=["T"])
    rotated = rotate(params, plan, turns)
    for name, x in rotate(plain, plan, turns).items():
        assert rotated[name].sharding == params[name].sharding
        np.testing.assert_allclose(rotated[name], x, atol=1e-5)


def test_layers_are_counted_as_numbers():
    params = {"layers": [{"v": jnp.ones((7, 4)), "o": jnp.ones((4, 7))} for _ in range(12)]}
    plan = Plan({"T": Axes(["layers/*/v@1", "layers/*/o@0"], per_layer=True)})
    turns = plan.init(jax.random.key(0), params)
    np.testing.assert_array_equal(rotate(params, plan, turns)["layers"][10]["v"][0], turns["T"][10].apply(jnp.ones(4)))


def test_float64_needs_x64(x64_off):
    with pytest.raises(ValueError, match="'v' has dtype float64, which needs jax_enable_x64"):
        PAIR.folds({"v": np.ones((2, 4)), "o": np.ones((4, 2))})


def error_cases():
    """Name, plan, what the error says; all on the parameters of `params_for_errors`."""
    rest = ["**"]
    return {
        "unmatched": (Plan({"T": ["layers/*/w@1"]}, keep=rest), r"no array matches 'layers/\*/w'; the tree has 'bias'"),
        "unmatched norm": (Plan({}, fuse=[Fuse("ln", ["v@0"])], keep=rest), "no array matches 'ln'"),
        "size": (Plan({"T": ["v@1", "bias@0"]}, keep=rest), r"T has size 8; axis 0 of 'bias' must have that, got 6"),
        "split": (
            Plan({"T": ["v@1", Axis("bias", 0, split=True)]}, keep=rest),
            r"T has size 8; axis 0 of 'bias' must have a multiple of it, got 6",
        ),
        "unknown size": (Plan({"T": [Axis("v", 1, split=True)]}, keep=rest), "size of T is not known"),
        "no such axis": (Plan({"T": ["v@2"]}, keep=rest), r"'v' of shape \(4, 8\) has no axis 2"),
        "no such layers": (
            Plan({"T": [Axis("v", 1, layers=-3)]}, keep=rest),
            r"'v' of shape \(4, 8\) has no layers -3",
        ),
        "no such part": (Plan({"T": [Axis("v", 1, part=4)]}, keep=rest), r"'v' of shape \(4, 8\) has no part 4"),
        "norm not fused": (
            Plan({"T": ["v@1", "o@0"]}, keep=["(int8|bias|c/**)"]),
            r"'norm' of shape \(4,\) is not in the plan. If it is the weight of a norm, fuse it",
        ),
        "bias forgotten": (
            Plan({"T": ["v@1", "o@0"]}, fuse=[Fuse("norm", ["v@0"])], keep=["c/**"]),
            r"'bias' of shape \(6,\) is not in the plan",
        ),
        "matched twice": (Plan({"T": ["v@1", "(v|none)@-1?", "o@0"]}, keep=rest), "matched twice, by T and by T"),
        "two rotations": (
            Plan({"T": ["v@1"], "U": ["v@-1"]}, keep=rest),
            "axis 1 of 'v' is matched twice, by T and by U",
        ),
        "two parts": (
            Plan({"T": [Axis("v", 1, part=1), Axis("v", 1, part=-3)]}, keep=rest),
            "axis 1 of 'v' is matched twice",
        ),
        "a part and the whole": (
            Plan({"T": [Axis("v", 1, part=1), "v@1"]}, keep=rest),
            "axis 1 of 'v' is matched twice",
        ),
        "norm of another size": (
            Plan({}, fuse=[Fuse("norm", ["o@0"])], keep=rest),
            r"the norm 'norm' of 4 elements does not fit axis 0 of 'o', which has 8",
        ),
        "norm into nothing": (Plan({}, fuse=[Fuse("norm", ["none@0?"])], keep=rest), "'norm' is fused into nothing"),
        "norm twice": (
            Plan({}, fuse=[Fuse("norm", ["v@0"]), Fuse("norm", ["c/0/w@0"])], keep=rest),
            "'norm' is fused twice",
        ),
        "two norms": (
            Plan({}, fuse=[Fuse("norm", ["v@0"]), Fuse("c/1/w", ["v@0"])], keep=rest),
            "two norms are fused into axis 0 of 'v'",
        ),
        "norm of no layer": (
            Plan({}, fuse=[Fuse("c/*/w", ["(v)@0"])], keep=rest),
            r"'v' must have one norm of 'c/\*/w', got no",
        ),
        "norm that is rotated": (
            Plan({"T": ["norm@0"]}, fuse=[Fuse("norm", ["v@0"])], keep=rest),
            "'norm' is a norm to fuse; it cannot be rotated",
        ),
        "norm into a part": (
            Plan({}, fuse=[Fuse("c/0/w", [Axis("o", 1, part=0)])], keep=rest),
            "'c/0/w' does not fit 'o': .* a part of an array cannot take a norm",
        ),
        "norm of layers": (
            Plan({}, fuse=[Fuse(Axis("v", 0, layers=1), ["o@1"])], keep=rest),
            "'v' does not fit 'o': both must name the axis of the layers",
        ),
        "norm of which one reader is rotated": (
            Plan({"T": ["v@0"]}, fuse=[Fuse("norm", ["v@0", "c/0/w@0"])], keep=rest),
            r"'v' and 'c/0/w' read the norm 'norm'; both must be rotated alike, got \['T'\] and \[\]",
        ),
        "dtype": (Plan({"T": ["int8@0"]}, keep=rest), "'int8' has dtype int8; it must be float16"),
        "no layer": (
            Plan({"T": Axes(["v@1", "o@0"], per_layer=True)}, keep=rest),
            "'v' does not say which layer it is in",
        ),
        "an axis that not every layer has": (
            Plan({"T": Axes(["c/*/w@0", "c/*/b@0"], per_layer=True)}, keep=rest),
            r"'c/\*/b' matches nothing in layer 1, where T rotates another axis",
        ),
        "nothing to rotate": (Plan({"T": Axes(["none@0?"])}, keep=rest), "T rotates nothing"),
        "nothing to untie": (Plan({}, untie=[rotations.Untie("x", "y")], keep=rest), "no array 'x' to untie"),
    }


def params_for_errors():
    return {
        "v": np.ones((4, 8), np.float32),
        "o": np.ones((8, 4), np.float32),
        "norm": np.ones(4, np.float32),
        "bias": np.ones(6, np.float32),
        "int8": np.ones(4, np.int8),
        "c": [{"w": np.ones(4, np.float32), "b": np.ones(4, np.float32)}, {"w": np.ones(4, np.float32)}],
    }


@pytest.mark.parametrize(("plan", "message"), error_cases().values(), ids=error_cases())
def test_a_plan_that_does_not_fit_names_the_path(plan, message):
    with pytest.raises(ValueError, match=f"^Plan: .*{message}"):
        plan.folds(params_for_errors())


def test_errors_of_init_and_rotate():
    params = {"v": jnp.ones((2, 6)), "o": jnp.ones((6, 2))}
    key = jax.random.key(0)
    with pytest.raises(
        ValueError, match=r"Plan.init: T needs another block, given as block={'T': ...}: .*size 6 = 3 \* 2"
    ):
        PAIR.init(key, params)
    with pytest.raises(ValueError, match="the block of T must divide its size 6, got 4"):
        PAIR.init(key, params, block={"T": 4})
    with pytest.raises(ValueError, match=r"the plan has the rotations \['T'\], got \['R1'\]"):
        PAIR.init(key, params, learn=["R1"])
    turns = PAIR.init(key, params, block={"T": 2})
    with pytest.raises(ValueError, match=r"needs the rotations \['T'\], got none for \['T'\]"):
        rotate(params, PAIR, {})
    with pytest.raises(ValueError, match="T has size 4, and does not fit axis 1 of 'v', which has 6"):
        rotate(params, PAIR, {"T": Rotation(4)})
    with pytest.raises(ValueError, match=r"T must be a single one for 'v', got a batch of \(3,\)"):
        rotate(params, PAIR, {"T": Rotation(6, signs(6, 3), block=2)})
    with pytest.raises(ValueError, match=r"T must be a batch of more than 0 for 'a/0/v', got a batch of \(\)"):
        rotate({"a": [params]}, Plan({"T": Axes(["a/*/v@1", "a/*/o@0"], per_layer=True)}), turns)
    assert rotate(params, PAIR, {**turns, "R3": Rotation(4)}).keys() == params.keys()
    for text in "v", "v@", "@1", "v@x":
        with pytest.raises(ValueError, match="must be written as 'PATH@AXIS'"):
            Plan({"T": [text]})
    with pytest.raises(ValueError, match="two arrays of the tree have the path 'a/b'"):
        PAIR.folds({"a/b": params["v"], "a": {"b": params["o"]}})


def test_errors_of_plans():
    with pytest.raises(ValueError, match=r"naming must be one of \['tunix', 'hf'\], got 'maxtext'"):
        plans.llama(naming="maxtext")
    with pytest.raises(ValueError, match=r"rotations can be R1, R2 and R4, got \['R3'\]. R3 folds nothing"):
        plans.llama(naming="tunix", rotations=["R3"])
    with pytest.raises(ValueError, match=r"tied must be None or one of \['untie', 'online'\], got True"):
        plans.llama(naming="tunix", tied=True)
    with pytest.raises(ValueError, match=r"R2 needs head_dim .* got None"):
        plans.gemma3(naming="hf")


def test_check_invariance():
    params = {"v": jnp.eye(4), "o": 2 * jnp.eye(4)}
    rotated = rotate(params, PAIR, {"T": Rotation(4)})

    def apply(p, x):
        return {"y": x @ p["v"] @ p["o"]}

    assert 0 <= check_invariance(apply, params, rotated, jnp.ones(4)) < 1e-6
    with pytest.raises(AssertionError, match=r"may deviate by 5e-05 .* got"):
        check_invariance(apply, params, {**rotated, "o": params["o"]}, jnp.ones(4))
    with pytest.raises(AssertionError, match="got nan"):
        check_invariance(apply, params, rotated, jnp.full(4, jnp.nan))
    assert check_invariance(apply, params, {**rotated, "o": params["o"]}, jnp.ones(4), tolerance=9) > 0.1


def test_flax_is_imported_for_the_layers_only():
    program = """
        import sys
        import jax_hadacore.rotations as rotations
        assert "flax" not in sys.modules and "optax" not in sys.modules
        sys.modules["flax"] = None
        import importlib.util
        try:
            rotations.OnlineHadamard
        except ModuleNotFoundError as error:
            assert "OnlineHadamard needs flax: pip install 'jax_hadacore[flax]'" in str(error), error
        else:
            raise SystemExit("no error")
        try:
            rotations.nothing
        except AttributeError as error:
            assert "has no attribute 'nothing'" in str(error)
    """
    subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(program)], check=True)


def test_fuse_norms_alone_keeps_structure():
    params = {"norm": np.full(4, 3, np.float32), "v": np.ones((4, 8), np.float32)}
    fused = fuse_norms(params, Plan({}, fuse=[Fuse("norm", ["v@0"], offset=1.0)]))
    np.testing.assert_array_equal(fused["norm"], 0)
    np.testing.assert_array_equal(fused["v"], 4)


def test_untying_alone():
    params = {"a/embed": np.arange(6, dtype=np.float32).reshape(3, 2)}
    plan = Plan({}, untie=[rotations.Untie("a/embed", "a/head", transpose=True)], keep=["a/embed"])
    np.testing.assert_array_equal(rotate(params, plan, {})["a/head"], params["a/embed"].T)


@pytest.mark.usefixtures("x64_off")
@pytest.mark.parametrize("module", ["_rotation", "_plan", "_rotate", "plans"])
def test_docstrings(module):
    tested = doctest.testmod(importlib.import_module(f"jax_hadacore.rotations.{module}"))
    assert tested.attempted
    assert not tested.failed


def test_merged_heads_of_scanned_layers():
    params = {"v": normal((5, 3, 16), np.float32), "o": normal((16, 3, 5), np.float32)}
    axes = [Axis("v", 2, layers=1, split=True), Axis("o", 0, layers=1, split=True)]
    plan = Plan({"R2": Axes(axes, per_layer=True, size=8)})
    rotated = rotate(params, plan, plan.init(jax.random.key(0), params))
    assert not np.allclose(rotated["v"], params["v"], atol=0.1)
    with pytest.raises(ValueError, match=r"R2 must be a batch of 3 for 'v', got a batch of \(2,\)"):
        rotate(params, plan, {"R2": Rotation(8, signs(8, 2))})
    for i in range(3):
        expected = params["v"][:, i] @ params["o"][:, i]
        np.testing.assert_allclose(np.asarray(rotated["v"][:, i]) @ np.asarray(rotated["o"][:, i]), expected, atol=1e-5)
