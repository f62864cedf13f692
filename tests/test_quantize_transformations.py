"""hadamard_quantize under JAX's transformations, sharded, exported; and what programs call."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal, rng
from hlo import collectives, hlo
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from quantize_cases import CASES, Case, cases

from jax_hadacore import EXPORT_SAFETY_CHECKS, _ffi, hadamard, hadamard_fake_quantize, hadamard_quantize

F32 = np.float32
TARGET = "jax_hadacore_quantize_v1"
X = normal((8, 4, 64), jnp.bfloat16)
S = rng("signs").choice(np.array([-1, 1], np.int8), 64)
FEW = pytest.mark.parametrize(
    "case",
    [
        Case("float8_e4m3fn"),
        Case("int8", 16),
        Case("int4", 16, asymmetric=True),
        Case("int8", given=0.03),
        Case("mxfp4"),
        Case("nvfp4", given=0.01),
    ],
    ids=str,
)


def quantizer(case, **options):
    return functools.partial(hadamard_quantize, qtype=case.qtype, **case.options, **options)


def assert_same(a, b):
    """The same leaves, bit for bit but for the sign of NaN."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(np.asarray(one).astype(F32), np.asarray(other).astype(F32))


def calls(text):
    return text.count(f"@{TARGET}(")


def lowered(function, *args, platform="cpu"):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


class TestJit:
    @cases
    def test_gives_the_same_bits(self, case):
        assert_same(jax.jit(quantizer(case))(X), quantizer(case)(X))

    def test_traced_scales(self):
        x = normal((4, 64), F32)
        given = jax.jit(lambda x, s: hadamard_quantize(x, "int8", granularity="tensor", quant_scale=s))(x, 0.03)
        assert_same(given, hadamard_quantize(x, "int8", granularity="tensor", quant_scale=0.03))
        tensor = jax.jit(lambda x, s: hadamard_quantize(x, "nvfp4", tensor_scale=s))(x, jnp.float32(0.02))
        assert_same(tensor, hadamard_quantize(x, "nvfp4", tensor_scale=0.02))


class TestVmap:
    @cases
    @pytest.mark.parametrize("axis", [0, 1])
    def test_over_rows(self, case, axis):
        mapped = jax.vmap(quantizer(case), in_axes=axis, out_axes=axis)(X)
        assert_same(mapped, quantizer(case)(X)) if case.given is None else np.testing.assert_array_equal(
            mapped.dequantize(), quantizer(case)(X).dequantize()
        )

    @FEW
    def test_over_the_last_axis(self, case):
        mapped = jax.vmap(quantizer(case), in_axes=-1)(np.moveaxis(X, 0, -1))
        np.testing.assert_array_equal(mapped.dequantize(), quantizer(case)(X).dequantize())

    def test_over_signs_and_scales(self):
        signs = rng("several").choice(np.array([-1, 1], np.int8), (8, 64))
        mapped = jax.vmap(lambda x, s: hadamard_quantize(x, "int8", signs=s))(X, signs)
        for row in range(8):
            one = hadamard_quantize(X[row], "int8", signs=signs[row])
            assert_same(jax.tree.map(lambda a, row=row: a[row], mapped), one)
        scales = np.linspace(0.01, 0.1, 3, dtype=F32)
        many = jax.vmap(lambda s: hadamard_quantize(X, "int8", granularity="tensor", quant_scale=s))(scales)
        for i, s in enumerate(scales):
            one = hadamard_quantize(X, "int8", granularity="tensor", quant_scale=s)
            assert_same(jax.tree.map(lambda a, i=i: a[i], many), one)


