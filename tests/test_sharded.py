"""An axis that is split between devices, transformed by axis_name and hadamard_sharded without gathering it."""
# ruff: noqa: E731

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, dtypes, halves, normal
from hlo import collectives, compiled, copies, hlo, received_bytes, transpositions
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import bound, dense, error_in_roundings, transform
from split_axis import SPEC, N, X, across, auto_and_explicit, check_vma, close, devices, put

import jax_hadacore._sharded as sharded
from jax_hadacore import hadamard, hadamard_sharded

TARGET = "jax_hadacore_hadamard_v1"


class TestValues:
    @devices
    @pytest.mark.parametrize("shape", [(N,), (1, N), (3, N), (2, 5, N), (8, 64), (0, N)], ids=str)
    def test_is_the_transform_of_the_whole_axis(self, mesh, devices, shape):
        m = mesh(devices)
        spec = P(*[None] * (len(shape) - 1), "tp")
        x = normal(shape, np.float32)
        y = jax.jit(across(m, spec))(put(x, m, spec))
        close(y, transform(x) if x.size else x)
        assert not x.size or y.sharding.is_equivalent_to(NamedSharding(m, spec), len(shape))

    @devices
    @dtypes
    @pytest.mark.parametrize("n", [64, 512, 2**14, 2**17], ids="n{}".format)
    def test_error_is_within_the_bound(self, mesh, devices, dtype, n):
        x = normal((max(3, 4096 // n), n), dtype)
        y = np.asarray(jax.jit(across(mesh(devices)))(x))
        limit = 1.5 if dtype.itemsize == 2 else bound(dtype, n)
        assert error_in_roundings(y, transform(x), dtype) <= limit

    @devices
    @dtypes
    @pytest.mark.parametrize("n", [64, 128], ids="n{}".format)
    def test_one_hot_rows_are_rows_of_the_matrix(self, mesh, devices, dtype, n):
        x = np.eye(n, dtype=np.float32).astype(dtype)
        assert_same_bits(np.asarray(jax.jit(across(mesh(devices), scale=1))(x)), dense(n).astype(dtype))

    @dtypes
    @pytest.mark.parametrize("scale", [1, -0.3, 1e-3, 1e3, 0])
    def test_scale(self, mesh, dtype, scale):
        x = normal((3, N), dtype)
        y = np.asarray(jax.jit(across(mesh(4), scale=scale))(x))
        limit = 1.5 if dtype.itemsize == 2 else bound(dtype, N) + 1  # the scale itself is rounded
        assert error_in_roundings(y, transform(x, scale), dtype) <= limit

    @pytest.mark.parametrize("scale", [1.2e-38, 3e38])
    def test_scale_at_the_ends_of_float32(self, mesh, scale):
        x = (normal((3, N), np.float64) * (1e6 if scale < 1 else 1e-3)).astype(np.float32)
        y = np.asarray(jax.jit(across(mesh(4), scale=scale))(x))
        assert error_in_roundings(y, transform(x, scale), x.dtype) <= bound(x.dtype, N) + 1

    @halves
    def test_small_and_large_values(self, mesh, dtype):
        # A scale that undoes the operand's size: what is exchanged must neither overflow nor vanish.
        for size in (2.0**-12, 2.0**10):
            x = (normal((64, N), np.float64) * size).astype(dtype)
            for scale in (1 / size / 16, 1 / size):
                y = np.asarray(jax.jit(across(mesh(4), scale=scale))(x))
                assert error_in_roundings(y, transform(x, scale), dtype) <= 1.5

    @dtypes
    def test_a_row_depends_on_itself_alone(self, mesh, dtype):
        f = jax.jit(across(mesh(4)))
        x = normal((5, N), dtype)
        whole = np.asarray(f(x))
        for row in range(5):
            assert_same_bits(np.asarray(f(x[row : row + 1])), whole[row : row + 1])
        spoilt = x.copy()
        spoilt[1, 3], spoilt[3, 200] = np.nan, np.inf
        y = np.asarray(f(spoilt))
        assert not np.isfinite(y[[1, 3]].astype(np.float64)).any()
        assert_same_bits(y[[0, 2, 4]], whole[[0, 2, 4]])

    @pytest.mark.parametrize("axis", [0, 1, 2, -3])
    def test_any_axis(self, mesh, axis):
        x = np.moveaxis(normal((2, 3, 64), np.float32), -1, axis)
        spec = P(*("tp" if i == axis % 3 else None for i in range(3)))
        y = jax.jit(across(mesh(4), spec, axis=axis))(x)
        close(np.moveaxis(np.asarray(y), axis, -1), transform(np.moveaxis(x, axis, -1)))

    def test_complex(self, mesh):
        z = (X + 1j * X[::-1]).astype(np.complex64)
        close(jax.jit(across(mesh(4)))(z), transform(X) + 1j * transform(X[::-1]))

    def test_without_jit(self, mesh):
        close(across(mesh(4))(X), transform(X))

    def test_one_device(self, mesh):
        text = hlo(across(mesh(1)), X)
        assert collectives(text) == []
        assert_same_bits(np.asarray(across(mesh(1))(X)), np.asarray(hadamard(X)))
        assert_same_bits(np.asarray(across(mesh(1), P(), ())(X)), np.asarray(hadamard(X)))


class TestMeshes:
    @pytest.mark.parametrize("names", list(itertools.permutations(("a", "b"))), ids=str)
    @pytest.mark.parametrize("shape", [(2, 4), (4, 2), (1, 8)], ids=str)
    def test_several_mesh_axes(self, mesh, shape, names):
        m = mesh(shape, ("a", "b"))
        spec = P(None, names)
        close(jax.jit(across(m, spec, names))(put(X, m, spec)), transform(X))

    @pytest.mark.parametrize("spec", [P("dp", "tp"), P(None, "tp")], ids=str)
    def test_beside_a_sharded_batch(self, mesh, spec):
        m = mesh((2, 4), ("dp", "tp"))
        x = normal((6, N), np.float32)
        f = across(m, spec)
        assert collectives(hlo(f, put(x, m, spec))) == ["all-to-all"] * 2
        close(jax.jit(f)(put(x, m, spec)), transform(x))

    @auto_and_explicit
    @check_vma
    def test_modes(self, mesh, kind, check):
        m = mesh(4, kind=kind)
        with jax.set_mesh(m):
            f = across(m, check_vma=check)
            close(jax.jit(f)(put(X, m)), transform(X))
            close(jax.jit(jax.grad(lambda x: jnp.sum(f(x) ** 2)))(put(X, m)), 2 * X, rtol=1e-4, atol=1e-4)

    @auto_and_explicit
    @check_vma
    def test_partial_manual(self, mesh, kind, check):
        m = mesh((2, 4), ("dp", "tp"), kind)
        x = normal((6, N), np.float32)
        options = {"axis_names": {"tp"}, "check_vma": check}
        with jax.set_mesh(m):
            f = across(m, **options)
            operand = put(x, m, P("dp", "tp"))
            close(jax.jit(f)(operand), transform(x))
            gradient = jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))
            close(jax.jit(gradient)(operand), transform(np.cos(transform(x))))
            # An elementwise operation shows what partial-manual mode itself costs: jax 0.10.2 gathers in explicit mode.
            identity = jax.shard_map(lambda x: 2 * x, mesh=m, in_specs=SPEC, out_specs=SPEC, **options)
            text = hlo(f, operand)
            assert set(collectives(text)) <= {"collective-permute", *collectives(hlo(identity, operand))}
            # As many bytes as two all_to_all move.
            assert received_bytes(text)["collective-permute"] == 2 * 3 / 4 * x.nbytes / 8

    def test_operand_that_does_not_vary(self, mesh):
        # Every device holds the same block.
        f = jax.shard_map(lambda x: hadamard(x, axis_name="tp"), mesh=mesh(4), in_specs=P(), out_specs=SPEC)
        x = normal((3, 64), np.float32)
        close(jax.jit(f)(x), transform(np.tile(x, (1, 4))))

    def test_vmapped_axis(self):
        x = normal((4, 64), np.float32)
        y = jax.vmap(lambda x: hadamard(x, axis_name="i"), axis_name="i")(x)
        close(y, transform(x.reshape(-1)).reshape(4, 64))


class TestCommunication:
    @devices
    @pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 5)], ids=str)
    def test_two_all_to_all_and_no_copy(self, mesh, devices, batch):
        spec = P(*[None] * len(batch), "tp")
        m = mesh(devices)
        text = hlo(across(m, spec), put(normal((*batch, N), np.float32), m, spec))
        assert text.count(f'"{TARGET}"') == 1
        assert collectives(text) == ["all-to-all"] * 2
        assert copies(text) == transpositions(text) == 0

    @devices
    def test_gradient_costs_the_same(self, mesh, devices):
        m = mesh(devices)
        text = hlo(jax.linear_transpose(across(m), X), put(X, m))
        assert collectives(text) == ["all-to-all"] * 2
        assert copies(text) == transpositions(text) == 0

    @devices
    @pytest.mark.parametrize("dtype", [DTYPES[0], *DTYPES[2:]], ids=str)  # XLA:CPU moves bfloat16 as float32
    def test_bytes_are_a_share_of_a_gather(self, mesh, devices, dtype):
        m = mesh(devices)
        x = put(normal((3, N), dtype), m)
        gathered = received_bytes(hlo(hadamard, x, out_shardings=NamedSharding(m, SPEC)))
        assert gathered == {"all-gather": x.nbytes * (devices - 1) / devices}
        exchanged = received_bytes(hlo(across(m), x))
        assert set(exchanged) == {"all-to-all"}
        assert exchanged["all-to-all"] * devices == 2 * gathered["all-gather"]

    def test_many_rows_take_the_kernel(self, mesh, monkeypatch):
        # As with more devices than are fused, or a slow order k.
        monkeypatch.setattr(sharded, "_MAX_FUSED_ROWS", 2)
        jax.clear_caches()
        m = mesh(4)
        text = hlo(across(m), put(X, m))
        assert text.count(f'"{TARGET}"') == 2
        assert collectives(text) == ["all-to-all"] * 2
        close(jax.jit(across(m))(X), transform(X))
        close(jax.jit(jax.grad(lambda x: jnp.sum(across(m)(x) ** 2)))(X), 2 * X, rtol=1e-4, atol=1e-4)
        jax.clear_caches()

    @pytest.mark.parametrize("inplace", [True, False])
    def test_donated(self, mesh, inplace):
        m = mesh(4)
        program = compiled(across(m, inplace=inplace), put(X, m), donate_argnums=0)
        assert "input_output_alias" in program.as_text()
        assert copies(program.as_text()) == 0
        operand = put(X, m)
        close(program(operand), transform(X))
        assert operand.is_deleted()

    def test_in_place_keeps_an_operand_that_is_used_again(self, mesh):
        m = mesh(4)
        f = across(m, inplace=True)
        x = put(X, m)
        close(jax.jit(lambda x: f(x) + x)(x), transform(X) + X)
        close(f(x), transform(X))
        np.testing.assert_array_equal(x, X)


