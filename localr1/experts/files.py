"""The lowest tier: experts in the files of their checkpoint."""

from collections.abc import Sequence

from localr1.checkpoint.api import Checkpoint
from localr1.checkpoint.packed import PackedReader
from localr1.errors import TensorError
from localr1.kernels.api import PackedExpert
from localr1.kernels.native import NativeKernels
from localr1.kernels.native_experts import ExpertForm, SlotArena
from localr1.models.moe_weights import DOWN, GATE, UP


class CheckpointExperts:
    """Reads packed experts by position, whatever the layout of their files.

    names: of the experts' modules, by layer. The checkpoint stays open until `close`, which closes
    it.
    """

    def __init__(
        self, checkpoint: Checkpoint, kernels: NativeKernels, names: Sequence[Sequence[str]]
    ) -> None:
        self._checkpoint = checkpoint
        self._reader = PackedReader(checkpoint)
        self._kernels = kernels
        self._names = names
        self.forms = [ExpertForm.of(self._packed(layer[0])) for layer in names]
        """Of each layer's experts; read from its first one."""
        self._layouts = [kernels.expert_layout(form) for form in self.forms]

    def read(self, layer: int, expert: int, arena: SlotArena, slot: int) -> int:
        """`ExpertFiles.read`."""
        name = self._names[layer][expert]
        packed = self._packed(name)
        form = ExpertForm.of(packed)
        if form != self.forms[layer]:
            raise TensorError(
                f"expert {name}", expected=f"as the layer's first: {self.forms[layer]}", found=form
            )
        self._kernels.place_expert(self._layouts[layer], arena, slot, packed)
        return sum(
            part.nbytes
            for weight in (packed.gate, packed.up, packed.down)
            for part in (weight.packed, weight.scale)
        )

    def close(self) -> None:
        self._checkpoint.close()

    def _packed(self, name: str) -> PackedExpert:
        gate, up, down = (self._reader.read(f"{name}.{part}") for part in (GATE, UP, DOWN))
        if gate is None or up is None or down is None:
            raise TensorError(f"tensor {name}.{GATE}.weight_packed is missing")
        sizes = (gate.out_features, gate.in_features)
        shapes = ((up.out_features, up.in_features), (down.in_features, down.out_features))
        if shapes != (sizes, sizes):
            raise TensorError(
                f"expert {name}: sizes of gate, up and transposed down",
                expected=f"{list(sizes)} each",
                found=" and ".join(str(list(shape)) for shape in shapes),
            )
        return PackedExpert(gate, up, down)