class TestGradient:
    @cases
    @pytest.mark.parametrize(
        "options",
        [{}, {"axis": 0, "scale": 0.3}, {"signs": S}, {"signs": S, "transpose": True}, {"block_size": 16}],
        ids=["plain", "axis", "signs", "transpose", "blocks"],
    )
    def test_is_straight_through(self, case, options):
        x = normal((64, 64), F32)
        weights = normal((64, 64), F32, "weights")
        fake = functools.partial(hadamard_fake_quantize, qtype=case.qtype, **case.options, **options)
        y, vjp = jax.vjp(fake, x)
        np.testing.assert_array_equal(y, quantizer(case, **options)(x).dequantize(x.dtype))
        _, plain = jax.vjp(functools.partial(hadamard, **options), x)
        np.testing.assert_array_equal(vjp(weights)[0], plain(weights)[0])
        _, tangent = jax.jvp(fake, (x,), (weights,))
        np.testing.assert_array_equal(tangent, hadamard(weights, **options))

    def test_in_x_s_dtype_and_of_any_order(self):
        fake = functools.partial(hadamard_fake_quantize, qtype="int4")
        assert jax.grad(lambda x: jnp.sum(fake(x)))(X).dtype == jnp.bfloat16
        second = jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(fake(x))))(x) ** 2))
        assert np.isfinite(np.asarray(second(normal((4, 64), F32)))).all()

    def test_of_traced_signs_scales_and_keys(self):
        def loss(x, s, t, key):
            return jnp.sum(hadamard_fake_quantize(x, "nvfp4", signs=s, tensor_scale=t, key=key))

        x, s = normal((4, 64), F32), S.astype(F32)
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, s, 0.01, jax.random.key(0))
        expected = jax.grad(lambda x: jnp.sum(hadamard(x, signs=S)))(x)
        np.testing.assert_allclose(gradients[0], expected, rtol=1e-6)
        assert not np.any(gradients[1])
        assert not gradients[2]

    @pytest.mark.parametrize("transformation", [jax.grad, jax.jacfwd], ids=["reverse", "forward"])
    def test_codes_have_none(self, transformation):
        with pytest.raises(TypeError, match=r"hadamard_quantize: the result has no derivative. hadamard_fake_quantize"):
            transformation(lambda x: hadamard_quantize(x, "int8").dequantize().sum())(normal((4, 64), F32))

    def test_codes_may_be_constants(self):
        x = normal((4, 64), F32)
        gradient = jax.grad(lambda x: jnp.sum(x * hadamard_quantize(jax.lax.stop_gradient(x), "int8").dequantize()))(x)
        np.testing.assert_array_equal(gradient, hadamard_quantize(x, "int8").dequantize())
        gradient = jax.grad(lambda y: jnp.sum(y * hadamard_quantize(x, "int8").dequantize()))(x)
        np.testing.assert_array_equal(gradient, hadamard_quantize(x, "int8").dequantize())


LINE = ((4,), ("b",))
SQUARE = ((2, 2), ("b", "c"))
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


@pytest.fixture
def mesh(cpu_devices):
    def mesh(grid, kind=AxisType.Auto):
        shape, names = grid
        return Mesh(np.array(cpu_devices).reshape(shape), names, axis_types=(kind,) * len(shape))

    return mesh


