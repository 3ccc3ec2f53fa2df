"""Recipes as files: what they mean, what a mistake in one says, and the presets."""

import json
from pathlib import Path
from typing import Any

import pytest
from quant_sources import MIXTURES, save_source
from typer.testing import CliRunner

from localr1.cli.main import app
from localr1.errors import (
    FormatError,
    LocalR1Error,
    NotFoundError,
    UnsupportedError,
    UsageError,
)
from localr1.qtypes import QuantScheme
from localr1.quant.methods import registry
from localr1.quant.pipeline import dry_run, quantize
from localr1.quant.recipe import HEAD, KEEP_BITS, Keep, Recipe, Rule
from localr1.quant.recipe_file import PRESETS, find_recipe, read_recipe

METHODS = ("rtn", "other")
WITH_ZERO_POINTS = ("rtn",)
PORTABLE = PRESETS[:3]

WHOLE = r"""
description = "for a test"
smooth = false
awq = true
group = 64
method = "other"

[[dense]]
pattern = '.*layers\.0\..*_proj$'
name = "first"
bits = 16

[[dense]]
part = "attention"
bits = 8
group = 32

[[dense]]
part = "mlp"
bits = 4
method = "rtn"
symmetric = false

[[mixture]]
part = "experts"
bits = 4
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def preset_named(name: str) -> Recipe:
    return find_recipe(name, registry.METHODS, registry.WITH_ZERO_POINTS)


def test_every_key_is_honoured(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, WHOLE), METHODS, WITH_ZERO_POINTS)
    first, attention, mlp = recipe.rules
    assert isinstance(first, Keep)
    assert isinstance(attention, Rule)
    assert isinstance(mlp, Rule)
    assert (attention.scheme, attention.method) == (QuantScheme(8, 32), "other")
    assert (mlp.scheme, mlp.method) == (QuantScheme(4, 64, symmetric=False), "rtn")
    assert not recipe.smooth
    assert recipe.awq
    dense = recipe.for_model(is_mixture=False)
    assert dense.rule_for("model.layers.0.mlp.up_proj") is None
    assert dense.rule_for("model.layers.1.mlp.up_proj") == mlp
    assert dense.rule_for("lm_head") is None, "what no rule matches is kept"
    (experts,) = recipe.for_model(is_mixture=True).rules
    assert isinstance(experts, Rule)
    assert experts.scheme == QuantScheme(4, 64)
    assert dense.to_json()[0] == {
        "name": "first",
        "pattern": first.pattern,
        "bits": KEEP_BITS,
    }


MISTAKES: dict[str, tuple[str, type[LocalR1Error], str]] = {
    "no TOML": ("[[dense]\n", FormatError, r"mine\.toml: is not valid TOML: found .*line 1"),
    "an unknown key": ("bits = 4\n", FormatError, r"mine\.toml: key 'bits': expected one of desc"),
    "an unknown key of a rule": (
        '[[dense]]\npart = "mlp"\nbits = 4\nbit = 8\n',
        FormatError,
        r"mine\.toml: dense rule 1: key 'bit'",
    ),
    "no rule": ('description = "x"\n', FormatError, "expected a rule"),
    "rules that quantize nothing": (
        '[[dense]]\npart = "mlp"\nbits = 16\n',
        FormatError,
        "expected a rule",
    ),
    "both": (
        '[[dense]]\npart = "mlp"\npattern = "x"\nbits = 4\n',
        FormatError,
        "either part or pattern, found both",
    ),
    "neither": ("[[mixture]]\nbits = 4\n", FormatError, "mixture rule 1: .*found neither"),
    "an unknown part": (
        '[[dense]]\npart = "experts"\nbits = 4\n',
        FormatError,
        "part: expected attention or mlp or head or embedding, found 'experts'",
    ),
    "no bits": ('[[dense]]\npart = "mlp"\n', FormatError, r"rule 1 \(mlp\): bits is missing"),
    "bits as text": (
        '[[dense]]\npart = "mlp"\nbits = "4"\n',
        FormatError,
        r"bits: expected a whole number, found '4'",
    ),
    "other bits": (
        '[[dense]]\npart = "mlp"\nbits = 8\n[[dense]]\npart = "head"\nbits = 7\n',
        UnsupportedError,
        r"dense rule 2 \(head\): bits: expected 4 or 5 or 6 or 8 or 16, found 7",
    ),
    "another group": (
        'group = 48\n[[dense]]\npart = "mlp"\nbits = 4\n',
        UnsupportedError,
        "group: expected 32 or 64 or 128, found 48",
    ),
    "groups that are no numbers": (
        '[[dense]]\npart = "mlp"\nbits = 4\ngroup = [32, "64"]\n',
        UnsupportedError,
        "group: expected 32 or 64 or 128, found '64'",
    ),
    "no group": (
        '[[dense]]\npart = "mlp"\nbits = 4\ngroup = []\n',
        FormatError,
        "group: expected at least one",
    ),
    "another method": (
        '[[dense]]\npart = "mlp"\nbits = 4\nmethod = "magic"\n',
        UnsupportedError,
        "method: expected rtn or other, found 'magic'",
    ),
    "zero points by a method without": (
        '[[dense]]\npart = "mlp"\nbits = 4\nmethod = "other"\nsymmetric = false\n',
        UnsupportedError,
        "method: expected rtn, found 'other'",
    ),
    "zero points for 8 bits": (
        '[[dense]]\npart = "mlp"\nbits = 8\nsymmetric = false\n',
        UnsupportedError,
        "symmetric = false: expected fewer bits",
    ),
    "awq as text": (
        'awq = "yes"\n',
        FormatError,
        "awq: expected true or false, found 'yes'",
    ),
    "a group of what is kept": (
        '[[dense]]\npart = "mlp"\nbits = 16\ngroup = 32\n',
        FormatError,
        "group: expected none beside bits = 16",
    ),
    "a pattern that is none": (
        '[[dense]]\npattern = "(a"\nbits = 4\n',
        FormatError,
        "pattern: expected a regular expression",
    ),
    "smooth as a number": ("smooth = 1\n", FormatError, "smooth: expected true or false, found 1"),
    "a rule that is no table": ("dense = [4]\n", FormatError, r"a table, \[\[dense\]\], found 4"),
    "rules that are no list": ("[dense]\nbits = 4\n", FormatError, "dense: expected tables"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_names_its_place(case: str, tmp_path: Path) -> None:
    text, kind, message = MISTAKES[case]
    with pytest.raises(kind, match=message):
        read_recipe(written(tmp_path, text), METHODS, WITH_ZERO_POINTS)


def test_the_first_group_that_divides_all_of_a_rule(tmp_path: Path) -> None:
    """One group a rule, or the experts' gate and down would have different schemes."""
    sizes = {**MIXTURES["deepseek_v3"], "moe_intermediate_size": 96}
    save_source(tmp_path / "source", "deepseek_v3", **sizes)
    experts = [[128, 64, 32], [128, 64]]
    text = '[[mixture]]\npart = "experts"\nbits = 4\ngroup = '
    recipes = [read_recipe(written(tmp_path, f"{text}{each}"), METHODS) for each in experts]
    schemes = {tensor.scheme for tensor in dry_run(tmp_path / "source", recipes[0]).tensors}
    assert schemes == {"bf16", "f32", "int4-g32"}
    with pytest.raises(UnsupportedError, match="group size 128: expected a divisor of its 96"):
        dry_run(tmp_path / "source", recipes[1])


