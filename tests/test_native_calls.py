"""What a native call is given: the attributes and operands that ffi/arguments.h reads, and nothing else."""

import re

import jax
import numpy as np
import pytest
from cases import DTYPES, normal, rng
from jax import export
from jax.interpreters import mlir
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import paley

from jax_hadacore import EXPORT_SAFETY_CHECKS, hadamard

TARGET = "jax_hadacore_hadamard_v1"
X = normal((3, 64), np.float32)


def calls(function, *args, platform="cuda"):
    """The attributes, the operands' types and the results' types of the native calls that a platform is given."""
    return calls_of(jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).compiler_ir())


def calls_of(module):
    found = []

    def visit(op):
        if op.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value == TARGET:
            config = op.attributes["mhlo.backend_config"]
            attributes = {config[i].name: plain(config[i].attr) for i in range(len(config))}
            types = [[str(value.type)[len("tensor<") : -1] for value in values] for values in (op.operands, op.results)]
            found.append((attributes, *types))
        return mlir.ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


def plain(attribute):
    return attribute.value if hasattr(attribute, "value") else np.array(attribute)


def packed(negative):
    """Signs in words of 32, by the definition in ffi/problem.h."""
    words = [0] * -(-len(negative) // 32)
    for i, minus in enumerate(negative):
        words[i // 32] |= int(minus) << (i % 32 // 2 + 16 * (i % 2))
    return words


def rows(matrix):
    return [word for row in matrix for word in packed(row < 0)]


def draw(n):
    return rng("signs", n).choice(np.array([-1, 1]), n)


def lists(attributes):
    """Arrays as lists, for comparisons."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in attributes.items()}


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("n", [1, 2, 64, 2**16])
def test_powers_of_two_need_the_scale_alone(platform, n):
    x = normal((3, n), np.float32)
    for function in (hadamard, lambda x: hadamard(x, transpose=True), lambda x: hadamard(x, block_size=n)):
        assert calls(function, x, platform=platform) == [({"scale": n**-0.5}, [f"3x{n}xf32"], [f"3x{n}xf32"])]


def test_blocks():
    assert calls(lambda x: hadamard(x, block_size=16), X) == [({"scale": 0.25, "n": 16}, ["3x64xf32"], ["3x64xf32"])]


@pytest.mark.parametrize(("n", "orders"), [(24, [12]), (344, [344]), (2736, [36, 76])])
def test_orders(n, orders):
    ((attributes, *_),) = calls(hadamard, normal((3, n), np.float32))
    assert lists(attributes) == {
        "scale": n**-0.5,
        "orders": orders,
        "factors": [word for order in orders for word in rows(paley(order))],
    }
    assert (attributes["orders"].dtype, attributes["factors"].dtype) == (np.int64, np.uint32)


@pytest.mark.parametrize("transpose", [False, True])
def test_matrix(transpose):
    m = np.linalg.qr(normal((5, 5), np.float64))[0]
    x = normal((3, 40), np.float32)
    ((attributes, *_),) = calls(lambda x: hadamard(x, matrix=m, scale=2, transpose=transpose), x)
    assert lists(attributes) == {"scale": 2, "orders": [5], "matrix": (m.T if transpose else m).ravel().tolist()}
    assert attributes["matrix"].dtype == np.float64


@pytest.mark.parametrize("transpose", [False, True])
def test_matrix_of_one_magnitude(transpose):
    m = -0.25 * paley(12)[rng("order").permutation(12)]
    x = normal((3, 24), np.float32)
    ((attributes, *_),) = calls(lambda x: hadamard(x, matrix=m, scale=2, transpose=transpose), x)
    assert lists(attributes) == {"scale": 0.5, "orders": [12], "factors": rows(m.T if transpose else m)}


@pytest.mark.parametrize("n", [1, 36, 64, 132])
def test_signs(n):
    s, x = draw(n), normal((3, n), np.float32)
    ((attributes, operands, _),) = calls(lambda x: hadamard(x, signs=s), x)
    assert attributes["signs"].tolist() == packed(s < 0)
    assert attributes["signs"].dtype == np.uint32
    assert operands == [f"3x{n}xf32"]
    assert "signs_last" not in attributes
    ((attributes, *_),) = calls(lambda x: hadamard(x, signs=s, transpose=True), x)
    assert attributes["signs"].tolist() == packed(s < 0)
    assert attributes["signs_last"] is True


class TestTracedSigns:
    f = staticmethod(lambda x, s: hadamard(x, signs=s))

    def test_are_an_operand_on_one_device(self):
        assert calls(self.f, X, draw(64)) == [({"scale": 0.125}, ["3x64xf32", "2xui32"], ["3x64xf32"])]
        adjoint = calls(lambda x, s: hadamard(x, signs=s, transpose=True), X, draw(64))
        assert adjoint == [({"scale": 0.125, "signs_last": True}, ["3x64xf32", "2xui32"], ["3x64xf32"])]

    def test_and_in_shard_map(self, cpu_devices):
        mesh = Mesh(np.array(cpu_devices), ("b",), axis_types=(AxisType.Auto,))
        local = jax.shard_map(self.f, mesh=mesh, in_specs=(P("b"), P()), out_specs=P("b"))
        ((_, operands, _),) = calls(local, normal((12, 64), np.float32), draw(64), platform="cpu")
        assert operands == ["3x64xf32", "2xui32"]

    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
    def test_are_none_where_the_compiler_shards(self, cpu_devices, kind):
        mesh = Mesh(np.array(cpu_devices), ("b",), axis_types=(kind,))
        x = jax.device_put(normal((12, 64), np.float32), NamedSharding(mesh, P("b")))
        assert calls(self.f, x, draw(64), platform="cpu") == [({"scale": 0.125}, ["12x64xf32"], ["12x64xf32"])]

    def test_nor_in_a_part_of_a_mesh(self, cpu_devices):
        mesh = Mesh(np.array(cpu_devices).reshape(2, 2), ("b", "c"), axis_types=(AxisType.Auto,) * 2)
        local = jax.shard_map(self.f, mesh=mesh, in_specs=(P("b"), P()), out_specs=P("b"), axis_names={"b"})
        with jax.set_mesh(mesh):
            ((_, operands, _),) = calls(local, normal((6, 64), np.float32), draw(64), platform="cpu")
        assert operands == ["3x64xf32"]

    def test_nor_in_exported_programs(self):
        # They may be called where the compiler shards.
        exported = export.export(jax.jit(self.f), platforms=["cuda"], disabled_checks=EXPORT_SAFETY_CHECKS)(X, draw(64))
        assert "tensor<2xui32>" not in re.search(rf"@{TARGET}\(.*", exported.mlir_module())[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2**15, 2**16, 24, 2**11 * 12, 53248])
def test_workspace_of_the_cuda_kernels(dtype, n):
    ((_, _, (result, *workspace)),) = calls(hadamard, jax.ShapeDtypeStruct((3, n), dtype))
    # What one pass does on any GPU needs none.
    longest = {"float16": 49000, "bfloat16": 49000, "float32": 24 * 1024, "float64": 0}[dtype.name]
    if n & (n - 1) == 0:
        assert workspace == ([f"3x{n}xf32"] if n == 2**16 and dtype.itemsize == 2 else [])
    elif n > longest:
        assert workspace == [f"3x{n}x{'f64' if dtype == np.float64 else 'f32'}"]
    else:
        assert workspace == []
    ((_, _, results),) = calls(hadamard, jax.ShapeDtypeStruct((3, n), dtype), platform="cpu")
    assert results == [result]
