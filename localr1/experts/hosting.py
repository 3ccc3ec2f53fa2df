"""Puts an ExpertStore in charge of a model's unread experts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from localr1.checkpoint.api import Checkpoint
from localr1.errors import TensorError
from localr1.experts.device import Device
from localr1.experts.files import CheckpointExperts
from localr1.experts.hot_set import HotSet
from localr1.experts.store import ExpertStore
from localr1.experts.store_options import Layer, StoreOptions
from localr1.kernels.native import NativeKernels
from localr1.layers.moe import ExpertSource, MoeBlock, UnreadExperts
from localr1.models.decoder import Decoder


@dataclass(frozen=True)
class Slots:
    """Experts there is to be room for, in RAM and on each device."""

    ram: int
    devices: Sequence[int] = ()


@dataclass(frozen=True)
class Hosting:
    """slots: given the bytes of a slot and the number of experts. homes: by the model's number of a
    layer, that of the device that may hold its experts, the first where it is not named. progress:
    bytes read of all. hot: which experts come into memory first."""

    slots: Callable[[int, int], Slots]
    devices: Sequence[Device] = ()
    homes: Mapping[int, int] = field(default_factory=dict)
    options: StoreOptions = field(default_factory=StoreOptions)
    progress: Callable[[int, int], None] | None = None
    hot: HotSet | None = None


def unread_experts(model: Decoder) -> dict[int, tuple[MoeBlock, UnreadExperts]]:
    """By the number of the layer."""
    return {
        index: (block, block.experts)
        for index, block in model.mixtures.items()
        if isinstance(block.experts, UnreadExperts)
    }


def host_experts(
    model: Decoder, checkpoint: Checkpoint, kernels: NativeKernels, hosting: Hosting
) -> ExpertStore | None:
    """None where the model left no experts unread. Else the store has taken charge of the
    checkpoint too, and closes it at its own end. Raises what reading raises, MemoryLimitError and
    KernelError; the checkpoint is the caller's then."""
    unread = unread_experts(model)
    if not unread:
        return None
    names = [experts.names for _, experts in unread.values()]
    files = CheckpointExperts(checkpoint, kernels, names)
    for (_, experts), form in zip(unread.values(), files.forms, strict=True):
        if (form.inner, form.hidden) != (experts.inner, experts.hidden):
            raise TensorError(
                f"expert {experts.names[0]}: gate_proj",
                expected=f"[{experts.inner}, {experts.hidden}]",
                found=f"[{form.inner}, {form.hidden}]",
            )
    layers = [
        Layer(number, form, len(experts.names), block.router, block.norm, block.eps)
        for (number, (block, experts)), form in zip(unread.items(), files.forms, strict=True)
    ]
    homes = [hosting.homes.get(layer.number, 0) for layer in layers]
    store = ExpertStore(kernels, files, layers, hosting.devices, homes, hosting.options)
    try:
        slots = hosting.slots(store.slot_bytes, store.num_experts)
        store.open(slots.ram, slots.devices, hosting.progress, hosting.hot)
    except BaseException:
        store.stop()
        raise
    place = {layer: number for number, layer in enumerate(unread)}

    def source(layer: int, experts: ExpertSource) -> ExpertSource:
        return store.source(place[layer]) if layer in place else experts

    model.wrap_experts(source)
    model.observe_passes(store)
    return store