def test_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"expected small, balanced, quality, local, or a file"):
        find_recipe("smalll", METHODS)
    with pytest.raises(NotFoundError, match=r"a\.toml: there is no such recipe"):
        find_recipe(str(tmp_path / "a.toml"), METHODS)
    assert find_recipe(str(written(tmp_path, WHOLE)), METHODS, WITH_ZERO_POINTS).rules


def test_rules_of_the_other_kind_alone(tmp_path: Path) -> None:
    save_source(tmp_path / "dense")
    text = '[[mixture]]\npart = "experts"\nbits = 4\n'
    with pytest.raises(UnsupportedError, match="rules for a dense model"):
        dry_run(tmp_path / "dense", read_recipe(written(tmp_path, text), METHODS))


def test_overlapping_rules_are_refused(tmp_path: Path) -> None:
    """config.json cannot say them: its groups are in another order."""
    save_source(tmp_path / "source")
    text = "[[dense]]\npattern = '.*up_proj$'\nbits = 4\n[[dense]]\npart = \"mlp\"\nbits = 8\n"
    with pytest.raises(UnsupportedError, match="patterns that do not overlap"):
        dry_run(tmp_path / "source", read_recipe(written(tmp_path, text), METHODS))


@pytest.mark.parametrize("preset", PORTABLE)
@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_preset_keeps_a_mixture_portable(preset: str, model_type: str, tmp_path: Path) -> None:
    save_source(tmp_path / "source", model_type, **MIXTURES[model_type])
    report = dry_run(tmp_path / "source", preset_named(preset))
    assert not report.reasons_not_portable
    for tensor in report.tensors:
        is_routed = ".mlp.experts." in tensor.name
        assert is_routed or not tensor.scheme.startswith("int4"), tensor.name
        if tensor.name.endswith("kv_b_proj.weight"):
            assert tensor.scheme == "bf16"
        assert is_routed == (tensor.part == "experts")