class TestTransformations:
    @pytest.fixture
    def f(self, mesh):
        return across(mesh(4), scale=0.3)

    def test_gradient(self, f):
        loss = lambda t: lambda x: jnp.sum(jnp.sin(t(jnp.tanh(x))))
        close(jax.jit(jax.grad(loss(f)))(X), jax.grad(loss(functools.partial(hadamard, scale=0.3)))(X))

    def test_jvp(self, f):
        y, t = jax.jvp(f, (X,), (X[::-1],))
        close(y, transform(X, 0.3))
        close(t, transform(X[::-1], 0.3))

    def test_gradient_inside(self, mesh):
        local = jax.grad(lambda x: jnp.sum(jnp.sin(hadamard(x, axis_name="tp"))))
        f = jax.shard_map(local, mesh=mesh(4), in_specs=SPEC, out_specs=SPEC)
        close(jax.jit(f)(X), transform(np.cos(transform(X))))

    def test_second_order(self, mesh):
        f = across(mesh(4), P("tp"), scale=0.3)
        h = jax.jit(jax.hessian(lambda x: jnp.sum(jnp.sin(f(x)))))(X[0, :64])
        m = dense(64) * 0.3
        close(h, m @ np.diag(-np.sin(m @ X[0, :64])) @ m, rtol=1e-4, atol=1e-4)
        product = lambda x, v: jax.jvp(jax.grad(lambda x: jnp.sum(f(x) ** 3)), (x,), (v,))[1]
        close(jax.jit(product)(X[0, :64], X[1, :64]), m @ (6 * (m @ X[0, :64]) * (m @ X[1, :64])), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("mapped", [0, 1, 2])
    def test_vmap_of_shard_map(self, f, mapped):
        x = normal((2, 3, N), np.float32)
        y = jax.jit(jax.vmap(f, in_axes=mapped, out_axes=mapped))(np.moveaxis(x, 0, mapped))
        close(np.moveaxis(np.asarray(y), mapped, 0), transform(x, 0.3))

    @pytest.mark.parametrize("mapped", [0, 1])
    def test_vmap_inside(self, mesh, mapped):
        local = jax.vmap(functools.partial(hadamard, axis_name="tp"), in_axes=mapped, out_axes=mapped)
        f = jax.shard_map(local, mesh=mesh(4), in_specs=P(None, None, "tp"), out_specs=P(None, None, "tp"))
        x = normal((2, 3, N), np.float32)
        close(jax.jit(f)(x), transform(x))

    def test_scan_and_remat(self, f):
        step = lambda t: jax.checkpoint(lambda c, _: (jnp.sin(t(c) / 8), None))
        loss = lambda t: lambda x: jnp.sum(jax.lax.scan(step(t), x, None, length=3)[0])
        expected = jax.grad(loss(functools.partial(hadamard, scale=0.3)))(X)
        close(jax.jit(jax.grad(loss(f)))(X), expected, rtol=1e-4, atol=1e-4)

    def test_tensor_parallel_projection(self, mesh):
        # The online rotation before a down-projection whose contracted axis is split: h W = (h H)(H W).
        m = mesh(4, ("tp",))
        h, w = normal((3, 64), np.float32), normal((64, 5), np.float32)
        rotated = np.asarray(hadamard(w, axis=0))  # offline, on one device

        def layer(h, w):
            return jax.lax.psum(hadamard(h, axis_name="tp") @ w, "tp")

        f = jax.shard_map(layer, mesh=m, in_specs=(SPEC, P("tp", None)), out_specs=P())
        with jax.default_matmul_precision("highest"):
            close(jax.jit(f)(h, rotated), h @ w, rtol=1e-4, atol=1e-4)
        assert sorted(collectives(hlo(f, h, rotated))) == ["all-reduce", "all-to-all", "all-to-all"]


class TestHadamardSharded:
    @auto_and_explicit
    @pytest.mark.parametrize("context", [True, False], ids=["in-context", "no-context"])
    @pytest.mark.parametrize(
        "spec", [P("dp", "tp"), P(None, "tp"), P(None, ("dp", "tp")), P(None, ("tp", "dp")), P("tp"), P()], ids=str
    )
    def test_every_way_to_call(self, mesh, kind, context, spec):
        m = mesh((2, 2), ("dp", "tp"), kind)
        sharding = NamedSharding(m, spec)
        value = normal((4, 64), np.float32)
        with jax.set_mesh(m) if context else contextlib.nullcontext():
            x = put(value, m, spec)
            given = functools.partial(hadamard_sharded, sharding=sharding)
            calls = {"eager": hadamard_sharded, "given": given, "jit": jax.jit(given)}
            if kind == AxisType.Explicit:
                calls["in the type"] = jax.jit(hadamard_sharded)
            for way, call in calls.items():
                y = call(x)
                close(y, transform(value), err_msg=way)
                assert y.sharding.is_equivalent_to(sharding, 2), way
            gradient = jax.jit(jax.grad(lambda x: jnp.sum(given(x) ** 2)))(x)
            close(gradient, 2 * value, rtol=1e-4, atol=1e-4)
            assert gradient.sharding.is_equivalent_to(sharding, 2)

    def test_gathers_nothing(self, mesh):
        m = mesh(4)
        sharding = NamedSharding(m, SPEC)
        f = functools.partial(hadamard_sharded, sharding=sharding)
        assert collectives(hlo(lambda x: jnp.sin(f(jnp.cos(x))), put(X, m))) == ["all-to-all"] * 2
        text = hlo(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))), put(X, m))
        assert set(collectives(text)) == {"all-to-all"}

    def test_options(self, mesh):
        m = mesh(4)
        x = put(X.T, m, P("tp"))
        close(hadamard_sharded(x, axis=0, scale=0.3), transform(X, 0.3).T)
        close(
            jax.jit(functools.partial(hadamard_sharded, axis=0, inplace=True, sharding=x.sharding))(x), transform(X).T
        )
        np.testing.assert_array_equal(x, X.T)

    def test_vmap(self, mesh):
        m = mesh(4)
        sharding = NamedSharding(m, P("tp"))
        close(jax.jit(jax.vmap(functools.partial(hadamard_sharded, sharding=sharding)))(put(X, m)), transform(X))

    def test_donated(self, mesh):
        m = mesh(4)
        f = functools.partial(hadamard_sharded, inplace=True, sharding=NamedSharding(m, SPEC))
        text = hlo(f, put(X, m), donate_argnums=0)
        assert "input_output_alias" in text
        assert copies(text) == 0

    def test_one_device(self):
        assert_same_bits(np.asarray(hadamard_sharded(jnp.asarray(X))), np.asarray(hadamard(X)))

    def test_equal_calls_are_traced_once(self, mesh, monkeypatch):
        traced = []
        transform = sharded.transform
        monkeypatch.setattr(sharded, "transform", lambda *args, **kw: traced.append(1) or transform(*args, **kw))
        x = put(normal((7, 64), np.float32), mesh(4))
        for _ in range(10):
            hadamard_sharded(x, scale=0.7)
        assert len(traced) == 1


