"""Bits chosen for a target: never above it, the least error of all choices, and open elsewhere."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quant_sources import MIXTURES, dequantized, read_output, relative_error, save_source
from tiny_models import prompt, stored_matrix, transformer_logits
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from localr1.checkpoint.reader import open_checkpoint
from localr1.cli.main import app
from localr1.errors import LocalR1Error, MemoryLimitError, UsageError
from localr1.experts.trace import Trace, write_trace
from localr1.kernels.reference import ReferenceKernels
from localr1.models.registry import load_model, parse_config
from localr1.models.step import Step
from localr1.quant import choosing
from localr1.quant.choosing import Chosen, Target, choose, routing_shares
from localr1.quant.item_maker import ItemMaker, Piece
from localr1.quant.pipeline import quantize
from localr1.quant.plan import plan_quantization
from localr1.quant.result_size import result_bytes
from localr1.quant.units import find_units, recipe_in

IDS = prompt(0, 32)
SAME = 1e-6
"""As in test_quant_portable.py."""
INT8_ACTIVATIONS = 0.015
"""As in test_quant_experts_portable.py."""


def chosen_for(source: Path, target: Target, **options: Any) -> Chosen:
    with open_checkpoint(source) as checkpoint:
        return choose(checkpoint, target, result_bytes, **options)


def directory_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def bits_of(chosen: Chosen) -> dict[str, int]:
    """Of every matrix of the plan that was chosen."""
    return {
        item.name: item.rule.scheme.bits if item.rule else 16
        for item in chosen.plan.items
        if len(item.source.shape) == 2
    }


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("dense") / "source"
    save_source(source)
    return source


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("mixture") / "source"
    save_source(source, "deepseek_v3", **MIXTURES["deepseek_v3"], num_hidden_layers=3)
    return source


@pytest.mark.parametrize("kind", ["dense", "mixture"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_the_directory_is_never_larger(
    kind: str, share: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(kind)
    with pytest.raises(MemoryLimitError) as refused:
        chosen_for(source, Target(1, None))
    assert refused.value.exit_code == 3
    least = int(str(refused.value.expected).split()[2].replace(",", ""))
    with open_checkpoint(source) as checkpoint:
        in_eight = plan_quantization(
            checkpoint, recipe_in(8, 32, "rtn", smooth=True, is_portable=True)
        )
        most = result_bytes(checkpoint, in_eight)
    wanted = int(least + share * (most - least))
    chosen = chosen_for(source, Target(wanted, None))
    assert not chosen.plan.reasons_not_portable
    report = quantize(source, tmp_path / "out", chosen.recipe)
    assert not report.reasons_not_portable
    found = directory_bytes(tmp_path / "out")
    assert found <= wanted
    # What is unknown before, lengths of numbers in JSON, is little.
    assert result_bytes_of(source, chosen) - found < 8192
    manifest = json.loads((tmp_path / "out" / "localr1.json").read_text())
    assert manifest["target"]["bytes"] == wanted
    with pytest.raises(MemoryLimitError, match="the smallest that is possible"):
        chosen_for(source, Target(least - 1, None))


def result_bytes_of(source: Path, chosen: Chosen) -> int:
    with open_checkpoint(source) as checkpoint:
        return result_bytes(checkpoint, chosen.plan)


@pytest.mark.parametrize("bits_per_weight", [6.0, 8.0, 11.0])
def test_bits_a_weight_are_those_of_the_report(
    bits_per_weight: float, dense: Path, tmp_path: Path
) -> None:
    chosen = chosen_for(dense, Target(None, bits_per_weight))
    report = quantize(dense, tmp_path / "out", chosen.recipe)
    assert bits_per_weight - 1.0 < report.bits_per_weight <= bits_per_weight


def test_a_target_that_needs_no_quantization(dense: Path) -> None:
    with pytest.raises(MemoryLimitError, match="all in 16 bits"):
        chosen_for(dense, Target(None, 16.0))


def test_no_other_choice_has_less_error(dense: Path) -> None:
    """Every choice of the units of a model with one layer less than none to spare."""
    with open_checkpoint(dense) as checkpoint:
        plans = {
            bits: plan_quantization(
                checkpoint, recipe_in(bits, 32, "rtn", smooth=True, is_portable=True)
            )
            for bits in (4, 8)
        }
        units = find_units(plans, is_portable=True)
        errors, _ = choosing.measure(
            checkpoint, plans, units, choosing.built_in_moments(checkpoint), None, None
        )
        names = [(unit.part, unit.layer) for unit in units]
        assert names.count(("qkv", 0)) == names.count(("gate up", 1)) == 1
        assert len(units) == 9
        chosen = choose(
            checkpoint,
            Target(None, 7.0),
            result_bytes,
            moments=choosing.built_in_moments(checkpoint),
        )
    limit = 7 * chosen.plan.parameters // 8 - plans[4].nbytes + sum(u.nbytes[4] for u in units)
    best = min(
        sum(error[bits] for error, bits in zip(errors, choice, strict=True))
        for choice in itertools.product((4, 8, 16), repeat=len(units))
        if sum(u.nbytes[bits] for u, bits in zip(units, choice, strict=True)) <= limit
    )
    assert chosen.allocation.error == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_the_noise_of_head_and_embedding_counts_whole(tied: bool, tmp_path: Path) -> None:
    """In the logits and in what the first layer reads; that of a tied matrix in both."""
    save_source(tmp_path / "source", "qwen3", tie_word_embeddings=tied)
    with open_checkpoint(tmp_path / "source") as checkpoint:
        plans = {
            bits: plan_quantization(
                checkpoint, recipe_in(bits, 32, "rtn", smooth=False, is_portable=False)
            )
            for bits in (4, 8)
        }
        units = find_units(plans, is_portable=False)
        losses, relative = choosing.measure(checkpoint, plans, units, None, None, None)
        layers = parse_config(checkpoint.config).num_layers
    for unit, loss in zip(units, losses, strict=True):
        (name, *others) = (item.name for item in unit.items)
        is_whole = name in ("model.embed_tokens", "lm_head")
        expected = sum(relative[each, 4] for each in (name, *others))
        count = layers * (4 if tied else 2) if is_whole else 1
        assert loss[4] == pytest.approx(expected * count)


def test_errors_are_those_that_the_result_has(dense: Path, tmp_path: Path) -> None:
    chosen = chosen_for(dense, Target(None, 7.0, smooth=False))
    report = quantize(dense, tmp_path / "out", chosen.recipe)
    bits = bits_of(chosen)
    checked = 0
    for tensor in report.tensors:
        if tensor.relative_error is not None:
            assert tensor.relative_error == chosen.relative_errors[tensor.name, bits[tensor.name]]
            checked += 1
    assert checked > 5


class Loud:
    """Moments of a model whose first layer's inputs are loud in the first column of each group."""

    def section(self, layer: int | None) -> "Loud":
        self.layer = layer
        return self

    def inputs(self, module: str) -> Tensor:
        columns = 256 if module.endswith("down_proj") else 128
        loud = torch.arange(columns) % 32 == 0
        return torch.where(loud & (self.layer == 0), 1e6, 1.0)


