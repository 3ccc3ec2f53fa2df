"""What `localr1 plan` says: as a document, as a page, as a row of the table of known models."""

import shlex
from dataclasses import asdict
from typing import Any

from localr1.cli.output import Output, format_bytes
from localr1.cli.plan_machine import Machine
from localr1.cli.plan_model import DEFAULT_BITS, Plan
from localr1.experts.hardware import HardwareProfile
from localr1.experts.placement import LEAST_CONTEXT, CardUse, Placement, TierUse
from localr1.experts.prediction import (
    Speed,
    decode_shares,
    predict_decode,
    predict_prefill,
)

PROMPT_TOKENS = 512
"""Of the prompt that is predicted, and that the decoded tokens follow."""
DEFAULT_GROUP = 32


def verdict(plan: Plan) -> str:
    if not plan.placement.fits:
        return "does not fit"
    where = "from disk" if plan.placement.experts_on_disk else "fits"
    if plan.no_gpu:
        return f"{where}, without the GPU"
    return where + layers_words(plan)


def layers_words(plan: Plan) -> str:
    """What GPUs compute, if that is not all layers and the head."""
    placement, count = plan.placement, plan.placement.layers_on_cards
    gpu = "the GPU" if len(placement.cards) == 1 else f"{len(placement.cards)} GPUs"
    layers = placement.footprint.config.num_layers
    if placement.cards and count < layers:
        return f", {count} of {layers} layers on {gpu}"
    if placement.cards and not placement.cards[-1].has_head:
        return f", all but the head on {gpu}"
    return ""


def speeds(plan: Plan, machine: Machine) -> tuple[Speed, Speed | None]:
    """(of decoding, of a prompt, where the machine's multiply-adds are known)."""
    placement, hardware = plan.placement, machine.hardware
    prompt = min(PROMPT_TOKENS, placement.context)
    decode = predict_decode(placement, hardware, prompt)
    rates = [hardware.cpu_gmacs]
    if placement.vram is not None:
        rates.append(hardware.gpu_gmacs)
    rates += [hardware.cards[card.number].gmacs for card in placement.cards]
    computes = all(rates)
    return decode, predict_prefill(placement, hardware, prompt) if computes else None


def commands(plan: Plan, machine: Machine) -> list[str]:
    """What to type next, from where the model is now."""
    subject = plan.subject
    chat = ["localr1", "chat"]
    steps: list[list[str]] = []
    if subject.path is not None:
        source = str(subject.path) if subject.known is None else subject.name
    elif subject.known is not None and subject.known.repository is not None:
        source = subject.known.alias
        pull = ["localr1", "pull", source]
        if plan.bits is not None and plan.group == subject.known.recipe.group:
            # Quantized as it arrives, and then what the name means.
            steps.append([*pull, "--quantize", str(plan.bits)])
            return _joined(steps, [*chat, source], plan)
        steps.append(pull)
    else:
        source = "MODEL"
    is_embedded = subject.known is not None and subject.known.repository is None
    if plan.bits is None or (
        is_embedded and (plan.bits, plan.group) == (DEFAULT_BITS, DEFAULT_GROUP)
    ):
        chat.append(source)
    else:
        name = source.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
        out = f"{name}-int{plan.bits}"
        quantize = ["localr1", "quantize", source, out, "--bits", str(plan.bits)]
        steps.append(
            [*quantize, "--group", str(plan.group)] if plan.group != DEFAULT_GROUP else quantize
        )
        chat.append(out)
    return _joined(steps, chat, plan)


def _joined(steps: list[list[str]], chat: list[str], plan: Plan) -> list[str]:
    placement = plan.placement
    if plan.asked.context is not None or placement.context == placement.largest_context:
        chat += ["--context", str(placement.context)]
    if plan.asked.devices is not None and placement.cards:
        chat += ["--devices", plan.asked.devices]
    elif placement.cards or placement.vram is not None:
        chat += ["--device", "cuda"]
    if plan.asked.gpu_layers is not None and placement.cards:
        chat += ["--gpu-layers", str(plan.asked.gpu_layers)]
    for option, value in (("--vram", plan.asked.vram), ("--ram", plan.asked.ram)):
        chat += [option, value] if value is not None else []
    return [shlex.join(step) for step in [*steps, chat]]


