"""One of several processes that transform arrays together: python distributed.py PORT PROCESS PROCESSES.

The processes run the functions named check_* below, all in the same order, and print a line for each.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from cases import assert_same_bits, normal
from hlo import collectives, hlo, received_bytes
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import transform

from jax_hadacore import hadamard, hadamard_sharded

DEVICES = 4  # of all processes together
X = normal((8, 4, 64), np.float32)
Y = transform(X)
LINE, SQUARE = ((4,), ("b",)), ((2, 2), ("b", "c"))


def put(x, grid, spec, kind=AxisType.Auto):
    """An array of which each process makes its own shards."""
    shape, names = grid
    mesh = Mesh(np.array(jax.devices()).reshape(shape), names, axis_types=(kind,) * len(names))
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


def assert_close(y, expected, tolerance=1e-5):
    """Compares the shards that this process has."""
    assert y.shape == expected.shape
    for shard in y.addressable_shards:
        np.testing.assert_allclose(shard.data, expected[shard.index], rtol=tolerance, atol=tolerance)


def across(x, **options):
    """The transform by axis_name of an array whose sharding splits its last axis."""
    mesh, spec = x.sharding.mesh, x.sharding.spec
    local = functools.partial(hadamard, axis_name=spec[-1], **options)
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)


def check_batch_sharded():
    for grid, spec in ((LINE, P("b")), (LINE, P(None, "b")), (SQUARE, P("b", "c")), (SQUARE, P(("c", "b")))):
        x = put(X, grid, spec)
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(hadamard(x))))
        assert collectives(hlo(hadamard, x)) == collectives(hlo(gradient, x)) == []
        for y in (jax.jit(hadamard)(x), hadamard(x)):
            assert_close(y, Y)
            assert y.sharding.is_equivalent_to(x.sharding, 3)
        assert_close(jax.jit(gradient)(x), transform(np.cos(Y)))


def check_explicit():
    x = put(X, SQUARE, P("b", "c"), AxisType.Explicit)
    with jax.set_mesh(x.sharding.mesh):
        assert collectives(hlo(hadamard, x)) == []
        assert_close(jax.jit(hadamard)(x), Y)


def check_bits():
    x = X.astype(jnp.bfloat16)
    expected = np.asarray(hadamard(x))
    for shard in jax.jit(hadamard)(put(x, LINE, P("b"))).addressable_shards:
        assert_same_bits(np.asarray(shard.data), expected[shard.index])


def check_a_sharded_transform_axis_is_gathered():
    x = put(X, SQUARE, P("b", None, "c"))
    assert set(collectives(hlo(hadamard, x))) == {"all-gather"}
    assert_close(jax.jit(hadamard)(x), Y)


def check_shard_map():
    x = put(X, LINE, P("b"))
    f = jax.shard_map(hadamard, mesh=x.sharding.mesh, in_specs=P("b"), out_specs=P("b"))
    assert collectives(hlo(f, x)) == []
    assert_close(jax.jit(f)(x), Y)


def check_axis_name():
    for grid, spec in ((LINE, P(None, None, "b")), (SQUARE, P("c", None, "b")), (SQUARE, P(None, None, ("c", "b")))):
        x = put(X, grid, spec)
        f = across(x)
        assert collectives(hlo(f, x)) == ["all-to-all"] * 2
        assert_close(jax.jit(f)(x), Y)
        assert_close(jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))))(x), transform(np.cos(Y)))  # noqa: B023
    x = put(X[:3], LINE, P(None, None, "b"))
    assert_close(jax.jit(across(x))(x), Y[:3])


def check_axis_name_moves_half_of_a_gather():
    x = put(X, LINE, P(None, None, "b"))
    gathered = received_bytes(hlo(hadamard, x, out_shardings=x.sharding))
    assert received_bytes(hlo(across(x), x))["all-to-all"] == gathered["all-gather"] / 2


def check_second_order_across():
    x = put(X[:1, 0], LINE, P(None, "b"))
    f = across(x)
    product = jax.jit(lambda x: jax.jvp(jax.grad(lambda x: jnp.sum(f(x) ** 3)), (x,), (x,))[1])
    assert_close(product(x), transform(6 * Y[:1, 0] ** 2), 1e-4)


def check_donated():
    x = put(X, LINE, P(None, None, "b"))
    assert_close(jax.jit(across(x, inplace=True), donate_argnums=0)(x), Y)
    x = put(X, LINE, P("b"))
    assert_close(jax.jit(functools.partial(hadamard, inplace=True), donate_argnums=0)(x), Y)


def check_hadamard_sharded():
    for grid, spec in ((LINE, P(None, None, "b")), (SQUARE, P("b", None, "c"))):
        x = put(X, grid, spec)
        assert_close(hadamard_sharded(x), Y)
        assert_close(jax.jit(functools.partial(hadamard_sharded, sharding=x.sharding))(x), Y)


CHECKS = [name for name in dir() if name.startswith("check_")]


def main():
    port, process, processes = map(int, sys.argv[1:])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    assert (jax.process_count(), jax.device_count()) == (processes, DEVICES)
    for name in CHECKS:
        try:
            globals()[name]()
        except BaseException:
            print(json.dumps([name, "failed"]), flush=True)
            raise
        print(json.dumps([name, ""]), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