def test_inputs_decide(tmp_path: Path) -> None:
    """Weights that are small beside others of their group, and rounded to nothing with 4 bits, are
    worth more bits only where their inputs are loud."""

    def make_small(model: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("_proj.weight"):
                    parameter[:, ::32] *= 0.05

    source = tmp_path / "source"
    save_source(source, adjust=make_small)
    for moments, is_more in ((None, False), (Loud(), True)):
        bits = bits_of(chosen_for(source, Target(None, 9.0), moments=moments))
        first, second = (
            sum(each for name, each in bits.items() if f"layers.{layer}." in name)
            for layer in (0, 1)
        )
        assert (first > second + 8) == is_more


def logits_in_transformers(folder: Path) -> Tensor:
    return transformer_logits(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), IDS
    )


def test_transformers_opens_a_mixed_choice(tmp_path: Path) -> None:
    """Layers that differ in their bits: patterns with numbers."""
    model = save_source(tmp_path / "source", "qwen3")
    chosen = chosen_for(tmp_path / "source", Target(None, 8.0))
    schemes = {(item.rule.name, item.rule.scheme.bits) for item in chosen.plan.items if item.rule}
    assert len(schemes) > len({name for name, _ in schemes}), "some part differs by layer"
    quantize(tmp_path / "source", tmp_path / "out", chosen.recipe)
    model.load_state_dict(dequantized(read_output(tmp_path / "out")))
    expected = transformer_logits(model, IDS)
    assert relative_error(expected, logits_in_transformers(tmp_path / "out")) < SAME


def routed(mixture: Path, favourite: int) -> Any:
    """Shares of a trace in which every token goes to one expert of each layer, and two others."""
    with open_checkpoint(mixture) as checkpoint:
        config = parse_config(checkpoint.config)
    assert config.moe is not None
    experts = np.zeros((40, len(config.moe.layers), 3), dtype=np.uint8)
    experts[:, :, 0] = favourite
    experts[:, :, 1:] = (favourite + 1 + np.arange(40)[:, None, None] % 4 + [[[0, 1]]]) % 8
    sequences = np.array([[20, 20]], dtype=np.int32)
    trace = Trace(experts, sequences, config.moe.layers, 8, "source")
    return trace, config


