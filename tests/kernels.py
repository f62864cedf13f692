"""Two ways to run the CUDA kernels alone, on arrays with guards around them: emulated on the host, and on the GPU."""

import contextlib
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
from cases import DTYPES, assert_same_bits
from oracle import decompose, paley

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "emulation"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]
UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,pointer-overflow"
KERNEL_FLAGS = ["-fno-exceptions", "-fsanitize=thread", f"-fsanitize={UNDEFINED}", "-include", EMULATION / "device.h"]

FLOAT32 = np.dtype(np.float32)
MANY_PROCESSORS = 10**6  # any problem is a small one
LEAST_SHARED, MOST_SHARED = 99 * 1024, 227 * 1024  # that a block may have on sm_86, 89 and 120, and on sm_90 and 100
REDZONE = 4096
CANARY = 0xCB


def build_emulator(folder):
    """Compiles the emulator with the kernels, of which only the wrappers of single instructions are replaced."""
    shutil.copytree(ROOT / "ffi", folder / "ffi")
    shutil.copy(EMULATION / "ptx.cuh", folder / "ffi" / "cuda")
    cuda = folder / "ffi" / "cuda"
    host = (cuda / f"{name}.cc" for name in ("launch", "plan", "order_plan", "quantized_plan", "order_words"))
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


class FactorStruct(ctypes.Structure):
    _fields_ = [("order", ctypes.c_int64), ("signs", ctypes.c_void_p), ("values", ctypes.c_void_p)]


