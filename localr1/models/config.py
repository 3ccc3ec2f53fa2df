"""What a model is, read once from config.json and frozen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from localr1.errors import UnsupportedError
from localr1.kernels.api import RouterRule
from localr1.layers.rope import RopeVariant
from localr1.models.fields import Fields, describe
from localr1.models.rope_parameters import MAX_POSITIONS, read_rope

# Upper bounds far beyond any released model: they turn a corrupt number into an error that names
# it, before anything is allocated.
MAX_LAYERS = 4096
MAX_WIDTH = 1 << 22
MAX_HEADS = 1 << 14
MAX_HEAD_DIM = 1 << 14
MAX_VOCABULARY = 1 << 24
MAX_EXPERTS = 1 << 16
LAYER_PREFIX = "model.layers."


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (layers/mla.py). query_rank: size of the queries' own latent, or
    None. latent_size: of keys and values. key_size, rope_size: values of a head's query and key
    without and with a position. value_size: of a head's value. interleaved: the file pairs value 2i
    of the rope part with 2i + 1, not i with i + rope_size/2. bias: on the matrices that read or
    write the residual stream, but for a query matrix without query_rank."""

    query_rank: int | None
    latent_size: int
    key_size: int
    rope_size: int
    value_size: int
    interleaved: bool
    bias: bool


@dataclass(frozen=True)
class MoeConfig:
    """layers: which ones are mixtures, ascending; the others are dense. intermediate_size: of an
    expert. shared_size: of the expert that every token goes through; 0 for none. choice_bias: the
    router has one."""

    router: RouterRule
    intermediate_size: int
    shared_size: int
    layers: tuple[int, ...]
    choice_bias: bool


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of pre-norm attention and gated-MLP blocks.

    architecture: the registry's name, as `model_type` in config.json.
    head_dim: values of a head's query. max_positions: the context the model was made for, after
    rope scaling.
    qkv_bias, output_bias, mlp_bias: which matrices carry one. qk_norm: RMS norm per head on
    queries and keys. latent: where attention is over a latent, whatever num_kv_heads and the biases
    of dense attention say. moe: where some layers are mixtures of experts.
    mtp_layers: layers behind the last one that the checkpoint may hold for multi-token prediction
    (DeepSeek-AI 2024, "DeepSeek-V3", section 2.2). They do not take part in a forward pass and are
    not loaded.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tie_embeddings: bool
    rms_norm_eps: float
    rope: RopeVariant
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    latent: LatentConfig | None = None
    moe: MoeConfig | None = None
    mtp_layers: int = 0

    @property
    def parameter_count(self) -> int:
        """All parameters; a tied matrix counts once."""
        return self._count(0 if self.moe is None else self.moe.router.num_experts)

    @property
    def active_parameter_count(self) -> int:
        """Parameters that take part in computing one token."""
        return self._count(0 if self.moe is None else self.moe.router.experts_per_token)

    @property
    def cached_values(self) -> int:
        """Values the cache keeps of one position in one layer."""
        if self.latent is not None:
            return self.latent.latent_size + self.latent.rope_size
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def rope_size(self) -> int:
        """Values of a head that are rotated."""
        return self.head_dim if self.latent is None else self.latent.rope_size

    def is_left_out(self, tensor_name: str) -> bool:
        """Whether a tensor belongs to a multi-token-prediction layer, which is not loaded."""
        index, _, rest = tensor_name.removeprefix(LAYER_PREFIX).partition(".")
        if not (tensor_name.startswith(LAYER_PREFIX) and rest and index.isascii()):
            return False
        left_out = range(self.num_layers, self.num_layers + self.mtp_layers)
        return index in (str(layer) for layer in left_out)

    def _count(self, experts: int) -> int:
        """Parameters, with so many experts in each mixture."""
        mixtures = 0 if self.moe is None else len(self.moe.layers)
        dense = 3 * self.hidden_size * self.intermediate_size
        dense += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        layers = self.num_layers * (2 * self.hidden_size + self._attention_count())
        layers += (self.num_layers - mixtures) * dense
        if self.moe is not None:
            moe = self.moe
            mixture = 3 * self.hidden_size * (experts * moe.intermediate_size + moe.shared_size)
            mixture += (2 * moe.shared_size + self.hidden_size) * self.mlp_bias
            mixture += moe.router.num_experts * (self.hidden_size + moe.choice_bias)
            layers += mixtures * mixture
        matrices = 1 if self.tie_embeddings else 2
        return layers + self.hidden_size + matrices * self.vocab_size * self.hidden_size

    def _attention_count(self) -> int:
        hidden, queries = self.hidden_size, self.num_heads * self.head_dim
        if self.latent is None:
            keys = self.num_kv_heads * self.head_dim
            return (
                hidden * (2 * queries + 2 * keys)
                + (queries + 2 * keys) * self.qkv_bias
                + hidden * self.output_bias
                + 2 * self.head_dim * self.qk_norm
            )
        latent = self.latent
        rank, cached = latent.query_rank, latent.latent_size + latent.rope_size
        count = hidden * queries if rank is None else rank * (hidden + 1 + queries)
        count += hidden * cached + latent.latent_size
        up = latent.latent_size * (latent.key_size + latent.value_size)
        count += self.num_heads * (up + latent.value_size * hidden)
        return count + ((rank or 0) + cached + hidden) * latent.bias


