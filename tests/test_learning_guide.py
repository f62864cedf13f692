"""The page on learned rotations: its examples run, in the order of the page."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

GUIDE = (Path(__file__).resolve().parents[1] / "docs" / "learning.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
ORBAX = next(i for i, snippet in enumerate(SNIPPETS) if "orbax" in snippet)

pytestmark = pytest.mark.usefixtures("x64_off", "usual_promotion")


def test_examples():
    names = {}
    for i, snippet in enumerate(SNIPPETS):
        if i != ORBAX:
            exec(snippet, names)
    assert int(names["state"].step) == 4
    assert names["state"].distance > 0
    tokens = names["batches"](0)
    before, after = (names["exact"](names[params], tokens) for params in ("params", "rotated"))
    np.testing.assert_allclose(after, before, atol=1e-2 * np.max(np.abs(before)))  # float32 products are TF32 on a GPU
    assert np.abs(names["q"] - np.eye(64)).max() > 1e-4


@pytest.mark.skipif(importlib.util.find_spec("orbax") is None, reason="needs the extra 'models'")
@pytest.mark.filterwarnings("ignore")
def test_saving_and_restoring():
    names = {}
    for snippet in SNIPPETS[: ORBAX + 1]:
        exec(snippet, names)
    assert int(names["restored"].step) == 2
    whole, resumed = names["state"], names["resumed"]
    assert jax.tree.structure(whole) == jax.tree.structure(resumed)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, whole, resumed))
    assert not jnp.array_equal(names["restored"].rotations["R1"].q, whole.rotations["R1"].q)
