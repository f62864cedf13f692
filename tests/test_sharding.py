"""Sharded arrays: batch axes stay where they are, and only a sharded transform axis is gathered."""
# ruff: noqa: E731

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HALVES, assert_same_bits, normal, rng
from hlo import copies, hlo
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import transform

from jax_hadacore import _primitive, hadamard

COLLECTIVES = re.compile(r"\b(all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\(")
SCALE = 0.3
X = normal((8, 4, 16), np.float32)
Y = transform(X, SCALE)

f = functools.partial(hadamard, scale=SCALE)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

LINE = ((4,), ("b",))
SQUARE = ((2, 2), ("b", "c"))
BATCH_SHARDED = [
    pytest.param(LINE, P("b"), id="first"),
    pytest.param(LINE, P(None, "b"), id="middle"),
    pytest.param(LINE, P("b", None, None), id="padded-spec"),
    pytest.param(SQUARE, P("b"), id="square-first"),
    pytest.param(SQUARE, P("b", "c"), id="square-both"),
    pytest.param(SQUARE, P(("b", "c")), id="square-one-axis"),
    pytest.param(SQUARE, P("c", "b"), id="square-swapped"),
]
batch_sharded = pytest.mark.parametrize(("grid", "spec"), BATCH_SHARDED)
auto_and_explicit = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


@pytest.fixture
def mesh(cpu_devices):
    def mesh(grid, kind=AxisType.Auto):
        shape, names = grid
        return Mesh(np.array(cpu_devices).reshape(shape), names, axis_types=(kind,) * len(shape))

    return mesh


def collectives(function, *args, **options):
    text = hlo(function, *args, **options)
    assert "jax_hadacore_hadamard_v1" in text
    return COLLECTIVES.findall(text)


def assert_gathers_at_most(text, elements):
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)
    assert shapes
    assert all(np.prod([int(size) for size in shape.split(",")]) <= elements for shape in shapes), shapes


