"""The README's example runs and does what it says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

README = Path(__file__).resolve().parents[1] / "README.md"


def test_examples(capsys):
    example, options, quantised, across = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(example, names)
    before, after = map(float, re.findall(r"[\d.]+", capsys.readouterr().out))
    assert before > 10 * after
    assert jnp.max(jnp.abs(names["back"] - names["x"])) < 0.05 * jnp.max(jnp.abs(names["x"]))
    assert names["gradient"].shape == names["x"].shape
    with jax.default_matmul_precision("highest"):
        exec(options, names)
        assert jnp.allclose(names["rotated"], names["h"] @ names["w"], atol=1e-3)
    assert jnp.allclose(names["restored"], names["h"], atol=1e-5)
    exec(quantised, names)
    assert jnp.max(jnp.abs(names["approximately_y"] - names["y"])) < 0.05 * jnp.max(jnp.abs(names["y"]))
    assert jnp.std(names["product"] - names["h"] @ names["w"]) < 0.02 * jnp.std(names["product"])
    exec(across, names)
    assert jnp.max(jnp.abs(names["across"] - names["y"])) < 0.02 * jnp.max(jnp.abs(names["y"]))