def put(x, mesh, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


class TestSharded:
    @KINDS
    @FEW
    @pytest.mark.parametrize(("grid", "spec"), [(LINE, P("b")), (LINE, P(None, "b")), (SQUARE, P("c", "b"))], ids=str)
    def test_batch_axes_need_no_communication(self, mesh, kind, case, grid, spec):
        m = mesh(grid, kind)
        with jax.set_mesh(m):
            x = put(X, m, spec)
            text = hlo(quantizer(case), x)
            assert collectives(text) == []
            assert TARGET in text
            q = jax.jit(quantizer(case))(x)
            assert_same(q, quantizer(case)(X))
            assert q.values.sharding.is_equivalent_to(x.sharding, 3)
            if case.given is None or case.qtype == "nvfp4":
                assert q.scales.sharding.is_equivalent_to(x.sharding, 3)

    @pytest.mark.parametrize(
        "options",
        [{"signs": S}, {"signs": S, "transpose": True}, {"block_size": 16}, {"matrix": np.eye(4)}, {"axis": 0}],
        ids=["signs", "transpose", "blocks", "matrix", "axis"],
    )
    @pytest.mark.parametrize("qtype", ["int8", "nvfp4"])
    def test_options(self, mesh, cpu_devices, qtype, options):
        x = np.moveaxis(X, -1, 0) if options.get("axis") == 0 else X
        call = functools.partial(hadamard_quantize, qtype=qtype, **options)
        sharded = put(x, mesh(LINE), P(None, "b"))
        assert collectives(hlo(call, sharded)) == []
        assert_same(jax.jit(call)(sharded), call(jax.device_put(x, cpu_devices[0])))

    def test_traced_signs(self, mesh):
        x = put(X, mesh(LINE), P("b"))
        call = jax.jit(lambda x, s: hadamard_quantize(x, "int8", signs=s))
        assert collectives(call.lower(x, S).compile().as_text()) == []
        assert_same(call(x, S), hadamard_quantize(X, "int8", signs=S))

    @KINDS
    def test_stochastic_rounding(self, mesh, kind):
        m, key = mesh(LINE, kind), jax.random.key(0)
        call = functools.partial(hadamard_quantize, qtype="int4", key=key)
        expected = call(X)
        with jax.set_mesh(m):
            x = put(X, m, P("b"))
            assert collectives(hlo(call, x)) == []
            assert_same(jax.jit(call)(x), expected)

    def test_gradient(self, mesh):
        x = put(X.astype(F32), mesh(LINE), P("b"))
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(hadamard_fake_quantize(x, "mxfp8"))))
        assert collectives(hlo(gradient, x)) == []

    @KINDS
    @pytest.mark.parametrize("case", [Case("int8"), Case("int8", 16), Case("nvfp4")], ids=str)
    def test_a_sharded_transform_axis_is_gathered(self, mesh, kind, case):
        m = mesh(LINE, kind)
        with jax.set_mesh(m):
            x = put(X, m, P(None, None, "b"))
            assert set(collectives(hlo(quantizer(case), x))) <= {"all-gather"}
            q = jax.jit(quantizer(case))(x)
            assert_same(q, quantizer(case)(X))
            if kind == AxisType.Explicit or case.bits == 8:  # the compiler leaves packed codes gathered
                assert q.values.sharding.is_equivalent_to(x.sharding, 3)

    def test_whole_blocks_and_groups_are_not(self, mesh):
        x = put(X, mesh(LINE), P(None, None, "b"))
        call = functools.partial(hadamard_quantize, qtype="nvfp4", block_size=16)
        assert collectives(hlo(call, x)) == []
        assert_same(jax.jit(call)(x), call(X))

    @KINDS
    @pytest.mark.parametrize("check", [True, False], ids=["check-vma", "no-check"])
    @FEW
    def test_shard_map(self, mesh, kind, case, check):
        m = mesh(LINE, kind)
        given = case.given is not None and case.qtype != "nvfp4"
        local = lambda x: arrays(quantizer(case)(x))[: 1 if given else None]  # noqa: E731
        with jax.set_mesh(m):
            run = jax.jit(jax.shard_map(local, mesh=m, in_specs=P("b"), out_specs=P("b"), check_vma=check))
            assert_same(run(put(X, m, P("b"))), local(X))

    def test_scales_that_differ_between_devices(self, mesh):
        m = mesh(LINE)
        local = lambda x, s: hadamard_quantize(x, "int8", granularity="tensor", quant_scale=s).values  # noqa: E731
        run = jax.jit(jax.shard_map(local, mesh=m, in_specs=(P(), P("b")), out_specs=P("b")))
        scales = np.array([0.01, 0.02, 0.05, 0.1], F32)
        expected = np.concatenate([local(X, s) for s in scales])
        np.testing.assert_array_equal(run(X, scales), expected)


