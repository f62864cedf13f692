"""Two ways to run the CUDA kernels alone, on arrays with guards around them: emulated on the host, and on the GPU."""

import ctypes
import math
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from cases import DTYPES, HALVES, assert_same_bits

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "emulation"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]
UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,pointer-overflow"
KERNEL_FLAGS = ["-fno-exceptions", "-fsanitize=thread", f"-fsanitize={UNDEFINED}", "-include", EMULATION / "device.h"]

FLOAT32 = np.dtype(np.float32)
ONE_PASS = 32768  # longer rows of 16-bit types need a workspace
MANY_PROCESSORS = 10**6  # any problem is a small one
LEAST_SHARED, MOST_SHARED = 99 * 1024, 227 * 1024  # that a block may have on sm_86, 89 and 120, and on sm_90 and 100
REDZONE = 4096
CANARY = 0xCB


def build_emulator(folder):
    """Compiles the emulator with the kernels, of which only the wrappers of single instructions are replaced."""
    shutil.copytree(ROOT / "ffi", folder / "ffi")
    shutil.copy(EMULATION / "ptx.cuh", folder / "ffi" / "cuda")
    cuda = folder / "ffi" / "cuda"
    host = (cuda / f"{name}.cc" for name in ("launch", "plan", "order_words"))
    sources = [*(cuda / "instances").glob("*.cu"), *host, *EMULATION.glob("*.cc")]

    def run(*command):
        done = subprocess.run(["g++", *FLAGS, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def compile_one(source):
        target = folder / f"{source.stem}.o"
        more = KERNEL_FLAGS if source.suffix == ".cu" else []
        run(*more, f"-I{EMULATION}", f"-I{folder / 'ffi'}", "-x", "c++", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "emulator.so"
    run("-shared", "-Wl,-z,defs", *objects, "-o", library)
    return library


class Guarded(NamedTuple):
    """An array, and the memory around it that nothing may touch."""

    array: np.ndarray
    raw: np.ndarray

    @property
    def offset(self):
        return self.array.ctypes.data - self.raw.ctypes.data


def guarded(shape, dtype, offset=0):
    """An array filled with NaN, `offset` elements behind a multiple of 256 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 2 * REDZONE + 256, np.uint8)
    skip = -raw.ctypes.data % 256
    raw = raw[skip : skip + size + 2 * REDZONE]
    raw[:] = CANARY
    start = REDZONE + offset * dtype.itemsize
    inside = raw[start : start + size]
    inside[:] = 0xFF
    return Guarded(inside.view(dtype).reshape(shape), raw)


def assert_guards_are_whole(buffer):
    assert (buffer.raw[: buffer.offset] == CANARY).all()
    assert (buffer.raw[buffer.offset + buffer.array.nbytes :] == CANARY).all()


class Kernel:
    """Transforms the rows of an array that has guards around it; subclasses say where."""

    def __call__(self, x, scale=None, *, inplace=False, offsets=(0, 0), **schedule):
        """`offsets` of operand and result from alignment are in elements; `schedule` is for the emulator."""
        rows, n = x.shape
        operand = guarded(x.shape, x.dtype, offsets[0])
        operand.array[:] = x
        result = operand if inplace else guarded(x.shape, x.dtype, offsets[1])
        workspace = guarded(x.shape if x.dtype in HALVES and n > ONE_PASS else (0,), FLOAT32)
        buffers = (operand, result, workspace)
        self._run((x.dtype, n, rows, n**-0.5 if scale is None else scale), buffers, schedule)
        for buffer in buffers:
            assert_guards_are_whole(buffer)
        if not inplace:
            assert_same_bits(operand.array, x)
        return result.array


class PlannedLaunch(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "blocks",
            "blocks_per_row",
            "threads",
            "shared_bytes",
            "per_block",
            "runs",
            "run_rows",
            "count",
            "n",
            "stride",
        )
    ]


class Emulator(Kernel):
    """The kernels run thread by thread on the host, where races and accesses out of bounds are found."""

    def __init__(self, folder):
        self._library = ctypes.CDLL(build_emulator(folder))
        self._library.emulation_run.restype = ctypes.c_char_p

    def plan(
        self, dtype, n, rows, processors=MANY_PROCESSORS, shared_bytes=MOST_SHARED, *, clusters=True, inplace=False
    ):
        launches = (PlannedLaunch * 2)()
        count = self._library.emulation_plan(
            DTYPES.index(dtype),
            ctypes.c_int64(n),
            ctypes.c_int64(rows),
            processors,
            shared_bytes,
            clusters,
            inplace,
            launches,
        )
        return launches[:count]

    def _run(self, problem, buffers, schedule):
        dtype, n, rows, scale = problem
        failure = self._library.emulation_run(
            DTYPES.index(dtype),
            ctypes.c_int64(n),
            ctypes.c_int64(rows),
            ctypes.c_double(scale),
            *(buffer.array.ctypes if buffer.array.size else None for buffer in buffers),
            schedule.get("processors", MANY_PROCESSORS),
            schedule.get("shared_bytes", MOST_SHARED),
            schedule.get("clusters", True),
            schedule.get("order", 0),
        )
        assert failure == b"", failure.decode()


class Gpu(Kernel):
    """The kernels on the default GPU, without JAX around them."""

    def _run(self, problem, buffers, schedule):
        del schedule
        memories = {id(buffer.raw): buffer.raw for buffer in buffers}  # one for both where in place
        on_device = jax.block_until_ready(jax.device_put(memories, jax.devices("gpu")[0]))
        transform_on_gpu(*problem, *(address(on_device[id(b.raw)]) + b.offset for b in buffers))
        for key, memory in memories.items():
            memory[:] = np.asarray(on_device[key])


def transform_on_gpu(dtype, n, rows, scale, *addresses):
    """Transforms memory at device addresses of operand, result and workspace on a stream of its own, and waits."""
    from jax_hadacore import _cuda  # noqa: PLC0415  only where there is a GPU

    _cuda.transform(_cuda.Problem(getattr(_cuda.Dtype, np.dtype(dtype).name), n, rows, scale), *addresses)


def address(array):
    return array.unsafe_buffer_pointer()
