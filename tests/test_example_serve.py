"""examples/serve_rotated.py: attention on codes, the cache, and what the example prints."""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from cases import normal

from jax_hadacore import QuantizedArray

pytest.importorskip("flax", reason="flax is not installed: needs the extra 'models'")

# Flax is written for JAX's usual configuration.
pytestmark = pytest.mark.usefixtures("x64_off", "usual_promotion", "exact_products")
ROOT = Path(__file__).resolve().parents[1]
CODES = {"int8": np.int8, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}


@pytest.fixture(scope="module")
def serve():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
        yield importlib.import_module("serve_rotated")


@pytest.fixture(scope="module")
def setting(serve):
    model = serve.llama.Config(40, 32, 48, layers=2, heads=4, kv_heads=2, head_dim=16)
    return serve.Setting(model, batch=2, context=32, piece=4, steps=4, calls=3)


@pytest.fixture(scope="module")
def exact(serve):
    """Numerics whose cache is not rounded."""
    return serve.llama.Numerics(attention=serve.attention)


def prompt(setting, length=None):
    shape = setting.batch, length or setting.context
    return jnp.asarray(np.random.default_rng(0).integers(setting.model.vocab, size=shape), jnp.int32)


def random_codes(codes, shape, label):
    """A QuantizedArray of codes and scales that no quantiser made, and its float64 values."""
    values = (normal(shape, np.float32, label) * 40).clip(-127, 127).astype(CODES[codes])
    scales = np.exp(normal((*shape[:-1], 1), np.float32, f"{label} scales")) / 40
    array = QuantizedArray(jnp.asarray(values), jnp.asarray(scales), qtype=codes)
    return array, values.astype(np.float64) * scales.astype(np.float64)


