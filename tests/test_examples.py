"""The examples run, and show what they say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import scripts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def fp8_attention():
    return scripts.load("fp8_attention")


class TestFP8Attention:
    @pytest.mark.usefixtures("usual_promotion")
    def test_rotation_lowers_the_error(self, fp8_attention, tmp_path, capsys):
        stored, document = tmp_path / "results.json", tmp_path / "document.md"
        fp8_attention.main(["--small", "--json", str(stored)])
        results = json.loads(stored.read_text())
        error = {
            (row["model"], row["phase"], row["scales"], row["rotated"]): np.array(row["rmse"])
            for row in results["rows"]
        }
        assert len(error) == 2 * 2 * (1 + 3 * 2)
        assert all(np.all((values > 0) & (values < 0.05)) for values in error.values())  # and so no NaN
        for model in fp8_attention.MODELS:
            for phase in ("prefill", "decode"):
                plain, rotated = (error[model, phase, "per tensor", rotate] for rotate in (False, True))
                assert plain.mean() > 1.2 * rotated.mean()
                assert error[model, phase, "bfloat16", False].mean() < 0.1 * rotated.mean()
                assert error[model, phase, "per row", False].mean() < plain.mean()
        printed = capsys.readouterr().out
        assert printed == "\n\n".join(fp8_attention.tables(results)) + "\n"

        document.write_text("Before\n<!-- fp8-attention:begin -->\nold\n<!-- fp8-attention:end -->\nafter\n")
        fp8_attention.main(["--json", str(stored), "--markdown", str(document)])
        assert printed in document.read_text()
        assert "![" not in document.read_text()
        assert "old" not in document.read_text()
        assert re.fullmatch(r"(?s)Before\n<!--.*-->\nafter\n", document.read_text())

    @pytest.mark.parametrize("rotate", [False, True])
    @pytest.mark.parametrize("scales", ["per tensor", "per block", "per row"])
    def test_the_operands_are_those_of_the_scores(self, fp8_attention, scales, rotate):
        q, k, v = fp8_attention.draw(0, 2, 8, 128)
        codes = fp8_attention.operands(q, k, v, scales=scales, rotate=rotate)
        q8, k8, v8 = (np.asarray(part[0], np.float64) for part in codes)
        q_scale, k_scale, v_scale = (np.asarray(part[1], np.float64) for part in codes)
        exact_q, exact_k, exact_v = (np.asarray(x, np.float64) for x in (q, k, v))
        scores = (q8 * q_scale) @ (k8 * k_scale).swapaxes(1, 2)
        exact = exact_q @ exact_k.swapaxes(1, 2)
        # Roundings of 2^-4, of d products each.
        assert np.std(scores - exact) < 2**-4 * np.std(exact)
        np.testing.assert_allclose(v8 * np.repeat(v_scale, 64, axis=1), exact_v, rtol=2**-4, atol=2e-3)
        count = {"per tensor": 1, "per block": 2 * 1, "per row": 2 * 8}[scales]
        assert len(np.unique(q_scale)) == count

    def test_scales_per_row_help_because_the_largest_entry_is_exact(self, fp8_attention):
        bfloat16 = fp8_attention.draw(0, 8, 512, 512)
        q, k, v = (np.asarray(x, np.float64) for x in bfloat16)
        exact = fp8_attention.float64_attention(q, k, v)

        def error(scales, mend=False):
            """Of attention on the quantised q and k, with the largest entry of each row exact where `mend`."""
            operands = fp8_attention.operands(*bfloat16, scales=scales, rotate=False)
            left = [np.asarray(codes, np.float64) * np.asarray(scale, np.float64) for codes, scale in operands[:2]]
            if mend:
                left = [
                    np.where(np.abs(x) == np.abs(x).max(axis=-1, keepdims=True), x, y)
                    for x, y in zip((q, k), left, strict=True)
                ]
            return fp8_attention.rms(fp8_attention.float64_attention(*left, v) - exact)

        assert error("per tensor") > 1.2 * error("per row")
        assert error("per tensor", mend=True) == pytest.approx(error("per row"), rel=0.1)

    @pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="the source distribution has no stored results")
    def test_the_documentation_has_the_stored_tables(self, fp8_attention, tmp_path):
        text = (ROOT / "docs" / "quantization.md").read_text()
        link = re.search(r"Stored in \[(.*?fp8-attention.json)\]", text)[1]
        document = tmp_path / "docs" / "quantization.md"
        document.parent.mkdir()
        document.write_text(text.replace("RMSE", ""))
        stored = document.parent / link
        stored.parent.mkdir(parents=True)
        stored.write_bytes((ROOT / "docs" / link).read_bytes())
        fp8_attention.main(["--json", str(stored), "--markdown", str(document)])
        assert document.read_text() == text

    def test_wrong_arguments(self, fp8_attention, capsys):
        with pytest.raises(SystemExit):
            fp8_attention.main(["--markdown", "document.md"])
        assert "--markdown shows what --json FILE stores" in capsys.readouterr().err