def as_document(plan: Plan, nearest: Plan | None, machine: Machine) -> dict[str, Any]:
    """Everything `plan` says, ready for JSON. Bytes are bytes; speeds are tokens a second."""
    placement, config = plan.placement, plan.placement.footprint.config
    footprint = placement.footprint
    known = plan.subject.known
    shares = decode_shares(placement)
    decode, prefill = speeds(plan, machine)
    return {
        "model": plan.subject.name,
        "repository": None if known is None else known.repository,
        "path": None if plan.subject.path is None else str(plan.subject.path),
        "architecture": config.architecture,
        "parameters": config.parameter_count,
        "active_parameters": config.active_parameter_count,
        "bits": plan.bits,
        "group": None if plan.bits is None else plan.group,
        "file_bytes": plan.file_bytes,
        "weight_bytes": footprint.weights,
        "expert_bytes": footprint.expert,
        "experts": footprint.num_experts,
        "context": placement.context,
        "largest_context": placement.largest_context,
        "model_context": config.max_positions,
        "verdict": verdict(plan),
        "fits": placement.fits,
        "short": dict(placement.short),
        "vram": vram_document(placement),
        "cards": [card_document(card) for card in placement.cards],
        "ram": tier_document(placement.ram),
        "disk": {
            "experts": placement.experts_on_disk,
            "bytes": placement.experts_on_disk * footprint.expert,
        },
        "prediction": None
        if not placement.fits
        else {
            "decode": decode.tokens_per_second,
            "decode_bound": decode.bound,
            "prefill": None if prefill is None else prefill.tokens_per_second,
            "prefill_bound": None if prefill is None else prefill.bound,
            "tokens_before": min(PROMPT_TOKENS, placement.context),
            "hits": asdict(shares) if footprint.num_experts else None,
        },
        "hardware": {**asdict(machine.hardware), "measured": machine.is_measured},
        "next": commands(plan, machine) if placement.fits else [],
        "nearest": None if nearest is None else as_document(nearest, None, machine),
    }


def tier_document(tier: TierUse) -> dict[str, int]:
    return {**asdict(tier), "expert_bytes": tier.experts, "free": tier.free}


def vram_document(placement: Placement) -> dict[str, int] | None:
    """Of all cards together."""
    tiers = [card.tier for card in placement.cards]
    if placement.vram is not None:
        tiers.append(placement.vram)
    if not tiers:
        return None
    documents = [tier_document(tier) for tier in tiers]
    return {name: sum(each[name] for each in documents) for name in documents[0]}


def card_document(card: CardUse) -> dict[str, int | bool]:
    return {
        "number": card.number,
        "layers": card.num_layers,
        "head": card.has_head,
        **tier_document(card.tier),
    }


def print_plan(output: Output, plan: Plan, nearest: Plan | None, machine: Machine) -> None:
    placement = plan.placement
    output.fields(head(plan))
    output.line()
    output.table(("", *columns(plan)), tier_rows(plan))
    output.line()
    if placement.fits:
        output.fields(speed_fields(plan, machine))
    else:
        lacks = " and ".join(
            f"{format_bytes(missing)} of {name_of(memory)}"
            for memory, missing in placement.short.items()
        )
        line = f"does not fit: {lacks} short"
        if plan.vram_short:
            line += f", the GPU {format_bytes(plan.vram_short)}"
        fields = {"verdict": line, "largest context": context_line(plan)}
        if nearest is None:
            fields["nearest"] = "nothing that is known here fits this machine"
        else:
            fields["nearest"] = one_line(nearest, machine)
        output.fields(fields)
    chosen = plan if placement.fits else nearest
    if chosen is not None:
        output.line()
        for command in commands(chosen, machine):
            output.line(f"    {command}")


def head(plan: Plan) -> dict[str, str]:
    config = plan.placement.footprint.config
    known = plan.subject.known
    name = plan.subject.name
    if known is not None and known.repository is not None:
        name += f" ({known.repository})"
    count = f"{config.parameter_count:,}"
    if config.moe is not None:
        count += f", {config.active_parameter_count:,} active"
    weights = format_bytes(plan.file_bytes)
    if plan.bits is not None:
        weights += f" of files at {plan.bits} bits in groups of {plan.group}"
    else:
        weights += " of files, as it is"
    fields = {"model": name, "parameters": count, "weights": weights}
    footprint = plan.placement.footprint
    if footprint.num_experts:
        fields["experts"] = f"{footprint.num_experts:,} of {format_bytes(footprint.expert)}"
    fields["context"] = f"{plan.placement.context:,} tokens"
    return fields


def columns(plan: Plan) -> list[str]:
    on_disk = ["disk"] if plan.placement.footprint.num_experts else []
    cards = plan.placement.cards
    if len(cards) > 1:
        return [*(f"card {card.number}" for card in cards), "RAM", *on_disk]
    has_card = plan.placement.vram is not None or cards
    return [*(["VRAM"] if has_card else []), "RAM", *on_disk]


def tier_rows(plan: Plan) -> list[list[str]]:
    placement = plan.placement
    cards = [card.tier for card in placement.cards]
    tiers = [tier for tier in (*cards, placement.vram, placement.ram) if tier is not None]
    on_disk = [""] if placement.footprint.num_experts else []
    rows = []
    if cards:
        left = placement.footprint.config.num_layers - placement.layers_on_cards
        layers = [f"{card.num_layers}" for card in placement.cards]
        rows = [["layers", *layers, f"{left}", *on_disk]]
    rows += [
        ["weights", *(format_bytes(tier.weights) for tier in tiers), *on_disk],
        ["KV cache", *(format_bytes(tier.cache) for tier in tiers), *on_disk],
        ["workspace", *(format_bytes(tier.workspace) for tier in tiers), *on_disk],
        ["program", *(format_bytes(tier.program) for tier in tiers), *on_disk],
    ]
    if on_disk:
        disk = placement.experts_on_disk
        rows += [
            [
                "expert slots",
                *(format_bytes(tier.experts) for tier in tiers),
                format_bytes(disk * placement.footprint.expert),
            ],
            ["  experts", *(f"{tier.slots:,}" for tier in tiers), f"{disk:,}"],
        ]
    rows += [
        ["free", *(format_signed(tier.free) for tier in tiers), *on_disk],
        ["of", *(format_bytes(tier.budget) for tier in tiers), *on_disk],
    ]
    return rows