def test_presets_go_from_small_to_large(tmp_path: Path) -> None:
    save_source(tmp_path / "dense")
    save_source(tmp_path / "mixture", "deepseek_v3", **MIXTURES["deepseek_v3"])
    for source in ("dense", "mixture"):
        sizes = [dry_run(tmp_path / source, preset_named(name)).nbytes for name in PORTABLE]
        assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_what_is_for_localr1_alone_says_so(kind: str, tmp_path: Path) -> None:
    model_type = {"dense": "llama", "mixture": "deepseek_v3"}[kind]
    save_source(tmp_path / "source", model_type, **MIXTURES.get(model_type, {}))
    report = dry_run(tmp_path / "source", preset_named("local"))
    assert any("packed embeddings" in reason for reason in report.reasons_not_portable)
    schemes = {tensor.part: tensor.scheme for tensor in report.tensors}
    most = schemes["mlp" if kind == "dense" else "experts"]
    assert most == {"dense": "int5-g32-zp", "mixture": "int5-g32"}[kind]


@pytest.mark.parametrize("awq", ["true", '"dense"'])
def test_awq_of_dense_models_alone(awq: str, tmp_path: Path) -> None:
    rules = '[[dense]]\npart = "mlp"\nbits = 4\n[[mixture]]\npart = "experts"\nbits = 4\n'
    recipe = read_recipe(written(tmp_path, f"awq = {awq}\n{rules}"), METHODS)
    assert recipe.for_model(is_mixture=False).awq
    assert recipe.for_model(is_mixture=True).awq == (awq == "true")


@pytest.mark.parametrize(
    ("recipe", "tokens"), [("small", 8192), ("balanced", 1024), ("quality", 1024), ("local", 8192)]
)
def test_a_dry_run_says_what_it_reads(recipe: str, tokens: int, tmp_path: Path) -> None:
    save_source(tmp_path / "source", max_position_embeddings=1024)
    command = ("quantize", str(tmp_path / "source"), "out", "--recipe", recipe, "--dry-run")
    said = f"calibrates  {tokens:,} tokens of calibration_text.txt, a layer in memory at a time"
    assert said in run(*command).stdout
    document = json.loads(run(*command, "--json").stdout)
    assert document["calibration"]["tokens"] == tokens
    options = ("--bits", "4", "--no-smooth", "--dry-run")
    assert "calibrat" not in run("quantize", str(tmp_path / "source"), "out", *options).stdout


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_takes_a_recipe(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_source(source)
    done = run("quantize", str(source), str(out), "--recipe", "balanced", "--json")
    assert done.exit_code == 0, done.output
    assert "tensors" not in json.loads(done.stdout)
    recipe = json.loads((out / "localr1.json").read_text())["recipe"]
    assert [(rule["name"], rule["bits"]) for rule in recipe][-1] == ("head", 8)
    assert recipe[-1]["pattern"] == HEAD
    directly = tmp_path / "directly"
    quantize(source, directly, preset_named("balanced"))
    for path in directly.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    "option",
    [("--bits", "4"), ("-g", "32"), ("--head-bits", "8"), ("--no-smooth",), ("--method", "rtn")],
)
def test_an_option_that_a_recipe_says_is_refused(option: tuple[str, ...], tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    result = run(
        "quantize", str(tmp_path / "source"), str(tmp_path / "out"), "--recipe", "small", *option
    )
    assert isinstance(result.exception, UsageError)
    assert "beside --recipe" in str(result.exception)


def test_a_dry_run_shows_every_tensor(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_source(source)
    command = ("quantize", str(source), str(tmp_path / "out"), "--recipe", "small", "--dry-run")
    document = json.loads(run(*command, "--json").stdout)
    assert sum(tensor["nbytes"] for tensor in document["tensors"]) == document["bytes"]
    lines = run(*command, "--verbose").stdout
    assert all(tensor["name"] in lines for tensor in document["tensors"])
    assert document["tensors"][2]["name"] not in run(*command).stdout
    without = run(*command[:-1], "--verbose")
    assert isinstance(without.exception, UsageError)