class TestErrors:
    @pytest.mark.parametrize("name", ["zz", ("tp", "zz")], ids=str)
    def test_unknown_axis(self, mesh, name):
        with pytest.raises(ValueError, match=r"hadamard: axis_name .*no manual mesh axis 'zz' here"):
            jax.jit(across(mesh(4), axis_name=name))(X)

    @pytest.mark.parametrize("call", [hadamard, jax.jit(hadamard, static_argnames="axis_name")], ids=["eager", "jit"])
    def test_outside_of_shard_map(self, call):
        with pytest.raises(ValueError, match=r"axis_name 'tp'.*inside jax\.shard_map.*hadamard_sharded"):
            call(X, axis_name="tp")

    def test_axis_of_the_compiler(self, mesh):
        m = mesh((2, 4), ("dp", "tp"))
        f = across(m, axis_name="dp", axis_names={"tp"})
        with jax.set_mesh(m), pytest.raises(ValueError, match="no manual mesh axis 'dp'"):
            jax.jit(f)(X)

    @pytest.mark.parametrize("name", [["tp"], ("tp", ["tp"]), 0, ("tp", 0)], ids=str)
    def test_not_a_name(self, mesh, name):
        with pytest.raises(TypeError, match="hadamard: axis_name must be the name of a mesh axis or a tuple"):
            jax.jit(across(mesh(4), axis_name=name))(X)

    def test_a_name_twice(self, mesh):
        with pytest.raises(ValueError, match="names the axis 'tp' more than once"):
            jax.jit(across(mesh(4), axis_name=("tp", "tp")))(X)

    @pytest.mark.parametrize(("n", "devices", "largest"), [(8, 4, 2), (32, 8, 4), (4, 4, 2), (2, 2, 1)])
    def test_too_many_devices(self, mesh, n, devices, largest):
        m = mesh(devices)
        x = jnp.zeros((2, n))
        message = rf"hadamard: axis 1 of n = {n} .*P = {devices} devices .*'tp'; the largest usable P is {largest}\b"
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(across(m), x)
        with pytest.raises(ValueError, match=message):
            hadamard_sharded(x, sharding=NamedSharding(m, SPEC))

    def test_not_a_power_of_two(self, mesh):
        sharding = NamedSharding(mesh((2, 3), ("a", "b")), P(None, ("a", "b")))
        with pytest.raises(ValueError, match=r"axis 1 of n = 64 .*P = 6 .*\('a', 'b'\); the largest usable P is 8"):
            hadamard_sharded(jnp.zeros((2, 64)), sharding=sharding)
        with pytest.raises(ValueError, match=r"axis 1 of n = 192 .*P = 3 .*P must be a power of two"):
            jax.eval_shape(across(mesh(3)), jnp.zeros((2, 192)))

    def test_unequal_blocks(self, mesh):
        with pytest.raises(ValueError, match=r"hadamard: axis 0 of n = 2 .*P = 4 devices .*'tp'; the largest.* is 1"):
            hadamard_sharded(jnp.zeros((2, 64)), axis=0, sharding=NamedSharding(mesh(4), P("tp")))

    def test_global_length(self, mesh):
        with pytest.raises(ValueError, match=r"size 33554432 = 2\^25; .*up to 2\^24"):
            jax.eval_shape(across(mesh(2)), jax.ShapeDtypeStruct((1, 2**25), jnp.float32))

    def test_sharding_not_known(self):
        with pytest.raises(ValueError, match="hadamard_sharded: the sharding of x is not known here; pass it"):
            jax.jit(hadamard_sharded)(X)

    @pytest.mark.parametrize("sharding", [SPEC, "tp"], ids=str)
    def test_not_a_named_sharding(self, sharding):
        with pytest.raises(TypeError, match="hadamard_sharded: sharding must be a NamedSharding, got"):
            hadamard_sharded(X, sharding=sharding)

    def test_of_the_other_options(self, mesh):
        sharding = NamedSharding(mesh(4), SPEC)
        for options, error in ({"scale": True}, TypeError), ({"inplace": 1}, TypeError), ({"axis": 2}, ValueError):
            with pytest.raises(error, match="hadamard: "):
                hadamard_sharded(X, sharding=sharding, **options)
