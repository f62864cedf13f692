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
    for field in ("rotations", "opt_state", "step"):
        a, b = (getattr(names[state], field) for state in ("state", "restored"))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, a, b))
    assert int(names["more"].step) == 6
    whole = names["learn_rotations"](
        *(names[name] for name in ("quantised", "params", "plan", "rotations", "batches")),
        **{"steps": 6, "accumulate": 2, "objective": "kl", "teacher": names["exact"], "state": names["state"]},
    )
    np.testing.assert_array_equal(names["more"].rotations["R1"].q, whole.rotations["R1"].q)
