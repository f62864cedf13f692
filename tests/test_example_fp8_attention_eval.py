"""The example of MMLU: its answers, its attention, runs that are stopped and continued, and every refusal."""

import csv
import json
import re

import checkpoints
import decoder
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scripts

pytest.importorskip("flax", reason="flax is not installed: needs the extra 'models'")
pytest.importorskip("tokenizers", reason="tokenizers is not installed: needs the extra 'models'")

import tokenizers
from flax import nnx

example = scripts.load("fp8_attention_eval")
checkpoint, mmlu = (scripts.load(name) for name in ("checkpoint", "mmlu"))

pytestmark = pytest.mark.usefixtures("x64_off", "usual_promotion")

SIZES = decoder.Config(vocab=512, inner=40, heads=8, kv_heads=4)
SUBJECTS = ("abstract_algebra", "world_history")
BATCH = ("--tokens", "1024")


@pytest.fixture(scope="module")
def tokenizer():
    """Byte pairs, trained on a few words, and a token that every prompt begins with, as Llama 3 has them."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<first>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "The following are multiple choice questions (with answers) about algebra and history"
    found.train_from_iterator([f"{words}\nAnswer: {letter}\n" for letter in "ABCD"], trainer)
    found.decoder = tokenizers.decoders.ByteLevel()
    found.post_processor = tokenizers.processors.TemplateProcessing(
        single="<first> $A", special_tokens=[("<first>", found.token_to_id("<first>"))]
    )
    return found


def write_questions(folder):
    """Five examples of each subject, and six other questions, with what a CSV file must quote."""
    draw = np.random.default_rng(0)
    for part, count in ("dev", 5), ("test", 6):
        (folder / part).mkdir(parents=True)
        for subject in SUBJECTS:
            with (folder / part / f"{subject}_{part}.csv").open("w", newline="") as file:
                for number in draw.integers(100, 1000, size=count):
                    choices = [f"{choice}, or so" for choice in draw.integers(100, size=4)]
                    csv.writer(file).writerow([f'The "{number}":\nwhich? ', *choices, draw.choice(list("ABCD"))])


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    """A folder with a checkpoint, its tokenizer and questions."""
    folder = tmp_path_factory.mktemp("source")
    params = decoder.parameters(SIZES, seed=2)
    # The last token of every prompt says little, and attends to few others, so that answers differ.
    params["model.embed_tokens.weight"][tokenizer.token_to_id(":")] *= 0.01
    for name in params:
        if "q_proj" in name:
            params[name] *= 4
    checkpoints.save_llama(folder / "model", SIZES, {name: x.astype(jnp.bfloat16) for name, x in params.items()})
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    write_questions(folder / "questions")
    return folder


@pytest.fixture
def copy(tmp_path, tokenizer):
    """Such a folder that a test may change."""
    checkpoints.save_llama(tmp_path / "model", SIZES)
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    write_questions(tmp_path / "questions")
    return tmp_path


def run(folder, *options):
    return example.main([str(folder / "model"), str(folder / "questions"), *BATCH, *map(str, options)])


def right_letters(folder):
    """By subject, read without the example."""
    found = {}
    for subject in SUBJECTS:
        with (folder / "questions" / "test" / f"{subject}_test.csv").open(newline="") as file:
            found[subject] = "".join(row[-1] for row in csv.reader(file))
    return found


@pytest.fixture(scope="module")
def results(source):
    """Those of a whole run."""
    stored = source / "results.json"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert run(source, "--json", stored) == 0
    return json.loads(stored.read_text())


class TestAnswers:
    def test_a_prompt_is_that_of_the_benchmark(self, source):
        algebra, _ = mmlu.read(source / "questions", shots=5)
        assert [len(algebra.examples), len(algebra.questions)] == [5, 6]
        prompt = algebra.prompt(algebra.questions[0], skipped=4)
        assert re.fullmatch(
            r"The following are multiple choice questions \(with answers\) about abstract algebra\.\n\n"
            r'The "\d+":\nwhich\?\nA\. \d+, or so\nB\. \d+, or so\nC\. \d+, or so\nD\. \d+, or so\nAnswer: [ABCD]\n\n'
            r'The "\d+":\nwhich\?\nA\. \d+, or so\nB\. \d+, or so\nC\. \d+, or so\nD\. \d+, or so\nAnswer:',
            prompt,
        )
        with (source / "questions" / "dev" / "abstract_algebra_dev.csv").open(newline="") as file:
            numbers = [re.findall(r"\d+", row[0])[0] for row in csv.reader(file)]
        question = re.findall(r"\d+", algebra.questions[0].text)
        assert re.findall(r'"(\d+)"', algebra.prompt(algebra.questions[0])) == [*numbers, *question]
        assert re.findall(r'"(\d+)"', prompt) == [*numbers[4:], *question]

    def test_they_are_those_of_the_definition(self, source, results, tokenizer):
        params = {name: np.asarray(x, np.float32) for name, x in read(source / "model").items()}
        letters = [tokenizer.token_to_id(f"Ġ{letter}") for letter in "ABCD"]
        found = {row["subject"]: row for row in results["rows"] if row["attention"] == "bfloat16"}
        clear = ""
        for subject in mmlu.read(source / "questions", shots=5):
            for question, answer in zip(subject.questions, found[subject.name]["answers"], strict=True):
                tokens = tokenizer.encode(subject.prompt(question)).ids
                assert tokens[0] == tokenizer.token_to_id("<first>")
                logits = decoder.logits(params, SIZES, tokens)[-1][letters]
                best = np.argmax(logits)
                if logits[best] - np.sort(logits)[-2] > 0.3:  # more than bfloat16 changes
                    assert answer == "ABCD"[best]
                    clear += answer
        assert len(clear) > 6
        assert len(set(clear)) > 2

    def test_rows_count_them(self, source, results):
        right = right_letters(source)
        assert [(row["subject"], row["attention"]) for row in results["rows"]] == [
            (subject, variant) for subject in SUBJECTS for variant in example.VARIANTS
        ]
        for row in results["rows"]:
            assert row["right"] == sum(map(str.__eq__, row["answers"], right[row["subject"]]))
            assert (row["questions"], row["shortened"]) == (6, 0)

    def test_a_head_that_always_prefers_b_has_the_share_of_b(self, copy, tokenizer, capsys):
        params = decoder.parameters(SIZES)
        # One channel of the stream is large and positive, and read by the column of B alone.
        params["model.embed_tokens.weight"][:, 0] = 1000
        params["model.norm.weight"][0] = 1
        params["lm_head.weight"][:, 0] = 0
        params["lm_head.weight"][tokenizer.token_to_id("ĠB"), 0] = 100
        checkpoints.save_llama(copy / "model", SIZES, params)
        assert run(copy, "--limit", 4) == 0
        letters = [letters[:4] for letters in right_letters(copy).values()]
        share = 100 * "".join(letters).count("B") / 8
        of_algebra = 25 * letters[0].count("B")
        assert 0 < share < 100
        printed = re.sub(" +", " ", capsys.readouterr().out)  # columns are aligned
        for variant in example.VARIANTS:
            assert re.search(rf"\| {variant} \| {share:.2f} ± [\d.]+ % \| {share:.2f} % \| 0.00 % \|", printed)
        assert f"| abstract_algebra | 4 |{3 * f' {of_algebra:.1f} |'}\n" in printed

    def test_examples_are_dropped_from_the_front_of_long_prompts(self, source, tokenizer):
        subject, _ = mmlu.read(source / "questions", shots=5)
        lengths = [len(tokenizer.encode(subject.prompt(question)).ids) for question in subject.questions]
        whole, shortened = mmlu.encoded(tokenizer, subject, max(lengths))
        assert ([len(prompt) for prompt in whole], shortened) == (lengths, 0)
        prompts, shortened = mmlu.encoded(tokenizer, subject, min(lengths) - 1)
        assert shortened == 6
        shorter = [subject.prompt(question, skipped=1) for question in subject.questions]
        assert [tokenizer.decode(prompt) for prompt in prompts] == shorter
        with pytest.raises(
            mmlu.QuestionsError, match=r"question 1 has \d+ tokens without examples, and at most 20 are"
        ):
            mmlu.encoded(tokenizer, subject, 20)

    def test_a_batch_has_few_shapes(self):
        prompts = [[1 + i] * length for i, length in enumerate([256, 3, 257, 512, 9, 600, 255])]
        found = list(example.batches(prompts, 512))
        assert [(indices, array.shape) for indices, array, _ in found] == [
            ([0, 1], (2, 256)),
            ([4, 6], (2, 256)),
            ([2], (1, 512)),
            ([3], (1, 512)),
            ([5], (1, 1024)),
        ]
        for indices, array, lengths in found:
            for index, row, length in zip(indices, array, lengths, strict=True):
                assert row[:length].tolist() == prompts[index]
                assert not row[length:].any()
        *_, (indices, array, lengths) = example.batches(prompts[:1], 512)
        assert (indices, array.shape, lengths.tolist()) == ([0], (2, 256), [256, 256])


def read(folder):
    return {name: tensor[:] for name, tensor in checkpoint.Checkpoint(folder).tensors.items()}


class TestAttention:
    @staticmethod
    def draw(tokens):
        """Queries and keys with outliers, values, and a causal mask."""
        draw = np.random.default_rng(4)
        shapes = (tokens, 4, 64), (tokens, 2, 64), (tokens, 2, 64)
        usual = [draw.standard_normal(shape) for shape in shapes]
        added = [10 * draw.standard_normal(shape) * (draw.random(shape) < 0.005) for shape in shapes[:2]]
        q, k, v = (jnp.asarray(x + y, jnp.bfloat16) for x, y in zip(usual, [*added, 0], strict=True))
        return q, k, v, jnp.tri(tokens, dtype=bool)[None]

    @pytest.mark.parametrize("rotate", [False, True])
    def test_it_multiplies_codes(self, rotate):
        q, k, v, mask = self.draw(128)
        mixed = example.fp8(q, k, v, mask, 128, scales="per tensor", rotate=rotate)
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        turn = oracle.dense(64) / 8 if rotate else np.eye(64)
        expected = attention(coded(q @ turn), coded(k @ turn), coded(v), weight=lambda w: as_e4m3(256 * w) / 256)
        assert rms(mixed - expected) < 0.01 * rms(
            expected
        )  # it is rounded to bfloat16, and a code may be the one beside
        assert rms(mixed - attention(q, k, v)) > 0.03 * rms(expected)

    @pytest.mark.parametrize("rotate", [False, True])
    @pytest.mark.parametrize("scales", ["per block", "per row"])
    def test_it_has_other_scales(self, scales, rotate):
        q, k, v, mask = self.draw(128)
        mixed, coarser = (example.fp8(q, k, v, mask, 128, scales=s, rotate=rotate) for s in (scales, "per tensor"))
        exact = attention(*(np.asarray(x, np.float64) for x in (q, k, v)))
        assert rms(mixed - exact) < 0.07 * rms(exact)
        assert rms(mixed - coarser) > 0.01 * rms(exact)

    @pytest.mark.parametrize("rotate", [False, True])
    def test_padding_does_not_matter(self, rotate):
        q, k, v, mask = self.draw(128)
        clean = example.fp8(q, k, v, mask, 100, scales="per tensor", rotate=rotate)
        q, k, v = (x.at[100:].set(1000) for x in (q, k, v))
        np.testing.assert_array_equal(example.fp8(q, k, v, mask, 100, scales="per tensor", rotate=rotate), clean)

    def test_devices_share_it(self, source, cpu_devices):
        tokens = np.random.default_rng(3).integers(SIZES.vocab, size=(2, 64)).astype(np.int32)
        lengths, letters = np.array([64, 40]), np.arange(4)
        found = checkpoint.Checkpoint(source / "model")
        one, four = (
            nnx.split(checkpoint.load(found, dtype="float32", devices=cpu_devices[:count])) for count in (1, 4)
        )
        for variant, rotate in example.VARIANTS.items():
            first, second = (
                np.asarray(
                    example.letter_logits(
                        params, tokens, lengths, letters, graph=graph, scales="per tensor", rotate=rotate
                    )
                )
                for graph, params in (one, four)
            )
            # Where a sum has another order, a number may be rounded to the code beside.
            close = 1e-5 if variant == "bfloat16" else 0.02
            np.testing.assert_allclose(second, first, atol=close * np.abs(first).max(), err_msg=variant)


def attention(q, k, v, weight=lambda w: w):
    """Causal, of grouped queries; `weight` is what is done to the weights before their product with values."""
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weight(weights), v) / weights.sum(-1).T[:, :, None]


def coded(x):
    scale = np.abs(x).max() / 448
    return as_e4m3(x / scale) * scale


def as_e4m3(x):
    return x.astype(jnp.float8_e4m3fn).astype(np.float64)


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


class TestContinued:
    def test_a_run_that_was_stopped(self, source, results, tmp_path, monkeypatch, capsys):
        stored, asked = tmp_path / "results.json", []
        rows = example.Model.rows

        def stopped(self, subject, variants, answered):
            for row in rows(self, subject, variants, answered):
                asked.append((row["subject"], row["attention"]))
                if len(asked) == 3:
                    raise KeyboardInterrupt
                yield row

        monkeypatch.setattr(example.Model, "rows", stopped)
        assert run(source, "--json", stored) == 130
        assert "interrupted; the same command continues" in capsys.readouterr().err
        assert json.loads(stored.read_text())["rows"] == results["rows"][:2]

        assert run(source, "--json", stored) == 0
        assert len(asked) == len(set(asked)) + 1  # the third is repeated
        assert json.loads(stored.read_text())["rows"] == results["rows"]
        printed = capsys.readouterr().out

        monkeypatch.setattr(example, "Model", None)  # there is nothing left to do
        assert run(source, "--json", stored) == 0
        assert capsys.readouterr().out == printed == example.markdown(results) + "\n"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--shots", 4), "has results of another run, with shots 5 instead of 4; continue that one, or store"),
            (("--scales", "per row"), "with scales 'per tensor' instead of 'per row'"),
            (("--limit", 3), "with limit None instead of 3"),
        ],
    )
    @pytest.mark.usefixtures("results")
    def test_other_arguments_are_refused(self, source, capsys, options, message):
        before = (source / "results.json").read_text()
        assert run(source, "--json", source / "results.json", *options) == 2
        assert re.search(message, capsys.readouterr().err)
        assert (source / "results.json").read_text() == before

    @pytest.mark.usefixtures("results")
    def test_other_weights_and_questions_are_refused(self, source, copy, capsys):
        stored = copy / "results.json"
        stored.write_bytes((source / "results.json").read_bytes())
        assert run(copy, "--json", stored) == 2
        assert re.search("with checkpoint 'model .*' instead of 'model .*'", capsys.readouterr().err)
        (copy / "questions" / "test" / "world_history_test.csv").write_text("q,a,b,c,d,A\n")
        assert example.main([str(source / "model"), str(copy / "questions"), "--json", str(stored)]) == 2
        assert re.search("with questions '.*' instead of '.*'", capsys.readouterr().err)

    @pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"arguments": 1}'])
    def test_other_files_are_refused(self, source, tmp_path, capsys, text):
        stored = tmp_path / "other.json"
        stored.write_text(text)
        assert run(source, "--json", stored) == 2
        assert "other.json: exists, and has no results of this program" in capsys.readouterr().err
        assert stored.read_text() == text


class TestRefused:
    @pytest.mark.parametrize(
        ("file", "text", "message"),
        [
            (
                "test/world_history_test.csv",
                "a,b,c,d,A\n",
                "world_history_test.csv, line 1: must have 6 fields, .* got 5",
            ),
            (
                "test/world_history_test.csv",
                "q,a,b,c,d,A\nq,a,b,c,d,E\n",
                "line 2: the answer must be one of A, .*got 'E'",
            ),
            ("test/world_history_test.csv", "q,a,b,c,d,AB\n", "the answer must be one of A, B, C, D, got 'AB'"),
            ("test/world_history_test.csv", 'q,"a" b,b,c,d,A\n', "not a CSV file in UTF-8"),
            ("test/world_history_test.csv", b"q\xff,a,b,c,d,A\n", "not a CSV file in UTF-8"),
            ("test/world_history_test.csv", "", "world_history_test.csv: has no questions"),
            ("dev/world_history_dev.csv", "q,a,b,c,d,A\n", "world_history_dev.csv: must have 5 examples, got 1"),
            ("dev/world_history_dev.csv", None, "world_history_dev.csv: cannot be read: No such file"),
        ],
    )
    def test_other_questions(self, copy, capsys, file, text, message):
        path = copy / "questions" / file
        if text is None:
            path.unlink()
        else:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert run(copy) == 2
        assert re.search(message, capsys.readouterr().err)

    def test_a_negative_number(self, source, capsys):
        with pytest.raises(SystemExit):
            run(source, "--shots", "-1")
        assert "expected a whole number that is not negative, got '-1'" in capsys.readouterr().err

    def test_a_folder_without_questions(self, source, tmp_path, capsys):
        assert example.main([str(source / "model"), str(tmp_path)]) == 2
        assert (
            "must have questions, test/SUBJECT_test.csv, and examples, dev/SUBJECT_dev.csv" in capsys.readouterr().err
        )

    def test_another_checkpoint(self, copy, capsys):
        checkpoints.save_llama(copy / "model", SIZES, model_type="qwen3")
        assert run(copy) == 2
        assert "model_type must be 'llama', got 'qwen3'" in capsys.readouterr().err

    def test_a_checkpoint_without_tokenizer(self, copy, capsys):
        (copy / "model" / "tokenizer.json").unlink()
        assert run(copy) == 2
        assert "tokenizer.json: no such file; the checkpoint must have its tokenizer" in capsys.readouterr().err

    def test_something_else_than_a_tokenizer(self, copy, capsys):
        (copy / "model" / "tokenizer.json").write_text("{}")
        assert run(copy) == 2
        assert "tokenizer.json: not a tokenizer" in capsys.readouterr().err

    def test_a_tokenizer_of_a_larger_model(self, copy, capsys):
        checkpoints.save_llama(copy / "model", decoder.Config(vocab=256, inner=40, heads=8, kv_heads=4))
        assert run(copy) == 2
        assert re.search("must have at most the 256 tokens of config.json, got [34]", capsys.readouterr().err)

    def test_a_tokenizer_whose_letters_are_no_tokens(self, copy, capsys):
        other = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"A": 0, " ": 1, "C": 2}, merges=[]))
        other.save(str(copy / "model" / "tokenizer.json"))
        assert run(copy) == 2
        assert 'must have one token for " A", " B", " C" and " D" each' in capsys.readouterr().err

    def test_no_tokenizers(self, source, capsys, monkeypatch):
        monkeypatch.setattr(mmlu.importlib.util, "find_spec", lambda name: None)
        assert run(source) == 2
        assert "the package tokenizers is not installed; pip install tokenizers" in capsys.readouterr().err
