"""GPTQ against the formulas of its paper, and what it is given of a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quant_sources import (
    MIXTURES,
    dequantized,
    read_output,
    relative_error,
    save_source,
    write_source,
)
from test_quant_calibrated import inputs_of, recipe, spread, uneven_inputs
from test_quant_calibration import IDS, _routing
from test_quant_calibration import inputs_of as transformer_inputs
from test_quant_methods import gaussian
from torch import Tensor

from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import MemoryLimitError, NumericsError
from localr1.models.registry import parse_config
from localr1.qtypes import QuantScheme
from localr1.quant import preparer
from localr1.quant.calibrate import Calibration
from localr1.quant.hessians import ROUNDING, hessian_bytes
from localr1.quant.methods.base import Inputs
from localr1.quant.methods.gptq import DAMPING, SHRINKAGE, Gptq
from localr1.quant.methods.rtn import RoundToNearest
from localr1.quant.moments import RARE_TOKENS
from localr1.quant.pipeline import dry_run, quantize

SCHEME = QuantScheme(4, 32)


def textbook(weight: Tensor, scale: Tensor, hessian: Tensor, order: Tensor) -> Tensor:
    """Codes by section 3.1 of the paper, equations 2 and 3, with the inverse itself: float64, one
    column after another, the inverse of what is left by Gaussian elimination."""
    w = weight.double().clone()
    damped = (1 - SHRINKAGE) * hessian + SHRINKAGE * torch.diag(hessian.diagonal())
    damped.diagonal().add_(DAMPING * float(hessian.diagonal().mean()))
    inverse = torch.linalg.inv(damped)
    codes = torch.zeros_like(w)
    wide = scale.double().repeat_interleave(SCHEME.group_size, dim=1)
    for j in order.tolist():
        codes[:, j] = (w[:, j] / wide[:, j]).round().clamp(SCHEME.code_min, SCHEME.code_max)
        error = w[:, j] - codes[:, j] * wide[:, j]
        w -= (error / inverse[j, j])[:, None] * inverse[j]
        inverse = inverse - inverse[:, j, None] * inverse[j] / inverse[j, j]
        inverse[j, j] = 1.0  # Of a column that is done: nothing reads it any more.
    return codes


def test_codes_are_those_of_the_textbook() -> None:
    weight, x = gaussian(16, 160), uneven_inputs(600, 160)
    hessian = x.T @ x / len(x)
    found = Gptq().quantize_for(inputs_of(x), weight, SCHEME, torch.bfloat16, "w")
    order = hessian.diagonal().argsort(descending=True)
    expected = textbook(weight, found.scale.float(), hessian, order)
    # A code in a thousand may lie so near a half that float32 rounds it the other way, which
    # changes what comes after it in its row.
    same_rows = (found.codes == expected).all(1)
    assert int(same_rows.sum()) >= 15
    natural = textbook(weight, found.scale.float(), hessian, torch.arange(160))
    assert not (found.codes == natural).all(1).any(), "the order matters, and is seen here"


def test_inputs_that_are_not_related_leave_nothing_to_make_up_for() -> None:
    weight = gaussian(8, 96)
    sizes = torch.rand(96, dtype=torch.float64) + 0.5
    inputs = Inputs(sizes.float(), lambda: torch.diag(sizes))
    plain = RoundToNearest().quantize(weight, SCHEME, torch.bfloat16, "w", sizes.float())
    found = Gptq().quantize_for(inputs, weight, SCHEME, torch.bfloat16, "w")
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scale, plain.scale)
    nothing = Inputs(sizes.float(), lambda: torch.zeros(96, 96, dtype=torch.float64))
    found = Gptq().quantize_for(nothing, weight, SCHEME, torch.bfloat16, "w")
    assert torch.equal(found.codes, plain.codes)


def test_fewer_tokens_than_columns_are_enough_and_nonsense_is_named() -> None:
    weight, x = gaussian(8, 128), uneven_inputs(20, 128)
    found = Gptq().quantize_for(inputs_of(x), weight, SCHEME, torch.bfloat16, "w")
    assert bool(found.scale.isfinite().all())
    wrong = Inputs(torch.ones(128), lambda: torch.full((128, 128), 2.0).double().fill_diagonal_(1))
    with pytest.raises(NumericsError, match=r"w: the products of its inputs.*positive definite"):
        Gptq().quantize_for(wrong, weight, SCHEME, torch.bfloat16, "w")


def test_rows_beyond_a_chunk_are_each_by_themselves() -> None:
    weight, x = gaussian(300, 64), uneven_inputs(200, 64)
    whole = Gptq().quantize_for(inputs_of(x), weight, SCHEME, torch.bfloat16, "w")
    last = Gptq().quantize_for(inputs_of(x), weight[256:], SCHEME, torch.bfloat16, "w")
    assert torch.equal(whole.codes[256:], last.codes)


CLOSE = 1e-3
"""Relative to the largest entry, of products in float64 of activations that transformers has in
float32; measured below 1e-5."""


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected.detach()).abs().max()) < CLOSE * float(expected.abs().max())


@pytest.mark.parametrize("model_type", ["llama", *MIXTURES])
def test_hessians_are_of_what_transformers_computes(model_type: str, tmp_path: Path) -> None:
    model = save_source(tmp_path / "source", model_type, **MIXTURES.get(model_type, {}))
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith((".gate", "kv_b_proj"))
    }
    expected = transformer_inputs(model, IDS, linears.__contains__)
    with open_checkpoint(tmp_path / "source") as checkpoint:
        config = parse_config(checkpoint.config)
        calibration = Calibration(checkpoint, config, IDS)
        calibration.embed()
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}."
            experts = [
                f"{prefix}mlp.experts.{e}.{m}_proj" for e in range(8) for m in ("up", "down")
            ]
            mine = [name for name in linears if name.startswith(prefix)]
            moments = calibration.layer(layer, [*mine, *experts])
            assert moments.hessians is not None
            for name in mine:
                x = expected[name].double()
                assert_close(moments.hessians.of(name), x.T @ x / len(x))
            if moments.experts is not None:
                _check_experts(model, layer, moments, f"{prefix}mlp.experts")


def _check_experts(model: Any, layer: int, moments: Any, prefix: str) -> None:
    name = f"model.layers.{layer}.mlp"
    x = transformer_inputs(model, IDS, name.__eq__)[name].double()
    assert_close(moments.hessians.of(f"{prefix}.3.up_proj"), x.T @ x / len(x))
    chosen, weights = _routing(model, layer, x)
    experts = model.model.layers[layer].mlp.experts
    own, tokens, mass = [], [], []
    for expert in range(len(moments.experts.tokens)):
        rows, column = (chosen == expert).nonzero(as_tuple=True)
        squares = weights[rows, column].double().square()
        gate, up = (x[rows] @ experts.gate_up_proj[expert].double().T).chunk(2, dim=1)
        inner = torch.nn.functional.silu(gate) * up
        own.append((inner * squares[:, None]).T @ inner)
        tokens.append(len(rows))
        mass.append(float(squares.sum()))
    of_layer = torch.stack(own).sum(0) / sum(mass)
    assert sum(tokens) > 0
    for expert, count in enumerate(tokens):
        mean = own[expert] / mass[expert] if count else own[expert]
        expected = (count * mean + RARE_TOKENS * of_layer) / (count + RARE_TOKENS)
        assert_close(moments.hessians.of(f"{prefix}.{expert}.down_proj"), expected)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "deepseek_v3"])
def test_a_layer_reads_what_the_quantized_ones_before_it_made(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_source(
        tmp_path / "source", model_type, adjust=spread, **MIXTURES.get(model_type, {})
    )
    seen: list[Tensor] = []
    really_layer = Calibration.layer

    def layer(self: Calibration, index: int, wanted: Any = ()) -> Any:
        if wanted:
            seen.append(self.hidden.clone())
        return really_layer(self, index, wanted)

    monkeypatch.setattr(Calibration, "layer", layer)
    monkeypatch.setattr(preparer, "calibration_windows", lambda *_: IDS)
    quantize(tmp_path / "source", tmp_path / "out", recipe("gptq"))
    weights = dequantized(read_output(tmp_path / "out"))
    config = model.config.to_dict()
    write_source(tmp_path / "dequantized", {**config, "tie_word_embeddings": False}, weights)
    before, after = (_hidden_of(tmp_path / name) for name in ("source", "dequantized"))
    assert len(seen) == len(after) - 1
    for index, hidden in enumerate(seen):
        assert relative_error(after[index], hidden) < 1e-10
        if index:
            assert relative_error(before[index], hidden) > 1e-6


def _hidden_of(folder: Path) -> list[Tensor]:
    """What each layer reads, and the head."""
    with open_checkpoint(folder) as checkpoint:
        config = parse_config(checkpoint.config)
        calibration = Calibration(checkpoint, config, IDS)
        calibration.embed()
        hidden = [calibration.hidden.clone()]
        for layer in range(config.num_layers):
            calibration.layer(layer)
            hidden.append(calibration.hidden.clone())
    return hidden


def test_too_little_memory_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = "model.layers.3"
    columns = {
        f"{layer}.self_attn.q_proj": 64,
        f"{layer}.self_attn.k_proj": 64,
        f"{layer}.self_attn.o_proj": 32,
        f"{layer}.mlp.down_proj": 128,
    }
    needed = 8 * (64**2 + 32**2 + (1 + ROUNDING) * 128**2)
    assert hessian_bytes({**columns, "model.layers.4.self_attn.o_proj": 32}) == needed
    experts = {f"{layer}.mlp.experts.{number}.down_proj": 16 for number in range(256)}
    assert hessian_bytes({**columns, **experts}) == needed + 8 * 16**2

    save_source(tmp_path / "source")
    monkeypatch.setattr(preparer, "available_memory", lambda: 100_000)
    for begin in (dry_run, lambda *made: quantize(made[0], tmp_path / "out", made[1])):
        with pytest.raises(MemoryLimitError, match=r"awq\+imatrix or --recipe balanced"):
            begin(tmp_path / "source", recipe("gptq"))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    assert dry_run(tmp_path / "source", recipe("imatrix")).calibrated is not None
