"""Which experts a token goes to, and with what weight: one rule for DeepSeek-V2, V3 and Qwen3.

Scores are a softmax or a sigmoid of the router's logits. Experts may lie in equal groups, of which
only the best are chosen from; a bias may move the choice but never the weights (DeepSeek-AI 2024,
"DeepSeek-V3", section 2.1.2).
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional


class Scoring(Enum):
    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class GroupScore(Enum):
    """How a group is judged: by its best expert, or by the sum of its best two."""

    BEST = 1
    BEST_TWO = 2


@dataclass(frozen=True)
class RouterRule:
    """num_experts experts in num_groups equal groups; experts_per_token chosen from the best
    groups_per_token groups. normalized: the weights are divided by their sum plus epsilon. scale:
    multiplies the weights at the end."""

    num_experts: int
    experts_per_token: int
    scoring: Scoring
    normalized: bool
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: GroupScore = GroupScore.BEST
    epsilon: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Routing:
    """experts: int64 [T, k], the one chosen first in column 0; weights: float32 [T, k]. Outputs are
    summed in this order, wherever they were computed."""

    experts: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Router:
    """weight: float32 [num_experts, hidden]. choice_bias: float32 [num_experts] or None."""

    rule: RouterRule
    weight: Tensor
    choice_bias: Tensor | None

    def __call__(self, x: Tensor) -> Routing:
        """x float32 [T, hidden], normed. Equal scores: the lower expert comes first."""
        rule = self.rule
        logits = functional.linear(x, self.weight)
        scores = logits.softmax(1) if rule.scoring is Scoring.SOFTMAX else logits.sigmoid()
        judged = scores if self.choice_bias is None else scores + self.choice_bias
        if rule.groups_per_token < rule.num_groups:
            judged = _within_best_groups(judged, rule)
        experts = _best(judged, rule.experts_per_token)
        weights = scores.gather(1, experts)
        if rule.normalized:
            weights = weights / (weights.sum(1, keepdim=True) + rule.epsilon)
        return Routing(experts, weights * rule.scale)


def _within_best_groups(judged: Tensor, rule: RouterRule) -> Tensor:
    """judged [T, num_experts], with -inf in every group but the best ones."""
    grouped = judged.view(len(judged), rule.num_groups, -1)
    per_group = grouped.topk(rule.group_score.value, dim=2).values.sum(2)
    kept = torch.zeros_like(per_group, dtype=torch.bool)
    kept.scatter_(1, _best(per_group, rule.groups_per_token), True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)


def _best(judged: Tensor, count: int) -> Tensor:
    """Indices of the highest values [T, count], highest first. A stable sort, since `topk` leaves
    the order of equal values to the machine."""
    return judged.sort(dim=1, descending=True, stable=True).indices[:, :count]
