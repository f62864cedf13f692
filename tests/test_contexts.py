"""JAX's modes and surroundings: configurations, compilation and its caches, other processes, threads."""

import functools
import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, dtypes, normal
from hlo import collectives
from jax import export
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import transform

import jax_hadacore
from jax_hadacore import EXPORT_SAFETY_CHECKS, hadamard, hadamard_sharded

X = normal((8, 64), np.float32)
Y = transform(X)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@pytest.fixture
def run_python(tmp_path):
    """Runs code in a new process with four CPU devices, in tmp_path, and returns what it prints."""

    def run(code, **environment):
        flags = "--xla_force_host_platform_device_count=4"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environment}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture
def line(cpu_devices):
    return Mesh(np.array(cpu_devices), ("b",), axis_types=(AxisType.Auto,))


class TestModes:
    def test_disable_jit(self):
        with jax.disable_jit():
            close(hadamard(X), Y)
            close(jax.grad(lambda x: jnp.sum(hadamard(x) ** 2))(X), 2 * X, rtol=1e-4, atol=1e-4)
            close(jax.vmap(hadamard)(X), Y)

    def test_debug_nans(self):
        with jax.debug_nans(True):
            close(hadamard(X), Y)
            for call in (hadamard, jax.jit(hadamard)):
                with pytest.raises(FloatingPointError, match="nan"):
                    call(jnp.asarray(X).at[0, 0].set(jnp.nan)).block_until_ready()

    @pytest.mark.parametrize("x64", [True, False])
    @dtypes
    def test_x64(self, x64, dtype):
        before = jax.config.jax_enable_x64
        jax.config.update("jax_enable_x64", x64)
        try:
            expected = np.dtype(np.float32) if dtype == np.float64 and not x64 else dtype
            x = normal((3, 64), dtype)
            for call in (hadamard, jax.jit(hadamard), jax.vmap(hadamard)):
                y = call(x)
                assert y.dtype == expected
                assert_same_bits(np.asarray(y), np.asarray(hadamard(x.astype(expected))))
        finally:
            jax.config.update("jax_enable_x64", before)

    @pytest.mark.parametrize("promotion", ["strict", "standard"])
    def test_promotion(self, promotion):
        with jax.numpy_dtype_promotion(promotion):
            for dtype in DTYPES:
                x = jnp.asarray(X, dtype)
                assert hadamard(x, scale=np.float64(0.3)).dtype == dtype
                assert jax.grad(lambda x: hadamard(x, scale=0.3).sum())(x).dtype == dtype

    def test_weak_types(self):
        x = jnp.broadcast_to(jnp.asarray(1.0), (4,))
        assert jax.typeof(x).weak_type
        for call in (hadamard, jax.jit(hadamard)):
            y = call(x)
            assert not jax.typeof(y).weak_type
            assert (y.dtype, y.tolist()) == (x.dtype, [2, 0, 0, 0])

    @pytest.mark.parametrize("kind", ["pinned_host", "unpinned_host"])
    def test_arrays_in_host_memory(self, cpu_devices, kind):
        device = cpu_devices[0]
        if kind not in {memory.kind for memory in device.addressable_memories()}:
            kind = device.default_memory().kind
        x = jax.device_put(X, jax.sharding.SingleDeviceSharding(device, memory_kind=kind))
        close(hadamard(x), Y)
        close(jax.jit(hadamard)(x), Y)

    @pytest.mark.parametrize(
        ("options", "shown"),
        [
            ({}, "inplace=False length=64 matrix=None scale=0.125 signs=None transpose=False"),
            ({"scale": 1, "inplace": True}, "inplace=True length=64 matrix=None scale=1.0 signs=None transpose=False"),
            ({"signs": [1] * 64, "transpose": True}, "signs=StaticArray(shape=(2,), dtype=dtype('uint32'))"),
        ],
    )
    def test_jaxpr_is_readable(self, options, shown):
        jaxpr = jax.make_jaxpr(functools.partial(hadamard, **options))(jax.ShapeDtypeStruct(X.shape, X.dtype))
        assert [str(equation.primitive) for equation in jaxpr.eqns] == ["hadamard"]
        assert shown in " ".join(str(jaxpr).split())

    @pytest.mark.parametrize(
        ("policy", "transforms"),
        [
            ("everything_saveable", 2),
            ("nothing_saveable", 3),
            ("dots_saveable", 3),
            (("save_only_these_names", "rotated"), 2),
        ],
        ids=str,
    )
    def test_checkpoint_policies(self, policy, transforms):
        # One transform forward, one in the gradient, and one more where the forward one is computed again.
        name, *arguments = policy if isinstance(policy, tuple) else (policy,)
        policy = getattr(jax.checkpoint_policies, name)
        policy = policy(*arguments) if arguments else policy

        def loss(x):
            return jnp.sum(jnp.sin(checkpoint_name(hadamard(x), "rotated")))

        gradient = jax.grad(jax.checkpoint(loss, policy=policy))
        assert str(jax.make_jaxpr(gradient)(X)).count("hadamard[") == transforms
        close(jax.jit(gradient)(X), transform(np.cos(Y)))


