"""Which experts a token goes to, and with what weight: one rule for DeepSeek-V2, V3 and Qwen3.

Scores are a softmax or a sigmoid of the router's logits. Experts may lie in equal groups, of which
only the best are chosen from; a bias may move the choice but never the weights (DeepSeek-AI 2024,
"DeepSeek-V3", section 2.1.2). The kernels compute it in a fixed order, so that a token goes to the
same experts alone and among others, wherever it is computed.
"""

from dataclasses import dataclass

from torch import Tensor

from localr1.kernels.api import Kernels, RouterRule, Routing


@dataclass(frozen=True)
class Router:
    """weight: float32 [num_experts, hidden]. choice_bias: float32 [num_experts] or None."""

    kernels: Kernels
    rule: RouterRule
    weight: Tensor
    choice_bias: Tensor | None

    def __call__(self, x: Tensor) -> Routing:
        """x float32 [T, hidden], normed. Equal scores: the lower expert comes first."""
        return self.kernels.route(x, self.weight, self.choice_bias, self.rule)
