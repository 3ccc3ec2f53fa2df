"""What becomes of each tensor: a scheme and a method, or kept as it is.

A recipe is a list of rules, the first that matches a module's name wins; what no rule matches is
kept in 16 bits. A rule's pattern is written to config.json as it stands, so that every loader of
the checkpoint applies the rule that made it. Pure Python: never imports torch.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from localr1.errors import UnsupportedError, UsageError
from localr1.qtypes import SUPPORTED_GROUPS, QuantScheme

ATTENTION = r".*self_attn\.(q|k|v|o)_proj$"
MLP = r".*mlp\.(gate|up|down)_proj$"
HEAD = r".*lm_head$"
EMBEDDING = r".*embed_tokens$"

# Of mixtures of experts. transformers finds the experts' scheme by the word "experts" in a pattern,
# so the shared ones are named without it. kv_b_proj stays a float: decoding multiplies by its
# transpose too (docs/quantization.md).
ROUTED_EXPERTS = r".*mlp\.experts\.\d+\.(gate|up|down)_proj$"
SHARED_EXPERTS = r".*mlp\.shared_[a-z]+\.(gate|up|down)_proj$"
MIXTURE_ATTENTION = r".*self_attn\.((q|k|v|o|q_a|q_b)_proj|kv_a_proj_with_mqa)$"

AWQ = "awq"

KEEP_BITS = 16
"""The number of bits that means "as it is" on the command line."""

NF4 = "nf4"
"""The method that writes another layout, that of bitsandbytes (methods/nf4.py)."""

HADAMARD, RANDOM = "hadamard", "random"


@dataclass(frozen=True)
class Rotation:
    """Of the residual stream (rotation.py). kind: HADAMARD or RANDOM. seed: of what is drawn.
    Raises UsageError for others."""

    kind: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in (HADAMARD, RANDOM):
            raise UsageError("rotation", expected=f"{HADAMARD} or {RANDOM}", found=repr(self.kind))
        if not 0 <= self.seed < 1 << 63:
            raise UsageError("rotation: seed", expected="0 to 2^63 - 1", found=self.seed)


@dataclass(frozen=True)
class Rule:
    """name: for people. pattern: regular expression matched from the start of a module's name
    ("model.layers.0.mlp.up_proj"), as compressed-tensors matches `re:` targets. other_groups: to
    take, the first that does, where the scheme's does not divide the rows of all that it matches.
    """

    name: str
    pattern: str
    scheme: QuantScheme
    method: str = "rtn"
    other_groups: tuple[int, ...] = ()

    @property
    def type_name(self) -> str:
        """Of what it makes."""
        return NF4 if self.method == NF4 else self.scheme.name

    def matches(self, module: str) -> bool:
        return re.match(self.pattern, module) is not None


@dataclass(frozen=True)
class Keep:
    """A rule that leaves what it matches as it is. name, pattern: as of a Rule."""

    name: str
    pattern: str

    def matches(self, module: str) -> bool:
        return re.match(self.pattern, module) is not None


@dataclass(frozen=True)
class Recipe:
    """rules: in order. mixture_rules: those for a mixture of experts, where they are others.
    smooth: even out the activations first (smoothing.py), which mixtures are left without. target:
    what the rules were chosen for (choosing.py), None where somebody wrote them. rotation: of the
    residual stream, before anything else; None for none. awq: search how columns are scaled before
    matrices of fewer than 8 bits are rounded (awq.py); awq_mixtures: in a mixture too."""

    rules: tuple[Rule | Keep, ...]
    mixture_rules: tuple[Rule | Keep, ...] = ()
    smooth: bool = True
    target: Mapping[str, Any] | None = None
    rotation: Rotation | None = None
    awq: bool = False
    awq_mixtures: bool = True

    @classmethod
    def uniform(
        cls,
        bits: int = 4,
        group_size: int = 32,
        *,
        attention_bits: int = 8,
        head_bits: int = 8,
        embedding_bits: int = KEEP_BITS,
        shared_bits: int = 8,
        method: str = "rtn",
        smooth: bool = True,
        rotation: Rotation | None = None,
        asymmetric: bool = False,
    ) -> "Recipe":
        """One group size; the matrices of the MLP (of a mixture: of the routed experts) in `bits`,
        others in their own, KEEP_BITS = kept.

        attention_bits: 8, because attention is a fifth of a model's weights and more sensitive.
        shared_bits: of a mixture's shared experts and dense MLPs; 8: every token goes through them.
        asymmetric: zero points for what becomes fewer than 8 bits, which gain nothing by them.
        head_bits: 8: it is read for every token. embedding_bits: kept, because transformers 5 and
        the released vLLM and SGLang do not load packed embeddings (docs/quantization.md).
        method: as `split_method` takes it.

        Raises UsageError or UnsupportedError for bits and groups that do not exist.
        """
        tables = [("head", HEAD, head_bits), ("embedding", EMBEDDING, embedding_bits)]
        dense = [("attention", ATTENTION, attention_bits), *tables, ("mlp", MLP, bits)]
        mixture = [
            ("experts", ROUTED_EXPERTS, bits),
            ("attention", MIXTURE_ATTENTION, attention_bits),
            *tables,
            ("shared", SHARED_EXPERTS, shared_bits),
            ("mlp", MLP, shared_bits),
        ]
        awq, method = split_method(method)
        rules = _rules(dense, group_size, method, asymmetric=asymmetric)
        if not rules:
            raise UsageError(
                "recipe", expected="at least one part in 4, 5, 6 or 8 bits", found="none"
            )
        of_mixtures = _rules(mixture, group_size, method, asymmetric=asymmetric)
        return cls(rules, of_mixtures, smooth, rotation=rotation, awq=awq)

    @classmethod
    def nf4(cls, *, smooth: bool = True, rotation: Rotation | None = None) -> "Recipe":
        """Of a dense model attention and MLP in NF4; embedding and head stay as they are."""
        scheme = QuantScheme(4, 64)  # Its blocks of 64 are none of a row alone.
        rules = (Rule("attention", ATTENTION, scheme, NF4), Rule("mlp", MLP, scheme, NF4))
        return cls(rules, smooth=smooth, rotation=rotation)

    @property
    def quantizing(self) -> list[Rule]:
        """The rules that do not keep what they match."""
        return [rule for rule in self.rules if isinstance(rule, Rule)]

    @property
    def is_nf4(self) -> bool:
        return any(rule.method == NF4 for rule in self.quantizing)

    def for_model(self, *, is_mixture: bool) -> "Recipe":
        """The recipe with the rules of one kind of model alone. Raises UnsupportedError for one
        that has none for it."""
        rules = self.mixture_rules if is_mixture and self.mixture_rules else self.rules
        if not rules:
            raise UnsupportedError(
                "recipe", expected="rules for a dense model", found="those for mixtures alone"
            )
        awq = self.awq and (self.awq_mixtures or not is_mixture)
        return replace(self, rules=rules, mixture_rules=(), awq=awq)

    def fitted(self, columns: Mapping[str, int]) -> "Recipe":
        """With one group a rule. columns: of each module's rows."""
        return replace(self, rules=tuple(_fitted(rule, columns) for rule in self.rules))

    def rule_for(self, module: str) -> Rule | None:
        """None: it is kept."""
        found = next((rule for rule in self.rules if rule.matches(module)), None)
        return None if isinstance(found, Keep) else found

    def to_json(self) -> list[dict[str, Any]]:
        return [_rule_to_json(rule) for rule in self.rules]