class TestEagerCalls:
    def test_are_traced_once(self, monkeypatch):
        traced = []
        decompose = jax_hadacore._options.decompose
        monkeypatch.setattr(
            jax_hadacore._options, "decompose", lambda n: traced.append(n) or decompose(n), raising=True
        )
        for _ in range(10):
            hadamard(jnp.asarray(normal((5, 32), np.float32)), scale=0.7, axis=1)
        assert traced == [32]
        jitted = jax.jit(lambda x: hadamard(x, scale=0.9))
        for _ in range(10):
            jitted(X)
        assert traced == [32, 64]

    def test_are_about_as_fast_as_a_sine(self):
        def seconds(f, x):
            f(x).block_until_ready()
            start = time.perf_counter()
            for _ in range(200):
                f(x).block_until_ready()
            return time.perf_counter() - start

        x = jnp.asarray(X)
        times = [(seconds(hadamard, x), seconds(jnp.sin, x)) for _ in range(20)]
        ours, sine = (min(each) for each in zip(*times, strict=True))
        assert ours <= 3 * sine, (ours, sine)

    def test_equal_options_of_other_types_are_told_apart(self):
        hadamard(X, scale=1)
        with pytest.raises(TypeError, match="scale must be a static real number"):
            hadamard(X, scale=True)
        with pytest.raises(TypeError, match="inplace must be True or False"):
            hadamard(X, inplace=0)