class ProblemStruct(ctypes.Structure):
    """The Problem of ffi/problem.h."""

    _fields_ = [
        ("dtype", ctypes.c_int),
        ("n", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("factor_count", ctypes.c_int),
        ("factors", FactorStruct * 2),
        ("signs", ctypes.c_void_p),
        ("signs_last", ctypes.c_bool),
        ("signs_on_device", ctypes.c_bool),
        ("stride", ctypes.c_int64),
    ]


def pack(negative):
    """Packs rows of booleans as ffi/problem.h says: 32 to a word, of which even ones are in the low half."""
    negative = np.asarray(negative)
    padded = np.zeros((*negative.shape[:-1], -(-negative.shape[-1] // 32) * 32), np.uint32)
    padded[..., : negative.shape[-1]] = negative
    pairs = padded.reshape(*negative.shape[:-1], -1, 16, 2)
    words = pairs[..., 0] << np.arange(16, dtype=np.uint32) | pairs[..., 1] << np.arange(16, 32, dtype=np.uint32)
    return np.bitwise_or.reduce(words, axis=-1)


class Request(NamedTuple):
    """What a kernel is asked for. `factors` are matrices of signs, or one of other values, the slowest first.

    With a stride the rows are the columns of (n, stride) tiles.
    """

    dtype: np.dtype
    n: int
    rows: int
    scale: float = 1.0
    factors: tuple[np.ndarray, ...] = ()
    signs: np.ndarray | None = None
    signs_last: bool = False
    signs_on_device: bool = False
    stride: int = 1

    @property
    def has_values(self):
        return any((abs(factor) != 1).any() for factor in self.factors)

    @property
    def words_of_factors(self):
        words = [pack(factor < 0).ravel() for factor in self.factors]
        return np.concatenate(words) if words else np.zeros(0, np.uint32)


class Kernel:
    """Transforms the rows of an array that has guards around it; subclasses say where."""

    def __call__(self, x, scale=None, *, inplace=False, offsets=(0, 0), **more):
        """`offsets` of operand and result from alignment are in elements; more: of a Request, or for the emulator.

        x of three dimensions is tiles, whose columns are transformed.
        """
        _, n, *stride = x.shape
        of_request = {name: more.pop(name) for name in Request._fields if name in more}
        if stride:
            of_request["stride"] = stride[0]
        request = Request(x.dtype, n, x.size // n, n**-0.5 if scale is None else scale, **of_request)
        operand = guarded(x.shape, x.dtype, offsets[0])
        operand.array[:] = x
        result = operand if inplace else guarded(x.shape, x.dtype, offsets[1])
        shape = x.shape if self.needs_workspace(request) else (0,)
        workspace = guarded(shape, x.dtype if x.dtype.itemsize == 8 else FLOAT32)
        buffers = (operand, result, workspace)
        self._run(request, buffers, more)
        for buffer in buffers:
            assert_guards_are_whole(buffer)
        if not inplace:
            assert_same_bits(operand.array, x)
        return result.array

    def codes(self, x, quantization, scale, *, given=None, **schedule):
        """The codes (4-bit ones apart), scales and zero points of a transform's results."""
        rows, n = x.shape
        request = Request(x.dtype, n, rows, scale, tuple(paley(k) for k in decompose(n)[:-1]))
        operand = guarded(x.shape, x.dtype)
        operand.array[:] = x
        groups = (rows, n // quantization.group)
        scales = {"float32": FLOAT32, "given": None}.get(quantization.scale, np.dtype(np.uint8))
        results = (
            guarded((rows, n * quantization.bits // 8), np.dtype(np.uint8)),
            guarded(groups, scales) if scales else None,
            guarded(groups, np.dtype(np.int8)) if quantization.asymmetric else None,
        )
        given = None if given is None else np.full(1, given, np.float32)
        self._run_codes(request, quantization, (operand, *results), given, schedule)
        for buffer in (operand, *filter(None, results)):
            assert_guards_are_whole(buffer)
        codes, *more = (r.array if r else None for r in results)
        if quantization.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, n)
        return codes, *more


class QuantizationStruct(ctypes.Structure):
    """The Quantization of ffi/quantization.h."""

    _fields_ = [
        ("code", ctypes.c_int),
        ("scale", ctypes.c_int),
        ("group", ctypes.c_int64),
        ("asymmetric", ctypes.c_bool),
        ("given", ctypes.c_void_p),
    ]


class QuantizedBuffersStruct(ctypes.Structure):
    _fields_ = [("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("zero_points", ctypes.c_void_p)]


CODES = ("int8", "int4", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")
SCALES = ("float32", "float8_e8m0fnu", "float8_e4m3fn", "given")


class Quantization(NamedTuple):
    """What becomes of a transform's results: names as in a native call's attributes."""

    code: str
    scale: str
    group: int
    asymmetric: bool = False

    @property
    def bits(self):
        return 4 if self.code in ("int4", "float4_e2m1fn") else 8

    def struct(self, given):
        code, scale = CODES.index(self.code), SCALES.index(self.scale)
        return QuantizationStruct(code, scale, self.group, self.asymmetric, given)


class MachineStruct(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("processors", "shared_bytes", "clusters", "warp_groups", "schedule")]


def machine(processors=MANY_PROCESSORS, shared_bytes=MOST_SHARED, clusters=True, warp_groups=False, order=0):
    return ctypes.byref(MachineStruct(processors, shared_bytes, clusters, warp_groups, order))


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
            "words",
            "most_words",
        )
    ]


class Emulator(Kernel):
    """The kernels run thread by thread on the host, where races and accesses out of bounds are found."""

    def __init__(self, folder):
        self._library = ctypes.CDLL(build_emulator(folder))
        self._library.emulation_run.restype = ctypes.c_char_p
        self._library.emulation_run_codes.restype = ctypes.c_char_p

    def plan(
        self,
        dtype,
        n,
        rows,
        processors=MANY_PROCESSORS,
        shared_bytes=MOST_SHARED,
        *,
        clusters=True,
        warp_groups=False,
        inplace=False,
        **more,
    ):
        launches = (PlannedLaunch * 8)()
        with self._problem(Request(dtype, n, rows, **more)) as problem:
            gpu = machine(processors, shared_bytes, clusters, warp_groups)
            count = self._library.emulation_plan(problem, gpu, inplace, launches, len(launches))
        assert count <= len(launches)
        return launches[:count]

    def needs_workspace(self, request):
        with self._problem(request) as problem:
            return bool(self._library.emulation_needs_workspace(problem))

    def takes_stride(self, request):
        with self._problem(request) as problem:
            return bool(self._library.emulation_takes_stride(problem))

    def _run(self, request, buffers, schedule):
        with self._problem(request) as problem:
            failure = self._library.emulation_run(
                problem,
                *(buffer.array.ctypes if buffer.array.size else None for buffer in buffers),
                machine(**schedule),
            )
        assert failure == b"", failure.decode()

    def fuses_codes(self, request, quantization):
        with self._problem(request) as problem:
            return bool(self._library.emulation_fuses_codes(problem, ctypes.byref(quantization.struct(0))))

    def pack_float8(self, values, code):
        """Rounds an even number of float32 values as GPUs before sm_89 do."""
        codes = np.zeros(values.shape, np.uint8)
        count = ctypes.c_int64(values.size)
        self._library.emulation_pack_float8(values.ctypes, count, code == "float8_e5m2", codes.ctypes)
        return codes

    def _run_codes(self, request, quantization, buffers, given, schedule):
        x, *results = buffers
        addresses = QuantizedBuffersStruct(*(r.array.ctypes.data if r else None for r in results))
        struct = quantization.struct(given.ctypes.data if given is not None else 0)
        with self._problem(request) as problem:
            failure = self._library.emulation_run_codes(
                problem, ctypes.byref(struct), x.array.ctypes, ctypes.byref(addresses), machine(**schedule)
            )
        assert failure == b"", failure.decode()

    @contextlib.contextmanager
    def _problem(self, request):
        problem = ProblemStruct(DTYPES.index(request.dtype), request.n, request.rows, request.scale)
        problem.stride = request.stride
        kept = []

        def address_of(array):
            kept.append(np.ascontiguousarray(array))
            return kept[-1].ctypes.data

        for factor in request.factors:
            values = address_of(np.float64(factor)) if request.has_values else None
            problem.factors[problem.factor_count] = (len(factor), address_of(pack(factor < 0)), values)
            problem.factor_count += 1
        if request.signs is not None:
            problem.signs = address_of(pack(request.signs < 0))
            problem.signs_last, problem.signs_on_device = request.signs_last, request.signs_on_device
        yield ctypes.byref(problem)


class Gpu(Kernel):
    """The kernels on the default GPU, without JAX around them."""

    def needs_workspace(self, request):
        from jax_hadacore import _cuda  # noqa: PLC0415  only where there is a GPU

        with native_problem(request) as problem:
            return _cuda.needs_workspace(problem)

    def _run(self, request, buffers, schedule):
        del schedule
        memories = {id(buffer.raw): buffer.raw for buffer in buffers}  # one for both where in place
        on_device = jax.block_until_ready(jax.device_put(memories, jax.devices("gpu")[0]))
        transform_on_gpu(request, *(address(on_device[id(b.raw)]) + b.offset for b in buffers))
        for key, memory in memories.items():
            memory[:] = np.asarray(on_device[key])

    def _run_codes(self, request, quantization, buffers, given, schedule):
        from jax_hadacore import _cuda  # noqa: PLC0415  only where there is a GPU

        del schedule
        on_device = jax.block_until_ready(
            jax.device_put([b.raw if b else None for b in buffers] + [given], jax.devices("gpu")[0])
        )
        *memories, scale = on_device
        x, *results = (address(m) + b.offset if b else 0 for m, b in zip(memories, buffers, strict=True))
        native = _cuda.Quantization(
            getattr(_cuda.Code, quantization.code),
            getattr(_cuda.Scale, quantization.scale),
            quantization.group,
            quantization.asymmetric,
            0 if scale is None else address(scale),
        )
        with native_problem(request) as problem:
            _cuda.quantize(problem, native, x, _cuda.QuantizedBuffers(*results))
        for buffer, memory in zip(buffers, memories, strict=True):
            if buffer:
                buffer.raw[:] = np.asarray(memory)


@contextlib.contextmanager
def native_problem(request):
    """A request for jax_hadacore._cuda."""
    from jax_hadacore import _cuda  # noqa: PLC0415  only where there is a GPU

    words, values, signs = request.words_of_factors, None, None
    if request.has_values:
        values = np.float64(request.factors[0])
    if request.signs is not None:
        signs = pack(request.signs < 0)
        if request.signs_on_device:
            signs = jax.block_until_ready(jax.device_put(signs, jax.devices("gpu")[0]))
    yield _cuda.Problem(
        getattr(_cuda.Dtype, request.dtype.name),
        request.n,
        request.rows,
        request.scale,
        orders=[len(factor) for factor in request.factors],
        factors=words.ctypes.data,
        matrix=0 if values is None else values.ctypes.data,
        signs=0 if signs is None else signs.ctypes.data if isinstance(signs, np.ndarray) else address(signs),
        signs_last=request.signs_last,
        signs_on_device=request.signs_on_device,
        stride=request.stride,
    )


def transform_on_gpu(request, *addresses):
    """Transforms memory at device addresses of operand, result and workspace on a stream of its own, and waits."""
    from jax_hadacore import _cuda  # noqa: PLC0415  only where there is a GPU

    with native_problem(request) as problem:
        _cuda.transform(problem, *addresses)


def address(array):
    return array.unsafe_buffer_pointer()