def test_experts_get_bits_by_how_often_they_are_chosen(tmp_path: Path) -> None:
    sizes = {**MIXTURES["deepseek_v3"], "first_k_dense_replace": 0}
    mixture = tmp_path / "source"
    source_model = save_source(mixture, "deepseek_v3", **sizes)
    trace, config = routed(mixture, favourite=3)
    target = Target(None, 7.0, is_portable=False)
    chosen = chosen_for(mixture, target, shares=routing_shares(trace, config, "trace"))
    bits = {name: each for name, each in bits_of(chosen).items() if ".mlp.experts." in name}
    assert {each for name, each in bits.items() if ".experts.3." in name} == {8}
    assert min(bits.values()) == 4
    assert chosen.plan.reasons_not_portable
    quantize(mixture, tmp_path / "out", chosen.recipe)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        model = load_model(checkpoint, ReferenceKernels())
        found = model.forward(Step(IDS, 0, all_logits=True), model.new_cache(len(IDS)))
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    for name, each in bits.items():
        rows, words = shapes[f"{name}.weight_packed"]
        assert words * 32 == each * shapes[f"{name}.weight_scale"][1] * 32, name
        assert rows in (64, 128)
    load_into(source_model, dequantized(read_output(tmp_path / "out")))
    assert relative_error(transformer_logits(source_model, IDS), found) < INT8_ACTIVATIONS


