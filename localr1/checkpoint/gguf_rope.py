"""What GGUF metadata says of rope scaling, as config.json's `rope_scaling` says it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from localr1.checkpoint import gguf_mixtures as mixtures
from localr1.checkpoint.gguf_metadata import Metadata
from localr1.checkpoint.gguf_names import Architecture
from localr1.checkpoint.paths import quoted
from localr1.errors import TensorError, UnsupportedError

LLAMA3_TOLERANCE = 1e-4
"""Largest relative difference between stored and recomputed rope factors. The file holds float32
factors (6e-8) computed from float32 frequencies (about 1e-6 after the powers); the next other
choice of parameters, an original context of 8191 for 8192, moves a factor by more than 1e-4
(tested)."""


def rope_scaling(
    metadata: Metadata,
    prefix: str,
    kind: Architecture,
    config: Mapping[str, Any],
    factors: Sequence[float] | None,
) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`, None for plain rope."""
    scaling = f"{prefix}.rope.scaling"
    rope_type = metadata.string(f"{scaling}.type", "none")
    if rope_type == "none" and f"{prefix}.rope.scale_linear" in metadata:
        rope_type = "linear"  # How files of 2023 say it.
    if rope_type != "yarn" and f"{prefix}.{mixtures.LOG_MULTIPLIER}" in metadata:
        raise UnsupportedError(
            f"{metadata.shown}: metadata {prefix}.{mixtures.LOG_MULTIPLIER}",
            expected=f"{scaling}.type yarn beside it",
            found=quoted(rope_type),
        )
    if factors is not None:
        if kind.has_latent:
            raise UnsupportedError(f"{metadata.shown}: rope_freqs.weight with latent attention")
        if rope_type != "none":
            raise UnsupportedError(
                f"{metadata.shown}: rope_freqs.weight together with {scaling}.type",
                found=quoted(rope_type),
            )
        return _llama3(factors, config, metadata.shown)
    if rope_type == "none":
        return None
    if rope_type not in ("linear", "yarn"):
        raise UnsupportedError(
            f"{metadata.shown}: metadata {scaling}.type",
            expected="none, linear or yarn",
            found=quoted(rope_type),
        )
    factor_key = f"{scaling}.factor"
    if rope_type == "linear" and factor_key not in metadata:
        factor_key = f"{prefix}.rope.scale_linear"
    factor = metadata.positive(factor_key)
    result: dict[str, Any] = {"rope_type": rope_type, "factor": factor}
    if rope_type == "linear":
        return None if factor == 1.0 else result
    result["original_max_position_embeddings"] = metadata.size(f"{scaling}.original_context_length")
    for name, source in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if f"{scaling}.{source}" in metadata:
            result[name] = metadata.positive(f"{scaling}.{source}")
    scale = metadata.positive(f"{scaling}.attn_factor", 1.0)
    if kind.has_latent:
        if scale != 1.0:
            raise UnsupportedError(
                f"{metadata.shown}: metadata {scaling}.attn_factor", expected=1.0, found=scale
            )
        return result | mixtures.read_magnitudes(metadata, prefix)
    if scale != 1.0:
        # llama.cpp multiplies its own magnitude correction by this; Hugging Face replaces it.
        result["attention_factor"] = scale * (0.1 * math.log(factor) + 1.0)
    return result


def llama3_factors(scaling: Mapping[str, float], theta: float, head_dim: int) -> list[float]:
    """What llama3 rope scaling divides each frequency by: the tensor rope_freqs.weight.

    scaling: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings, as in
    transformers' llama3 rope (modeling_rope_utils).
    """
    factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = scaling["original_max_position_embeddings"]
    result = []
    for turns in _turns_per_token(theta, head_dim):
        # How often the pair turns within the original context, between `low` and `high`.
        smooth = min(max((original * turns - low) / (high - low), 0.0), 1.0)
        result.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return result


def _turns_per_token(theta: float, head_dim: int) -> list[float]:
    return [theta ** (-2 * pair / head_dim) / (2 * math.pi) for pair in range(head_dim // 2)]


def _llama3(factors: Sequence[float], config: Mapping[str, Any], shown: str) -> dict[str, Any]:
    """Recover llama3 parameters from the factors and verify them by computing the factors again.

    Between its two bounds 1/factor is a line in the frequency. The line fixes low : high : original
    context; that they can be scaled together without effect is settled by low = 1, as all released
    models have it.
    """
    theta, head_dim = config["rope_theta"], config["head_dim"]
    turns = _turns_per_token(theta, head_dim)
    if len(factors) != len(turns):
        raise TensorError(
            f"{shown}: rope_freqs.weight", expected=f"{len(turns)} values", found=f"{len(factors)}"
        )
    unsupported = UnsupportedError(
        f"{shown}: rope_freqs.weight", expected="the factors of llama3 rope scaling"
    )
    if not all(math.isfinite(value) and value > 0 for value in factors):
        raise unsupported
    largest = max(factors)
    if largest == 1.0:
        raise unsupported
    middle = [
        (turn, (1 / value - 1 / largest) / (1 - 1 / largest))
        for turn, value in zip(turns, factors, strict=True)
        if 1.0 + LLAMA3_TOLERANCE < value < largest * (1 - LLAMA3_TOLERANCE)
    ]
    for high in (4.0, _fitted_high(middle)):
        if high is None or not middle:
            continue
        turn, smooth = middle[len(middle) // 2]
        scaling = {
            "factor": float(f"{largest:.6g}"),
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": round((smooth * (high - 1.0) + 1.0) / turn),
        }
        again = llama3_factors(scaling, theta, head_dim)
        if all(
            abs(one - two) <= LLAMA3_TOLERANCE * one
            for one, two in zip(factors, again, strict=True)
        ):
            return {"rope_type": "llama3", **scaling}
    raise unsupported


def _fitted_high(middle: Sequence[tuple[float, float]]) -> float | None:
    """high / low from two points of smooth = (original * turns - low) / (high - low), low = 1."""
    if len(middle) < 2:
        return None
    (turn_a, smooth_a), (turn_b, smooth_b) = middle[0], middle[-1]
    slope = (smooth_a - smooth_b) / (turn_a - turn_b)
    intercept = smooth_a - slope * turn_a
    return round(1.0 - 1.0 / intercept, 3) if intercept < 0 else None