class TestCompilation:
    def test_ahead_of_time(self):
        program = jax.jit(hadamard).lower(jax.ShapeDtypeStruct(X.shape, X.dtype)).compile()
        close(program(X), Y)

    def test_a_cached_program_serves_another_process(self, run_python, tmp_path):
        code = """
            import jax, jax.numpy as jnp, numpy as np
            from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
            from jax_hadacore import hadamard
            hits = []
            jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
            mesh = Mesh(np.array(jax.devices()), ("b",))
            x = jax.device_put(np.ones((8, 64), np.float32), NamedSharding(mesh, P("b")))
            f = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(hadamard(x)))))
            across = lambda x: hadamard(x, axis_name="b", axis=0)
            g = jax.shard_map(across, mesh=mesh, in_specs=P("b"), out_specs=P("b"))
            hits.clear()
            f(x).block_until_ready()
            jax.jit(g)(np.ones((64, 8), np.float32)).block_until_ready()
            print(*[hit for hit in hits if "compilation_cache" in hit])
        """
        options = {
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        first, second = run_python(code, **options), run_python(code, **options)
        assert "cache_misses" in first
        assert "cache_hits" in second
        assert "cache_misses" not in second


class TestExport:
    def save(self, path, function, *args, vjp_order=0, **options):
        exported = export.export(jax.jit(function), disabled_checks=EXPORT_SAFETY_CHECKS, **options)(*args)
        path.write_bytes(exported.serialize(vjp_order=vjp_order))
        return exported

    def test_in_a_new_process(self, run_python, tmp_path):
        (b,) = export.symbolic_shape("b")
        shape = jax.ShapeDtypeStruct((b, 64), jnp.float32)
        platforms = ["cpu", "cuda"]
        self.save(tmp_path / "rotation", hadamard, shape, vjp_order=2, platforms=platforms)
        np.save(tmp_path / "x.npy", X)
        run_python(
            """
            import jax, jax.numpy as jnp, numpy as np
            from pathlib import Path
            import jax_hadacore
            rotate = jax.export.deserialize(Path("rotation").read_bytes())
            x = np.load("x.npy")
            f = lambda x: jnp.sum(jnp.sin(rotate.call(x)))
            h = lambda x: jnp.sum(jax.grad(f)(x) ** 2)
            for rows in (1, 8):
                np.savez(f"{rows}.npz", y=rotate.call(x[:rows]), f=jax.grad(f)(x[:rows]), h=jax.grad(h)(x[:rows]))
            """
        )
        first = jax.grad(lambda x: jnp.sum(jnp.sin(hadamard(x))))
        second = jax.grad(lambda x: jnp.sum(first(x) ** 2))
        for rows in (1, 8):
            with np.load(tmp_path / f"{rows}.npz") as results:
                close(results["y"], Y[:rows])
                close(results["f"], first(X[:rows]))
                close(results["h"], second(X[:rows]), rtol=1e-4, atol=1e-4)

    def test_sharded_in_a_new_process(self, run_python, tmp_path, line):
        # By the compiler, and by axis_name inside shard_map, whose sizes must be static (docs/contexts.md).
        rows, split = NamedSharding(line, P("b")), NamedSharding(line, P(None, "b"))
        options = {"platforms": ["cpu"]}
        batch = jax.jit(hadamard, in_shardings=rows, out_shardings=rows)
        across = functools.partial(hadamard_sharded, sharding=split)
        across = jax.jit(across, in_shardings=split, out_shardings=split)
        for name, function in {"batch": batch, "across": across}.items():
            exported = export.export(function, disabled_checks=EXPORT_SAFETY_CHECKS, **options)(X)
            (tmp_path / name).write_bytes(exported.serialize(vjp_order=1))
        np.save(tmp_path / "x.npy", X)
        printed = run_python(
            """
            import jax, jax.numpy as jnp, numpy as np
            from pathlib import Path
            from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
            import jax_hadacore
            mesh = Mesh(np.array(jax.devices()), ("b",))
            for name, spec in ("batch", P("b")), ("across", P(None, "b")):
                x = jax.device_put(np.load("x.npy"), NamedSharding(mesh, spec))
                call = jax.export.deserialize(Path(name).read_bytes()).call
                print("==== program", jax.jit(call).lower(x).compile().as_text())
                gradient = jax.grad(lambda x: jnp.sum(jnp.sin(call(x))))
                np.savez(f"{name}.npz", y=jax.jit(call)(x), gradient=jax.jit(gradient)(x))
            """
        )
        batch, across = printed.split("==== program")[1:]
        assert collectives(batch) == []
        assert set(collectives(across)) == {"all-to-all"}
        for name in ("batch", "across"):
            with np.load(tmp_path / f"{name}.npz") as results:
                close(results["y"], Y)
                close(results["gradient"], transform(np.cos(Y)))

    @pytest.mark.parametrize("platform", ["cpu", "cuda"])
    def test_for_one_platform_from_any(self, tmp_path, platform):
        exported = self.save(tmp_path / "rotation", hadamard, X, platforms=[platform], vjp_order=2)
        assert exported.platforms == (platform,)
        assert exported.mlir_module().count("@jax_hadacore_hadamard_v1(") == 1

    def test_the_checks_are_those_of_the_targets(self):
        targets = [check.is_custom_call() for check in EXPORT_SAFETY_CHECKS]
        assert targets == ["jax_hadacore_hadamard_v1", "jax_hadacore_quantize_v1"]


class TestThreads:
    def test_many_at_once(self):
        # Some trace and compile, some run what others compiled.
        problems = [(rows, n, dtype) for rows in (1, 33) for n in (16, 256, 4096) for dtype in DTYPES]
        arrays = [normal((rows, n), dtype) for rows, n, dtype in problems]
        expected = [np.asarray(jax.jit(hadamard)(x)) for x in arrays]
        jitted = jax.jit(lambda x: hadamard(x))  # noqa: PLW0108

        def run(i):
            x = arrays[i % len(arrays)]
            call = (hadamard, jitted, jax.vmap(hadamard), jax.jit(functools.partial(hadamard)))[i // len(arrays) % 4]
            return i % len(arrays), np.asarray(call(x))

        with ThreadPoolExecutor(16) as pool:
            for i, y in pool.map(run, range(8 * len(arrays))):
                assert_same_bits(y, expected[i])

    def test_on_several_devices(self, line):
        sharded = NamedSharding(line, P("b"))
        split = NamedSharding(line, P(None, "b"))
        program = jax.jit(hadamard)
        xs = [normal((8, 64), np.float32, i) for i in range(16)]

        def run(x):
            return np.asarray(program(jax.device_put(x, sharded)))

        with ThreadPoolExecutor(8) as pool:
            for x, y in zip(xs, pool.map(run, xs), strict=True):
                close(y, transform(x))
        for x in xs[:2]:  # programs with collectives take turns, as JAX asks
            close(hadamard_sharded(jax.device_put(x, split)), transform(x))
