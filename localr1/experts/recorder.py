"""Recording which experts a running model chooses."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from localr1.errors import UnsupportedError
from localr1.experts.trace import Choices, Trace, expert_type
from localr1.kernels.api import Routing
from localr1.layers.moe import ExpertSource
from localr1.models.api import Model
from localr1.models.decoder import Decoder


class RoutingRecorder:
    """Stands between the routers and the experts of a model from its making on.

    Raises UnsupportedError for a model without routed experts.
    """

    def __init__(self, model: Model, name: str) -> None:
        moe = model.config.moe
        if moe is None or not isinstance(model, Decoder):
            raise UnsupportedError(
                f"{name}: routing",
                expected="a mixture of experts",
                found=f"{model.config.architecture}, which has none",
            )
        self._name = name
        self._layers = moe.layers
        self._num_experts = moe.router.num_experts
        self._experts_per_token = moe.router.experts_per_token
        self._type = expert_type(self._num_experts)
        self._sequences: list[tuple[int, int]] = []
        self._recorded: list[Choices] = []
        self._current: dict[int, list[Choices]] = {}
        self._forget()
        model.wrap_experts(lambda layer, experts: _Recording(self, layer, experts))

    def record(self, layer: int, experts: Tensor) -> None:
        """experts: int64 [T, k], chosen in one layer."""
        self._current[layer].append(experts.numpy().astype(self._type))

    def end_sequence(self, prompt_tokens: int) -> None:
        """All that was recorded since the last end is one sequence, its prompt first."""
        layers = [np.concatenate(self._current[layer]) for layer in self._layers]
        counts = {len(layer) for layer in layers}
        assert len(counts) == 1, "every layer sees every token"
        count = counts.pop()
        assert count >= prompt_tokens
        self._recorded.append(np.stack(layers, axis=1))
        self._sequences.append((prompt_tokens, count - prompt_tokens))
        self._forget()

    def trace(self, sampling: Mapping[str, int | float] | None = None) -> Trace:
        """Of all ended sequences. sampling: how their answers were drawn."""
        shape = (0, len(self._layers), self._experts_per_token)
        return Trace(
            np.concatenate([np.empty(shape, self._type), *self._recorded]),
            np.array(self._sequences, dtype=np.int32).reshape(-1, 2),
            self._layers,
            self._num_experts,
            self._name,
            sampling or {},
        )

    def _forget(self) -> None:
        self._current = {layer: [] for layer in self._layers}


@dataclass(frozen=True)
class _Recording:
    """An ExpertSource that notes the choice and passes it on."""

    recorder: RoutingRecorder
    layer: int
    experts: ExpertSource

    def __call__(self, x: Tensor, routing: Routing, residual: Tensor) -> None:
        self.recorder.record(self.layer, routing.experts)
        self.experts(x, routing, residual)
