"""The study of learned rotations: its statistics and tables, and that it goes on where it was stopped."""

import importlib.util
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

if importlib.util.find_spec("flax") is None:
    pytest.skip("flax is not installed: needs the extra 'models'", allow_module_level=True)

_PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "learning.py"
_SPEC = importlib.util.spec_from_file_location("learning", _PATH)
learning = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(learning)
training = learning.training

# Flax is written for JAX's usual configuration.
pytestmark = pytest.mark.usefixtures("x64_off", "usual_promotion")

SETTINGS = learning.Settings(
    training.Size(
        training.llama.Config(vocab=256, hidden=16, inner=16, layers=1, heads=2, kv_heads=1, head_dim=8, scan=True),
        training.Recipe(steps=20, batch=4, length=16, rate=1e-2),
        judged=2,
    ),
    steps=2,
    data_seeds=2,
    rotation_seeds=2,
)
KL = next(variant for variant in learning.VARIANTS if variant.objective == "kl")


def study(starts, learned):
    """Results with perplexities by (data seed, rotation seed)."""
    keys = ("data_seed", "rotation_seed")
    return {
        "environment": {"device": "a device", "command": "python benchmarks/learning.py"},
        "settings": {
            **{"judged tokens": 1, "trained tokens": 2, "rotation seeds": 3, "steps": 4, "tokens": 5},
        },
        "variants": dict.fromkeys(learned),
        "models": [
            {"data_seed": seed, "parameters": 10**6, "unquantised": 9.0, "w4a4kv4": 30.0, "a4kv4": 20.0}
            for seed in sorted({data_seed for data_seed, _ in starts})
        ],
        "starts": [
            dict(zip(keys, key, strict=True)) | {"rotations": " ".join(learning.ALL), "w4a4kv4": value, "a4kv4": 10.0}
            for key, value in starts.items()
        ],
        "learned": [
            dict(zip(keys, key, strict=True))
            | {"variant": name, "w4a4kv4": value, "a4kv4": 9.0, "distance": 0.5, "seconds": 2.0}
            for name, values in learned.items()
            for key, value in values.items()
        ],
    }


STARTS = {(0, 0): 10.0, (0, 1): 12.0, (1, 0): 20.0, (1, 1): 20.0}
# By -10, 0, +5 and -5 percent.
LEARNED = {(0, 0): 9.0, (0, 1): 12.0, (1, 0): 21.0, (1, 1): 19.0}


class TestStatistics:
    def test_changes_are_against_the_same_model_with_the_same_signs(self):
        found = learning.changes(study(STARTS, {"one": LEARNED, "other": STARTS}), "one")
        assert list(found) == [0, 1]
        np.testing.assert_allclose(found[0], [-10, 0], atol=1e-9)
        np.testing.assert_allclose(found[1], [5, -5], atol=1e-9)

    def test_the_spread_of_the_starts_is_that_within_models(self):
        found = learning.spread(study(STARTS, {}))
        np.testing.assert_allclose(found[0], [100 * (10 / 11 - 1), 100 * (12 / 11 - 1)])
        np.testing.assert_allclose(found[1], [0, 0])
        # Two degrees of freedom, one a model.
        assert learning.deviation(found) == pytest.approx(math.sqrt(2 * (100 / 11) ** 2 / 2))

    def test_the_interval_is_students(self):
        # From a table of Student's t: 3.182 for three degrees of freedom.
        assert learning.interval([-10.0, 0.0, 5.0, -5.0]) == pytest.approx(3.182 * math.sqrt(125 / 3) / 2, rel=1e-3)
        assert learning.interval([1.0]) == math.inf

    def test_table(self):
        _, table, beside = learning.of_variants(study(STARTS, {"one": LEARNED, "none": {}}))
        rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in r.split("|")[1:-1]] for r in table.splitlines())}
        assert rows["one"][:5] == ["-2.50 ± 10.27", "6.45", "2 of 4", "-5.00 to +0.00", "-10.00"]
        assert rows["none"][0] == "not run"
        assert "by 9.09 %" in beside
        assert "4.55 % below" in beside


@pytest.fixture
def caches():
    """Compiled programs are kept in the folder of a study; not those of later tests."""
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def test_variants_differ_from_the_recipe_in_one_thing():
    for variant in learning.VARIANTS[1:]:
        changed = {
            name
            for name in ("rate", "accumulate", "objective", "detach_scale", "weights")
            if getattr(variant, name) != getattr(learning.RECIPE, name)
        }
        assert len(changed) == 1, variant


def test_there_are_as_many_data_seeds_as_the_settings_say(capsys):
    with pytest.raises(SystemExit):
        learning.main(["--data-seed", "2"], SETTINGS)
    assert "--data-seed is one of 0 to 1, got 2" in capsys.readouterr().err


@pytest.mark.usefixtures("caches")
def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learning, "VARIANTS", (learning.RECIPE, KL))
    text, results, folder = tmp_path / "text.txt", tmp_path / "results.json", tmp_path / "kept"
    text.write_text("a rotation spreads outliers " * 300)
    options = ["--text", str(text), "--json", str(results), "--folder", str(folder)]

    learning.main([*options, "--budget", "0"], SETTINGS)
    first = json.loads(results.read_text())
    assert [row["data_seed"] for row in first["models"]] == [0, 1]
    assert len(first["starts"]) == 2 * 2 * 3
    assert "learned" not in first
    assert capsys.readouterr().out.count("not run") == 2

    # A model that was lost is trained again, and what was found with it is found again.
    (folder / "model-1.npz").unlink()
    learning.main([*options, "--data-seed", "1"], SETTINGS)
    second = json.loads(results.read_text())
    assert {row["data_seed"] for table in learning.TABLES for row in second[table]} == {1}
    assert len(second["learned"]) == 2 * 2

    capsys.readouterr()
    learning.main(options, SETTINGS)
    data = json.loads(results.read_text())
    assert all(row in data["learned"] for row in second["learned"])
    assert sorted(map(str, data["models"])) == sorted(map(str, first["models"]))
    assert sorted(map(str, data["starts"])) == sorted(map(str, first["starts"]))
    pairs = [(row["variant"], row["data_seed"], row["rotation_seed"]) for row in data["learned"]]
    assert sorted(pairs) == sorted((v.name, d, r) for v in (learning.RECIPE, KL) for d in (0, 1) for r in (0, 1))
    assert all(0 < row["distance"] < 1 for row in data["learned"])
    for row in data["learned"]:
        (start,) = (
            start["w4a4kv4"]
            for start in data["starts"]
            if start["rotations"] == "R1 R2 R3 R4"
            and (start["data_seed"], start["rotation_seed"]) == (row["data_seed"], row["rotation_seed"])
        )
        assert 0.5 < row["w4a4kv4"] / start < 2

    printed = capsys.readouterr().out
    document = tmp_path / "document.md"
    document.write_text("Before\n<!-- learning:begin -->\n<!-- learning:end -->\nafter\n")
    learning.main(["--json", str(results), "--markdown", str(document)])
    assert re.fullmatch(r"(?s)Before\n<!--.*-->\nafter\n", document.read_text())
    assert all(part in document.read_text() for part in printed.strip().split("\n\n"))
    assert (tmp_path / "images" / "learning.png").stat().st_size > 1000
