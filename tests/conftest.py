"""Configures JAX for the tests: eight CPU devices, 64-bit types, nothing promoted silently."""

import os
import shutil
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

# `python -m pytest` puts the checkout first on sys.path, where its source folder would hide the installed package: the
# native modules are in the latter only. An editable install is found through its import hook, which needs no path.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != _ROOT]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import AxisType, Mesh  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from kernels import Emulator, Gpu  # noqa: E402

from jax_hadacore import _ffi  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail without a GPU kernel, and wherever a test skips")
    parser.addoption("--require-models", action="store_true", help="fail where a test skips for want of google-tunix")


def pytest_configure(config):
    if not config.getoption("--require-gpu"):
        return
    if jax.default_backend() != "gpu":
        raise pytest.UsageError(f"--require-gpu: jax's default backend is {jax.default_backend()}, not gpu")
    if problem := _ffi.problem("cuda"):
        raise pytest.UsageError(f"--require-gpu: the cuda kernel is not available: {problem}")


def pytest_ignore_collect(collection_path, config):
    return True if collection_path.name == "test_gpu.py" and not config.getoption("--require-gpu") else None


def pytest_generate_tests(metafunc):
    if "kernel" in metafunc.fixturenames:
        gpu = ["gpu"] if metafunc.config.getoption("--require-gpu") else []
        metafunc.parametrize("kernel", ["emulated", *gpu], indirect=True)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the kernels are emulated by g++ on Linux")
    return Emulator(tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def kernel(request):
    """The CUDA kernels, emulated or on a GPU."""
    return Gpu() if request.param == "gpu" else request.getfixturevalue("emulator")


def _skip_is_failure(config, report):
    reason = str(report.longrepr)
    flag = "--require-models" if "the extra 'models'" in reason else "--require-gpu"
    wanted = config.getoption(flag) and "the real weights" not in reason  # for which there is no option
    if wanted and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{flag} forbids to skip: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    del call
    return _skip_is_failure(item.config, (yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _skip_is_failure(collector.config, (yield))


@pytest.fixture(scope="session")
def cpu_devices(eight_cpu_devices):
    """Four CPU devices, also where the default device is a GPU."""
    return eight_cpu_devices[:4]


@pytest.fixture(scope="session")
def eight_cpu_devices():
    devices = jax.devices("cpu")
    assert len(devices) >= 8
    return devices[:8]


@pytest.fixture
def mesh(eight_cpu_devices):
    """Makes meshes of CPU devices: of a shape, with names and a kind of axes."""

    def mesh(shape, names=("tp",), kind=AxisType.Auto):
        grid = np.array(eight_cpu_devices[: np.prod(shape)]).reshape(shape)
        return Mesh(grid, names, axis_types=(kind,) * len(names))

    return mesh


@pytest.fixture
def isas():
    """Every instruction set of the CPU kernel that this processor has, the widest last and in the end."""
    select = _ffi.CPU.module.select_isa
    names = [name for name in ("baseline", "avx2", "avx512") if select(name)]
    yield names
    select(names[-1])


@pytest.fixture
def fresh_lowering():
    """Forgets compiled programs and what _ffi found out, before and after a test that changes what serves."""

    def forget():
        jax.clear_caches()
        _ffi.problem.cache_clear()
        _ffi._warn_once.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def no_kernel(fresh_lowering, monkeypatch):
    """An installation without native modules, whose warning is ignored: the reference serves."""
    absent = _ffi.NativeModule(None, "removed by a test")
    monkeypatch.setattr(_ffi, "CPU", absent)
    monkeypatch.setattr(_ffi, "CUDA", absent)
    monkeypatch.setattr(_ffi, "_warn_once", _Silent())


class _Silent:
    def __call__(self, message):
        assert "removed by a test" in message

    def cache_clear(self):
        pass


@pytest.fixture
def x64_off():
    """JAX's default configuration, in which float64 does not exist."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.fixture
def exact_products():
    """Products as exact as their type: by default a GPU rounds the operands to TF32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def usual_promotion():
    """JAX's default rules for dtypes and ranks, for other packages' models."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
