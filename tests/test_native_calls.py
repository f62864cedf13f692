"""What a native call is given: the attributes and operands that ffi/arguments.h reads, and nothing else."""

import functools
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


class TestAnotherAxis:
    """Where CUDA kernels take columns as they lie, the call's layouts say so; elsewhere XLA transposes."""

    @staticmethod
    def layouts(function, *args, platform="cuda"):
        """For each call what is behind its last dimension, and the dimensions from the fastest to the slowest."""
        module = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).compiler_ir()
        orders = [
            re.findall(r"dense<\[([\d, ]*)\]>", found) for found in re.findall(r"_layouts = \[.*?\]>", str(module))
        ]
        operand, result = ([int(i) for i in order[0].split(",")] for order in orders)
        assert operand == result
        ((attributes, (shape,), _),) = calls_of(module)
        return attributes.get("behind", 0), operand, shape

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("n", [4, 8, 64, 128, 256, 512])
    def test_lengths(self, dtype, n):
        x = jax.ShapeDtypeStruct((3, n, 40), dtype)
        longest = {"float16": 256, "bfloat16": 256, "float32": 128, "float64": 0}[dtype.name]
        behind, order, shape = self.layouts(lambda x: hadamard(x, axis=-2), x)
        assert (behind, order) == ((1, [1, 2, 0]) if 8 <= n <= longest else (0, [2, 1, 0]))
        assert shape.startswith(f"3x40x{n}x")

    def test_every_axis(self):
        x = jax.ShapeDtypeStruct((8, 16, 32, 64), np.float32)
        for axis, expected in enumerate([(3, [2, 1, 0, 3]), (2, [2, 1, 3, 0]), (1, [2, 3, 1, 0]), (0, [3, 2, 1, 0])]):
            assert self.layouts(lambda x, axis=axis: hadamard(x, axis=axis), x)[:2] == expected

    @pytest.mark.parametrize("mapped", [0, 1, 2, 3])
    def test_vmap(self, mapped):
        # The columns stay what was behind the axis, wherever the mapped one comes from.
        x = jax.ShapeDtypeStruct((5, 64, 64, 64), np.float32)
        f = jax.vmap(lambda x: hadamard(x, axis=1), in_axes=mapped)
        assert self.layouts(f, x)[:2] == (1, [2, 3, 1, 0])

    def test_gradient(self):
        x = jax.ShapeDtypeStruct((3, 64, 64), np.float32)
        assert self.layouts(lambda x: jax.vjp(functools.partial(hadamard, axis=1), x)[1](x)[0], x)[:2] == (1, [1, 2, 0])

    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            ((64, 31), {}),
            ((24, 64), {}),
            ((64, 64), {"block_size": 32}),
            ((64, 64), {"signs": draw(64)}),
            ((64, 64), {"matrix": [[1, 1], [1, -1]]}),
        ],
    )
    def test_none_for_few_columns_orders_blocks_signs_and_matrices(self, shape, options):
        behind, order, _ = self.layouts(lambda x: hadamard(x, axis=0, **options), normal(shape, np.float32))
        assert (behind, order) == (0, [1, 0])

    def test_nor_for_traced_signs(self):
        def f(x, s):
            return hadamard(x, axis=0, signs=s)

        rows, mapped = normal((64, 40), np.float32), normal((3, 64, 40), np.float32)
        for call in (calls(f, rows, draw(64)), calls(jax.vmap(f, in_axes=(0, None)), mapped, draw(64))):
            ((attributes, operands, _),) = call
            assert "behind" not in attributes
            assert operands[1:] == ["2xui32"]

    def test_nor_on_the_cpu(self):
        x = normal((64, 64), np.float32)
        assert self.layouts(lambda x: hadamard(x, axis=0), x, platform="cpu")[:2] == (0, [1, 0])

    def test_the_compiler_shards_the_columns(self, cpu_devices):
        mesh = Mesh(np.array(cpu_devices).reshape(2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        x = jax.device_put(normal((4, 64, 64), np.float32), NamedSharding(mesh, P("a", None, "b")))
        lowered = jax.jit(lambda x: hadamard(x, axis=1)).trace(x).lower(lowering_platforms=("cuda",))
        assert 'num_batch_dims = "2"' in lowered.as_text()
        ((attributes, (shape,), _),) = calls_of(lowered.compiler_ir())
        assert (attributes["behind"], shape) == (1, "4x64x64xf32")

    def test_symbolic_columns_are_transposed(self):
        (size,) = export.symbolic_shape("c")
        x = jax.ShapeDtypeStruct((64, size), np.float32)
        f = jax.jit(lambda x: hadamard(x, axis=0))
        exported = export.export(f, platforms=["cuda"], disabled_checks=EXPORT_SAFETY_CHECKS)(x)
        assert "behind" not in exported.mlir_module()


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
