"""The order of the work: the embedding, one layer after another, then the norm and the head.

What becomes of a layer depends on the layers before it (the text that smoothing reads has gone
through them) and on none behind it. So each is done when its tensors are there, and its source is
not looked at again: but for tied embeddings, which are read once more for the head.
"""

from dataclasses import dataclass

from localr1.models.config import LAYER_PREFIX
from localr1.quant.plan import EMBEDDING_WEIGHT, Item, Plan

EMBEDDING = EMBEDDING_WEIGHT.removesuffix(".weight")


@dataclass(frozen=True)
class Section:
    """What is done in one go. name: "embedding", "layer 3" or "head". layer: its number, else None.
    items: dense ones in the order of the files, then routed experts."""

    name: str
    layer: int | None
    items: tuple[Item, ...]

    @property
    def nbytes(self) -> int:
        """In the output."""
        return sum(item.nbytes for item in self.items)


def plan_sections(plan: Plan, num_layers: int) -> list[Section]:
    """The plan's items, each in one of 2 + num_layers sections."""
    front: list[Item] = []
    layers: list[list[Item]] = [[] for _ in range(num_layers)]
    back: list[Item] = []
    for item in plan.dense:
        layer = _layer_of(item.name)
        if layer is not None and layer < num_layers:
            layers[layer].append(item)
        elif item.name.removesuffix(".weight") == EMBEDDING:
            front.append(item)
        else:
            back.append(item)
    for layer, experts in plan.experts.items():
        layers[layer] += [item for expert in experts for item in expert]
    return [
        Section("embedding", None, tuple(front)),
        *(Section(f"layer {number}", number, tuple(each)) for number, each in enumerate(layers)),
        Section("head", None, tuple(back)),
    ]


def _layer_of(name: str) -> int | None:
    if not name.startswith(LAYER_PREFIX):
        return None
    number = name.removeprefix(LAYER_PREFIX).partition(".")[0]
    return int(number) if number.isdecimal() else None
