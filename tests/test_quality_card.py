"""The quality card: its numbers, where it lies, who reads it, and what is wrong with it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from quant_sources import MIXTURES, dequantized, read_output, save_source
from quant_sources import relative_error as of_tensors
from test_eval import TEXT, TableModel, table_model
from tiny_models import unfused
from torch import Tensor
from typer.testing import CliRunner

from localr1.checkpoint.paths import model_root
from localr1.checkpoint.quality import CARD_NAME, read_card
from localr1.cli.main import app
from localr1.cli.show import describe
from localr1.errors import FormatError, NotFoundError, UsageError
from localr1.hub.verify_quantized import verify_quantized
from localr1.models.step import Step
from localr1.quant import evaluate
from localr1.quant.calibration_options import CalibrationOptions
from localr1.quant.pipeline import quantize
from localr1.quant.quality_card import check_disjoint, layer_errors, make_card, write_card
from localr1.quant.recipe import Recipe

WINDOW = 256


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and what the command makes of it with --quality-card."""
    folder = tmp_path_factory.mktemp("card")
    save_source(folder / "source", max_position_embeddings=1024)
    short = folder / "short.txt"  # The built-in text takes minutes.
    short.write_text(evaluate.read_text(None)[:1500])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "DEFAULT_TEXT", short)
        patch.setattr(evaluate, "DEFAULT_WINDOW", WINDOW)
        result = run("quantize", str(folder / "source"), str(folder / "out"), "--quality-card")
    assert result.exit_code == 0, result.output
    assert "quality" in result.stdout
    return folder / "source", folder / "out"


def copied(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "copy"))


def card_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / CARD_NAME).read_text())
    return document


def test_it_has_what_eval_measures(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    card = card_of(out)
    options = ("--text", str(source.parent / "short.txt"), "--window", str(WINDOW), "--json")
    compared = json.loads(run("eval", "kl", str(out), str(source), *options).stdout)
    assert card["kl"] == compared["kl"]
    assert card["kl_p99"] == compared["kl_p99"]
    assert card["top1"] == compared["top1"]
    assert card["text"]["positions"] == compared["num_positions"]
    ratio = compared["model"]["perplexity"]["value"] / compared["reference"]["perplexity"]["value"]
    assert card["perplexity_ratio"] == pytest.approx(ratio)
    assert card["seconds"] > 0
    assert card["peak_memory_bytes"] > 1 << 20
    assert card["bytes"] == sum(
        path.stat().st_size for path in out.iterdir() if path.name != CARD_NAME
    )
    # Beside it the checkpoint is what it is without a card, byte for byte.
    quantize(source, tmp_path / "again", Recipe.uniform(4, 32))
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_errors_of_layers(model_type: str, tmp_path: Path) -> None:
    """Against those of the tensors themselves."""
    model = save_source(tmp_path / "source", model_type, **MIXTURES.get(model_type, {}))
    quantize(tmp_path / "source", tmp_path / "out", Recipe.uniform(4, 32, smooth=False))
    stored = read_output(tmp_path / "out")
    weights = dequantized(stored)
    original = {name: value.float() for name, value in unfused_state(model).items()}
    for layer in layer_errors(tmp_path / "out"):
        name = layer["layer"]
        prefix = f"model.layers.{name}." if name.isdecimal() else name
        mine = [each for each in weights if each.startswith(prefix) and f"{each}_packed" in stored]
        assert mine
        total = sum(weights[each].numel() for each in mine)
        expected = sum(
            weights[each].numel() * of_tensors(original[each], weights[each]) for each in mine
        )
        assert layer["relative_error"] == pytest.approx(expected / total, rel=1e-4)
    assert [layer["layer"] for layer in layer_errors(tmp_path / "out")][-1] == "lm_head"


def unfused_state(model: Any) -> dict[str, Tensor]:
    return {
        own: each
        for name, value in model.state_dict().items()
        for own, each in unfused(name, value).items()
    }


def test_show_has_it(made: tuple[Path, Path]) -> None:
    printed = run("show", str(made[1])).stdout
    assert re.search(r"quality +KL \d+\.\d{4} ± .* nats, 99th percentile", printed)
    assert "positions of short.txt" in printed
    assert describe(made[1])["quality"] == card_of(made[1])
    assert describe(made[0])["quality"] is None


def test_it_is_made_later_and_of_another_text(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = copied(made, tmp_path)
    (out / CARD_NAME).unlink()
    (tmp_path / "text.txt").write_text(TEXT)
    options = ("--text", str(tmp_path / "text.txt"), "--window", "32")
    command = ("eval", "card", str(out), "--reference", str(made[0]), *options)
    shown = run(*command)
    assert shown.exit_code == 0, shown.output
    assert "relative error" in shown.stdout
    assert not (out / CARD_NAME).exists()
    written = json.loads(run(*command, "--write", "--json").stdout)
    assert card_of(out) == written
    assert written["text"]["name"] == "text.txt"
    assert written["seconds"] is None
    assert read_card(model_root(out), out) == written


def checked(folder: Path) -> list[str]:
    return [
        f"{each.file}: {each.detail}" for each in verify_quantized(folder, lambda *_: None).findings
    ]


def test_verify_knows_it(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = copied(made, tmp_path)
    assert checked(out) == []
    quantize(made[0], tmp_path / "other", Recipe.uniform(8, 32))
    shutil.copy(out / CARD_NAME, tmp_path / "other" / CARD_NAME)
    assert "one of another" in checked(tmp_path / "other")[0]
    (tmp_path / "other" / CARD_NAME).unlink()
    assert checked(tmp_path / "other") == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2),
        ("kl", 0.1),
        ("kl", {"value": "small"}),
        ("kl_p99", None),
        ("layers", [1]),
        ("layers", [{"layer": "0"}]),
        ("text", {"name": "x"}),
        ("manifest_sha256", "0"),
        ("seconds", "long"),
        ("bytes", 1.5),
    ],
)
def test_a_damaged_card_is_an_error(
    key: str, value: object, made: tuple[Path, Path], tmp_path: Path
) -> None:
    out = copied(made, tmp_path)
    (out / CARD_NAME).write_text(json.dumps({**card_of(out), key: value}))
    with pytest.raises(FormatError, match=r"quality\.json"):
        read_card(model_root(out), out)
    assert len(checked(out)) == 1
    with pytest.raises(FormatError):
        describe(out)


