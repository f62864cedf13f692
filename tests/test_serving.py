"""Which implementation serves: the kernel wherever it can run, else the reference with one warning that says why."""

import re
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from oracle import transform

from jax_hadacore import _ffi, hadamard

TARGET = "jax_hadacore_hadamard_v1"
X = normal((3, 64), np.float32)
REASON = "a reason made up by the test"
ABSENT = _ffi.NativeModule(None, REASON)
close = np.testing.assert_allclose


def fresh():
    """A compiled function that no cache has seen."""
    return jax.jit(lambda x: hadamard(x))  # noqa: PLW0108


def lowered(platform, x=X):
    return fresh().trace(x).lower(lowering_platforms=(platform,)).as_text()


def exported(*platforms):
    checks = [jax.export.DisabledSafetyCheck.custom_call(TARGET)]
    return jax.export.export(fresh(), platforms=platforms, disabled_checks=checks)(X)


def kernel_calls(text):
    return text.count(f"@{TARGET}(")


def test_target_name_is_what_exported_programs_hold():
    assert _ffi.HADAMARD_TARGET == TARGET


def test_cpu_kernel_is_installed():
    assert _ffi.problem("cpu") == ""
    assert kernel_calls(lowered("cpu")) == 1


@pytest.mark.usefixtures("fresh_lowering")
class TestKernelAbsent:
    @pytest.fixture(autouse=True)
    def _absent(self, monkeypatch, fresh_lowering):
        monkeypatch.setattr(_ffi, "CPU", ABSENT)
        monkeypatch.delenv("JAX_HADACORE_REQUIRE_KERNEL", raising=False)

    def test_reference_serves_with_one_warning(self, cpu_devices):
        x = jax.device_put(X, cpu_devices[0])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = [fresh()(x), fresh()(x), hadamard(x)]
            assert kernel_calls(lowered("cpu", x)) == 0
        for y in results:
            close(y, transform(X), rtol=1e-5, atol=1e-5)
        (warning,) = [w for w in caught if "jax_hadacore" in str(w.message)]
        assert warning.category is RuntimeWarning
        assert "cpu kernel" in str(warning.message)
        assert REASON in str(warning.message)

    def test_required_kernel_is_an_error(self, monkeypatch, cpu_devices):
        monkeypatch.setenv("JAX_HADACORE_REQUIRE_KERNEL", "1")
        for _ in range(2):
            with pytest.raises(RuntimeError, match=REASON):
                fresh()(jax.device_put(X, cpu_devices[0]))

    @pytest.mark.parametrize("value", ["0", ""])
    def test_only_1_requires_the_kernel(self, monkeypatch, value):
        monkeypatch.setenv("JAX_HADACORE_REQUIRE_KERNEL", value)
        with pytest.warns(RuntimeWarning, match=REASON):
            assert kernel_calls(lowered("cpu")) == 0

    def test_export_calls_the_kernel_all_the_same(self, monkeypatch):
        monkeypatch.setattr(_ffi, "CUDA", ABSENT)
        assert kernel_calls(exported("cpu").mlir_module()) == 1
        assert kernel_calls(exported("cpu", "cuda").mlir_module()) >= 1
        monkeypatch.setattr(_ffi, "has_nvidia_gpu", lambda: True)
        assert kernel_calls(exported("cuda").mlir_module()) == 1


