"""inplace=True: a donated operand's memory is reused without a copy, any other operand survives."""
# ruff: noqa: E731

import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_same_bits, dtypes, lengths, normal
from hlo import compiled
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import transform

from jax_hadacore import hadamard

SHAPE = (64, 1024)
f = functools.partial(hadamard, inplace=True)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def copies(program, shape=SHAPE):
    return hlo.copies(program.as_text(), shape)


@pytest.fixture
def x():
    return jnp.asarray(normal(SHAPE, np.float32))


class TestDonated:
    @dtypes
    @lengths(4, 64, 1024, 16384)
    def test_reuses_the_memory(self, n, dtype):
        x = normal((16, n), dtype)
        program = compiled(f, x, donate_argnums=0)
        assert "input_output_alias" in program.as_text()
        assert copies(program, x.shape) == 0
        operand = jnp.array(x)
        y = program(operand)
        assert operand.is_deleted()
        assert_same_bits(np.asarray(y), np.asarray(hadamard(x)))

    @pytest.mark.parametrize(
        "options",
        [
            {"block_size": 128},
            {"signs": [1, -1] * 512},
            {"signs": [1, -1] * 512, "transpose": True},
            {"block_size": 32, "signs": [1, -1] * 16},
            {"matrix": np.linalg.qr(normal((4, 4), np.float64))[0]},
        ],
        ids="-".join,
    )
    def test_with_options(self, x, options):
        program = compiled(functools.partial(f, **options), x, donate_argnums=0)
        assert copies(program) == 0
        expected = np.asarray(hadamard(x, **options))
        assert_same_bits(np.asarray(program(x)), expected)

    def test_with_traced_signs(self, x):
        s = jnp.asarray([1, -1] * 512)
        program = compiled(lambda x, s: f(x, signs=s), x, s, donate_argnums=0)
        assert copies(program) == 0
        expected = np.asarray(hadamard(x, signs=s))
        assert_same_bits(np.asarray(program(x, s)), expected)

    @lengths(24, 768, 2736)
    def test_with_orders(self, n):
        x = jnp.asarray(normal((16, n), np.float32))
        program = compiled(f, x, donate_argnums=0)
        assert copies(program, x.shape) == 0
        expected = np.asarray(hadamard(x))
        assert_same_bits(np.asarray(program(x)), expected)

    def test_needs_no_temporary_buffer(self, x):
        assert compiled(f, x, donate_argnums=0).memory_analysis().temp_size_in_bytes < x.nbytes

    def test_between_other_operations(self, x):
        program = compiled(lambda x: jnp.tanh(f(jnp.tanh(x))), x, donate_argnums=0)
        expected = np.tanh(transform(np.tanh(np.asarray(x))))
        close(program(x), expected)

    def test_twice(self, x):
        program = compiled(lambda x: f(f(x)), x, donate_argnums=0)
        assert copies(program) == 0
        expected = np.asarray(x).copy()
        close(program(x), expected)

    def test_inside_shard_map(self, cpu_devices):
        mesh = Mesh(np.array(cpu_devices), ("b",), axis_types=(AxisType.Auto,))
        local = jax.shard_map(f, mesh=mesh, in_specs=P("b"), out_specs=P("b"))
        x = jax.device_put(normal(SHAPE, np.float32), NamedSharding(mesh, P("b")))
        program = compiled(local, x, donate_argnums=0)
        assert "input_output_alias" in program.as_text()
        assert copies(program, (SHAPE[0] // 4, SHAPE[1])) == 0
        expected = transform(np.asarray(x))
        close(program(x), expected)

    def test_sharded(self, cpu_devices):
        mesh = Mesh(np.array(cpu_devices), ("b",), axis_types=(AxisType.Auto,))
        x = jax.device_put(normal(SHAPE, np.float32), NamedSharding(mesh, P("b")))
        expected = transform(np.asarray(x))
        program = compiled(f, x, donate_argnums=0)
        assert copies(program, (SHAPE[0] // 4, SHAPE[1])) <= 1  # XLA's partitioner drops the alias
        close(program(x), expected)


class TestNotDonated:
    def test_copies_once(self, x):
        assert copies(compiled(f, x)) == 1

    @dtypes
    @lengths(4, 64, 1024, 16384)
    def test_operand_survives(self, n, dtype):
        x = normal((16, n), dtype)
        operand = jnp.array(x)
        for call in (f, jax.jit(f)):
            assert_same_bits(np.asarray(call(operand)), np.asarray(hadamard(x)))
            assert_same_bits(np.asarray(operand), x)

    def test_operand_is_used_again(self, x):
        for use in (lambda x: f(x) + x, lambda x: x - f(x), lambda x: jnp.stack([x, f(x), x])):
            np.testing.assert_array_equal(jax.jit(use)(x), use(x))
        close(jax.jit(lambda x: f(x) + x)(x), transform(np.asarray(x)) + np.asarray(x))

    def test_donated_and_used_again(self, x):
        expected = transform(np.asarray(x)) + np.asarray(x)
        close(jax.jit(lambda x: f(x) + x, donate_argnums=0)(x), expected)

    def test_intermediate_is_used_again(self, x):
        def both(x):
            z = jnp.sin(x)
            return f(z), z

        y, z = jax.jit(both)(x)
        close(z, np.sin(np.asarray(x)))
        close(y, transform(np.sin(np.asarray(x))))

    def test_constant_of_the_program_survives(self):
        constant = normal((4, 16), np.float32)
        call = jax.jit(lambda a: f(jnp.asarray(constant)) * a)
        close(call(2.0 * np.ones((4, 16), np.float32)), 2 * transform(constant))
        close(call(np.ones((4, 16), np.float32)), transform(constant))


class TestDefault:
    def test_copies_nothing(self, x):
        program = compiled(hadamard, x)
        assert copies(program) == 0
        assert "output_to_operand_aliasing" not in program.as_text()
        assert program.memory_analysis().temp_size_in_bytes < x.nbytes

    def test_copies_nothing_where_the_operand_lives_on(self, x):
        assert copies(compiled(lambda x: (hadamard(x), x + 1), x)) == 0

    def test_batched_copies_nothing(self, x):
        assert copies(compiled(jax.vmap(hadamard), x)) == 0


class TestTransformed:
    def test_vmap(self, x):
        expected = transform(np.asarray(x))
        for call in (jax.vmap(f), jax.jit(jax.vmap(f))):
            close(call(x), expected)
        close(jax.vmap(f, in_axes=1, out_axes=1)(x.T), expected.T)

    def test_vmap_donated(self, x):
        program = compiled(jax.vmap(f), x, donate_argnums=0)
        assert copies(program) == 0
        expected = transform(np.asarray(x))
        close(program(x), expected)

    def test_gradient(self, x):
        loss = lambda t: lambda x: jnp.sum(jnp.sin(t(x)) * x)
        close(jax.jit(jax.grad(loss(f)))(x), jax.grad(loss(hadamard))(x))

    def test_cotangent_survives(self, x):
        y, pull = jax.vjp(f, x)
        cotangent = jnp.cos(y)
        before = np.array(cotangent)
        (pulled,) = pull(cotangent)
        assert_same_bits(np.asarray(cotangent), before)
        close(pulled, transform(before))
        # In a program, too: the cotangent is returned as well.
        both = jax.jit(lambda x, ct: (jax.linear_transpose(f, x)(ct)[0], ct))
        assert "output_to_operand_aliasing" not in both.lower(x, cotangent).compile().as_text()

    def test_jvp(self, x):
        primal, tangent = jax.jit(lambda x, t: jax.jvp(f, (x,), (t,)))(x, x)
        close(primal, tangent)
        close(primal, transform(np.asarray(x)))

    def test_scan(self, x):
        run = lambda t: lambda x: jax.lax.scan(lambda c, _: (jnp.tanh(t(c)), c[0]), x, None, length=3)
        expected = run(hadamard)(x)
        jax.tree.map(close, jax.jit(run(f))(x), expected)
        jax.tree.map(close, jax.jit(run(f), donate_argnums=0)(x), expected)

    def test_complex(self):
        z = jnp.asarray(normal((4, 16), np.float32) * np.complex64(1 + 2j))
        np.testing.assert_array_equal(f(z), hadamard(z))

    def test_another_axis(self, x):
        np.testing.assert_array_equal(f(x, axis=0), hadamard(x, axis=0))


class TestLoops:
    """A scan makes no more copies than with an elementwise operation in the transform's place."""

    @staticmethod
    def copies(step, operation):
        xs = jnp.asarray(normal((5, *SHAPE), np.float32))
        loop = lambda xs: jax.lax.scan(functools.partial(step, operation), xs[0], xs)
        return copies(compiled(loop, xs))

    def test_of_the_carry(self):
        step = lambda operation, carry, x: (operation(carry), None)
        assert self.copies(step, f) <= self.copies(step, jnp.negative)

    def test_of_the_slices(self):
        step = lambda operation, carry, x: (carry, operation(x))
        assert self.copies(step, hadamard) <= self.copies(step, jnp.negative)

    def test_of_both(self):
        step = lambda operation, carry, x: (operation(carry) + x, operation(x))
        assert self.copies(step, hadamard) <= self.copies(step, jnp.negative)
