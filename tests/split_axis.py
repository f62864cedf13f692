"""Transforms of an axis that is split between devices, for tests of axis_name and hadamard_sharded."""

import functools

import jax
import numpy as np
import pytest
from cases import normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_hadacore import hadamard

N = 256
X = normal((3, N), np.float32)
SPEC = P(None, "tp")
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
devices = pytest.mark.parametrize("devices", [2, 4, 8], ids="P{}".format)
auto_and_explicit = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
check_vma = pytest.mark.parametrize("check", [True, False], ids=["check-vma", "no-check"])


def across(mesh, spec=SPEC, axis_name="tp", **options):
    """The transform by axis_name, of arrays sharded like spec."""
    rest = {name: options.pop(name) for name in ("check_vma", "axis_names") if name in options}
    local = functools.partial(hadamard, axis_name=axis_name, **options)
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, **rest)


def put(x, mesh, spec=SPEC):
    return jax.device_put(x, NamedSharding(mesh, spec))
