"""The architecture: imports go one way, and each outside interface is known to one kind of file."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jax_hadacore"
PYTHON = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted(path for path in (ROOT / "ffi").rglob("*") if path.suffix in {".h", ".cc", ".cu", ".cuh"})
CMAKE = sorted([ROOT / "CMakeLists.txt", *(ROOT / "cmake").rglob("*.cmake")])

# Each module, and which of the package's own modules it may import.
LAYERS = {
    "__init__": {"quantize", "_rotated_dot", "_quantized_array", "_transform", "_primitive", "_orders", "_ffi"},
    "quantize": {"_quantize", "_quantized_array", "_formats"},
    "_rotated_dot": {"_quantize", "_quantized_array", "_transform", "_formats"},
    "_quantize": {
        *("_quantize_primitive", "_quantize_reference", "_quantized_array", "_transform", "_options", "_shardings"),
        "_formats",
    },
    "_quantize_primitive": {"_primitive", "_quantize_reference", "_ffi", "_formats", "_orders", "_signs"},
    "_quantize_reference": {"_formats", "_rounding"},
    "_quantized_array": {"_formats"},
    "_formats": set(),
    "_rounding": set(),
    "_transform": {"_options", "_sharded", "_shardings", "_primitive"},
    "_options": {"_sharded", "_shardings", "_primitive", "_orders"},
    "_shardings": set(),
    "_sharded": {"_primitive", "_orders"},
    "_primitive": {"_ffi", "_reference", "_orders", "_signs"},
    "_reference": {"_orders"},
    "_ffi": set(),
    "_orders": set(),
    "_signs": set(),
}
# Interfaces of one part, and the modules that may import them.
APART = {
    "flax": {"rotations/_layers"},
    "optax": {"rotations/_cayley", "rotations/_learn"},
    "jax_hadacore.bench": {"_cli"},
    "rich": {"bench/command", "bench/tables", "rotations/_progress"},
    "matplotlib": {"bench/plot"},
    "torch": set(),  # imported by name where it is installed
}


def name(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """Every module that a file imports, in absolute names ('jax_hadacore._ffi')."""
    parents = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else ()
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            # `from . import a` imports modules; `from .a import b` a module and perhaps its names.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^">]+)[">]', path.read_text(), re.MULTILINE)


def test_the_checkout_is_here():
    assert PACKAGE / "__init__.py" in PYTHON
    assert {path.parent.name for path in NATIVE} >= {"ffi", "cpu", "cuda"}


@pytest.mark.parametrize("module", LAYERS)
def test_python_imports_go_one_way(module):
    own = {found.split(".")[1] for found in imports(PACKAGE / f"{module}.py") if found.startswith("jax_hadacore.")}
    assert own <= LAYERS[module]


@pytest.mark.parametrize("package", APART)
def test_parts_stay_apart(package):
    found = {
        path.relative_to(PACKAGE).with_suffix("").as_posix()
        for path in PYTHON
        if any(f"{imported}.".startswith(f"{package}.") for imported in imports(path))
    }
    assert {module for module in found if not package.startswith("jax") or "bench/" not in module} <= APART[package]


@pytest.mark.parametrize("path", sorted((PACKAGE / "rotations").glob("*.py")), ids=name)
def test_rotations_sit_on_the_public_names(path):
    own = [found.split(".") for found in imports(path) if found.startswith("jax_hadacore.")]
    printing = {"_table"} if path.name == "_command.py" else set()
    assert not {found[1] for found in own if found[1] != "rotations" and found[1].startswith("_")} - printing


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=name)
def test_examples_are_made_of_public_names(path):
    assert not [found for found in imports(path) if re.match(r"jax_hadacore\.(.*\.)?_", found)]


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_only_public_jax(path):
    private = [found for found in imports(path) if re.match(r"(jax|jaxlib)\.(.*\.)?_", found)]
    assert private == []
    assert "jax._src" not in path.read_text()


@pytest.mark.parametrize("path", NATIVE, ids=name)
def test_outside_headers_stay_in_their_layer(path):
    if path.name != "module.cc":
        assert not [found for found in includes(path) if found.endswith("_binding.h")]
        if not path.name.endswith("_binding.h"):
            assert not [found for found in includes(path) if found.startswith("nanobind")]
    if not path.name.endswith(("_ffi.cc", "arguments.h")):
        assert not [found for found in includes(path) if found.startswith("xla/") or found.endswith("arguments.h")]
    if path.suffix in {".cu", ".cuh"} or path.name in {"problem.h", "kernel.h"}:
        assert not [found for found in includes(path) if found.endswith(("handlers.h", "Python.h"))]
    if path.parent.name == "cpu":
        assert not [found for found in includes(path) if "cuda" in found]


@pytest.mark.parametrize("path", [path for path in PYTHON if path.stat().st_size], ids=name)
def test_python_files_open_with_a_sentence(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring.split("\n\n")[0].endswith(".")


@pytest.mark.parametrize("path", NATIVE + CMAKE, ids=name)
def test_other_files_open_with_their_purpose(path):
    first = path.read_text().splitlines()[0]
    if path.name == "CMakeLists.txt":
        assert re.match(r"# \w.{10,}", first)
    else:
        assert re.match(rf"(//|#) {re.escape(path.name)}: \w.{{10,}}", first)


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_tests_open_with_a_sentence(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring.endswith(".")
    if path.name == "decoder.py" or (path.name.endswith("oracle.py") and not path.name.startswith("test_")):
        assert not [found for found in imports(path) if found.startswith(("jax", "jax_hadacore"))]