def test_a_text_that_was_fitted_to(made: tuple[Path, Path], tmp_path: Path) -> None:
    fitted = evaluate.read_text(evaluate.DEFAULT_TEXT.with_name("calibration_text.txt"))
    check_disjoint(evaluate.read_text(None), made[1])
    with pytest.raises(UsageError, match="calibrated on"):
        check_disjoint(f"other\n{fitted[2000:4000]}", made[1])
    quantize(made[0], tmp_path / "plain", Recipe.uniform(8, 32, smooth=False))
    check_disjoint(fitted, tmp_path / "plain")
    fitting = Recipe.uniform(8, 32, smooth=False, method="imatrix")
    quantize(made[0], tmp_path / "fitted", fitting, calibration=CalibrationOptions(tokens=64))
    with pytest.raises(UsageError, match="calibrated on"):
        check_disjoint(fitted, tmp_path / "fitted")


def test_what_has_no_card(made: tuple[Path, Path], tmp_path: Path) -> None:
    table = table_model(0)
    result = evaluate.divergence(table, table, byte_tokenizer(), TEXT, 20)
    with pytest.raises(NotFoundError, match=r"there is no localr1\.json"):
        make_card(made[0], made[0], result, TEXT, "text", 20)
    card = make_card(made[1], made[0], result, TEXT, "text", 20)
    assert write_card(copied(made, tmp_path), card).name == CARD_NAME
    for options in (("--dry-run",), ("--delete-source-shards",)):
        refused = run("quantize", str(made[0]), str(tmp_path / "o"), "--quality-card", *options)
        assert isinstance(refused.exception, UsageError)


def test_kl_wants_one_to_compare_with(made: tuple[Path, Path]) -> None:
    source, out = map(str, made)
    for arguments in ((out,), (out, source, "-r", source)):
        result = run("eval", "kl", *arguments)
        assert isinstance(result.exception, UsageError)
        assert "eval kl MODEL REFERENCE" in str(result.exception)


class Counting(TableModel):
    """Counts the logits that it gives at a time."""

    most = 0

    def forward(self, step: Step, cache: Any) -> Tensor:
        self.most = max(self.most, len(step.token_ids))
        return super().forward(step, cache)


def test_logits_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the window, LOGIT_BYTES of them are held; the result is the same."""
    models = [Counting(table_model(seed).table, table_model(seed).config) for seed in (1, 2)]
    whole = evaluate.divergence(models[0], models[1], byte_tokenizer(), TEXT, 60)
    assert models[0].most == 60
    rows = 7
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", rows * 4 * models[0].config.vocab_size)
    for model in models:
        model.most = 0
    streamed = evaluate.divergence(models[0], models[1], byte_tokenizer(), TEXT, 60)
    assert [model.most for model in models] == [rows, rows]
    assert streamed.kl.value == pytest.approx(whole.kl.value, rel=1e-12)
    assert streamed.kl_p99 == pytest.approx(whole.kl_p99, rel=1e-12)
    assert torch.isfinite(torch.tensor(streamed.kl.value))
