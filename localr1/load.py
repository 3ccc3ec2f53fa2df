"""The one place that assembles an Engine: checkpoint, kernels, model, tokenizer, template."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from localr1.chat_template import ChatTemplate
from localr1.checkpoint.api import Checkpoint, TensorInfo
from localr1.checkpoint.reader import open_checkpoint
from localr1.engine.engine import Engine
from localr1.errors import ConfigError, MemoryLimitError, UsageError
from localr1.experts.footprint import Footprint, measure
from localr1.experts.placement import PROGRAM_BYTES, Memory, default_budget, place
from localr1.heap import own_pages
from localr1.kernels.api import Kernels
from localr1.models.config import ModelConfig
from localr1.models.registry import load_model, parse_config
from localr1.sampler import SamplingParams
from localr1.tokenizer import Tokenizer

KERNELS = ("native", "reference")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class LoadOptions:
    """threads: None for the physical cores. context: the window in tokens; None for the model's
    own, at most placement.DEFAULT_CONTEXT, less where memory is short. kernels: one of KERNELS."""

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
    backend, num_threads = make_kernels(options)
    footprint = footprint_of(checkpoint.tensors, config)
    context = choose_context(footprint, options.context, num_threads)
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
            with own_pages():
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


def footprint_of(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> Footprint:
    """What the model takes in memory, with every expert of a mixture there."""
    return measure(((info, 1) for info in tensors.values()), config).all_resident()


def choose_context(footprint: Footprint, asked: int | None, threads: int) -> int:
    """The window in tokens. Raises MemoryLimitError where the weights, or the window that was asked
    for, do not fit into free memory, and UsageError for a window that is none."""
    longest = footprint.config.max_positions
    if asked is not None and asked < 2:
        raise UsageError("context", expected="at least 2 tokens", found=asked)
    if asked is not None and asked > longest:
        raise UsageError(
            "context",
            expected=f"at most {longest} tokens, what the model was made for",
            found=asked,
        )
    available = int(psutil.virtual_memory().available)
    # Torch is loaded by now, and no more a part of what is free.
    memory = Memory(default_budget(available, held=PROGRAM_BYTES))
    placement = place(footprint, memory, asked, threads=threads)
    if not placement.fits:
        ram = placement.ram
        smaller = "Choose a smaller context" if asked else "Close other programs"
        raise MemoryLimitError(
            "the model does not fit into memory",
            expected=f"{_gib(available - ram.free)} free (weights {_gib(ram.weights)}, context of "
            f"{placement.context} tokens {_gib(ram.cache)}, workspace {_gib(ram.workspace)})",
            found=f"{_gib(available)}",
            fix=f"{smaller}, quantize to fewer bits, or use a smaller model.",
        )
    return placement.context


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
