"""The rope part of config.json, in both spellings: `rope_parameters` (transformers 5) and
`rope_theta` with `rope_scaling` (before), its kind under `rope_type` or `type`.
"""

from localr1.errors import ConfigError
from localr1.layers.rope import DefaultRope, LinearRope, Llama3Rope, RopeVariant, YarnRope
from localr1.models.fields import Fields

DEFAULT_THETA = 10_000.0
MIN_THETA, MAX_THETA = 1.0 + 1e-6, 1e30
MAX_FACTOR = 1e6
MAX_POSITIONS = 2**30
SUPPORTED = ("default", "linear", "llama3", "yarn")


def read_rope(config: Fields, max_positions: int) -> tuple[RopeVariant, int]:
    """The variant, and the positions the model was made for once the rope is scaled.

    max_positions: the file's max_position_embeddings. A file that states the original context
    beside a yarn or linear factor reaches original * factor; llama3 factors stretch only some
    frequencies and its files state the context in full.
    Raises ConfigError for values that make no rope, UnsupportedError for kinds and keys that are
    not honoured.
    """
    scaling, name = _scaling(config)
    theta = _theta(config, scaling)
    if scaling is None:
        return DefaultRope(theta), max_positions
    kind = _kind(scaling, name, config)
    scaling.only("partial_rotary_factor", 1)
    rope: RopeVariant
    context = max_positions
    if kind == "default":
        scaling.only("factor", 1)
        rope = DefaultRope(theta)
    elif kind == "linear":
        rope = LinearRope(theta, scaling.number("factor", 1.0, MAX_FACTOR))
        if scaling.has("original_max_position_embeddings"):
            original = _original_positions(config, scaling, max_positions)
            context = max(context, int(original * rope.factor))
    elif kind == "llama3":
        rope = _llama3(config, scaling, theta, max_positions)
    else:
        rope = _yarn(config, scaling, theta, max_positions)
        context = max(context, int(rope.original_positions * rope.factor))
    scaling.refuse_unread()
    return rope, min(context, MAX_POSITIONS)


def _scaling(config: Fields) -> tuple[Fields | None, str]:
    new, old = config.nested("rope_parameters"), config.nested("rope_scaling")
    if new is not None and old is not None and not new.same_as(old):
        raise ConfigError(
            "config.json: rope_scaling",
            expected="what rope_parameters says, or only one of the two",
            found="different values",
        )
    return (old, "rope_scaling") if new is None else (new, "rope_parameters")


def _theta(config: Fields, scaling: Fields | None) -> float:
    outer = config.number("rope_theta", MIN_THETA, MAX_THETA, DEFAULT_THETA)
    if scaling is None or not scaling.has("rope_theta"):
        return outer
    inner = scaling.number("rope_theta", MIN_THETA, MAX_THETA)
    if config.has("rope_theta") and inner != outer:
        raise config.error("rope_theta", f"{inner:g}, as in rope_parameters", outer)
    return inner


def _kind(scaling: Fields, name: str, config: Fields) -> str:
    key = "rope_type" if scaling.has("rope_type") else "type"
    kind = scaling.text(key, "default" if name == "rope_parameters" else None)
    if scaling.has("type") and scaling.text("type") != kind:
        raise scaling.error("type", f"{kind!r}, as in rope_type", scaling.text("type"))
    if kind not in SUPPORTED:
        raise scaling.unsupported(key, "one of " + ", ".join(SUPPORTED))
    return kind


def _original_positions(config: Fields, scaling: Fields, max_positions: int) -> int:
    """Stated beside the factor, or at the top level (Phi's habit), or the file's own context."""
    name = "original_max_position_embeddings"
    outer = config.integer(name, 1, MAX_POSITIONS, max_positions)
    return scaling.integer(name, 1, MAX_POSITIONS, outer)


def _llama3(config: Fields, scaling: Fields, theta: float, max_positions: int) -> Llama3Rope:
    low = scaling.number("low_freq_factor", 1e-6, MAX_FACTOR)
    high = scaling.number("high_freq_factor", 1e-6, MAX_FACTOR)
    if high <= low:
        raise scaling.error("high_freq_factor", f"more than low_freq_factor ({low:g})", high)
    return Llama3Rope(
        theta,
        factor=scaling.number("factor", 1.0, MAX_FACTOR),
        low_frequency_factor=low,
        high_frequency_factor=high,
        original_positions=_original_positions(config, scaling, max_positions),
    )


def _yarn(config: Fields, scaling: Fields, theta: float, max_positions: int) -> YarnRope:
    original = _original_positions(config, scaling, max_positions)
    scaling.skip("finetuned")  # Says that the weights were trained with it; changes nothing.
    scaling.only("extrapolation_factor", 1)
    fixed: float | None = None
    if scaling.has("attention_factor"):
        fixed = scaling.number("attention_factor", 1e-6, MAX_FACTOR)
    return YarnRope(
        theta,
        factor=scaling.number("factor", 1.0, MAX_FACTOR, max(max_positions / original, 1.0)),
        original_positions=original,
        beta_fast=scaling.number("beta_fast", 1e-6, MAX_FACTOR, 32.0),
        beta_slow=scaling.number("beta_slow", 1e-6, MAX_FACTOR, 1.0),
        mscale=scaling.number("mscale", 0.0, MAX_FACTOR, 0.0),
        mscale_all_dim=scaling.number("mscale_all_dim", 0.0, MAX_FACTOR, 0.0),
        truncate=scaling.boolean("truncate", True),
        fixed_attention_factor=fixed,
        attention_multiplier=scaling.number("attn_factor", 1e-6, MAX_FACTOR, 1.0),
    )
