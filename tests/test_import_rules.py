"""The directions of imports, held by reading every file's imports (nothing is executed).

From the top: cli -> quant -> load -> engine -> models -> layers -> {cache, kernels}; beside them
checkpoint, tokenizer, chat_template and sampler. A module may import what its row in MAY_IMPORT
names, FOUNDATION, and its own package.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Top-level folders of the repository, and the package each is installed as.
INSTALLED_AS = {"localr1": "localr1", "quant": "localr1.quant", "cli": "localr1.cli"}

FOUNDATION = {"errors", "qtypes", "settings", "cgroup"}
EVERYTHING = {"*"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "qtypes": {"errors"},
    "settings": {"errors"},
    "checkpoint": {"kernels"},  # PackedWeight, what a packed matrix is read into.
    "token_stream": set(),
    "tokenizer_rules": {"checkpoint"},
    "tokenizer": {"checkpoint", "token_stream", "tokenizer_rules"},
    "template_worker": set(),
    "embedded": set(),
    "template_sandbox": set(),
    "chat_template": {"checkpoint", "tokenizer", "template_sandbox"},
    "candidates": set(),
    "sampler": {"candidates"},
    "heap": set(),
    "cgroup": set(),
    # What it says of kernels, speeds and budgets is asked of those who decide it.
    "doctor": {"cgroup", "experts", "kernels"},
    # Rules for file names, JSON that a stranger wrote, headers of what a cache holds; the checksum
    # of a quantized model's experts.
    "hub": {"checkpoint", "kernels"},
    "cache": {"kernels"},  # LayerCache, what attention is handed, is defined by the kernels' API.
    "kernels": set(),
    "layers": {"cache", "kernels"},
    "models": {"layers", "cache", "kernels", "checkpoint", "candidates"},
    "experts": {"checkpoint", "kernels", "layers", "models"},
    # Whole layers on a graphics card; the memory that copies go through is that of experts'.
    "card": {"models", "experts", "layers", "cache", "kernels", "candidates"},
    # Its events carry what the store of experts counted.
    "engine": {"models", "experts", "cache", "tokenizer", "chat_template", "sampler", "candidates"},
    # Conversations on disk, and what a model had read of them.
    "sessions": {"checkpoint", "kernels", "engine", "experts"},
    "structured": {"checkpoint", "tokenizer"},
    "load": EVERYTHING - {"quant", "cli"},
    "quant": EVERYTHING,
    "cli": EVERYTHING,
}
# Only these may import the upper packages; a star above does not include them.
ONLY_FROM = {"cli": {"cli"}, "quant": {"quant", "cli"}}

NEVER_TORCH = (
    "qtypes",
    "allocation",
    "recipe",
    "recipe_file",
    "batched",
    "adaptive",
    "policy",
    "victims",
    "residency",
    "replay",
    "beneath",
    "budget",
    "fit",
    "hardware",
    "synthetic",
    "footprint",
    "workspace",
    "placement",
    "prediction",
    "simulate",
    "errors",
    "settings",
    "heap",
    "known",
    "partial",
    "ranges",
    "repository",
    "selection",
    "transfer",
    "file_task",
    "arrival",
    "repository_folder",
    "pull",
    "cached",
    "describe",
    "library",
    "downloads",
    "locks",
    "trash",
    "removal",
    "prune",
    "verify",
    "verify_quantized",
    "cgroup",
    "finding",
    "nvidia",
    "cards",
    "processor",
    "power",
    "storage",
    "network",
    "terminal",
    "kernel_cache",
    "uses",
    "archive",
    "document",
    "private_file",
    "fingerprint",
    "ngrams",
    "draft_length",
)
ORACLES = {"transformers", "compressed_tensors", "llama_cpp", "xllamacpp", "hypothesis", "pytest"}
HEAVY = {
    "torch",
    "numpy",
    "bitsandbytes",
    "gguf",
    "tokenizers",
    "safetensors",
    "jinja2",
    "huggingface_hub",
    "llguidance",
    "prompt_toolkit",
    "rich",
}
# What of ours a module loaded at start may import: all else may import torch.
LIGHT_OF_OURS = (
    "localr1.__version__",
    "localr1.errors",
    "localr1.settings",
    "localr1.qtypes",
    "localr1.cli",
    "localr1.embedded",
)


@dataclass(frozen=True)
class Import:
    """One imported module, absolute. at_import: whether importing the file runs it."""

    module: str
    line: int
    at_import: bool


@dataclass(frozen=True)
class Source:
    module: str
    text: str

    @property
    def part(self) -> str:
        """The name under localr1 that the rules speak of: "checkpoint" for localr1.checkpoint.x."""
        pieces = self.module.split(".")
        return pieces[1] if len(pieces) > 1 else ""


def sources() -> Iterator[Source]:
    for folder, package in INSTALLED_AS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            pieces = [package, *(piece for piece in inner if piece != "__init__")]
            yield Source(".".join(pieces), path.read_text(encoding="utf-8"))


def is_type_checking(node: ast.If) -> bool:
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(source: Source) -> list[Import]:
    """All imports of a file; those for type checkers only are left out, as they never run."""
    found: list[Import] = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.module}:{node.lineno}: relative import"
            base = node.module or ""
            found.append(Import(base, node.lineno, at_import))
            # `from localr1 import kernels` imports localr1.kernels.
            if base.startswith("localr1"):
                found.extend(
                    Import(f"{base}.{alias.name}", node.lineno, at_import) for alias in node.names
                )
        if isinstance(node, ast.If) and is_type_checking(node):
            children: list[ast.AST] = list(node.orelse)
        else:
            children = list(ast.iter_child_nodes(node))
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in children:
            visit(child, at_import and not deferred)

    visit(ast.parse(source.text), True)
    return found


def broken_directions(source: Source) -> list[str]:
    allowed = MAY_IMPORT.get(source.part, set())
    broken = []
    for item in imports_of(source):
        pieces = item.module.split(".")
        if pieces[0] != "localr1" or len(pieces) < 2:
            continue
        target = pieces[1]
        if target == source.part or target not in MAY_IMPORT:
            continue
        if target in ONLY_FROM:
            fine = source.part in ONLY_FROM[target]
        else:
            fine = target in allowed or target in FOUNDATION or "*" in allowed
        if source.part in FOUNDATION:
            fine = target in allowed
        if not fine:
            broken.append(f"{source.module}:{item.line}: {source.part} must not import {target}")
    return list(dict.fromkeys(broken))


def broken_torch_rule(source: Source) -> list[str]:
    last = source.module.rsplit(".", 1)[-1]
    if last not in NEVER_TORCH:
        return []
    return [
        f"{source.module}:{item.line}: must not import torch"
        for item in imports_of(source)
        if item.module.split(".")[0] == "torch"
    ]


def broken_oracle_rule(source: Source) -> list[str]:
    return [
        f"{source.module}:{item.line}: {item.module} belongs to tests and benchmarks"
        for item in imports_of(source)
        if item.module.split(".")[0] in ORACLES
    ]


def commands_at_start(all_sources: list[Source]) -> set[str]:
    """The modules of the cli that importing localr1.cli.main imports: what `--help` pays for."""
    by_name = {source.module: source for source in all_sources}
    reached: set[str] = set()
    waiting = ["localr1.cli.main"]
    while waiting:
        module = waiting.pop()
        if module in reached or module not in by_name:
            continue
        reached.add(module)
        waiting += [item.module for item in imports_of(by_name[module]) if item.at_import]
    return {module for module in reached if module.startswith("localr1.cli")}


def broken_cli_weight(source: Source) -> list[str]:
    """A module loaded at start imports no library that costs time, nor one of ours that may."""
    return [
        f"{source.module}:{item.line}: {item.module} must be imported inside a function"
        for item in imports_of(source)
        if item.at_import
        and (
            item.module.split(".")[0] in HEAVY
            or (item.module.startswith("localr1.") and not item.module.startswith(LIGHT_OF_OURS))
        )
    ]


def broken_environment_rule(source: Source) -> list[str]:
    """Only settings reads os.environ; os.getenv is the same thing by another name."""
    if source.part == "settings":
        return []
    names = {"environ", "environb", "getenv", "getenvb"}
    lines = []
    for node in ast.walk(ast.parse(source.text)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            lines += [node.lineno for alias in node.names if alias.name in names]
    return [f"{source.module}:{line}: only settings.py reads the environment" for line in lines]


RULES = {
    "directions": broken_directions,
    "never torch": broken_torch_rule,
    "oracles": broken_oracle_rule,
    "light start": broken_cli_weight,
    "environment": broken_environment_rule,
}


@pytest.mark.parametrize("rule", RULES)
def test_every_file_keeps_the_rule(rule: str) -> None:
    checked = list(sources())
    if rule == "light start":
        at_start = commands_at_start(checked)
        assert {"localr1.cli.main", "localr1.cli.output"} <= at_start
        checked = [source for source in checked if source.module in at_start]
    broken = [line for source in checked for line in RULES[rule](source)]
    assert not broken, "\n".join(broken)


def test_the_rules_know_every_part() -> None:
    parts = {source.part for source in sources()} - {""}
    assert parts <= set(MAY_IMPORT), f"no rule for {sorted(parts - set(MAY_IMPORT))}"
    assert {"cli", "checkpoint", "kernels"} <= parts


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [
        ("directions", "localr1.checkpoint.index", "from localr1.models.api import Model"),
        ("directions", "localr1.models.llama", "from localr1 import engine"),
        ("directions", "localr1.layers.mlp", "import localr1.models.registry"),
        ("directions", "localr1.engine.engine", "def f():\n    from localr1.quant import recipe"),
        ("directions", "localr1.quant.writer", "from localr1.cli.output import Output"),
        ("directions", "localr1.load", "from localr1.cli import chat"),
        ("directions", "localr1.errors", "from localr1.settings import read_settings"),
        ("directions", "localr1.sampler", "if a:\n    from localr1.models import step"),
        ("never torch", "localr1.qtypes", "def f():\n    from torch import Tensor"),
        ("never torch", "localr1.experts.policy", "import torch.nn"),
        ("oracles", "localr1.models.qwen2", "try:\n    import transformers\nexcept E: pass"),
        ("light start", "localr1.cli.show", "import torch"),
        (
            "light start",
            "localr1.cli.show",
            "from localr1.checkpoint.reader import open_checkpoint",
        ),
        ("light start", "localr1.cli.show", "class A:\n    import numpy"),
        ("environment", "localr1.kernels.native", "import os\nos.environ.get('X')"),
        ("environment", "localr1.kernels.native", "from os import getenv"),
    ],
)
def test_a_planted_import_is_found(rule: str, module: str, text: str) -> None:
    assert RULES[rule](Source(module, text)), f"{rule} does not see: {text}"


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [
        ("directions", "localr1.models.llama", "from localr1.layers.norm import RMSNorm"),
        ("directions", "localr1.cli.quantize", "from localr1.quant.pipeline import quantize"),
        ("light start", "localr1.cli.show", "def f():\n    import torch"),
        ("light start", "localr1.cli.show", "from localr1.errors import UsageError"),
        (
            "light start",
            "localr1.cli.show",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        ),
        ("environment", "localr1.settings", "import os\nos.environ.get('X')"),
    ],
)
def test_what_is_allowed_is_not_reported(rule: str, module: str, text: str) -> None:
    assert not RULES[rule](Source(module, text))