@dataclass(frozen=True)
class Attention:
    """The part of a ModelConfig that the reader of an architecture fills in, under its names."""

    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    latent: LatentConfig | None = None


def read_decoder(
    config: Mapping[str, object],
    *,
    default_head_dim: int | None = None,
    sliding_window: bool = False,
    attention_bias: str | None = None,
    mlp_bias: str | None = None,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    read_moe: Callable[[Fields, int], MoeConfig] | None = None,
) -> ModelConfig:
    """Read the fields that llama-like decoders share.

    The keywords are what an architecture adds: default_head_dim where config.json has none
    (otherwise hidden_size / heads); sliding_window: its files carry the fields of one, which must
    be off; attention_bias, mlp_bias: names of the fields that switch these biases on; qkv_bias:
    always there; qk_norm: always there; read_moe: reads what it says of experts, given the number
    of layers.
    Raises ConfigError for a value that makes no model and UnsupportedError for a field that is not
    honoured, each naming it.
    """
    fields = Fields(config, "config.json")
    num_heads, num_layers = read_heads(fields), read_layers(fields)
    num_kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})", num_kv_heads
        )
    hidden_size = fields.integer("hidden_size", 1, MAX_WIDTH)
    both_biases = attention_bias is not None and fields.boolean(attention_bias, False)
    _check_window(fields, num_layers, sliding_window)
    attention = Attention(
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, hidden_size, num_heads, default_head_dim),
        qkv_bias=qkv_bias or both_biases,
        output_bias=both_biases,
        qk_norm=qk_norm,
    )
    return read_model(
        fields,
        attention,
        mlp_bias=mlp_bias is not None and fields.boolean(mlp_bias, False),
        moe=None if read_moe is None else read_moe(fields, num_layers),
    )


def read_heads(fields: Fields) -> int:
    return fields.integer("num_attention_heads", 1, MAX_HEADS)


def read_layers(fields: Fields) -> int:
    return fields.integer("num_hidden_layers", 1, MAX_LAYERS)


def read_model(
    fields: Fields,
    attention: Attention,
    *,
    mlp_bias: bool = False,
    moe: MoeConfig | None = None,
    mtp_layers: int = 0,
) -> ModelConfig:
    """Read what every architecture has, around what its own reader found. All fields must have been
    read by then. Raises as `read_decoder`."""
    stated_positions = fields.integer("max_position_embeddings", 1, MAX_POSITIONS)
    rope, max_positions = read_rope(fields, stated_positions)
    fields.only("hidden_act", "silu", "swish")
    fields.only("partial_rotary_factor", 1)
    for multiplier in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        fields.only(multiplier, 1)
    _check_quantization(fields)
    result = ModelConfig(
        architecture=fields.text("model_type"),
        num_layers=read_layers(fields),
        hidden_size=fields.integer("hidden_size", 1, MAX_WIDTH),
        intermediate_size=fields.integer("intermediate_size", 1, MAX_WIDTH),
        num_heads=read_heads(fields),
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        vocab_size=fields.integer("vocab_size", 1, MAX_VOCABULARY),
        max_positions=max_positions,
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0),
        rope=rope,
        qkv_bias=attention.qkv_bias,
        output_bias=attention.output_bias,
        mlp_bias=mlp_bias,
        qk_norm=attention.qk_norm,
        latent=attention.latent,
        moe=moe,
        mtp_layers=mtp_layers,
    )
    fields.refuse_unread()
    return result


def _head_dim(fields: Fields, hidden_size: int, num_heads: int, default: int | None) -> int:
    if default is None and not fields.has("head_dim"):
        if hidden_size % num_heads:
            raise fields.error(
                "hidden_size",
                f"a multiple of num_attention_heads ({num_heads}) where head_dim is not given",
                hidden_size,
            )
        default = hidden_size // num_heads
    head_dim = fields.integer("head_dim", 2, MAX_HEAD_DIM, default)
    if head_dim % 2:
        raise fields.error("head_dim", "an even number (rope turns pairs)", head_dim)
    return head_dim


def _check_window(fields: Fields, num_layers: int, has_window_fields: bool) -> None:
    """Full attention in every layer, or UnsupportedError."""
    if not has_window_fields:
        return
    first_windowed = fields.integer("max_window_layers", 0, MAX_LAYERS, num_layers)
    if (
        fields.boolean("use_sliding_window", False)
        and fields.has("sliding_window")
        and first_windowed < num_layers
    ):
        raise fields.unsupported("use_sliding_window", "false")
    fields.skip("sliding_window")
    kinds = fields.strings("layer_types")
    if kinds and len(kinds) != num_layers:
        raise fields.error("layer_types", f"one entry for each of {num_layers} layers", len(kinds))
    if any(kind != "full_attention" for kind in kinds):
        raise fields.unsupported("layer_types", "full_attention in every layer")


def _check_quantization(fields: Fields) -> None:
    quantization = fields.nested("quantization_config")
    if quantization is None:
        return
    method = quantization.text("quant_method")
    if method not in ("compressed-tensors", "fp8", "bitsandbytes"):
        raise UnsupportedError(
            "config.json: quantization_config.quant_method",
            expected="compressed-tensors, fp8 or bitsandbytes",
            found=describe(method),
            fix="Start from the unquantized model and use `localr1 quantize`.",
        )