def put(x, mesh, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


@auto_and_explicit
def test_columns_lie_behind_their_axis_in_every_part(mesh, kind, monkeypatch):
    # What a GPU is given; the CPU's kernel would take the parts for rows, so they are looked at only.
    monkeypatch.setattr(_primitive, "_takes_columns", lambda *_, **__: True)
    x = put(normal((4, 32, 64), np.float32), mesh(SQUARE, kind), P("b", None, "c"))
    text = hlo(functools.partial(hadamard, axis=1), x)
    assert COLLECTIVES.findall(text) == []
    assert "operand_layout_constraints={f32[2,32,32]{1,2,0}}" in text


class TestBatchSharded:
    @batch_sharded
    def test_forward(self, mesh, grid, spec):
        x = put(X, mesh(grid), spec)
        assert collectives(f, x) == []
        for y in (jax.jit(f)(x), f(x)):
            close(y, Y)
            assert y.sharding.is_equivalent_to(x.sharding, x.ndim)

    @batch_sharded
    def test_gradient(self, mesh, grid, spec):
        x = put(X, mesh(grid), spec)
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(f(jnp.tanh(x)))))
        # The loss itself is a sum over devices, which needs no communication in its gradient.
        assert collectives(gradient, x) == []
        y = jax.jit(gradient)(x)
        close(y, gradient(X))
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim)

    @batch_sharded
    def test_vmap(self, mesh, grid, spec):
        x = put(X, mesh(grid), spec)
        for mapped in (jax.vmap(f), jax.vmap(f, in_axes=1, out_axes=1), jax.vmap(jax.vmap(f))):
            assert collectives(mapped, x) == []
            y = jax.jit(mapped)(x)
            close(y, Y)
            assert y.sharding.is_equivalent_to(x.sharding, x.ndim)

    def test_vmap_of_grad(self, mesh):
        x = put(X, mesh(LINE), P("b"))
        gradient = jax.vmap(jax.grad(lambda x: jnp.sum(f(x) ** 2)))
        assert collectives(gradient, x) == []
        close(jax.jit(gradient)(x), 2 * transform(Y, SCALE), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("spec", [P(None, "b"), P(None, None, "b")], ids=["row", "column"])
    def test_scan(self, mesh, spec):
        x = put(normal((3, 8, 4, 16), np.float32), mesh(LINE), spec)
        step = lambda c, v: (f(c) + v, f(v))
        run = lambda x: jax.lax.scan(step, jnp.zeros_like(x[0]), x)
        assert collectives(run, x) == []
        jax.tree.map(close, jax.jit(run)(x), run(np.asarray(x)))

    @pytest.mark.parametrize("axis", [0, 1])
    def test_another_axis_is_transformed(self, mesh, axis):
        x = put(X, mesh(LINE), P(*("b" if i == (1 - axis) else None for i in range(3))))
        call = functools.partial(f, axis=axis)
        assert collectives(call, x) == []
        y = jax.jit(call)(x)
        close(y, np.moveaxis(transform(np.moveaxis(X, axis, -1), SCALE), -1, axis))
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim)

    def test_between_matrix_products(self, mesh):
        x, w = put(X, mesh(LINE), P("b")), put(normal((16, 16), np.float32), mesh(LINE), P())
        layer = lambda x, w: f(jnp.tanh(x @ w)) @ w
        assert collectives(layer, x, w) == []
        with jax.default_matmul_precision("highest"):  # by default a GPU rounds the operands to TF32
            close(jax.jit(layer)(x, w), layer(X, np.asarray(w)), rtol=1e-4, atol=1e-4)

    def test_sharding_flows_through(self, mesh):
        # Nothing but the producer says how its result is sharded; the consumer follows.
        m = mesh(LINE)
        split = lambda x: jnp.cos(f(jax.lax.with_sharding_constraint(jnp.sin(x), NamedSharding(m, P("b")))))
        x = put(X, m, P())
        y = jax.jit(split)(x)
        assert y.sharding.is_equivalent_to(NamedSharding(m, P("b")), 3)
        assert collectives(split, x) == []

    @pytest.mark.parametrize("rank", [2, 5])
    def test_other_ranks(self, mesh, rank):
        shape = (8,) + (1,) * (rank - 2) + (64,)
        x = put(X.reshape(shape), mesh(LINE), P("b"))
        assert collectives(f, x) == []
        close(jax.jit(f)(x), transform(X.reshape(shape), SCALE))

    @pytest.mark.parametrize("dtype", [*HALVES, np.dtype(np.float64)], ids=str)
    @pytest.mark.parametrize(
        ("grid", "spec"), [(LINE, P("b")), (LINE, P(None, "b")), (SQUARE, P(("b", "c")))], ids=["row", "column", "both"]
    )
    def test_bits_do_not_depend_on_the_sharding(self, mesh, cpu_devices, grid, spec, dtype):
        x = normal((8, 1024), dtype)
        expected = np.asarray(hadamard(jax.device_put(x, cpu_devices[0])))
        assert_same_bits(np.asarray(jax.jit(hadamard)(put(x, mesh(grid), spec))), expected)

    def test_complex(self, mesh):
        x = put((X + 1j * X).astype(np.complex64), mesh(LINE), P("b"))
        assert collectives(f, x) == []
        close(jax.jit(f)(x), Y + 1j * Y)

    def test_uneven_only_where_jax_allows_it(self, mesh):
        # Six rows on four devices: jit may pad inside, the result is the same.
        m = mesh(LINE)
        constrain = lambda x: f(jax.lax.with_sharding_constraint(x, NamedSharding(m, P("b"))))
        x = put(X[:6], m, P())
        close(jax.jit(constrain)(x), Y[:6])