def load_into(model: Any, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in weights.items():
            is_buffer = name.endswith("e_score_correction_bias")
            place = model.get_buffer(name) if is_buffer else stored_matrix(model, name)
            place.copy_(value)


def test_a_portable_mixture_has_one_scheme_for_all_experts(mixture: Path) -> None:
    trace, config = routed(mixture, favourite=3)
    shares = routing_shares(trace, config, "trace")
    for bits_per_weight in (5.5, 7.0, 9.0):
        chosen = chosen_for(mixture, Target(None, bits_per_weight), shares=shares)
        bits = bits_of(chosen)
        assert len({each for name, each in bits.items() if ".mlp.experts." in name}) == 1
        assert {each for name, each in bits.items() if name.endswith("kv_b_proj.weight")} == {16}
        inputs = {name: each for name, each in bits.items() if "_a_proj" in name}
        assert len(inputs) == 6
        assert not chosen.plan.reasons_not_portable


def test_a_trace_of_another_model(mixture: Path, dense: Path) -> None:
    trace, config = routed(mixture, favourite=0)
    with pytest.raises(UsageError, match="expected a trace of this model"):
        routing_shares(Trace(trace.experts, trace.sequences, (0, 1), 8, "x"), config, "trace")
    with open_checkpoint(dense) as checkpoint, pytest.raises(UsageError, match="of this model"):
        routing_shares(trace, parse_config(checkpoint.config), "trace")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_goes_on_with_its_choice(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without measuring again, which a source that is partly deleted would not allow."""
    command = ("quantize", str(dense), str(tmp_path / "out"), "--target-bpw", "7.5")
    whole = run(*command[:2], str(tmp_path / "whole"), *command[3:])
    assert whole.exit_code == 0, whole.output

    make = ItemMaker.make

    def fail(maker: ItemMaker, piece: Piece) -> Any:
        if piece.item.name.startswith("model.layers.1."):
            raise KeyboardInterrupt
        return make(maker, piece)

    with monkeypatch.context() as patch:
        patch.setattr(ItemMaker, "make", fail)
        run(*command)
    assert not (tmp_path / "out").exists()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("it measures again")

    with monkeypatch.context() as patch:
        patch.setattr(choosing, "measure", refuse)
        again = run(*command)
    assert again.exit_code == 0, again.output
    shown = run("show", str(tmp_path / "out")).stdout
    assert "chosen for 7.5 bits a weight" in " ".join(shown.split())
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(ItemMaker, "make", fail)
        run(*command)
    other = run(*command[:-1], "8.5")
    assert isinstance(other.exception, LocalR1Error)
    assert "another recipe" in str(other.exception)


def test_a_dry_run_measures_and_tells(dense: Path, tmp_path: Path) -> None:
    command = ("quantize", str(dense), str(tmp_path / "out"), "--target-bpw", "7.5", "--dry-run")
    result = run(*command, "--json")
    document = json.loads(result.stdout)
    assert document["bits_per_weight"] <= 7.5
    assert document["target"]["bits_per_weight"] == 7.5
    assert document["target"]["least_possible_error"] <= document["target"]["error"] * (1 + 1e-9)
    parts = {part["part"]: part for part in document["parts"]}
    assert all(part["relative_error"] for name, part in parts.items() if name != "kept")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("asymmetric", [False, True])
def test_five_and_six_bits_where_it_need_not_be_portable(
    asymmetric: bool, dense: Path, tmp_path: Path
) -> None:
    command = ("quantize", str(dense), str(tmp_path / "out"), "--target-bpw", "6.2", "--json")
    portable = json.loads(run(*command, "--dry-run").stdout)
    assert bits_in(portable) <= {"int4", "int8"}
    options = ("--not-portable", *(("--asymmetric",) if asymmetric else ()))
    document = json.loads(run(*command, *options).stdout)
    assert bits_in(document) & {"int5", "int6"}
    assert document["bits_per_weight"] <= 6.2
    assert document["target"]["error"] < portable["target"]["error"]
    schemes = {part["scheme"] for part in document["parts"] if part["scheme"].startswith("int")}
    assert {scheme.endswith("-zp") for scheme in schemes if "int8" not in scheme} == {asymmetric}
    told = json.loads((tmp_path / "out" / "localr1.json").read_text())
    assert told["target"].get("asymmetric", False) == asymmetric


def bits_in(document: Any) -> set[str]:
    schemes = {part["scheme"] for part in document["parts"]}
    return {scheme.partition("-")[0] for scheme in schemes if scheme.startswith("int")}


def test_a_trace_on_the_command_line(mixture: Path, tmp_path: Path) -> None:
    trace, _ = routed(mixture, favourite=1)
    write_trace(trace, tmp_path / "trace.safetensors")
    command = ("quantize", str(mixture), str(tmp_path / "out"), "--target-bpw", "7", "--dry-run")
    routing = ("--not-portable", "--routing", str(tmp_path / "trace.safetensors"))
    document = json.loads(run(*command, *routing, "--json").stdout)
    experts = [t for t in document["tensors"] if ".experts.1." in t["name"]]
    assert {tensor["scheme"] for tensor in experts} == {"int8-g32"}
    assert not document["portable"]


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_calibration_file_weighs_the_errors(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Also where the method itself has no use for it: the target has had one."""
    source, stats = str(request.getfixturevalue(kind)), str(tmp_path / "stats")
    (tmp_path / "text.txt").write_text("What is larger, 9.11 or 9.9? It depends. " * 20)
    text = ("--text", str(tmp_path / "text.txt"), "--tokens", "100")
    assert run("calibrate", source, "--out", stats, *text).exit_code == 0
    command = ("quantize", source, str(tmp_path / "out"), "--target-bpw", "7", "--no-smooth")
    document = json.loads(run(*command, "--calibration", stats, "--json").stdout)
    assert document["bits_per_weight"] <= 7
    assert document["target"]["weighted_by"] == hashlib.sha256(Path(stats).read_bytes()).hexdigest()
    told = json.loads((tmp_path / "out" / "localr1.json").read_text())["target"]
    assert told["weighted_by"] == document["target"]["weighted_by"]
    without = json.loads(run(*command, "--dry-run", "--json").stdout)
    assert without["target"]["error"] != document["target"]["error"]


def test_a_target_for_a_method_that_looks_at_inputs(dense: Path, tmp_path: Path) -> None:
    """The embedding has none: it is rounded to nearest."""
    (tmp_path / "text.txt").write_text("What is larger, 9.11 or 9.9? It depends. " * 20)
    text = ("--text", str(tmp_path / "text.txt"), "--tokens", "100", "--method", "awq+gptq")
    out = tmp_path / "out"
    command = ("quantize", str(dense), str(out), "--target-bpw", "7", "--not-portable", *text)
    result = run(*command, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(result.stdout)["bits_per_weight"] <= 7
    recipe = json.loads((out / "localr1.json").read_text())["recipe"]
    methods = {(rule["name"], rule["method"]) for rule in recipe if rule["bits"] < 16}
    assert ("embedding", "rtn") in methods
    assert {method for name, method in methods if name != "embedding"} == {"gptq"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-bpw", "5", "--target-size", "1GB"), "one of the two"),
        (("--target-bpw", "5", "--bits", "4"), "--bits beside a target"),
        (("--target-size", "1GB", "--recipe", "small"), "--recipe beside a target"),
        (("--target-size", "many"), "--target-size"),
        (("--target-bpw", "5", "--asymmetric"), "--asymmetric beside a target"),
        (("--rotation-seed", "3"), "--rotate beside it"),
        (("--not-portable",), "--target-size or --target-bpw beside it"),
        (("--routing", "x"), "--target-size or --target-bpw beside it"),
    ],
)
def test_options_that_contradict(options: tuple[str, ...], message: str, dense: Path) -> None:
    result = run("quantize", str(dense), "out", "--dry-run", *options)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
