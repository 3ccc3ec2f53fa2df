"""Types of the native module; cuda/bindings.cpp checks the sizes, native.py the tensors.

Tensors are addresses (0 for None). A rope table is (cos, sin, positions, pairs), a cache (keys,
values, capacity, number in cache_rows.DTYPES), heads are (query, key/value, dim).
"""

from typing import ClassVar

class RefusedError(ValueError): ...

class Matrix:
    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int:
        """Of its bytes in the blocked layout, for as long as this lives."""
        ...
    @property
    def layout(self) -> tuple[int, int, int, int, int, int, int]:
        """The fields of `MatrixLayout` of cuda/blocks.h, in their order."""
        ...

class ExpertLayout:
    @property
    def nbytes(self) -> int: ...

class SlotArena:
    def __init__(self, slot_bytes: int, /) -> None: ...
    def resize(self, count: int, /) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    def address(self, slot: int, /) -> int: ...

class BoundAttention: ...
class BoundMlp: ...
class BoundLatent: ...

def available_isas() -> list[str]: ...
def available_checksums() -> list[str]: ...
def crc32c(buffer: bytes | bytearray | memoryview, value: int, build: str, /) -> int: ...
def crc32c_joined(first: int, second: int, second_size: int, /) -> int: ...
def matrix_bytes(
    rows: int,
    columns: int,
    rows_per_block: int,
    code: int,
    group: int,
    scale_type: int,
    zero: bool,
) -> int: ...

class Quantizer:
    def __init__(self, isa: str, threads: int) -> None: ...
    def quantize(
        self,
        values: int,
        type: int,
        rows: int,
        columns: int,
        blocks: tuple[int, int, int, int, int],
        scheme: tuple[int, int, int],
        positions: tuple[int, int],
        importance: int,
        out: tuple[int, int, int, int],
        /,
    ) -> None: ...

class HostMixtures:
    run: ClassVar[int]
    def add(
        self,
        number: int,
        layout: ExpertLayout,
        table: int,
        count: int,
        on_card: int,
        per_token: int,
        exchange: tuple[int, int, int],
        /,
    ) -> int: ...
    def go(self, way: int, /) -> None: ...
    def take(self) -> list[tuple[int, bytes, float, float]]: ...

class Kernels:
    def __init__(self, isa: str, threads: int) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def rows_per_block(self) -> int: ...
    def prepare(
        self,
        codes: int,
        scales: int,
        zeros: int,
        rows: int,
        columns: int,
        code: int,
        group: int,
        scale_type: int,
        /,
    ) -> Matrix: ...
    def expert_layout(
        self, hidden: int, inner: int, schemes: list[tuple[int, int, int, bool]], /
    ) -> ExpertLayout: ...
    def place_expert(
        self,
        layout: ExpertLayout,
        arena: SlotArena,
        slot: int,
        matrices: list[tuple[int, int, int]],
        /,
    ) -> None: ...
    def bind_attention(
        self,
        norm: int,
        matrices: list[Matrix],
        biases: list[int],
        q_norm: int,
        k_norm: int,
        heads: tuple[int, int, int],
        eps: float,
        scale: float,
        /,
    ) -> BoundAttention: ...
    def bind_mlp(
        self, norm: int, matrices: list[Matrix], biases: list[int], eps: float, /
    ) -> BoundMlp: ...
    def bind_latent(
        self,
        vectors: tuple[int, int, int],
        up: tuple[int, int, int],
        matrices: list[Matrix],
        biases: list[int],
        sizes: tuple[int, int, int, int, int],
        eps: float,
        latent_eps: float,
        scale: float,
        /,
    ) -> BoundLatent: ...
    def quantize(self, x: int, tokens: int, columns: int, q: int, scale: int, /) -> None: ...
    def rms_norm(
        self, x: int, weight: int, eps: float, tokens: int, size: int, y: int, /
    ) -> None: ...
    def linear(
        self,
        x: int,
        tokens: int,
        columns: int,
        norm: int,
        eps: float,
        matrices: list[Matrix],
        biases: list[int],
        out: int,
        /,
    ) -> None: ...
    def linear_add(
        self, x: int, tokens: int, columns: int, matrix: Matrix, bias: int, residual: int, /
    ) -> None: ...
    def gate_up(
        self, x: int, tokens: int, columns: int, gate: Matrix, up: Matrix, out: int, /
    ) -> None: ...
    def embedding(self, ids: int, tokens: int, matrix: Matrix, out: int, /) -> None: ...
    def rope_append(
        self,
        qkv: int,
        tokens: int,
        heads: tuple[int, int, int],
        q_norm: int,
        k_norm: int,
        eps: float,
        rope: tuple[int, int, int, int],
        cache: tuple[int, int, int, int],
        start: int,
        q: int,
        /,
    ) -> None: ...
    def attention(
        self,
        q: int,
        tokens: int,
        heads: tuple[int, int, int],
        cache: tuple[int, int, int, int],
        start: int,
        scale: float,
        out: int,
        /,
    ) -> None: ...
    def attention_block(
        self,
        x: int,
        tokens: int,
        bound: BoundAttention,
        rope: tuple[int, int, int, int],
        cache: tuple[int, int, int, int],
        start: int,
        /,
    ) -> None: ...
    def mlp_block(self, x: int, tokens: int, bound: BoundMlp, /) -> None: ...
    def latent_block(
        self,
        x: int,
        tokens: int,
        bound: BoundLatent,
        rope: tuple[int, int, int, int],
        cache: tuple[int, int, int],
        start: int,
        /,
    ) -> None: ...
    def route(
        self,
        x: int,
        tokens: int,
        hidden: int,
        weight: int,
        bias: int,
        rule: tuple[int, int, int, int, int, bool, bool, float, float],
        chosen: int,
        weights: int,
        /,
    ) -> None: ...
    def mix_experts(
        self,
        x: int,
        tokens: int,
        hidden: int,
        chosen: int,
        weights: int,
        per_token: int,
        layout: ExpertLayout,
        table: int,
        count: int,
        residual: int,
        /,
    ) -> None: ...
    def expert_outputs(
        self,
        x: int,
        tokens: int,
        hidden: int,
        chosen: int,
        per_token: int,
        layout: ExpertLayout,
        table: int,
        count: int,
        outputs: int,
        /,
    ) -> None: ...
    def combine_experts(
        self,
        outputs: int,
        weights: int,
        tokens: int,
        per_token: int,
        hidden: int,
        residual: int,
        /,
    ) -> None: ...
    def host_mixtures(self, elsewhere: int, /) -> HostMixtures: ...
