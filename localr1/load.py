"""The one place that assembles an Engine: checkpoint, kernels, model, tokenizer, template."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from localr1.card.decoder import CardDecoder
from localr1.card.experts import StoreOnCards
from localr1.card.fit import homes_of
from localr1.card.loading import CardRoom, put_beside_experts, put_on_cards
from localr1.cgroup import available_memory
from localr1.chat_template import ChatTemplate
from localr1.checkpoint.api import Checkpoint, TensorInfo
from localr1.checkpoint.nf4 import runnable
from localr1.checkpoint.reader import open_checkpoint
from localr1.engine.engine import Engine
from localr1.errors import ConfigError, MemoryLimitError, UsageError
from localr1.experts.budget import parse_budget
from localr1.experts.cuda import CudaDevice, memory_to_take, open_cuda
from localr1.experts.device import Device, SimulatedDevice
from localr1.experts.footprint import Footprint, measure
from localr1.experts.hosting import Hosting, Slots, host_experts
from localr1.experts.hot_set import HotSet
from localr1.experts.options import ExpertOptions, SimulatedSpec, parse_device
from localr1.experts.placement import PROGRAM_BYTES, Memory, Placement, default_budget, place
from localr1.experts.store_options import StoreOptions
from localr1.experts.workspace import cache_in_8_bits
from localr1.heap import own_pages
from localr1.kernels.api import Kernels
from localr1.kernels.gpu_driver import DENSE_PROGRAMS, open_card
from localr1.kernels.gpu_program import kept_programs
from localr1.kernels.native import NativeKernels, default_threads
from localr1.kernels.reference import ReferenceKernels
from localr1.models.config import ModelConfig
from localr1.models.decoder import Decoder
from localr1.models.registry import load_model, parse_config
from localr1.qtypes import CARD_BITS, SUPPORTED_BITS
from localr1.sampler import SamplingParams
from localr1.settings import Settings
from localr1.tokenizer import Tokenizer

KERNELS = ("native", "reference")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class LoadOptions:
    """threads: None for the physical cores. context: the window in tokens; None for the model's
    own, at most placement.DEFAULT_CONTEXT, less where memory is short. kernels: one of KERNELS.
    experts: where those of a mixture lie. progress: called with bytes of experts read and to read.
    notice: called with a line about what else takes time. hot: which experts come into memory
    first. kv_bits: 8 keeps keys and values (or latents) in 8 bits; None and 16 as they are.
    """

    threads: int | None = None
    context: int | None = None
    kernels: str = "native"
    experts: ExpertOptions = ExpertOptions()  # noqa: RUF009  It is frozen.
    progress: Callable[[int, int], None] | None = None
    notice: Callable[[str], None] = lambda line: None
    hot: HotSet | None = None
    kv_bits: int | None = None


def load_engine(
    path: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    kernels: str = "native",
    experts: ExpertOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] = lambda line: None,
    hot: HotSet | None = None,
    kv_bits: int | None = None,
) -> Engine:
    """Load the model at `path`, a Hugging Face directory or a .gguf file, ready to generate. Close
    the engine when it is no more needed: it may read experts from the files as long as it lives.

    Raises LocalR1Error of any kind: a checkpoint is untrusted. MemoryLimitError comes before any
    weight is read.
    """
    where = experts or ExpertOptions()
    options = LoadOptions(threads, context, kernels, where, progress, notice, hot, kv_bits)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(runnable(open_checkpoint(path)))
        engine = assemble(checkpoint, options)
        if engine.experts is not None:
            stack.pop_all()  # The store reads on, and closes it.
        return engine


def assemble(checkpoint: Checkpoint, options: LoadOptions) -> Engine:
    """An Engine of an open checkpoint, which may be closed afterwards unless the engine has a store
    of experts: that closes it."""
    in_8_bits = cache_in_8_bits(options.kv_bits)
    if in_8_bits and options.experts.is_card:
        raise UsageError(
            "--kv-bits 8 beside --device cuda",
            expected="one of the two: what a card keeps of a conversation has 16 bits",
            found="both",
        )
    config = parse_config(checkpoint.config)
    defaults = sampling_defaults(checkpoint.generation_config)
    footprint = footprint_of(checkpoint.tensors, config, for_card=options.experts.is_card)
    # A mixture's experts go to a Device; of a dense model whole layers go to the card.
    is_dense_on_card = options.experts.is_card and not footprint.num_experts
    with ExitStack() as undo:
        backend: Kernels
        devices: list[Device] = []
        if is_dense_on_card:
            backend, num_threads = native_kernels(options)
        else:
            backend, num_threads, devices = make_backend(options)
        for device in devices:
            undo.callback(device.close)
        if in_8_bits:
            footprint = footprint.with_cache_in_8_bits()
        if isinstance(backend, ReferenceKernels):
            footprint = footprint.all_resident()
        check_options(options.experts, footprint, checkpoint.path.name)
        # What a simulated device has is main memory.
        taken = sum(each.memory for each in devices if isinstance(each, SimulatedDevice))
        placement = choose_placement(footprint, options.context, num_threads, taken)
        files = checkpoint.tokenizer_files()
        template = None
        if files.chat_template is not None:
            template = ChatTemplate(files.chat_template, files.bos_token, files.eos_token)
            undo.callback(template.close)
        # Both take about a second for a large vocabulary, while the disk reads weights.
        with ThreadPoolExecutor(max_workers=1) as executor:
            building = executor.submit(Tokenizer.from_files, files, config.vocab_size)
            if template is not None:
                template.start()
            with own_pages():
                model = load_model(
                    checkpoint, backend, leave_experts=isinstance(backend, NativeKernels)
                )
            tokenizer = building.result()
        if in_8_bits and isinstance(model, Decoder):
            model.quantize_cache()
        store, card = None, None
        if isinstance(backend, NativeKernels) and isinstance(model, Decoder):
            if is_dense_on_card:
                card = load_on_cards(model, backend, options, placement.context)
                undo.callback(card.close)
            cards = [device for device in devices if isinstance(device, CudaDevice)]
            if cards:
                layers = options.experts.gpu_layers
                card = put_beside_experts(model, cards, footprint, placement.context, layers)
                if card is not None:
                    undo.callback(card.close)
            hosting = make_hosting(options, placement, devices, homes(model, card, devices))
            store = host_experts(model, checkpoint, backend, hosting)
            if card is not None and store is not None:
                card.use_experts(StoreOnCards(store, cards))
        undo.pop_all()
    return Engine(
        card or model,
        tokenizer,
        template,
        placement.context,
        name=checkpoint.path.name,
        kernels=backend.name,
        arithmetic=f"{backend.name} {backend.isa}"
        if isinstance(backend, NativeKernels)
        else backend.name,
        threads=num_threads,
        defaults=defaults,
        experts=store,
        path=checkpoint.path,
        where="" if card is None else card.where,
        on_close=None if card is None else card.close,
    )


def check_options(asked: ExpertOptions, footprint: Footprint, name: str) -> None:
    """Raises UsageError for what this model has no use for."""
    if not footprint.num_experts and asked.moves_experts:
        raise UsageError(
            "--ram, --vram, --policy, a simulated --device",
            expected="a mixture with packed experts, which can be moved",
            found=f"{name}, which has none",
            fix="Leave them out, or quantize the mixture with `localr1 quantize`.",
        )


def load_on_cards(
    model: Decoder, kernels: NativeKernels, options: LoadOptions, context: int
) -> CardDecoder:
    """As `open_card` and `put_on_cards`."""
    asked = options.experts
    programs = kept_programs(Settings.from_environment(), options.notice)
    rooms: list[CardRoom] = []
    with ExitStack() as undo:
        for spec in asked.cards:
            driver = open_card(programs, kernels.rows_per_block, DENSE_PROGRAMS, spec.number)
            undo.callback(driver.close)
            driver.enter()
            rooms.append(CardRoom(driver, memory_to_take(driver, spec.memory)))
        card = put_on_cards(model, rooms, context, asked.gpu_layers)
        undo.pop_all()
        return card


def homes(model: Decoder, card: CardDecoder | None, devices: Sequence[Device]) -> dict[int, int]:
    """The number of the device that may hold a mixture's experts, by the layer's."""
    if not devices:
        return {}
    computed = {} if card is None else card.layers.card_of_mixture
    return homes_of(list(model.mixtures), computed, [each.memory for each in devices])


def make_hosting(
    options: LoadOptions,
    placement: Placement,
    devices: Sequence[Device],
    homes: Mapping[int, int],
) -> Hosting:
    """The budgets, in slots. homes: by the number of a layer, that of a device. Raises UsageError,
    when asked for slots, for one that is more than there is."""
    asked = options.experts

    def slots(slot_bytes: int, num_experts: int) -> Slots:
        whole = slot_bytes * num_experts
        ram = placement.ram.slots
        if asked.ram is not None:
            free = placement.ram.experts + max(placement.ram.free, 0)
            ram = parse_budget(asked.ram, "--ram", whole=whole, available=free) // slot_bytes
        there = []
        for number, device in enumerate(devices):
            memory, vram = device.memory, asked.vram_of(number)
            if vram is not None:
                memory = parse_budget(vram, "--vram", whole=whole, available=memory)
            there.append(memory // slot_bytes)
        return Slots(ram, there)

    return Hosting(
        slots,
        devices,
        homes,
        StoreOptions(policy=asked.policy, read_ahead=asked.read_ahead),
        options.progress,
        options.hot,
    )


def make_backend(options: LoadOptions) -> tuple[Kernels, int, list[Device]]:
    """The kernels, their threads, and the devices beside them. A simulated device computes with
    threads that the CPU then has not. Raises UsageError, KernelError where there is no card to use,
    and MemoryLimitError where it has no memory free."""
    asked = options.experts
    if asked.is_card:
        backend, num_threads = native_kernels(options)
        programs = kept_programs(Settings.from_environment(), options.notice)
        with ExitStack() as undo:
            cards: list[Device] = []
            for card in asked.cards:
                cards.append(open_cuda(programs, card, backend))
                undo.callback(cards[-1].close)
            undo.pop_all()
        return backend, num_threads, cards
    spec = parse_device(asked.device)
    if not isinstance(spec, SimulatedSpec):
        return *make_kernels(options), []
    whole = options.threads or default_threads()
    for_device = spec.threads or max(1, whole // 2)
    backend, num_threads = native_kernels(replace(options, threads=max(1, whole - for_device)))
    device = SimulatedDevice(
        spec.memory, spec.link_bandwidth, spec.latency, for_device, backend.isa
    )
    return backend, num_threads, [device]


def native_kernels(options: LoadOptions) -> tuple[NativeKernels, int]:
    """As `make_kernels`, of what a device needs beside it."""
    if options.kernels != "native":
        raise UsageError("--device", expected="native kernels beside it", found=options.kernels)
    backend, num_threads = make_kernels(options)
    assert isinstance(backend, NativeKernels)
    return backend, num_threads


def make_kernels(options: LoadOptions) -> tuple[Kernels, int]:
    """The backend by name, and its number of threads. Raises UsageError and KernelError."""
    if options.kernels not in KERNELS:
        raise UsageError("kernels", expected=" or ".join(KERNELS), found=repr(options.kernels)[:40])
    if options.threads is not None and options.threads < 1:
        raise UsageError("threads", expected="at least 1", found=options.threads)
    if options.kernels == "reference":
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        return ReferenceKernels(), torch.get_num_threads()
    bits = CARD_BITS if options.experts.is_card else SUPPORTED_BITS
    native = NativeKernels(threads=options.threads, numbers_of_bits=bits)
    # Unquantized matrices are torch's work: by the same number of threads.
    torch.set_num_threads(native.threads)
    return native, native.threads


def footprint_of(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, *, for_card: bool = False
) -> Footprint:
    """What the model takes in memory."""
    return measure(((info, 1) for info in tensors.values()), config, for_card=for_card)


def choose_placement(
    footprint: Footprint, asked: int | None, threads: int, taken: int = 0
) -> Placement:
    """What lies where, and the window in tokens; taken: bytes of memory that something else takes
    first. Raises MemoryLimitError where the weights, or the window that was asked for, do not fit
    into free memory, and UsageError for a window that is none."""
    longest = footprint.config.max_positions
    if asked is not None and asked < 2:
        raise UsageError("context", expected="at least 2 tokens", found=asked)
    if asked is not None and asked > longest:
        raise UsageError(
            "context",
            expected=f"at most {longest} tokens, what the model was made for",
            found=asked,
        )
    available = available_memory()
    if taken > available:
        raise MemoryLimitError(
            "--device", expected=f"at most {_gib(available)}, what is free", found=_gib(taken)
        )
    # Torch is loaded by now, and no more a part of what is free.
    memory = Memory(default_budget(available - taken, held=PROGRAM_BYTES))
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
    return placement


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
