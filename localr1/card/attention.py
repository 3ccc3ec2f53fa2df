"""Attention's launches, over keys and values or over latents, from the norm to the residual."""

from ctypes import c_float, c_int32, c_int64

from localr1.card.program import pointer
from localr1.card.step import Heads, LayerMemory, StepLaunches
from localr1.card.weights import CardAttention, CardLatent
from localr1.card.workspace import FLOAT
from localr1.kernels import gpu_launch


def attention(step: StepLaunches, weights: CardAttention, memory: LayerMemory) -> None:
    w, work, tokens = weights, step.work, step.tokens
    dim, heads, kv_heads = w.head_dim, w.num_heads, w.num_kv_heads
    step.norm(work.x, w.norm, w.eps, w.o.rows)
    step.products(w.projections, work.inputs, work.projected, (heads + 2 * kv_heads) * dim)
    step.program.launch(
        gpu_launch.rope_append(heads, kv_heads, dim, tokens),
        pointer(work.projected), c_int32(heads), c_int32(kv_heads), c_int32(dim), pointer(w.q_norm),
        pointer(w.k_norm), c_float(w.eps), *step.rope.arguments, pointer(work.start),
        pointer(memory.keys), pointer(memory.values), c_int64(memory.capacity),
        c_int32(memory.half), pointer(work.queries),
    )  # fmt: skip
    shape = Heads(heads, kv_heads, dim, dim, memory.capacity * dim, w.scale)
    step.attend(work.queries, memory, shape)
    step.quantize(work.attended, w.o.columns)
    step.add_product(w.o, work.inputs)


def latent_attention(step: StepLaunches, weights: CardLatent, memory: LayerMemory) -> None:
    """In absorbed form: all heads share one key and value, the latent."""
    w, work, tokens, heads = weights, step.work, step.tokens, weights.num_heads
    cached = w.latent_size + w.rope_size
    stride = cached + w.first_rows
    step.norm(work.x, w.norm, w.eps, w.o.rows)
    step.products(w.projections, work.inputs, work.projected, stride)
    queries, query_stride = work.projected + FLOAT * cached, stride
    if w.q is not None:
        step.norm(queries, w.q_norm, w.latent_eps, w.first_rows, stride=stride)
        queries, query_stride = work.queries, w.q.rows
        step.product(w.q, work.inputs, queries, query_stride)
    rope, start = step.rope.arguments, pointer(work.start)
    step.program.launch(
        gpu_launch.latent_append(tokens),
        pointer(work.projected), c_int64(stride), pointer(w.kv_norm), c_float(w.latent_eps),
        c_int32(w.latent_size), *rope, start, pointer(memory.keys), c_int32(memory.half),
    )  # fmt: skip
    step.program.launch(
        gpu_launch.absorb_queries(w.latent_size, heads, tokens),
        pointer(queries), c_int64(query_stride), pointer(w.key_up), c_int32(w.up_type),
        c_int32(w.key_size), c_int32(w.latent_size), *rope, start, pointer(work.absorbed),
    )  # fmt: skip
    shape = Heads(heads, 1, cached, w.latent_size, memory.capacity * cached, w.scale)
    step.attend(work.absorbed, memory, shape)
    step.program.launch(
        gpu_launch.expand_values(w.value_size, heads, tokens),
        pointer(work.attended), pointer(w.value_up), c_int32(w.up_type), c_int32(w.latent_size),
        c_int32(w.value_size), pointer(work.expanded),
    )  # fmt: skip
    step.quantize(work.expanded, w.o.columns)
    step.add_product(w.o, work.inputs)
