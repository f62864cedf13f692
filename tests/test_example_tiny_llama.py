"""The example of a small Llama, and what it shares with the study of learning: text, training, quantisers, tables."""

import importlib.util
import json
import math
import re

import decoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

from jax_hadacore import hadamard

if importlib.util.find_spec("flax") is None:
    pytest.skip("flax is not installed: needs the extra 'models'", allow_module_level=True)

training, stored, tiny_llama = map(scripts.load, ("training", "stored", "tiny_llama"))

# Flax is written for JAX's usual configuration.
pytestmark = pytest.mark.usefixtures("x64_off", "usual_promotion", "exact_products")

SIZE = training.Size(
    training.llama.Config(vocab=256, hidden=32, inner=32, layers=2, heads=2, kv_heads=1, head_dim=16, scan=True),
    training.Recipe(steps=60, batch=8, length=32, rate=1e-2),
    judged=2,
)


@pytest.fixture
def sentences(tmp_path):
    """A file of text that is quickly learned."""
    words = np.random.default_rng(0).choice(["hadamard", "rotates", "rows", "of", "outliers", "\n"], 4000)
    path = tmp_path / "sentences.txt"
    path.write_text(" ".join(words))
    return path


class TestText:
    def test_a_file_is_split_at_its_end(self, sentences):
        text, data = training.read_text(sentences), sentences.read_bytes()
        assert bytes(np.asarray(text.train)) + bytes(np.asarray(text.held_out)) == data
        assert len(text.held_out) == len(data) // training.HELD_OUT
        assert text.source.startswith("sentences.txt, ")

    def test_files_of_the_standard_library_are_split_by_their_names(self, tmp_path, monkeypatch):
        names = [f"package/module{i}.py" for i in range(64)]
        for name in [*names, "site-packages/theirs.py", "package/data.txt"]:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(f"<{name}>")
        monkeypatch.setattr(training.sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
        text = training.read_text()
        parts = [bytes(np.asarray(part)).decode() for part in (text.train, text.held_out)]
        assert sorted(re.findall("<(.*?)>", "".join(parts))) == sorted(names)
        assert 0 < parts[1].count("<") < 16
        (tmp_path / "package" / "new.py").write_text("<new>")
        more = training.read_text()
        assert {*re.findall("<(.*?)>", bytes(np.asarray(more.held_out)).decode())} - {"new"} == {
            *re.findall("<(.*?)>", parts[1])
        }

    def test_windows_are_parts_of_the_text(self):
        text = jnp.arange(200, dtype=jnp.uint8)
        tokens = np.asarray(training.windows(text, jax.random.key(0), batch=50, length=16))
        np.testing.assert_array_equal(tokens, tokens[:, :1] + np.arange(16))
        assert tokens.dtype == np.int32
        assert len(np.unique(tokens[:, 0])) > 30
        again = training.windows(text, jax.random.key(0), batch=50, length=16)
        np.testing.assert_array_equal(again, tokens)


def test_perplexity_is_that_of_the_decoder():
    """It is exp of the mean of -log p, with the logits of the NumPy model."""
    config = training.llama.Config(
        vocab=40, hidden=24, inner=20, layers=2, heads=4, kv_heads=2, head_dim=8, rope_theta=100.0, norm_eps=1e-6
    )
    params = training.initial(config, jax.random.key(0), ())
    tokens = np.random.default_rng(0).integers(0, 40, (2, 3, 9))
    theirs = {
        "model.embed_tokens.weight": params["embedder"]["input_embedding"],
        "model.norm.weight": params["final_norm"]["w"],
        "lm_head.weight": params["lm_head"]["w"].T,
    }
    for i, layer in params["layers"].items():
        name = f"model.layers.{i}"
        theirs |= {
            f"{name}.{norm}.weight": layer[norm]["w"] for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for kind in "qkv":
            theirs[f"{name}.self_attn.{kind}_proj.weight"] = layer["attn"][f"{kind}_proj"]["w"].reshape(24, -1).T
        theirs[f"{name}.self_attn.o_proj.weight"] = layer["attn"]["o_proj"]["w"].reshape(-1, 24).T
        for kind in "gate", "up", "down":
            theirs[f"{name}.mlp.{kind}_proj.weight"] = layer["mlp"][f"{kind}_proj"]["kernel"].T
    losses = []
    for row in tokens.reshape(-1, 9):
        logits = decoder.logits(theirs, decoder.Config(), row)
        log_p = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
        losses += [-log_p[t, row[t + 1]] for t in range(8)]
    found = training.perplexity(training.model(config), params, jnp.asarray(tokens))
    assert found == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def levels(x, axis):
    """The largest number of distinct values along axes."""
    rows = np.moveaxis(np.asarray(x), axis, range(-len(axis), 0)).reshape(-1, math.prod(x.shape[a] for a in axis))
    return max(len(np.unique(row)) for row in rows)


class TestQuantisers:
    def test_weights(self):
        params = training.initial(SIZE.config, jax.random.key(0))
        found = training.with_rounded_weights(params)
        axes = {"q_proj": (0,), "k_proj": (0,), "v_proj": (0,), "o_proj": (0, 1)}
        for i in range(2):
            for name, axis in axes.items():
                given, rounded = (tree["layers"][i]["attn"][name]["w"] for tree in (params, found))
                assert levels(given, axis) > 16 >= levels(rounded, axis)
                assert np.std(given - rounded) < 0.15 * np.std(given)
            for name in "gate_proj", "up_proj", "down_proj":
                given, rounded = (tree["layers"][i]["mlp"][name]["kernel"] for tree in (params, found))
                assert levels(given, (0,)) > 16 >= levels(rounded, (0,))
        for tree in params, found:
            tree["layers"] = {i: [v for k, v in layer.items() if "norm" in k] for i, layer in tree["layers"].items()}
        jax.tree.map(np.testing.assert_array_equal, params, found)

    @pytest.mark.parametrize("detach_scale", [True, False])
    def test_activations(self, detach_scale):
        numerics = training.a4kv4(("R1", "R3", "R4"), detach_scale=detach_scale)
        x = jax.random.normal(jax.random.key(0), (5, 3, 64)) + 1
        for found in numerics.activation(x), numerics.cached(x):
            assert levels(x, (-1,)) > 16 >= levels(found, (-1,))
            assert np.std(found - x) < 0.2
        turned = hadamard(x)
        for found in numerics.keys(x), numerics.hidden(x):
            assert levels(found, (-1,)) <= 16
            assert np.std(found - turned) < 0.5
        fused = training.rotated_and_rounded if detach_scale else None
        assert numerics.fused_keys is fused
        assert numerics.fused_hidden is fused
        np.testing.assert_array_equal(numerics.rotate_heads(x), turned)
        plain = training.a4kv4(("R1", "R2"), detach_scale=detach_scale)
        np.testing.assert_array_equal(plain.hidden(x), plain.activation(x))
        np.testing.assert_array_equal(plain.keys(x), plain.cached(x))

    def test_the_gradient_of_scales_is_left_out_or_not(self):
        def of_largest(detach_scale):
            numerics = training.a4kv4(("R4",), detach_scale=detach_scale)
            return jax.grad(lambda x: jnp.sum(numerics.activation(x)))(jnp.array([0.0, 0.4, 0.3, 7.1]))[-1]

        assert of_largest(True) == 1
        assert of_largest(False) != 1


def test_outlier_channels_are_trained_through(sentences):
    text = training.read_text(sentences)
    params = training.train(SIZE, text, seed=0)
    table = np.asarray(params["embedder"]["input_embedding"])
    np.testing.assert_allclose(table[:, :2].mean(0), training.OFFSETS, atol=1)
    assert table[:, 2:].std() == pytest.approx(training.DEVIATION, rel=0.2)
    batches = training.held_out_batches(text, SIZE)
    assert training.perplexity(training.model(SIZE.config), params, batches) < 10
    start = training.initial(SIZE.config, jax.random.key(0))
    assert training.perplexity(training.model(SIZE.config), start, batches) > 50


def test_the_example(sentences, tmp_path, capsys):
    results, document, image = tmp_path / "results.json", tmp_path / "document.md", tmp_path / "chart.png"
    tiny_llama.main(["--text", str(sentences), "--json", str(results)], SIZE)
    data, printed = json.loads(results.read_text()), capsys.readouterr().out
    assert data["environment"]["command"].endswith("--text sentences.txt --json results.json")
    found = {row["model"]: row["perplexity"] for row in data["rows"]}
    assert [len(values) for values in found.values()] == [1, 1, 5, 5, 5]
    exact, rounded = found["unquantised"][0], found["W4A4KV4"][0]
    best = np.mean(found["W4A4KV4 R1 R2 R3 R4"])
    assert exact < best < rounded
    assert best < 0.95 * rounded
    assert len(set(found["W4A4KV4 R1"])) == 5
    for values in found.values():
        assert f"{np.mean(values):.3f}" in printed

    document.write_text("Before\n<!-- tiny-llama:begin -->\nold\n<!-- tiny-llama:end -->\nafter\n")
    publish = ["--json", str(results), "--markdown", str(document), "--png", str(image)]
    tiny_llama.main(publish, SIZE)
    text = document.read_text()
    assert re.fullmatch(r"(?s)Before\n<!--.*-->\nafter\n", text)
    assert printed.strip().rpartition("\n\n")[2] in text
    assert "![Perplexity" in text
    assert "old" not in text
    assert image.read_bytes() == (tmp_path / "images" / "tiny-llama.png").read_bytes()


def test_tables_are_aligned():
    assert (
        stored.table(["a", "long name"], [["1234", ""]])
        == "| a    | long name |\n| ---- | --------- |\n| 1234 |           |"
    )
