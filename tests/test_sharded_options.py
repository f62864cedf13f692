"""Lengths with slow orders, signs, blocks and matrices of an axis that is split between devices."""
# ruff: noqa: E731

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import dtypes, normal, rng
from hlo import collectives, hlo, transpositions
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import bound, error_in_roundings, transform
from split_axis import SPEC, N, X, across, auto_and_explicit, check_vma, close, devices, put

import jax_hadacore._sharded as sharded
from jax_hadacore import hadamard, hadamard_sharded


class TestFactors:
    """Which rows are transformed across the devices, for powers of two and for lengths with a slow order k."""

    @pytest.mark.parametrize("m", range(1, 25))
    def test_powers_of_two(self, m):
        for e in range(m + 1):
            assert sharded.rows_across(2**m, 2**e) == (2**e if 2 * e <= m else None)
        assert sharded.most_devices(2**m) == 2 ** (m // 2)
        assert sharded.rows_across(2**m, 3) is None

    @pytest.mark.parametrize(
        ("n", "devices", "rows"),
        [
            (3072, 1, 12),
            (3072, 2, 12),
            (3072, 4, 12),
            (3072, 8, 24),
            (3072, 32, 96),
            (3072, 64, None),
            (14336, 8, 56),
            (10944, 4, 2736),
            (10944, 8, None),
            (3072, 3, None),
        ],
    )
    def test_slow_orders(self, n, devices, rows):
        assert sharded.rows_across(n, devices) == rows
        assert sharded.most_devices(n) >= (devices if rows else 1)


class TestOrders:
    """Lengths with a slow order: the devices share its rows, and none is cut."""

    @devices
    @pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
    @pytest.mark.parametrize("n", [12 * 128, 28 * 512, 20 * 64], ids="n{}".format)
    def test_is_the_transform_of_the_whole_axis(self, mesh, devices, batch, n):
        x = normal((*batch, n), np.float64)
        spec = P(*[None] * len(batch), "tp")
        f = across(mesh(devices), spec, scale=0.3)
        np.testing.assert_allclose(jax.jit(f)(x), transform(x, 0.3), rtol=1e-11, atol=1e-11)
        text = hlo(f, x)
        assert collectives(text) == ["all-to-all"] * 2
        # The whole block for the kernel, and its pieces for the exchange, there and back.
        assert transpositions(text) <= 2 + 2 * devices

    @devices
    @dtypes
    @pytest.mark.parametrize("n", [12 * 128, 20 * 64], ids="n{}".format)
    def test_error_is_within_the_bound(self, mesh, devices, dtype, n):
        x = normal((3, n), dtype)
        y = np.asarray(jax.jit(across(mesh(devices)))(x))
        assert error_in_roundings(y, transform(x), dtype) <= (1.5 if dtype.itemsize == 2 else bound(dtype, n))

    def test_a_pair_of_orders(self, mesh):
        x = normal((10944,), np.float64)
        close(jax.jit(across(mesh(4), P("tp")))(x), transform(x))

    def test_gradient(self, mesh):
        x = normal((3, 12 * 128), np.float64)
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(across(mesh(4))(x))))
        close(jax.jit(gradient)(x), transform(np.cos(transform(x))))
        assert set(collectives(hlo(gradient, x))) == {"all-to-all"}


@pytest.fixture
def s():
    return rng("signs").choice(np.array([-1, 1], np.int8), N)


