"""The guide's examples run, in the order of the page, and do what it says."""

import importlib.util
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard as sylvester

import jax_hadacore
from jax_hadacore import rotations

GUIDE = (Path(__file__).resolve().parents[1] / "docs" / "rotations.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
# Examples with Flax models come first in the page, and one with a Flax layer further down.
FLAX = [snippet for snippet in SNIPPETS if "nnx" in snippet]

pytestmark = pytest.mark.usefixtures("x64_off", "usual_promotion")


def test_examples():
    names = {}
    for snippet in SNIPPETS:
        if snippet not in FLAX:
            exec(snippet, names)
    assert jnp.max(jnp.abs(names["difference"])) < 1e-5
    assert jnp.max(jnp.abs(names["apply"](names["params"], names["tokens"]))) > 0.1
    x = np.arange(8)
    np.testing.assert_allclose(names["theirs"], x @ sylvester(8))
    np.testing.assert_allclose(names["ours"], x @ sylvester(8) / np.sqrt(8), rtol=1e-6)
    matrix = np.diag(names["signs"]) @ sylvester(8) / np.sqrt(8)
    np.testing.assert_allclose(names["quarot"], x @ matrix, atol=1e-5)
    assert names["head"].dtype == jnp.bfloat16
    assert names["head"].shape == (50, 64)


@pytest.mark.skipif(importlib.util.find_spec("tunix") is None, reason="needs the extra 'models'")
@pytest.mark.filterwarnings("ignore")
def test_examples_with_flax(capsys):
    assert len(FLAX) == 4
    names = {}
    exec(FLAX[0], names)
    exec(FLAX[1], names)
    deviation = float(capsys.readouterr().out)
    assert 0 < deviation < 5e-5
    before = names["logits"](names["rotated"])
    exec(FLAX[2], names)
    online = names["model"](names["tokens"], names["positions"], None, names["mask"])[0]
    np.testing.assert_allclose(online, before, atol=5e-5 * np.max(np.abs(before)))
    exec(FLAX[3], names)
    x = np.random.default_rng(0).standard_normal((4, 96)).astype(np.float32)
    np.testing.assert_allclose(names["layer"](x), names["linear"](x), atol=1e-5)


def test_every_name_of_the_page_is_there():
    for name in re.findall(r"`plans\.(\w+)", GUIDE):
        assert hasattr(rotations.plans, name)
    for name in ("hadamard", "hadamard_matrix", "is_supported", "CONVENTION"):
        assert f"`{name}" in GUIDE
        assert hasattr(jax_hadacore, name)