def format_signed(count: int) -> str:
    return format_bytes(count) if count >= 0 else f"-{format_bytes(-count)}"


def speed_fields(plan: Plan, machine: Machine) -> dict[str, str]:
    placement = plan.placement
    decode, prefill = speeds(plan, machine)
    shares = decode_shares(placement)
    fields = {"verdict": verdict_line(plan), "largest context": context_line(plan)}
    after = min(PROMPT_TOKENS, placement.context)
    fields["prefill"] = "not predicted: the machine's multiply-adds are not known"
    if prefill is not None:
        fields["prefill"] = f"about {rate(prefill)} tok/s, bound by {prefill.bound}"
    fields["decode"] = f"about {rate(decode)} tok/s after {after} tokens, bound by {decode.bound}"
    if placement.footprint.num_experts:
        found = [f"{shares.ram:.0%} in RAM", f"{shares.disk:.0%} on disk"]
        if placement.is_on_gpu:
            found.insert(0, f"{shares.vram:.0%} in VRAM")
        fields["a token's experts"] = ", ".join(found)
    fields["predicted from"] = bandwidths(machine.hardware, plan)
    return fields


def verdict_line(plan: Plan) -> str:
    if plan.placement.experts_on_disk:
        share = plan.placement.experts_on_disk / plan.placement.footprint.num_experts
        line = f"slow: {share:.0%} of the experts stay on disk"
    else:
        line = "fits" + layers_words(plan)
    if plan.no_gpu:
        line += f", without the GPU, {plan.no_gpu}"
    return line


def context_line(plan: Plan) -> str:
    largest = plan.placement.largest_context
    if largest < LEAST_CONTEXT:
        return "none fits"
    whole = largest == plan.placement.footprint.config.max_positions
    return f"{largest:,} tokens" + (", all the model was made for" if whole else "")


def rate(speed: Speed) -> str:
    value = speed.tokens_per_second
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def bandwidths(hardware: HardwareProfile, plan: Plan) -> str:
    """The figures that a prediction rests on."""
    values = {"CPU": hardware.cpu, "disk": hardware.disk}
    cards = plan.placement.cards
    if cards:
        names = ["GPU"] if len(cards) == 1 else [f"card {card.number}" for card in cards]
        rates = [hardware.cards[card.number].dense for card in cards]
        values = dict(zip(names, rates, strict=True)) | values
        if plan.placement.footprint.num_experts:
            values = {"PCIe": hardware.pcie} | values
    if plan.placement.vram is not None:
        expert = plan.placement.footprint.expert
        values = {"GPU": hardware.dense, "PCIe": hardware.pcie} | values
        if expert:
            values = {"GPU, experts": hardware.gpu(expert)} | values
    listed = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    return f"{hardware.name}: {listed} GB/s"


def name_of(memory: str) -> str:
    return {"vram": "graphics memory", "ram": "main memory"}[memory]


def one_line(plan: Plan, machine: Machine) -> str:
    decode, _ = speeds(plan, machine)
    bits = "as it is" if plan.bits is None else f"at {plan.bits} bits"
    return (
        f"{plan.subject.name} {bits} with {plan.placement.context:,} tokens of context: "
        f"{verdict(plan)}, about {rate(decode)} tok/s"
    )


def table_row(plan: Plan, machine: Machine) -> dict[str, Any]:
    document = as_document(plan, None, machine)
    kept = ("model", "repository", "bits", "file_bytes", "verdict", "context", "largest_context")
    return {name: document[name] for name in (*kept, "prediction")}


def print_plans(output: Output, plans: list[Plan], machine: Machine) -> None:
    rows = []
    for plan in plans:
        decode, prefill = speeds(plan, machine)
        fits = plan.placement.fits
        rows.append(
            [
                plan.subject.name,
                "" if plan.bits is None else str(plan.bits),
                format_bytes(plan.file_bytes),
                verdict(plan),
                f"{plan.placement.largest_context:,}" if fits else "",
                rate(prefill) if fits and prefill is not None else "",
                rate(decode) if fits else "",
            ]
        )
    output.table(
        ("model", "bits", "weights", "here", "longest context", "prefill tok/s", "decode tok/s"),
        rows,
    )
    output.line()
    hardware = machine.hardware
    parts = {"CPU": hardware.cpu, "disk": hardware.disk}
    if machine.memory.vram is not None:
        parts = {"GPU": hardware.dense, "PCIe": hardware.pcie} | parts
    listed = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    output.line(f"Predictions, from {hardware.name}: {listed} GB/s.")
    output.line(f"One model in detail: localr1 plan MODEL{machine.option}")
