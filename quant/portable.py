"""What other runtimes make of a quantized checkpoint (docs/quantization.md has the tables)."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from localr1.errors import UnsupportedError
from localr1.qtypes import QuantScheme

ATTENTION_IN = re.compile(r"(.*\.self_attn)\.(q_a_proj|kv_a_proj_with_mqa)$")
"""Two matrices that read the same input: vLLM makes one of them."""


def check_targets(config: Mapping[str, Any], schemes: Mapping[str, QuantScheme]) -> None:
    """schemes: module -> what it is quantized to. A loader takes the first group that matches, in
    the order of config.json, which is not the recipe's: raises UnsupportedError for rules that
    overlap in such a way that it would take the wrong one."""
    groups = [
        (
            group["weights"]["num_bits"],
            group["weights"]["group_size"],
            [re.compile(target.removeprefix("re:")) for target in group["targets"]],
        )
        for group in config["config_groups"].values()
    ]
    for module, scheme in schemes.items():
        bits, size, _ = next(
            group for group in groups if any(pattern.match(module) for pattern in group[2])
        )
        if (bits, size) != (scheme.bits, scheme.group_size):
            raise UnsupportedError(
                f"recipe: {module}",
                expected=f"no rule but that of {scheme.name} to match it",
                found=f"one of int{bits}-g{size}, which goes first in config.json",
                fix="Write patterns that do not overlap.",
            )


def reasons_not_portable(
    config: Mapping[str, Any],
    schemes: Mapping[str, QuantScheme],
    expert_schemes: Collection[QuantScheme],
) -> tuple[str, ...]:
    """Why another runtime may not load the result, or load it wrong; empty when all do.

    config: `quantization_config`. schemes: as in check_targets. expert_schemes: of routed experts.
    """
    reasons = []
    if any(module.endswith("embed_tokens") for module in schemes):
        reasons.append("packed embeddings are read by localr1 only")
    behind = list(config["config_groups"].values())[1:]
    if len(expert_schemes) > 1:
        names = " and ".join(sorted(scheme.name for scheme in expert_schemes))
        reasons.append(f"other runtimes take one scheme for all routed experts, not {names}")
    elif expert_schemes and any("experts" in target for g in behind for target in g["targets"]):
        reasons.append('transformers takes a later group that says "experts" for the routed ones')
    if any(module.endswith("kv_b_proj") for module in schemes):
        reasons.append("a packed kv_b_proj breaks latent attention in SGLang")
    fused: dict[str, set[QuantScheme]] = defaultdict(set)
    for module, scheme in schemes.items():
        if match := ATTENTION_IN.match(module):
            fused[match[1]].add(scheme)
    if any(len(both) > 1 for both in fused.values()):
        reasons.append("vLLM wants one scheme for q_a_proj and kv_a_proj_with_mqa")
    return tuple(reasons)