@pytest.mark.usefixtures("fresh_lowering")
class TestCuda:
    """Lowering for NVIDIA GPUs, on any machine."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        monkeypatch.setattr(_ffi, "has_nvidia_gpu", lambda: True)

    @pytest.fixture
    def no_gpu(self, monkeypatch):
        monkeypatch.setattr(_ffi, "has_nvidia_gpu", lambda: False)

    @pytest.fixture
    def module(self, monkeypatch):
        """A CUDA module that works, until a test changes its attributes."""
        module = types.SimpleNamespace(driver_problem=lambda: "", device_problem=lambda: "")
        monkeypatch.setattr(_ffi, "CUDA", _ffi.NativeModule(module))
        return module

    @pytest.mark.usefixtures("no_gpu")
    @pytest.mark.parametrize("cuda", [_ffi.CUDA, ABSENT], ids=["as-installed", "absent"])
    def test_without_a_gpu_the_program_runs_elsewhere(self, monkeypatch, cuda):
        monkeypatch.setattr(_ffi, "CUDA", cuda)
        monkeypatch.setenv("JAX_HADACORE_REQUIRE_KERNEL", "1")
        assert kernel_calls(lowered("cuda")) == 1
        assert _ffi.problem("cuda") == "no NVIDIA GPU in this process"

    @pytest.mark.usefixtures("gpu", "module")
    def test_with_a_working_module(self):
        assert _ffi.problem("cuda") == ""
        assert kernel_calls(lowered("cuda")) == 1

    @pytest.mark.usefixtures("gpu")
    def test_with_a_gpu_and_no_module(self, monkeypatch):
        monkeypatch.setattr(_ffi, "CUDA", ABSENT)
        with pytest.warns(RuntimeWarning, match=rf"cuda kernel is not available.*{REASON}") as caught:
            texts = [lowered("cuda"), lowered("cuda")]
        assert len(caught) == 1
        assert [kernel_calls(text) for text in texts] == [0, 0]

    @pytest.mark.usefixtures("gpu")
    @pytest.mark.parametrize("check", ["driver_problem", "device_problem"])
    def test_with_a_driver_or_device_that_cannot(self, monkeypatch, module, check):
        setattr(module, check, lambda: REASON)
        with pytest.warns(RuntimeWarning, match=REASON):
            assert kernel_calls(lowered("cuda")) == 0
        monkeypatch.setenv("JAX_HADACORE_REQUIRE_KERNEL", "1")
        with pytest.raises(RuntimeError, match=REASON):
            lowered("cuda")

    @pytest.mark.usefixtures("gpu")
    def test_the_driver_is_asked_first_and_once(self, module):
        asked = []
        module.driver_problem = lambda: asked.append("driver") or REASON
        module.device_problem = lambda: asked.append("device") or ""
        assert _ffi.problem("cuda") == _ffi.problem("cuda") == REASON
        assert asked == ["driver"]

    def test_no_gpu_is_asked_for_when_lowering_for_the_cpu(self, monkeypatch):
        monkeypatch.setattr(_ffi, "has_nvidia_gpu", lambda: pytest.fail("asked"))
        assert kernel_calls(lowered("cpu")) == 1

    def test_export_for_both(self):
        assert kernel_calls(exported("cpu", "cuda").mlir_module()) >= 1
        assert kernel_calls(exported("cuda").mlir_module()) == 1

    @pytest.mark.usefixtures("no_gpu")
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize("n", [32768, 65536])
    def test_workspace_of_long_16_bit_rows(self, n, dtype):
        text = lowered("cuda", jax.ShapeDtypeStruct((3, n), dtype))
        (call,) = (line for line in text.splitlines() if f"@{TARGET}(" in line)
        results = re.findall(r"tensor<3x\d+x(b?f\d+)>", call.split(" -> ")[-1])
        own = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}[dtype]
        assert results == ([own, "f32"] if n > 32768 and dtype.endswith("float16") else [own])

    @pytest.mark.usefixtures("no_gpu")
    def test_the_scale_travels_as_float64(self):
        assert "scale = 1.250000e-01 : f64" in lowered("cuda")


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_other_platforms_take_the_reference(platform):
    text = lowered(platform)
    assert TARGET not in text
    assert "dot_general" in text


class TestLoading:
    """What _ffi makes of modules that are not as they should be."""

    def load(self, monkeypatch, outcome):
        def import_module(name):
            assert name == "jax_hadacore._thing"
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(_ffi.importlib, "import_module", import_module)
        return _ffi._load("_thing")

    def test_not_built(self, monkeypatch):
        native = self.load(monkeypatch, ModuleNotFoundError("No module named 'jax_hadacore._thing'"))
        assert native.module is None
        assert "without jax_hadacore._thing" in native.problem

    def test_broken(self, monkeypatch):
        native = self.load(monkeypatch, ImportError("libfoo.so.1: cannot open shared object file"))
        assert native.module is None
        assert "failed to load" in native.problem
        assert "libfoo.so.1" in native.problem

    @pytest.mark.parametrize("built", [(0, 99), (1, 0)])
    def test_newer_than_jaxlib(self, monkeypatch, built):
        native = self.load(monkeypatch, types.SimpleNamespace(ffi_api_version=built))
        assert native.module is None
        assert f"XLA FFI {built[0]}.{built[1]}" in native.problem
        assert "reinstall" in native.problem

    def test_as_old_as_the_oldest_jaxlib(self, monkeypatch):
        module = types.SimpleNamespace(ffi_api_version=(0, 1))
        monkeypatch.setattr(_ffi.jax.ffi, "include_dir", lambda: pytest.fail("needs no headers"))
        assert self.load(monkeypatch, module) == _ffi.NativeModule(module)

    def test_of_this_jaxlib(self):
        header = (_ffi.Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
        numbers = [int(line.split()[2]) for line in header.splitlines() if line.startswith("#define XLA_FFI_API_M")]
        major, minor = numbers[:2]
        assert _ffi._version_problem((major, minor)) == ""
        assert f"this jaxlib's {major}.{minor}" in _ffi._version_problem((major, minor + 1))

    def test_installed_modules_are_accepted(self):
        for native in (_ffi.CPU, _ffi.CUDA):
            if native.module is not None:
                assert _ffi._version_problem(native.module.ffi_api_version) == ""


class TestHandler:
    """The native handler checks what protects memory itself."""

    def call(self, x, shape=None, dtype=None, **attributes):
        result = jax.ShapeDtypeStruct(x.shape if shape is None else shape, x.dtype if dtype is None else dtype)
        call = jax.jit(lambda x: jax.ffi.ffi_call(TARGET, result, vmap_method="sequential")(x, **attributes))
        return np.asarray(jax.block_until_ready(call(x)))

    def test_accepts_what_the_library_sends(self):
        close(self.call(X, scale=np.float64(0.125)), transform(X), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", ["int32", "int8", "bool", "complex64", "uint16", "float8_e4m3fn"])
    def test_element_type(self, dtype):
        x = jnp.zeros((4, 16), getattr(jnp, "bool_" if dtype == "bool" else dtype))
        with pytest.raises(jax.errors.JaxRuntimeError, match="jax_hadacore: the element type must be f16, bf16"):
            self.call(x, scale=np.float64(1))

    @pytest.mark.parametrize("shape", [(3, 32), (3, 128), (4, 64), (64,), ()], ids=str)
    def test_result_of_another_size(self, shape):
        with pytest.raises(jax.errors.JaxRuntimeError, match="jax_hadacore: the result must have the operand's"):
            self.call(X, shape, scale=np.float64(1))

    @pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
    def test_result_of_another_type(self, dtype):
        with pytest.raises(jax.errors.JaxRuntimeError, match="jax_hadacore: the result must have the operand's"):
            self.call(X, dtype=dtype, scale=np.float64(1))

    @pytest.mark.parametrize("n", [3, 12, 100, 2**15 - 1, 2**25])
    def test_last_dimension(self, n):
        with pytest.raises(
            jax.errors.JaxRuntimeError, match=rf"n = {n} must be the orders times a power of two up to 2\^24"
        ):
            self.call(jnp.zeros((2, n), jnp.float16), dtype=jnp.float16, scale=np.float64(1))

    def test_scalar(self):
        with pytest.raises(jax.errors.JaxRuntimeError, match="at least one dimension"):
            self.call(jnp.zeros(()), scale=np.float64(1))

    @pytest.mark.parametrize(
        "attributes",
        [{}, {"scale": np.float32(1)}, {"scale": 1}, {"scale": np.ones(1)}, {"scale": "1"}, {"size": 1.0}],
        ids=["none", "float32", "int", "array", "str", "another"],
    )
    def test_attributes(self, attributes):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"Failed to decode|(?i:attribute)"):
            self.call(X, **attributes)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"behind": np.int64(-1)}, "behind must be from 0 to the 1 dimensions before the last, got -1"),
            ({"behind": np.int64(2)}, "behind must be from 0 to the 1 dimensions before the last, got 2"),
            ({"behind": np.int64(1), "n": np.int64(8)}, "others behind it must be one transform, got n = 8"),
            ({"behind": np.int32(1)}, "the attribute behind has another type"),
        ],
        ids=str,
    )
    def test_dimensions_behind(self, more, message):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"jax_hadacore: .*{message}"):
            self.call(X, scale=np.float64(1), **more)

    def test_number_of_operands(self):
        result = jax.ShapeDtypeStruct(X.shape, X.dtype)
        call = jax.jit(lambda x: jax.ffi.ffi_call(TARGET, result)(x, x, scale=np.float64(1)))
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)argument|operand"):
            jax.block_until_ready(call(X))

    @pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0, 12), (0,)], ids=str)
    def test_nothing_to_do(self, shape):
        assert self.call(jnp.zeros(shape), scale=np.float64(1)).shape == shape

    def test_still_works_after_all_that(self):
        close(hadamard(X), transform(X), rtol=1e-5, atol=1e-5)