class TestExport:
    def saved(self, function, *args, **options):
        exported = export.export(jax.jit(function), disabled_checks=EXPORT_SAFETY_CHECKS, **options)(*args)
        return export.deserialize(exported.serialize(vjp_order=options.pop("vjp_order", 0)))

    @FEW
    def test_round_trip(self, case):
        call = lambda x: arrays(quantizer(case)(x))  # noqa: E731
        loaded = self.saved(call, X, platforms=["cpu", "cuda"])
        assert_same(loaded.call(X), call(X))

    def test_symbolic_batch(self):
        (b,) = export.symbolic_shape("b")
        for qtype in ("int8", "nvfp4"):
            call = lambda x, qtype=qtype: arrays(hadamard_quantize(x, qtype, block_size=32))  # noqa: E731
            loaded = self.saved(call, jax.ShapeDtypeStruct((b, 64), jnp.bfloat16))
            assert_same(loaded.call(X[:, 0]), call(X[:, 0]))

    def test_traced_signs(self):
        call = lambda x, s: arrays(hadamard_quantize(x, "int8", signs=s))  # noqa: E731
        assert_same(self.saved(call, X, S).call(X, S), call(X, S))


def arrays(q):
    return [leaf for leaf in (q.values, q.scales, q.zero_points) if leaf is not None]


class TestWhatIsCalled:
    """The table of docs/quantization.md."""

    @cases
    def test_cpu(self, case):
        assert calls(lowered(quantizer(case), X)) == 1
        assert calls(lowered(quantizer(case), X.astype(np.float64))) == 0
        for options in ({"signs": S}, {"block_size": 16}, {"matrix": np.eye(4)}, {"axis": 0}):
            x = np.moveaxis(X, -1, 0) if "axis" in options else X
            assert calls(lowered(quantizer(case, **options), x)) == 1

    def test_traced_signs_and_scales(self, cpu_devices):
        del cpu_devices
        assert calls(lowered(lambda x, s: hadamard_quantize(x, "int8", signs=s), X, S)) == 1
        given = lambda x, s: hadamard_quantize(x, "int8", granularity="tensor", quant_scale=s)  # noqa: E731
        assert calls(lowered(given, X, 0.1)) == 1

    @pytest.mark.parametrize("case", [case for case in CASES if case.bits == 4], ids=str)
    def test_stochastic_rounding(self, case):
        text = lowered(quantizer(case, key=jax.random.key(0)), X)
        assert calls(text) == 0
        assert text.count("@jax_hadacore_hadamard_v1(") == 1

    @pytest.mark.parametrize(
        ("n", "dtype", "options", "fused"),
        [
            (128, jnp.bfloat16, {}, True),
            (32768, jnp.float16, {}, True),
            (128, jnp.bfloat16, {"granularity": ("block", 64)}, True),
            (4096, jnp.bfloat16, {"granularity": ("block", 256)}, False),
            (128, jnp.float32, {}, False),
            (65536, jnp.bfloat16, {}, False),
            (16, jnp.bfloat16, {}, False),
            (3072, jnp.bfloat16, {}, True),
            (3072, jnp.bfloat16, {"granularity": ("block", 256)}, False),
            (11008, jnp.bfloat16, {}, False),
            (128, jnp.bfloat16, {"block_size": 64}, False),
            (128, jnp.bfloat16, {"signs": np.ones(128)}, False),
        ],
        ids=str,
    )
    def test_cuda(self, monkeypatch, n, dtype, options, fused):
        monkeypatch.setattr(_ffi, "has_nvidia_gpu", lambda: False)
        monkeypatch.setattr(_ffi, "CUDA", _ffi.NativeModule(None, "none here"))
        x = jax.ShapeDtypeStruct((3, n), dtype)
        text = lowered(functools.partial(hadamard_quantize, qtype="int8", **options), x, platform="cuda")
        assert calls(text) == fused

    def test_attributes(self):
        text = lowered(lambda x: hadamard_quantize(x, "int4", granularity=("block", 16), asymmetric=True), X)
        (line,) = (line for line in text.splitlines() if f"@{TARGET}(" in line)
        for part in ('code = "int4"', 'scale_type = "float32"', "group = 16 : i64", "asymmetric = true"):
            assert part in line
        assert re.search(r"-> \(tensor<8x4x32xui8>, tensor<8x4x4xf32>, tensor<8x4x4xi8>\)", line)

    def test_other_platforms_take_plain_jax(self):
        assert TARGET not in lowered(lambda x: hadamard_quantize(x, "mxfp8"), X, platform="tpu")