@pytest.mark.parametrize("codes", CODES)
def test_attention_on_codes_is_that_on_what_they_stand_for(serve, codes):
    q = normal((2, 3, 4, 16), np.float32)
    k, exact_k = random_codes(codes, (2, 7, 2, 16), "k")
    v, exact_v = random_codes(codes, (2, 7, 2, 16), "v")
    mask = np.arange(4, 7)[:, None] >= np.arange(7)
    expected = np.empty(q.shape)
    for row, head in np.ndindex(2, 4):
        scores = q[row, :, head].astype(np.float64) @ exact_k[row, :, head // 2].T / 4
        weights = np.where(mask, np.exp(scores), 0)
        expected[row, :, head] = weights / weights.sum(-1, keepdims=True) @ exact_v[row, :, head // 2]
    found = serve.attention(jnp.asarray(q), k, v, jnp.broadcast_to(mask, (2, 1, 3, 7)))
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("codes", CODES)
def test_the_cache_has_the_codes_of_rotated_keys(serve, setting, exact, codes, rotated):
    graph, params = serve.create(setting.model)
    plain = serve.Server(graph, params, exact, setting)
    coded = serve.Server(graph, params, serve.numerics(codes, rotated=rotated), setting)
    for server in plain, coded:
        server.read(prompt(setting))
    d = setting.model.head_dim
    matrix = oracle.dense(d) / np.sqrt(d) if rotated else np.eye(d)
    for name, turn in ("keys", matrix), ("values", np.eye(d)):
        expected = np.asarray(getattr(plain.caches[0], name), np.float64) @ turn
        found = getattr(coded.caches[0], name)
        assert found.values.dtype == CODES[codes]
        scales = np.asarray(found.scales)
        largest = 127 if codes == "int8" else 448
        np.testing.assert_allclose(scales, np.abs(expected).max(-1, keepdims=True) / largest, rtol=1e-4)
        steps = 0.5 if codes == "int8" else np.maximum(np.abs(expected / scales) * 2**-4, 2**-10)
        assert np.all(np.abs(np.asarray(found.values, np.float64) - expected / scales) < steps + 0.01)


@pytest.mark.parametrize("codes", CODES)
def test_keys_are_rotated_and_quantised_in_one_call(serve, codes):
    k = jnp.zeros((1, 2, 3, 16))
    program = str(jax.make_jaxpr(serve.numerics(codes, rotated=True).keys)(k))
    assert re.findall(r"= (hadamard\w*)", program) == ["hadamard_quantize"]


@pytest.mark.parametrize("codes", ["exact", "bfloat16", *CODES])
def test_pieces_and_steps_are_the_whole(serve, setting, exact, codes):
    """A prompt in pieces, and tokens one at a time, have the logits of one pass over all of them without a cache."""
    numerics = exact if codes == "exact" else serve.numerics(codes, rotated=True)
    graph, params = serve.create(setting.model)
    tokens = prompt(setting)
    whole = jax.jit(lambda params: serve.nnx.merge(graph, params)(tokens, numerics))(params)
    server = serve.Server(graph, params, numerics, setting)
    server.read(tokens[:, :24])
    last = server._logits
    given, steps = zip(*(server.decode(part) for part in tokens[:, 24:].T.reshape(2, 4, -1)), strict=True)
    np.testing.assert_array_equal(np.concatenate(given), tokens[:, 24:].T)
    found = np.concatenate([last[None], *steps])
    error = found - np.asarray(whole).swapaxes(0, 1)[23:]
    # Another order of sums can turn one code into the next.
    assert serve.rms(error) < (1e-5 if codes == "exact" else 0.02) * serve.rms(found)
    assert server.caches[0].length == setting.context


def test_it_decodes_the_most_likely_tokens(serve, setting, exact):
    graph, params = serve.create(setting.model)
    server = serve.Server(graph, params, exact, setting)
    tokens = prompt(setting, 8)
    server.read(tokens)
    given = np.full((4, 2), -1, np.int32)
    given[1] = 3
    found, _ = server.decode(jnp.asarray(given))
    read = jnp.concatenate([tokens, found.T], axis=1)
    logits = jax.jit(lambda params: serve.nnx.merge(graph, params)(read, serve.llama.EXACT))(params)
    likely = np.argmax(logits[:, 7:11], -1).T
    np.testing.assert_array_equal(found, np.where(given < 0, likely, given))


def test_the_cache_is_written_in_place(serve, setting):
    graph, params = serve.create(setting.model)
    server = serve.Server(graph, params, serve.numerics("int8", rotated=True), setting)
    program, before = server._model[0], jax.tree.leaves(server.caches)
    size = sum(leaf.nbytes for leaf in before)
    given = jnp.zeros((setting.steps, setting.batch), jnp.int32)
    arguments = program, params, server.caches, jnp.zeros((setting.batch, setting.model.vocab)), given
    assert serve.decode.lower(*arguments).compile().memory_analysis().alias_size_in_bytes == size
    serve.decode(*arguments)
    assert all(leaf.is_deleted() for leaf in before)


def test_planted_outliers_leave_the_model_as_it_is(serve, setting):
    logits, largest = {}, {}
    for outliers in 1, 16:
        graph, params = serve.create(setting.model, outliers=outliers)
        logits[outliers] = serve.nnx.merge(graph, params)(prompt(setting))
        largest[outliers] = np.abs(params["layers"][0]["attn"]["k_proj"]["w"][...]).max()
    np.testing.assert_allclose(logits[1], logits[16], atol=1e-4)
    assert largest[16] > 8 * largest[1]


def test_the_example(serve, setting, tmp_path, capsys, monkeypatch):
    json_file, document, image = (tmp_path / name for name in ("serve.json", "gallery.md", "serve.png"))
    model = dataclasses.replace(setting.model, head_dim=64)
    monkeypatch.setattr(serve, "SMALL", dataclasses.replace(setting, model=model, batch=4))
    serve.main(["--small", "--context", "80", "--json", str(json_file)])
    results = json.loads(json_file.read_text())
    assert results["setting"]["context"] == 80
    rows = {(row["cache"], row["rotated"]): row for row in results["rows"]}
    assert set(rows) == set(serve.CACHES)
    per_token = 2 * 2 * 2 * 64  # layers, keys and values, heads, elements
    assert {row["cache"]: row["bytes_per_token"] for row in rows.values()} == {
        "bfloat16": 2 * per_token,
        "int8": per_token + per_token // 64 * 4,
        "float8_e4m3fn": per_token + per_token // 64 * 4,
    }
    for row in rows.values():
        assert row["bytes"] == 4 * 80 * row["bytes_per_token"]
        assert len(row["step_ms"]) == 3
        assert row["tokens_per_second"] == pytest.approx(4e3 / sorted(row["step_ms"])[1])
    error = {key: row["logit_error"] for key, row in rows.items()}
    assert error["bfloat16", False] == 0
    assert 0 < error["bfloat16", True] < error["int8", True] < 0.5 * error["int8", False] < 0.1
    assert error["bfloat16", True] < error["float8_e4m3fn", False] < error["float8_e4m3fn", True] < 0.2
    assert rows["bfloat16", False]["same_tokens"] == 1

    printed = capsys.readouterr().out
    document.write_text("Before\n<!-- serve:begin -->\nold\n<!-- serve:end -->\nafter\n")
    serve.main(["--json", str(json_file), "--markdown", str(document), "--png", str(image)])
    written = document.read_text()
    for part in serve.PARTS:
        for text in part(results):
            assert text in written
            assert text in printed
    assert re.fullmatch(r"(?s)Before\n<!--.*-->\nafter\n", written)
    assert "old" not in written
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--small", "--context", "65"], "must be 64 positions .* a multiple of 64 for the prompt, got 65"),
        (["--small", "--context", "64"], "got 64"),
        (["--png", "chart.png"], "--markdown and --png show what --json FILE stores"),
    ],
)
def test_wrong_arguments(serve, arguments, message, capsys):
    with pytest.raises(SystemExit):
        serve.main(arguments)
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="the source distribution has no stored results")
def test_the_documentation_has_the_stored_table(serve):
    marked = (
        path for path in (ROOT / "docs").iterdir() if path.is_file() and "<!-- serve:begin -->" in path.read_text()
    )
    (document,) = marked
    text = document.read_text().partition("<!-- serve:begin -->")[2].partition("<!-- serve:end -->")[0]
    results = json.loads((document.parent / re.search(r"Stored in \[(.*?)\]", text)[1]).read_text())
    assert all(written in text for part in serve.PARTS for written in part(results))
