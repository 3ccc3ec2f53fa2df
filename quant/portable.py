"""What other runtimes make of a quantized checkpoint (docs/quantization.md has the tables)."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from localr1.errors import UnsupportedError
from localr1.qtypes import PORTABLE_BITS, QuantScheme
from localr1.quant.experts import EXPERTS_PART

LATENT_INPUT = re.compile(r"(.*\.self_attn)\.(q_a_proj|kv_a_proj_with_mqa)$")
"""Two matrices that read the same input: vLLM makes one of them."""


@dataclass(frozen=True)
class _Group:
    scheme: QuantScheme
    patterns: tuple[re.Pattern[str], ...]

    @property
    def says_experts(self) -> bool:
        return any("experts" in pattern.pattern for pattern in self.patterns)

    def matches(self, module: str) -> bool:
        return any(pattern.match(module) for pattern in self.patterns)


def _groups(config: Mapping[str, Any]) -> list[_Group]:
    return [
        _Group(
            QuantScheme(
                group["weights"]["num_bits"],
                group["weights"]["group_size"],
                group["weights"]["symmetric"],
            ),
            tuple(re.compile(target.removeprefix("re:")) for target in group["targets"]),
        )
        for group in config["config_groups"].values()
    ]


def check_targets(config: Mapping[str, Any], schemes: Mapping[str, QuantScheme]) -> None:
    """config: our own `quantization_config`. schemes: module -> what it is quantized to. A loader
    takes the first group that matches, in the order of config.json, which is not the recipe's:
    raises UnsupportedError for rules that overlap in such a way that it would take the wrong one.
    """
    groups = _groups(config)
    for module, scheme in schemes.items():
        found = next(group.scheme for group in groups if group.matches(module))
        if found != scheme:
            raise UnsupportedError(
                f"recipe: {module}",
                expected=f"no rule but that of {scheme.name} to match it",
                found=f"one of {found.name}, which goes first in config.json",
                fix="Write patterns that do not overlap.",
            )


def reasons_not_portable(
    config: Mapping[str, Any],
    schemes: Mapping[str, QuantScheme],
    expert_schemes: Collection[QuantScheme],
) -> tuple[str, ...]:
    """Why another runtime may not load the result, or load it wrong; empty when all do.

    config, schemes: as in check_targets. expert_schemes: of routed experts.
    """
    reasons = []
    if any(module.endswith("embed_tokens") for module in schemes):
        reasons.append("packed embeddings are read by localr1 only")
    if any(scheme.bits not in PORTABLE_BITS for scheme in schemes.values()):
        reasons.append("SGLang and older versions of vLLM take 4 and 8 bits alone")
    if not all(scheme.symmetric for scheme in schemes.values()):
        reasons.append("transformers fails on zero points, unless with dequantize=True")
    if len(expert_schemes) > 1:
        names = " and ".join(sorted(scheme.name for scheme in expert_schemes))
        reasons.append(f"other runtimes take one scheme for all routed experts, not {names}")
    else:
        reasons += _misread_in_transformers(_groups(config), schemes, expert_schemes)
    if any(module.endswith("kv_b_proj") for module in schemes):
        reasons.append("a packed kv_b_proj breaks latent attention in SGLang")
    fused: dict[str, set[QuantScheme]] = defaultdict(set)
    for module, scheme in schemes.items():
        if match := LATENT_INPUT.match(module):
            fused[match[1]].add(scheme)
    if any(len(both) > 1 for both in fused.values()):
        reasons.append("vLLM wants one scheme for q_a_proj and kv_a_proj_with_mqa")
    return tuple(reasons)


def _misread_in_transformers(
    groups: list[_Group],
    schemes: Mapping[str, QuantScheme],
    expert_schemes: Collection[QuantScheme],
) -> list[str]:
    """What transformers with `dequantize=True` reads as other numbers, without an error. It takes
    two groups: the first that says "experts" for routed experts, the first that does not for all
    else. More bits than those of the group do not show; fewer are an error of their own."""
    for_experts = next((group for group in groups if group.says_experts), groups[0]).scheme
    for_others = next((group for group in groups if not group.says_experts), groups[0]).scheme
    if any(scheme != for_experts for scheme in expert_schemes):
        return [f"transformers would read routed experts as {for_experts.name}"]
    for module, scheme in schemes.items():
        fails = scheme.bits < for_others.bits
        if EXPERTS_PART not in module and scheme != for_others and not fails:
            return [f"transformers with dequantize=True would read {module} as {for_others.name}"]
    return []
