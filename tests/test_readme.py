"""The README's example runs and does what it says."""

import re
from pathlib import Path

import jax.numpy as jnp

README = Path(__file__).resolve().parents[1] / "README.md"


def test_examples(capsys):
    example, across = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(example, names)
    before, after = map(float, re.findall(r"[\d.]+", capsys.readouterr().out))
    assert before > 10 * after
    assert jnp.max(jnp.abs(names["back"] - names["x"])) < 0.05 * jnp.max(jnp.abs(names["x"]))
    assert names["gradient"].shape == names["x"].shape
    exec(across, names)
    assert jnp.max(jnp.abs(names["across"] - names["y"])) < 0.02 * jnp.max(jnp.abs(names["y"]))