class TestOptions:
    """Signs, blocks and matrices of an axis that is split."""

    M = np.linalg.qr(normal((5, 5), np.float64))[0]

    @devices
    @pytest.mark.parametrize("transpose", [False, True], ids=["map", "adjoint"])
    @pytest.mark.parametrize("n", [N, 12 * 64], ids="n{}".format)
    def test_signs(self, mesh, devices, transpose, n):
        x, s = normal((3, n), np.float64), rng("signs", n).choice(np.array([-1.0, 1.0]), n)
        m = mesh(devices)
        local = lambda x, s: hadamard(x, signs=s, transpose=transpose, axis_name="tp")
        f = jax.shard_map(local, mesh=m, in_specs=(SPEC, P("tp")), out_specs=SPEC)
        expected = transform(x, signs=s, transpose=transpose)
        close(jax.jit(f)(x, s), expected)
        assert collectives(hlo(f, x, s)) == ["all-to-all"] * 2
        for sharding in (NamedSharding(m, SPEC), NamedSharding(m, P())):
            g = functools.partial(hadamard_sharded, sharding=sharding, transpose=transpose)
            close(g(x, signs=s), expected)
            close(jax.jit(lambda x, s, g=g: g(x, signs=s))(x, s), expected)
        (pulled,) = jax.linear_transpose(lambda x: f(x, jnp.asarray(s)), x)(x)
        close(pulled, transform(x, signs=s, transpose=not transpose))

    @check_vma
    def test_signs_that_vary_more_than_the_operand(self, mesh, check, s):
        # Every device holds the same block, and another piece of the signs.
        x = normal((3, 64), np.float64)
        local = lambda x, s: hadamard(x, signs=s)
        f = jax.shard_map(local, mesh=mesh(4), in_specs=(P(), P("tp")), out_specs=SPEC, check_vma=check)
        expected = np.concatenate([transform(x, signs=piece) for piece in np.split(s, 4)], axis=1)
        close(jax.jit(f)(x, s), expected)
        gradient = jax.grad(lambda x: jnp.sum(f(x, s) ** 2))
        close(jax.jit(gradient)(x), 8 * x)

    @devices
    @pytest.mark.parametrize("block", [16, 24, 1], ids="b{}".format)
    def test_whole_blocks_need_no_communication(self, mesh, devices, block):
        x = normal((3, 16 * block), np.float64)
        s = rng("signs", block).choice(np.array([-1.0, 1.0]), 16 * block)
        m = mesh(devices)
        f = across(m, block_size=block)
        assert collectives(hlo(f, x)) == []
        close(jax.jit(f)(x), transform(x, length=block))
        g = functools.partial(hadamard_sharded, block_size=block, sharding=NamedSharding(m, SPEC))
        close(g(x, signs=s[:block]), transform(x, length=block, signs=s[:block]))
        for transpose in (False, True):
            y = g(x, signs=s, transpose=transpose)
            close(g(y, signs=s, transpose=not transpose), x)
            close(y, transform(x, length=block) * s if transpose else transform(x * s, length=block))

    def test_matrix_in_blocks(self, mesh):
        x = normal((3, 8 * 20), np.float64)
        f = across(mesh(4), block_size=20, matrix=self.M)
        assert collectives(hlo(f, x)) == []
        close(jax.jit(f)(x), transform(x, length=20, matrix=self.M))
        close(hadamard_sharded(put(x, mesh(4)), block_size=20, matrix=self.M, transpose=True),
              transform(x, length=20, matrix=self.M, transpose=True))  # fmt: skip

    def test_matrix_across_devices(self, mesh):
        x = jnp.zeros((3, 5 * 64))
        with pytest.raises(ValueError, match=r"a matrix cannot be applied across the P = 4 devices .*'tp'.*block_size"):
            jax.eval_shape(across(mesh(4), matrix=self.M), x)
        with pytest.raises(ValueError, match="a matrix cannot be applied across"):
            hadamard_sharded(put(x, mesh(4)), matrix=self.M)
        close(jax.jit(across(mesh(1), matrix=self.M))(x), x)

    def test_cut_blocks(self, mesh):
        message = r"block_size must divide the 64 elements of axis 1 on each device, got 128"
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(across(mesh(4), block_size=128), jnp.zeros((3, N)))
        with pytest.raises(ValueError, match=message):
            hadamard_sharded(jnp.zeros((3, N)), block_size=128, sharding=NamedSharding(mesh(4), SPEC))

    @pytest.mark.parametrize("size", [1, N // 2, 2 * N])
    def test_signs_of_another_size(self, mesh, size):
        m = mesh(4)
        with pytest.raises(ValueError, match=rf"signs must have shape \({N},\), got \({size},\)"):
            hadamard_sharded(put(X, m), signs=np.ones(size))
        with pytest.raises(ValueError, match=rf"signs must have shape \({N // 4},\), got \({size},\)"):
            jax.eval_shape(across(m, signs=np.ones(size)), X)

    @auto_and_explicit
    def test_modes(self, mesh, kind, s):
        m = mesh((2, 4), ("dp", "tp"), kind)
        sharding = NamedSharding(m, P("dp", "tp"))
        x = normal((4, N), np.float64)
        with jax.set_mesh(m):
            for spec in (P(), P("tp")):
                operands = jax.device_put(x, sharding), jax.device_put(s, NamedSharding(m, spec))
                f = jax.jit(lambda x, s: hadamard_sharded(x, signs=s, sharding=sharding))
                close(f(*operands), transform(x, signs=s))
            close(hadamard_sharded(operands[0], signs=s, transpose=True), transform(x, signs=s, transpose=True))