class TestTransformAxisSharded:
    @pytest.mark.parametrize(
        ("grid", "spec"),
        [
            pytest.param(LINE, P(None, None, "b"), id="line"),
            pytest.param(SQUARE, P("b", None, "c"), id="square"),
            pytest.param(SQUARE, P(None, None, ("b", "c")), id="both"),
        ],
    )
    def test_right_and_at_most_gathers(self, mesh, grid, spec):
        x = put(X, mesh(grid), spec)
        text = hlo(f, x)
        assert set(COLLECTIVES.findall(text)) <= {"all-gather"}
        y = jax.jit(f)(x)
        close(y, Y)
        close(f(x), Y)
        close(jax.jit(jax.grad(lambda x: jnp.sum(f(x) ** 2)))(x), 2 * transform(Y, SCALE), rtol=1e-4, atol=1e-4)

    def test_gathers_that_axis_only(self, mesh):
        x = put(X, mesh(SQUARE), P("b", None, "c"))
        assert_gathers_at_most(hlo(f, x), X.size // 2)

    def test_the_only_axis(self, mesh):
        x = put(X[0, 0], mesh(LINE), P("b"))
        close(jax.jit(f)(x), Y[0, 0])
        close(f(x), Y[0, 0])


S = rng("signs").choice(np.array([-1, 1], np.int8), 16)
ROTATION = np.linalg.qr(normal((4, 4), np.float64))[0]


class TestOptions:
    """What the options add to a program is as local as the transform itself."""

    @auto_and_explicit
    @batch_sharded
    @pytest.mark.parametrize(
        "options",
        [
            {"signs": S},
            {"signs": S, "transpose": True},
            {"block_size": 4},
            {"block_size": 4, "signs": S[:4]},
            {"matrix": ROTATION},
        ],
        ids="-".join,
    )
    def test_a_sharded_batch(self, mesh, kind, grid, spec, options):
        m = mesh(grid, kind)
        x = put(X, m, spec)
        call = functools.partial(hadamard, **options)
        with jax.set_mesh(m):
            assert collectives(call, x) == []
            gradient = jax.grad(lambda x: jnp.sum(jnp.sin(call(x))))
            assert collectives(gradient, x) == []
            y = jax.jit(call)(x)
            close(jax.jit(gradient)(x), jax.grad(lambda x: jnp.sum(jnp.sin(call(x))))(X))
        assert_same_bits(np.asarray(y), np.asarray(call(jax.device_put(X, jax.devices("cpu")[0]))))
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim)

    @auto_and_explicit
    @pytest.mark.parametrize("transpose", [False, True], ids=["map", "adjoint"])
    @pytest.mark.parametrize("signs_spec", [P(), P("b")], ids=["whole", "split"])
    @pytest.mark.parametrize("spec", [P("b"), P(None, None, "b"), P()], ids=str)
    def test_traced_signs(self, mesh, kind, transpose, signs_spec, spec):
        m = mesh(LINE, kind)
        call = lambda x, s: hadamard(x, signs=s, transpose=transpose)
        expected = np.asarray(call(X, S))
        with jax.set_mesh(m):
            x, s = put(X, m, spec), put(S, m, signs_spec)
            assert_same_bits(np.asarray(jax.jit(call)(x, s)), expected)
            if spec == P("b") and signs_spec == P():
                assert collectives(call, x, s) == []
            gradient = jax.jit(jax.grad(lambda x, s: jnp.sum(call(x, s) ** 2)))(x, s)
        close(gradient, 2 * X, rtol=1e-4, atol=1e-4)

    @auto_and_explicit
    @pytest.mark.parametrize(
        ("grid", "spec"),
        [(LINE, P(None, None, "b")), (SQUARE, P("b", None, "c")), (SQUARE, P(None, None, ("c", "b")))],
        ids=["line", "square", "both"],
    )
    @pytest.mark.parametrize("block", [1, 2, 4])
    def test_whole_blocks_on_each_device(self, mesh, kind, grid, spec, block):
        m = mesh(grid, kind)
        x = put(X, m, spec)
        call = functools.partial(hadamard, block_size=block)
        with jax.set_mesh(m):
            text = hlo(call, x)
            assert COLLECTIVES.findall(text) == []
            assert copies(text) == 0
            assert COLLECTIVES.findall(hlo(jax.grad(lambda x: jnp.sum(jnp.sin(call(x)))), x)) == []
            y = jax.jit(call)(x)
            traced = jax.jit(lambda x, s: call(x, signs=s))(x, S[:block])
        assert_same_bits(np.asarray(y), np.asarray(call(X)))
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim)
        assert_same_bits(np.asarray(traced), np.asarray(call(X, signs=S[:block])))

    @auto_and_explicit
    @pytest.mark.parametrize("signs", [None, S], ids=["plain", "signs"])
    def test_cut_blocks_are_gathered(self, mesh, kind, signs):
        m = mesh(LINE, kind)
        x = put(X, m, P(None, None, "b"))
        call = functools.partial(hadamard, block_size=8, signs=signs)
        with jax.set_mesh(m):
            assert set(COLLECTIVES.findall(hlo(call, x))) == {"all-gather"}
            y = jax.jit(call)(x)
        assert_same_bits(np.asarray(y), np.asarray(call(X)))

    @auto_and_explicit
    @pytest.mark.parametrize("signs_spec", [P(), P("b")], ids=["whole", "split"])
    def test_signs_of_all_blocks(self, mesh, kind, signs_spec):
        m = mesh(LINE, kind)
        call = lambda x, s: hadamard(x, block_size=4, signs=s)
        with jax.set_mesh(m):
            x, s = put(X, m, P(None, None, "b")), put(S, m, signs_spec)
            assert_same_bits(np.asarray(jax.jit(call)(x, s)), np.asarray(call(X, S)))
            if signs_spec == P() or kind == AxisType.Auto:
                assert COLLECTIVES.findall(hlo(call, x, s)) == []

    @pytest.mark.parametrize("n", [24, 36 * 76])
    def test_orders(self, mesh, cpu_devices, n):
        x = normal((8, n), np.float32)
        expected = np.asarray(hadamard(jax.device_put(x, cpu_devices[0])))
        x = put(x, mesh(LINE), P("b"))
        assert collectives(hadamard, x) == []
        assert_same_bits(np.asarray(jax.jit(hadamard)(x)), expected)

    @auto_and_explicit
    def test_vmap_over_signs(self, mesh, kind):
        m = mesh(LINE, kind)
        s = np.stack([S, -S, S[::-1], np.ones_like(S)])
        call = jax.vmap(lambda x, s: hadamard(x, signs=s), in_axes=(1, 0))
        with jax.set_mesh(m):
            x = put(X, m, P("b"))
            assert_same_bits(np.asarray(jax.jit(call)(x, s)), np.asarray(call(X, s)))