def _fitted(rule: Rule | Keep, columns: Mapping[str, int]) -> Rule | Keep:
    if isinstance(rule, Keep) or not rule.other_groups:
        return rule
    found = {number for module, number in columns.items() if rule.matches(module)}
    groups = (rule.scheme.group_size, *rule.other_groups)
    fitting = [group for group in groups if all(number % group == 0 for number in found)]
    # Where none fits the first stays, and is an error that names the matrix.
    scheme = replace(rule.scheme, group_size=(fitting or groups)[0])
    return replace(rule, scheme=scheme, other_groups=())


def _rule_to_json(rule: Rule | Keep) -> dict[str, Any]:
    names = {"name": rule.name, "pattern": rule.pattern}
    if isinstance(rule, Keep):
        return {**names, "bits": KEEP_BITS}
    return {
        **names,
        "bits": rule.scheme.bits,
        "group_size": rule.scheme.group_size,
        "symmetric": rule.scheme.symmetric,
        "method": rule.method,
    }


def split_method(method: str) -> tuple[bool, str]:
    """Whether AWQ is a part of a method as people write it, and the one that chooses codes:
    "gptq", "awq+gptq", or "awq", which rounds to nearest. Raises UsageError for two of a kind."""
    parts = method.split("+")
    rounding = [part for part in parts if part != AWQ]
    if len(rounding) > 1 or parts.count(AWQ) > 1:
        raise UsageError("quantization method", expected="one, or awq+ and one", found=repr(method))
    return AWQ in parts, rounding[0] if rounding else "rtn"


def _rules(
    wanted: Sequence[tuple[str, str, int]], group_size: int, method: str, *, asymmetric: bool
) -> tuple[Rule, ...]:
    """wanted: (name, pattern, bits)."""
    return tuple(
        Rule(
            name,
            pattern,
            QuantScheme(bits, group_size, symmetric=not asymmetric or bits == 8),
            # Rows of a table are looked up: it has no inputs that a method could choose by.
            "rtn" if pattern == EMBEDDING else method,
        )
        for name, pattern, bits in wanted
        if bits != KEEP_BITS
    )


def rules_from_json(documents: Sequence[Mapping[str, Any]]) -> tuple[Rule | Keep, ...]:
    """What `Recipe.to_json` gave. Raises KeyError and TypeError for what it did not give."""
    return tuple(
        Keep(each["name"], each["pattern"])
        if each["bits"] == KEEP_BITS
        else Rule(
            each["name"],
            each["pattern"],
            QuantScheme(each["bits"], each["group_size"], each["symmetric"]),
            each["method"],
        )
        for each in documents
    )


def quantization_config(
    recipe: Recipe, kept_modules: list[str], expert_rules: Collection[Rule] = ()
) -> dict[str, Any]:
    """config.json's `quantization_config` (compressed-tensors 0.15 and later).

    kept_modules: every linear that no rule matches; vLLM refuses one that is neither targeted nor
    ignored. expert_rules: those of routed experts, which have groups of their own, first and in the
    recipe's order, where every version of transformers finds them. Then groups with more bits:
    transformers' `dequantize=True` applies the first group without experts to every dense matrix,
    which reads 4-bit codes as 8-bit ones with an error, but 8-bit codes as 4-bit ones without.
    """
    targets: dict[tuple[bool, QuantScheme], list[str]] = {}
    for rule in recipe.rules:
        if isinstance(rule, Keep):
            continue
        is_dense = rule not in expert_rules
        targets.setdefault((is_dense, rule.scheme), []).append(f"re:{rule.pattern}")
    groups = sorted(targets, key=lambda key: (key[0], -key[1].bits * key[0]))
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": kept_modules,
        "config_groups": {
            f"group_{index}": _config_group(group[1], targets[group])
            for index, group in enumerate(groups)
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
