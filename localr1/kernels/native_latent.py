"""Latent attention on the native kernels: one call a block and step."""

from torch import Tensor

from localr1.errors import KernelError
from localr1.kernels.api import LatentWeights, RopeTable, check_activations
from localr1.kernels.cache_rows import DTYPES
from localr1.kernels.checks import check_latent, check_latent_cache, check_rope_table
from localr1.kernels.native_weight import SCALE_TYPES, _native, address, matrix


class Latent:
    """A bound block; `weights` keeps alive what its addresses point to."""

    def __init__(self, bound: _native.BoundLatent, weights: LatentWeights) -> None:
        self.bound = bound
        self.weights = weights


def bind_latent(native: _native.Kernels, weights: LatentWeights) -> Latent:
    """`Kernels.bind_latent`."""
    check_latent(weights)
    w = weights
    matrices, biases = [w.q, w.kv_down, w.o], [w.q_bias, w.kv_down_bias, w.o_bias]
    if w.q_down is not None:
        matrices.append(w.q_down)
        biases.append(w.q_down_bias)
    sizes = (w.num_heads, w.key_size, w.rope_size, w.value_size, w.latent_size)
    try:
        bound = native.bind_latent(
            (w.norm.data_ptr(), address(w.q_norm), w.kv_norm.data_ptr()),
            (w.key_up.data_ptr(), w.value_up.data_ptr(), SCALE_TYPES[w.key_up.dtype]),
            [matrix(each) for each in matrices],
            [address(bias) for bias in biases],
            sizes,
            w.eps,
            w.latent_eps,
            w.scale,
        )
    except _native.RefusedError as error:
        raise KernelError(f"latent attention: {error}") from None
    return Latent(bound, weights)


def latent_block(
    native: _native.Kernels, x: Tensor, block: Latent, rope: RopeTable, cache: Tensor, start: int
) -> None:
    """`Kernels.latent_block`."""
    weights, tokens = block.weights, x.shape[0]
    check_activations(x, weights.norm.shape[0], "latent_block")
    check_latent_cache(cache, weights.latent_size + weights.rope_size, start, tokens)
    check_rope_table(rope, weights.rope_size, start + tokens)
    if tokens:
        native.latent_block(
            x.data_ptr(),
            tokens,
            block.bound,
            (rope.cos.data_ptr(), rope.sin.data_ptr(), rope.cos.shape[0], rope.cos.shape[1]),
            (cache.data_ptr(), cache.shape[0], DTYPES.index(cache.dtype)),
            start,
        )
