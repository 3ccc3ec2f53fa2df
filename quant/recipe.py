"""What becomes of each tensor: a scheme and a method, or kept as it is.

A recipe is a list of rules, the first that matches a module's name wins; what no rule matches is
kept in 16 bits. A rule's pattern is written to config.json as it stands, so that every loader of
the checkpoint applies the rule that made it. Pure Python: never imports torch.
"""

import re
from dataclasses import dataclass
from typing import Any

from localr1.errors import UsageError
from localr1.qtypes import SUPPORTED_GROUPS, QuantScheme

ATTENTION = r".*self_attn\.(q|k|v|o)_proj$"
MLP = r".*mlp\.(gate|up|down)_proj$"
HEAD = r".*lm_head$"
EMBEDDING = r".*embed_tokens$"

KEEP_BITS = 16
"""The number of bits that means "as it is" on the command line."""


@dataclass(frozen=True)
class Rule:
    """name: for people. pattern: regular expression matched from the start of a module's name
    ("model.layers.0.mlp.up_proj"), as compressed-tensors matches `re:` targets."""

    name: str
    pattern: str
    scheme: QuantScheme
    method: str = "rtn"

    def matches(self, module: str) -> bool:
        return re.match(self.pattern, module) is not None


@dataclass(frozen=True)
class Recipe:
    rules: tuple[Rule, ...]

    @classmethod
    def uniform(
        cls,
        bits: int = 4,
        group_size: int = 32,
        *,
        attention_bits: int = 8,
        head_bits: int = 8,
        embedding_bits: int = KEEP_BITS,
        method: str = "rtn",
    ) -> "Recipe":
        """One group size; the matrices of the MLP in `bits`, others in their own, KEEP_BITS = kept.

        attention_bits: 8, because attention is a fifth of a model's weights and more sensitive.
        head_bits: 8: it is read for every token. embedding_bits: kept, because transformers 5 and
        the released vLLM and SGLang do not load packed embeddings (docs/quantization.md).

        Raises UsageError or UnsupportedError for bits and groups that do not exist.
        """
        wanted = (
            ("attention", ATTENTION, attention_bits),
            ("head", HEAD, head_bits),
            ("embedding", EMBEDDING, embedding_bits),
            ("mlp", MLP, bits),
        )
        rules = tuple(
            Rule(name, pattern, QuantScheme(rule_bits, group_size), method)
            for name, pattern, rule_bits in wanted
            if rule_bits != KEEP_BITS
        )
        if not rules:
            raise UsageError("recipe", expected="at least one part in 4 or 8 bits", found="none")
        return cls(rules)

    def rule_for(self, module: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.matches(module)), None)

    @property
    def reasons_not_portable(self) -> tuple[str, ...]:
        """Why another runtime may not load the result; empty when it will."""
        packed = self.rule_for("model.embed_tokens")
        return ("packed embeddings are read by localr1 only",) if packed else ()

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "name": rule.name,
                "pattern": rule.pattern,
                "bits": rule.scheme.bits,
                "group_size": rule.scheme.group_size,
                "symmetric": rule.scheme.symmetric,
                "method": rule.method,
            }
            for rule in self.rules
        ]


def quantization_config(recipe: Recipe, kept_modules: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config` (compressed-tensors 0.15 and later).

    kept_modules: every linear that no rule matches; vLLM refuses one that is neither targeted nor
    ignored. Groups with more bits come first: transformers' `dequantize=True` applies the first
    group's scheme to every dense matrix, which reads 4-bit codes as 8-bit ones with an error, but
    8-bit codes as 4-bit ones without.
    """
    targets: dict[QuantScheme, list[str]] = {}
    for rule in recipe.rules:
        targets.setdefault(rule.scheme, []).append(f"re:{rule.pattern}")
    schemes = sorted(targets, key=lambda scheme: -scheme.bits)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": kept_modules,
        "config_groups": {
            f"group_{index}": _config_group(scheme, targets[scheme])
            for index, scheme in enumerate(schemes)
        },
    }


def _config_group(scheme: QuantScheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }


def groups_that_divide(columns: int) -> list[int]:
    return [group for group in SUPPORTED_GROUPS if columns % group == 0]
