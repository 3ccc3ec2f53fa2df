"""Muon for matrices, AdamW for the rest.

Muon (K. Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks") replaces a
matrix's momentum by its nearest orthogonal one, found by five Newton-Schulz steps. On r1-nano it
needs well under half the steps of AdamW alone.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from model import R1Nano
from torch import Tensor, nn

# The quintic iteration's coefficients, from the publication named above.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, about; matrices [n, rows, columns], computed in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = a * x + torch.bmm(b * gram + c * torch.bmm(gram, gram), x)
    return x.transpose(1, 2).float() if tall else x.float()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized; parameters are matrices or stacks of them."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: defaultdict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum: Tensor = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])
                for matrix, part in _matrices(parameter, update):
                    by_shape[(matrix.shape[-2], matrix.shape[-1])].append((matrix, part))
            for (rows, columns), pairs in by_shape.items():
                orthogonal = orthogonalize(torch.cat([part for _, part in pairs]))
                sizes = [len(matrix) for matrix, _ in pairs]
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for (matrix, _), part in zip(pairs, torch.split(orthogonal, sizes), strict=True):
                    matrix.sub_(part, alpha=scale)


def _matrices(parameter: Tensor, update: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views [n, rows, columns] of a parameter; the experts' gate and up count as two matrices."""
    if parameter.dim() == 2:
        yield parameter.unsqueeze(0), update.unsqueeze(0)
    elif parameter.shape[1] < parameter.shape[2]:
        yield from zip(parameter.chunk(2, 1), update.chunk(2, 1), strict=True)
    else:
        yield parameter, update


def muon_and_adam(
    masters: dict[str, nn.Parameter], muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for embedding, head, norms and routers."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, master in masters.items():
        inside = name.startswith("layers.") and master.dim() >= 2 and ".gate.weight" not in name
        (matrices if inside else others).append(master)
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, muon_lr), adam]


class MixedPrecision:
    """Optimizers on float32 copies ("masters") of a model's parameters, which turn bfloat16."""

    def __init__(
        self,
        model: R1Nano,
        make: Callable[[dict[str, nn.Parameter]], list[torch.optim.Optimizer]],
    ) -> None:
        self.model = model
        self.masters = {
            name: nn.Parameter(parameter.detach().float().clone())
            for name, parameter in model.named_parameters()
        }
        model.to_bfloat16()
        self.optimizers = make(self.masters)
        self.peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at `factor` times the peak learning rates; clears the gradients."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                raise RuntimeError(f"{name} took no part in the loss")
            self.masters[name].grad = parameter.grad.float()
            parameter.grad = None
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the float32 parameters into the model."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.masters[name])

    def state(self) -> dict[str, Tensor]:
        """Float32 parameters and the optimizers' moments, by name. What the optimizers were made
        with (rates, betas) is not state."""
        tensors = {f"masters/{name}": master.detach() for name, master in self.masters.items()}
        for place, optimizer in enumerate(self.optimizers):
            for parameter, moments in optimizer.state_dict()["state"].items():
                for name, value in moments.items():
                    tensors[f"moments/{place}/{parameter}/{name}"] = value
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """What `state` gave, and the model with it."""
        moments: list[defaultdict[int, dict[str, Tensor]]]
        moments = [defaultdict(dict) for _ in self.optimizers]
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            if kind == "masters":
                self.masters[name].copy_(value)
            else:
                place, parameter, moment = name.split("/")
                moments[int(place)][int(parameter)][moment] = value
        for optimizer, saved in zip(self.optimizers, moments, strict=True):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": dict(saved), "param_groups": groups})
        self.publish()
