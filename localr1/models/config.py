"""What a model is, read once from config.json and frozen."""

from collections.abc import Mapping
from dataclasses import dataclass

from localr1.errors import UnsupportedError
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


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of pre-norm attention and gated-MLP blocks.

    architecture: the registry's name, as `model_type` in config.json.
    max_positions: the context the model was made for, after rope scaling.
    qkv_bias, output_bias, mlp_bias: which matrices carry one. qk_norm: RMS norm per head on
    queries and keys.
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

    @property
    def parameter_count(self) -> int:
        """All parameters; a tied matrix counts once."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = 2 * self.hidden_size  # The two norms.
        layer += self.hidden_size * (2 * queries + 2 * keys + 3 * self.intermediate_size)
        layer += (queries + 2 * keys) * self.qkv_bias
        layer += self.hidden_size * self.output_bias
        layer += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        layer += 2 * self.head_dim * self.qk_norm
        matrices = 1 if self.tie_embeddings else 2
        return (
            self.num_layers * layer
            + self.hidden_size
            + matrices * self.vocab_size * self.hidden_size
        )


def read_decoder(
    config: Mapping[str, object],
    *,
    default_head_dim: int | None = None,
    sliding_window: bool = False,
    attention_bias: str | None = None,
    mlp_bias: str | None = None,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    """Read the fields that llama-like decoders share.

    The keywords are what an architecture adds: default_head_dim where config.json has none
    (otherwise hidden_size / heads); sliding_window: its files carry the fields of one, which must
    be off; attention_bias, mlp_bias: names of the fields that switch these biases on; qkv_bias:
    always there; qk_norm: always there.
    Raises ConfigError for a value that makes no model and UnsupportedError for a field that is not
    honoured, each naming it.
    """
    fields = Fields(config, "config.json")
    architecture = fields.text("model_type")
    hidden_size = fields.integer("hidden_size", 1, MAX_WIDTH)
    num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    num_kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})", num_kv_heads
        )
    head_dim = _head_dim(fields, hidden_size, num_heads, default_head_dim)
    stated_positions = fields.integer("max_position_embeddings", 1, MAX_POSITIONS)
    rope, max_positions = read_rope(fields, stated_positions)
    both_biases = attention_bias is not None and fields.boolean(attention_bias, False)
    fields.only("hidden_act", "silu", "swish")
    fields.only("partial_rotary_factor", 1)
    for multiplier in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        fields.only(multiplier, 1)
    _check_window(fields, num_layers, sliding_window)
    _check_quantization(fields)
    result = ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, MAX_WIDTH),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size", 1, MAX_VOCABULARY),
        max_positions=max_positions,
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0),
        rope=rope,
        qkv_bias=qkv_bias or both_biases,
        output_bias=both_biases,
        mlp_bias=mlp_bias is not None and fields.boolean(mlp_bias, False),
        qk_norm=qk_norm,
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
    if method != "compressed-tensors":
        raise UnsupportedError(
            "config.json: quantization_config.quant_method",
            expected="compressed-tensors",
            found=describe(method),
            fix="Start from the unquantized model and use `localr1 quantize`.",
        )