class TestExplicit:
    """Meshes with explicit axes, whose shardings are part of the type."""

    @batch_sharded
    def test_spec_stays_in_the_type(self, mesh, grid, spec):
        m = mesh(grid, AxisType.Explicit)
        specs = []

        def call(x):
            y = f(x)
            specs.append((jax.typeof(x).sharding.spec, jax.typeof(y).sharding.spec))
            return y

        with jax.set_mesh(m):
            x = put(X, m, spec)
            assert collectives(f, x) == []
            close(jax.jit(call)(x), Y)
            close(call(x), Y)
        assert all(before == after for before, after in specs)

    @pytest.mark.parametrize(
        ("grid", "spec"),
        [
            pytest.param(LINE, P(None, None, "b"), id="line"),
            pytest.param(SQUARE, P("b", None, "c"), id="square"),
            pytest.param(SQUARE, P(None, None, ("b", "c")), id="both"),
        ],
    )
    @pytest.mark.parametrize("context", [True, False], ids=["in-context", "no-context"])
    def test_a_sharded_transform_axis(self, mesh, grid, spec, context):
        m = mesh(grid, AxisType.Explicit)
        x = put(X, m, spec)
        with jax.set_mesh(m) if context else contextlib.nullcontext():
            for y in (jax.jit(f)(x), f(x)):
                close(y, Y)
                assert y.sharding.is_equivalent_to(x.sharding, 3)
            assert set(collectives(f, x)) <= {"all-gather"}

    @pytest.mark.parametrize("spec", [P("b"), P(None, None, "b")], ids=["batch", "last"])
    def test_derivatives_and_vmap(self, mesh, spec):
        m = mesh(LINE, AxisType.Explicit)
        with jax.set_mesh(m):
            x = put(X, m, spec)
            gradient = jax.jit(jax.grad(lambda x: jnp.sum(f(x) ** 2)))(x)
            close(gradient, 2 * transform(Y, SCALE), rtol=1e-4, atol=1e-4)
            assert gradient.sharding.is_equivalent_to(x.sharding, 3)
            close(jax.jit(jax.vmap(f, in_axes=1, out_axes=1))(x), Y)
            close(jax.jit(jax.vmap(f))(x), Y)

    def test_another_axis(self, mesh):
        m = mesh(LINE, AxisType.Explicit)
        expected = np.moveaxis(transform(np.moveaxis(X, 0, -1), SCALE), -1, 0)
        with jax.set_mesh(m):
            for spec in (P("b"), P(None, "b")):
                x = put(X, m, spec)
                y = jax.jit(functools.partial(f, axis=0))(x)
                close(y, expected)
                assert y.sharding.is_equivalent_to(x.sharding, 3)

    def test_inplace_with_a_sharded_transform_axis(self, mesh):
        m = mesh(LINE, AxisType.Explicit)
        with jax.set_mesh(m):
            x = put(X, m, P(None, None, "b"))
            close(jax.jit(functools.partial(f, inplace=True))(x), Y)
            close(x, X)

    def test_complex(self, mesh):
        m = mesh(LINE, AxisType.Explicit)
        with jax.set_mesh(m):
            for spec in (P("b"), P(None, None, "b")):
                close(jax.jit(f)(put((X + 1j * X).astype(np.complex64), m, spec)), Y + 1j * Y)


