"""Routing and mixing of experts in plain torch float32, every rounding in its place."""

from collections.abc import Iterator

import torch
from torch import Tensor

from localr1.kernels.api import RouterRule, Routing, Scoring
from localr1.kernels.rowwise import contract_exp, lane_dot, sigmoid


def route(x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouterRule) -> Routing:
    """`Kernels.route`, which it defines."""
    logits = lane_dot(x[:, None], weight)
    scores = _softmax(logits) if rule.scoring is Scoring.SOFTMAX else sigmoid(logits)
    judged = scores if bias is None else scores + bias
    if rule.groups_per_token < rule.num_groups:
        judged = _within_best_groups(judged, rule)
    experts = _best(judged, rule.experts_per_token)
    weights = scores.gather(1, experts)
    if rule.normalized:
        total = torch.zeros(len(x))
        for column in weights.unbind(1):
            total = total + column
        weights = weights / (total + rule.epsilon)[:, None]
    return Routing(experts, weights * rule.scale)


def pairs_by_expert(experts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each chosen expert with its places in the flattened choice [T*k], ascending. A negative one
    is left out."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    begin = int((flat < 0).sum())
    for expert, count in enumerate(flat.clamp_min(-1).add(1).bincount()[1:].tolist()):
        if count:
            yield expert, order[begin : begin + count]
            begin += count


def combine(outputs: Tensor, weights: Tensor) -> Tensor:
    """outputs [T*k, hidden], weights [T, k] -> [T, hidden], added up from the first column on."""
    columns = outputs.view(*weights.shape, -1).unbind(1)
    total = columns[0] * weights[:, 0, None]
    for column, weight in zip(columns[1:], weights.unbind(1)[1:], strict=True):
        total += column * weight[:, None]
    return total


def _softmax(logits: Tensor) -> Tensor:
    exponentials = contract_exp(logits - logits.amax(1, keepdim=True))
    return exponentials / lane_dot(exponentials, torch.ones(logits.shape[1]))[:, None]


def _within_best_groups(judged: Tensor, rule: RouterRule) -> Tensor:
    """judged [T, num_experts], with -inf in every group but the best ones."""
    grouped = judged.view(len(judged), rule.num_groups, -1)
    per_group = grouped.sort(dim=2, descending=True).values[:, :, : rule.group_score.value].sum(2)
    kept = torch.zeros_like(per_group, dtype=torch.bool)
    kept.scatter_(1, _best(per_group, rule.groups_per_token), True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)


def _best(judged: Tensor, count: int) -> Tensor:
    """Indices of the highest values [T, count], highest first, NaN before all. A stable sort, since
    `topk` leaves the order of equal values to the machine."""
    return judged.sort(dim=1, descending=True, stable=True).indices[:, :count].contiguous()
