"""The one place that assembles an Engine: checkpoint, kernels, model, tokenizer, template."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch

from localr1.chat_template import ChatTemplate
from localr1.checkpoint.api import Checkpoint, TensorInfo
from localr1.checkpoint.reader import open_checkpoint
from localr1.engine.engine import Engine
from localr1.errors import ConfigError, MemoryLimitError, UsageError
from localr1.kernels.api import Kernels
from localr1.models.config import ModelConfig
from localr1.models.registry import load_model, parse_config
from localr1.sampler import SamplingParams
from localr1.tokenizer import Tokenizer

DEFAULT_CONTEXT = 8192
"""Tokens, where the model was made for more and nobody asked: a bigger window costs memory only as
it fills, but then it does."""
MARGIN = 384 << 20
"""Bytes left to the system, the activations of a prefill chunk and the tokenizer."""
PACKED_SUFFIXES = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point")
LATENT_UP = ".kv_b_proj"
EMBEDDING = "model.embed_tokens.weight"
KERNELS = ("native", "reference")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class LoadOptions:
    """threads: None for the physical cores. context: the window in tokens; None for the model's
    own, at most DEFAULT_CONTEXT, less where memory is short. kernels: one of KERNELS."""

    threads: int | None = None
    context: int | None = None
    kernels: str = "native"


def load_engine(
    path: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    kernels: str = "native",
) -> Engine:
    """Load the model at `path`, a Hugging Face directory or a .gguf file, ready to generate.

    Raises LocalR1Error of any kind: a checkpoint is untrusted. MemoryLimitError comes before any
    weight is read.
    """
    options = LoadOptions(threads, context, kernels)
    with open_checkpoint(path) as checkpoint:
        return assemble(checkpoint, options)


def assemble(checkpoint: Checkpoint, options: LoadOptions) -> Engine:
    """An Engine of an open checkpoint, which may be closed afterwards."""
    config = parse_config(checkpoint.config)
    defaults = sampling_defaults(checkpoint.generation_config)
    context = choose_context(config, loaded_bytes(checkpoint.tensors, config), options.context)
    backend, num_threads = make_kernels(options)
    files = checkpoint.tokenizer_files()
    template = None
    if files.chat_template is not None:
        template = ChatTemplate(files.chat_template, files.bos_token, files.eos_token)
    # Both take about a second for a large vocabulary, while the disk reads weights.
    with ThreadPoolExecutor(max_workers=1) as executor:
        building = executor.submit(Tokenizer.from_files, files, config.vocab_size)
        if template is not None:
            template.start()
        try:
            model = load_model(checkpoint, backend)
            tokenizer = building.result()
        except BaseException:
            if template is not None:
                template.close()
            raise
    return Engine(
        model,
        tokenizer,
        template,
        context,
        name=checkpoint.path.name,
        kernels=backend.name,
        threads=num_threads,
        defaults=defaults,
    )


def make_kernels(options: LoadOptions) -> tuple[Kernels, int]:
    """The backend by name, and its number of threads. Raises UsageError and KernelError."""
    if options.kernels not in KERNELS:
        raise UsageError("kernels", expected=" or ".join(KERNELS), found=repr(options.kernels)[:40])
    if options.threads is not None and options.threads < 1:
        raise UsageError("threads", expected="at least 1", found=options.threads)
    if options.kernels == "reference":
        from localr1.kernels.reference import ReferenceKernels

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        return ReferenceKernels(), torch.get_num_threads()
    from localr1.kernels.native import NativeKernels

    native = NativeKernels(threads=options.threads)
    # Unquantized matrices are torch's work: by the same number of threads.
    torch.set_num_threads(native.threads)
    return native, native.threads


def loaded_bytes(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> int:
    """What the weights take in memory: packed ones what they take on disk, others float32, but for
    those that stay as narrow as they are stored: an embedding that is no head, and latent
    attention's kv_b beside packed matrices. A packed kv_b is unpacked to float32."""
    total = 0
    for info in tensors.values():
        if config.is_left_out(info.name):
            continue
        module, _, part = info.name.rpartition(".")
        if info.name.endswith(PACKED_SUFFIXES):
            if not module.endswith(LATENT_UP):
                total += info.nbytes
            elif part == "weight_packed" and config.latent is not None:
                sizes = config.latent.key_size + config.latent.value_size
                total += 4 * config.num_heads * sizes * config.latent.latent_size
            continue
        narrow = info.name == EMBEDDING and not config.tie_embeddings
        if part == "weight" and module.endswith(LATENT_UP):
            attention = module.removesuffix(LATENT_UP)
            narrow = f"{attention}.o_proj.weight_packed" in tensors
        if narrow and info.dtype in ("F16", "BF16"):
            total += info.nbytes
        else:
            total += 4 * prod(info.shape)
    return total


def cache_bytes(config: ModelConfig, context: int) -> int:
    """The K/V cache, filled: float32 at worst."""
    return 4 * config.num_layers * config.cached_values * context


def choose_context(config: ModelConfig, weight_bytes: int, asked: int | None) -> int:
    """The window in tokens. Raises MemoryLimitError where the weights, or the window that was asked
    for, do not fit into free memory, and UsageError for a window that is none."""
    available = int(psutil.virtual_memory().available)
    free = available - weight_bytes - MARGIN
    if asked is not None and asked < 2:
        raise UsageError("context", expected="at least 2 tokens", found=asked)
    if asked is not None and asked > config.max_positions:
        raise UsageError(
            "context",
            expected=f"at most {config.max_positions} tokens, what the model was made for",
            found=asked,
        )
    per_token = cache_bytes(config, 1)
    least = asked if asked is not None else min(512, config.max_positions)
    if free < least * per_token:
        needed = weight_bytes + MARGIN + least * per_token
        smaller = "Choose a smaller context" if asked else "Close other programs"
        raise MemoryLimitError(
            "the model does not fit into memory",
            expected=f"{_gib(needed)} free (weights {_gib(weight_bytes)}, context of {least} "
            f"tokens {_gib(least * per_token)})",
            found=f"{_gib(available)}",
            fix=f"{smaller}, quantize to fewer bits, or use a smaller model.",
        )
    if asked is not None:
        return asked
    return min(config.max_positions, DEFAULT_CONTEXT, free // per_token)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, int | float]:
    """What generation_config.json advises. Raises ConfigError for values out of range."""
    if generation_config.get("do_sample") is False:
        return {"temperature": 0.0}
    values = {
        name: generation_config[name]
        for name in SAMPLING
        if generation_config.get(name) is not None
    }
    try:
        SamplingParams(**values)
    except UsageError as error:
        raise ConfigError(
            f"generation_config.json: {error.what}",
            expected=error.expected,
            found=error.found,
            fix="Correct the file or delete it.",
        ) from error
    return values