class TestShardMap:
    @auto_and_explicit
    @pytest.mark.parametrize("check", [True, False], ids=["check-vma", "no-check"])
    def test_local_rows(self, mesh, kind, check):
        m = mesh(LINE, kind)
        local = jax.shard_map(f, mesh=m, in_specs=P("b"), out_specs=P("b"), check_vma=check)
        with jax.set_mesh(m):
            x = put(X, m, P("b"))
            assert collectives(local, x) == []
            close(jax.jit(local)(x), Y)
            gradient = jax.grad(lambda x: jnp.sum(local(x) ** 2))
            close(jax.jit(gradient)(x), 2 * transform(Y, SCALE), rtol=1e-4, atol=1e-4)

    @auto_and_explicit
    @pytest.mark.parametrize("check", [True, False], ids=["check-vma", "no-check"])
    def test_derivative_inside(self, mesh, kind, check):
        m = mesh(LINE, kind)
        local = jax.shard_map(
            jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))),
            mesh=m,
            in_specs=P("b"),
            out_specs=P("b"),
            check_vma=check,
        )
        with jax.set_mesh(m):
            close(jax.jit(local)(put(X, m, P("b"))), transform(np.cos(Y), SCALE), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("check", [True, False], ids=["check-vma", "no-check"])
    def test_partial_manual(self, mesh, check):
        m = mesh(SQUARE)
        local = jax.shard_map(f, mesh=m, in_specs=P("b"), out_specs=P("b"), axis_names={"b"}, check_vma=check)
        with jax.set_mesh(m):
            x = put(X, m, P("b", "c"))
            assert collectives(local, x) == []
            close(jax.jit(local)(x), Y)

    def test_varying_axes_reach_the_result(self, mesh):
        # check_vma would refuse this sum if the transform's result did not vary over the mesh.
        m = mesh(LINE)
        total = jax.shard_map(
            lambda x: jax.lax.psum(jnp.sum(f(x) ** 2), "b"), mesh=m, in_specs=P("b"), out_specs=P(), check_vma=True
        )
        with jax.set_mesh(m):
            close(jax.jit(total)(put(X, m, P("b"))), np.sum(Y**2))

    def test_halves_of_a_split_axis(self, mesh):
        # H_{4 * 4} = H_4 (x) H_4: local transforms and a transform over the devices make the whole.
        m = mesh(LINE)

        def local(x):
            y = hadamard(x, scale=1)
            blocks = jax.lax.all_gather(y, "b", axis=0)
            return hadamard(blocks, axis=0, scale=1)[jax.lax.axis_index("b")]

        whole = jax.shard_map(local, mesh=m, in_specs=P(None, None, "b"), out_specs=P(None, None, "b"), check_vma=False)
        close(jax.jit(whole)(put(X, m, P(None, None, "b"))), transform(X, 1))

    def test_spmd_axis_name(self, mesh):
        m = mesh(LINE)
        constrain = lambda x: jax.lax.with_sharding_constraint(f(x), NamedSharding(m, P(None, None)))
        call = jax.vmap(constrain, spmd_axis_name="b")
        x = put(X, m, P("b"))
        assert collectives(call, x) == []
        y = jax.jit(call)(x)
        close(y, Y)
        assert y.sharding.is_equivalent_to(x.sharding, 3)


@pytest.fixture(params=["shardy", "gspmd"])
def partitioner(request):
    """Shardy and the partitioner before it, in the versions of JAX that still have the choice."""
    if not hasattr(jax.config, "jax_use_shardy_partitioner"):
        yield "shardy"
        return
    before = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", request.param == "shardy")
    yield request.param
    jax.config.update("jax_use_shardy_partitioner", before)


def half(x):
    """An elementwise operation, which shows what a program costs without the transform."""
    return x * jnp.asarray(0.5, x.dtype)


def scanned(t):
    return lambda x: jax.lax.scan(lambda c, _: (jnp.sin(t(c)), t(c)), x, None, length=3)


def loss(t):
    return lambda x: jnp.sum(jnp.sin(t(jnp.tanh(x))))


PROGRAMS = {
    "forward": lambda t: t,
    "gradient": lambda t: jax.grad(loss(t)),
    "second-order": lambda t: lambda x: jax.jvp(jax.grad(loss(t)), (x,), (x,))[1],
    "vmap": lambda t: jax.vmap(t, in_axes=1, out_axes=1),
    "vmap-of-gradient": lambda t: jax.vmap(jax.grad(loss(t))),
    "scan": scanned,
    "gradient-of-scan": lambda t: jax.grad(lambda x: jnp.sum(jnp.sin(scanned(t)(x)[0]))),
    "remat": lambda t: jax.grad(jax.checkpoint(loss(lambda x: t(jnp.sin(t(x)))))),
    "another-axis": lambda t: functools.partial(t, axis=0) if t is f else t,
}


@pytest.mark.usefixtures("partitioner")
class TestPartitioners:
    @pytest.mark.parametrize("program", PROGRAMS)
    @pytest.mark.parametrize(
        ("grid", "spec"),
        [
            pytest.param(LINE, P("b"), id="first"),
            pytest.param(LINE, P(None, "b"), id="middle"),
            pytest.param(SQUARE, P("b", "c"), id="both"),
        ],
    )
    def test_no_collective_and_no_copy(self, mesh, grid, spec, program):
        if program == "another-axis":
            spec = P(None, *spec)
        x = put(X, mesh(grid), spec)
        run = PROGRAMS[program](f)
        assert collectives(run, x) == []
        # Another axis moves to the end and back.
        moves = 2 if program == "another-axis" else 0
        assert copies(hlo(run, x)) <= copies(hlo(PROGRAMS[program](half), x)) + moves
        for y, expected in zip(jax.tree.leaves(jax.jit(run)(x)), jax.tree.leaves(run(X)), strict=True):
            close(y, expected)
            if y.ndim == x.ndim:
                assert y.sharding.is_equivalent_to(x.sharding, x.ndim)

    @pytest.mark.parametrize("given", [P(), P("b"), P(None, "b")], ids=str)
    @pytest.mark.parametrize("wanted", [P(), P("b"), P(None, "b")], ids=str)
    def test_between_other_shardings(self, mesh, given, wanted):
        # A producer or consumer that is not sharded, or differently: no more than for an elementwise operation.
        m = mesh(LINE)

        def between(t):
            return lambda x: jax.lax.with_sharding_constraint(t(jnp.sin(x)), NamedSharding(m, wanted))

        x = put(X, m, given)
        assert sorted(collectives(between(f), x)) == sorted(COLLECTIVES.findall(hlo(between(half), x)))
        close(jax.jit(between(f))(x), transform(np.sin(X), SCALE))

    @pytest.mark.parametrize(
        ("grid", "spec"),
        [
            pytest.param(LINE, P(None, None, "b"), id="line"),
            pytest.param(SQUARE, P("b", None, "c"), id="square"),
            pytest.param(SQUARE, P(None, "c", "b"), id="swapped"),
        ],
    )
    @pytest.mark.parametrize("program", ["forward", "gradient"])
    def test_a_sharded_transform_axis(self, mesh, partitioner, grid, spec, program):
        x = put(X, mesh(grid), spec)
        run = PROGRAMS[program](f)
        text = hlo(run, x)
        assert set(COLLECTIVES.findall(text)) == {"all-gather"}
        assert_gathers_at_most(text, X.size if grid is LINE else X.size // 2)
        y = jax.jit(run)(x)
        close(y, run(X))
        if partitioner == "shardy":  # the older one leaves a result gathered that nothing else shards
            assert y.sharding.is_equivalent_to(x.sharding, x.ndim)
