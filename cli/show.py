"""`localr1 show`: what a model is, from its headers alone (no weight is read)."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localr1.cli.models import resolve_model
from localr1.cli.output import Output, format_bytes
from localr1.cli.weights import expert_bytes, weight_groups
from localr1.errors import ConfigError, NotFoundError, UnsupportedError
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.checkpoint.api import Checkpoint
    from localr1.models.config import ModelConfig

README = "README.md"
README_BYTES = 1 << 20
EXPERT_SHARD = re.compile(r"experts-\d{3,}\.safetensors$")


def open_headers(path: Path) -> "Checkpoint":
    """A checkpoint to look at. A cut GGUF file opens: its header says what it would be."""
    from localr1.checkpoint.gguf_file import GgufFile
    from localr1.checkpoint.reader import open_checkpoint

    if path.is_file() and path.suffix not in (".safetensors", ".json", ".bin", ".pt", ".pth"):
        return GgufFile.open(path, allow_truncated=True)
    return open_checkpoint(path)


def describe_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the architecture makes of config.json; of one that is not honoured, why."""
    from localr1.models.registry import parse_config

    try:
        parsed = parse_config(config)
    except (ConfigError, UnsupportedError) as error:
        return {"architecture": config.get("model_type"), "runs": False, "reason": str(error)}
    rope = {"variant": type(parsed.rope).__name__.removesuffix("Rope").lower()}
    rope |= {name: value for name, value in asdict(parsed.rope).items() if value is not None}
    return {
        "architecture": parsed.architecture,
        "runs": True,
        "parameters": parsed.parameter_count,
        "active_parameters": parsed.active_parameter_count,
        "context": parsed.max_positions,
        "layers": parsed.num_layers,
        "hidden_size": parsed.hidden_size,
        "heads": parsed.num_heads,
        "kv_heads": parsed.num_kv_heads,
        "head_dim": parsed.head_dim,
        "vocabulary": parsed.vocab_size,
        "tied_embeddings": parsed.tie_embeddings,
        "rope": rope,
        "cached_values": parsed.cached_values,
        "experts": describe_experts(parsed),
    }


def describe_experts(config: "ModelConfig") -> dict[str, int] | None:
    """The mixtures of a model; None of a dense one."""
    if config.moe is None:
        return None
    return {
        "experts": config.moe.router.num_experts,
        "experts_per_token": config.moe.router.experts_per_token,
        "layers": len(config.moe.layers),
    }


def prediction_layers(checkpoint: "Checkpoint") -> dict[str, int] | None:
    """The multi-token-prediction layers this checkpoint holds: known, and not loaded. None where
    there are none."""
    from localr1.models.registry import parse_config
    from localr1.quant.plan import left_out

    try:
        found = left_out(parse_config(checkpoint.config), checkpoint.tensors)
    except (ConfigError, UnsupportedError):
        return None
    return None if found is None else asdict(found)


def stored_experts(checkpoint: "Checkpoint", files: Mapping[str, int]) -> dict[str, Any] | None:
    """How the routed experts lie in the files; None of a model that has none, or has them stacked.
    files: as `file_sizes`."""
    sizes = expert_bytes(checkpoint.tensors).values()
    if not sizes:
        return None
    shards = [nbytes for name, nbytes in files.items() if EXPERT_SHARD.match(name)]
    return {
        "smallest_bytes": min(sizes),
        "largest_bytes": max(sizes),
        "shards": len(shards),
        "shard_bytes": sum(shards),
    }


def file_sizes(path: Path) -> dict[str, int]:
    """Bytes of each regular file of a model."""
    from localr1.checkpoint.gguf_split import part_paths

    files = (
        part_paths(path)
        if path.is_file()
        else sorted(each for each in path.iterdir() if each.is_file())
    )
    return {file.name: file.stat().st_size for file in files}


def licence_of(checkpoint: "Checkpoint", repository: str | None) -> str | None:
    """As the table of known models has it, else GGUF metadata, else the front matter of a Hugging
    Face README. repository: where it comes from, if that is known."""
    from localr1.checkpoint.files import read_text
    from localr1.checkpoint.gguf_file import GgufFile
    from localr1.hub.known import find_model

    known = None if repository is None else find_model(repository)
    if known is not None:
        return known.licence
    if isinstance(checkpoint, GgufFile):
        return checkpoint.metadata.string("general.license", "") or None
    readme = checkpoint.path / README
    if not readme.is_file() or readme.stat().st_size > README_BYTES:
        return None
    lines = read_text(readme, README, README_BYTES).splitlines()
    if lines[:1] != ["---"]:
        return None
    stated = {"license": "", "license_name": ""}
    for line in lines[1:]:
        if line == "---":
            break
        key, _, value = line.partition(":")
        if key in stated:
            stated[key] = value.strip().strip("\"'")
    if stated["license"] == "other" and stated["license_name"]:
        return stated["license_name"]
    return stated["license"] or None


def has_template(checkpoint: "Checkpoint") -> bool:
    """Whether there is a chat template; a model without a tokenizer has none either."""
    try:
        return checkpoint.tokenizer_files().chat_template is not None
    except NotFoundError:
        return False


def origin_of(path: Path) -> dict[str, Any] | None:
    """What localr1.json says the model was made from, and by; None without that file."""
    from localr1.checkpoint.manifest import MANIFEST_NAME
    from localr1.checkpoint.strict_json import optional, read_object, required

    manifest = path / MANIFEST_NAME
    if not manifest.is_file():
        return None
    shown = str(manifest)
    document = read_object(manifest, shown)
    kinds: dict[str, type] = {"source": dict, "made_by": dict, "recipe": list, "portable": bool}
    kinds["not_portable_because"] = list
    kinds["left_out"] = kinds["rotation"] = kinds["target"] = dict
    origin: dict[str, Any] = {
        name: optional(document, name, kind, shown) for name, kind in kinds.items()
    }
    if (counts := origin["left_out"]) is not None:
        where = f"{shown}: left_out"
        origin["left_out"] = {
            name: required(counts, name, int, where) for name in ("mtp_layers", "tensors", "bytes")
        }
    return origin


def quality_of(path: Path) -> Mapping[str, Any] | None:
    """The quality card; None where there is none. Raises FormatError for a damaged one."""
    from localr1.checkpoint.paths import model_root
    from localr1.checkpoint.quality import read_card

    return read_card(model_root(path), path)


def hub_source(path: Path, origin: Mapping[str, Any] | None) -> dict[str, str | None]:
    """The repository and commit that a model, or the source it was quantized from, was pulled as;
    None each for one that came otherwise."""
    from localr1.hub.cached import snapshot_of

    if origin is not None:
        source = origin["source"] or {}
        found = [source.get(key) for key in ("repository", "commit")]
        repository, commit = (value if isinstance(value, str) else None for value in found)
    else:
        repository, commit = snapshot_of(path) or (None, None)
    return {"repository": repository, "commit": commit}


def describe(path: Path) -> dict[str, Any]:
    """Everything `show` says, as one JSON-ready document. Raises CheckpointError and its like."""
    with open_headers(path) as checkpoint:
        groups = weight_groups(checkpoint)
        parameters = sum(group.parameters for group in groups)
        nbytes = sum(group.bytes for group in groups)
        files = file_sizes(path)
        origin = origin_of(path)
        source = hub_source(path, origin)
        return {
            "path": str(path),
            "format": checkpoint.format,
            "truncated": bool(getattr(checkpoint, "is_truncated", False)),
            **describe_config(checkpoint.config),
            "left_out": prediction_layers(checkpoint),
            "stored_experts": stored_experts(checkpoint, files),
            "stored_parameters": parameters,
            "weight_bytes": nbytes,
            "bits_per_weight": round(8 * nbytes / parameters, 3) if parameters else None,
            "weights": [{**asdict(group), "bits": round(group.bits, 3)} for group in groups],
            "chat_template": has_template(checkpoint),
            "licence": licence_of(checkpoint, source["repository"]),
            **source,
            "files": files,
            "origin": origin,
            "quality": None if origin is None else quality_of(path),
        }


def as_fields(model: dict[str, Any]) -> dict[str, str]:
    """The document's head as lines for people."""
    fields = {"model": model["path"], "format": model["format"]}
    if model["truncated"]:
        fields["format"] += ", cut short: the header only"
    fields["architecture"] = str(model["architecture"])
    if model["runs"]:
        rope = model["rope"]
        settings = ", ".join(f"{name} {value}" for name, value in rope.items() if name != "variant")
        fields |= {
            "parameters": f"{model['parameters']:,}"
            + (f", {model['active_parameters']:,} active" if model["experts"] else ""),
            "context": f"{model['context']:,} tokens",
            "layers": f"{model['layers']} of width {model['hidden_size']}",
            "heads": f"{model['heads']}, {model['kv_heads']} for keys and values, "
            f"of {model['head_dim']}",
            "vocabulary": f"{model['vocabulary']:,}"
            + (", embedding and head tied" if model["tied_embeddings"] else ""),
            "rope": f"{rope['variant']} ({settings})",
            "cache": f"{model['cached_values']:,} values a token and layer",
        }
        if model["experts"] is not None:
            fields["experts"] = (
                "{experts} a layer, {experts_per_token} a token, in {layers} of ".format_map(
                    model["experts"]
                )
                + f"{model['layers']} layers"
            )
        if model["left_out"] is not None:
            fields["left out"] = left_out_line(model["left_out"])
    else:
        fields["does not run"] = model["reason"]
    if model["stored_experts"] is not None:
        fields |= stored_experts_fields(model["stored_experts"])
    fields["weights"] = format_bytes(model["weight_bytes"])
    if model["bits_per_weight"] is not None:
        fields["weights"] += f", {model['bits_per_weight']:.2f} bits a stored weight"
    fields["files"] = f"{len(model['files'])}, {format_bytes(sum(model['files'].values()))}"
    fields["chat template"] = "yes" if model["chat_template"] else "no"
    fields["licence"] = model["licence"] or "not stated"
    if model["origin"] is not None:
        fields |= origin_fields(model["origin"])
    if model["quality"] is not None:
        fields["quality"] = quality_line(model["quality"])
    if model["repository"] is not None:
        of_source = "source " if model["origin"] is not None else ""
        fields[f"{of_source}repository"] = model["repository"]
        fields[f"{of_source}commit"] = model["commit"] or "not recorded"
    return fields


def left_out_line(left_out: Mapping[str, int]) -> str:
    layers, tensors = left_out["mtp_layers"], left_out["tensors"]
    return (
        f"{layers:,} multi-token-prediction layer{'s' * (layers > 1)} "
        f"({tensors:,} tensor{'s' * (tensors > 1)}, {format_bytes(left_out['bytes'])})"
    )


def stored_experts_fields(stored: Mapping[str, int]) -> dict[str, str]:
    smallest, largest = (format_bytes(stored[name]) for name in ("smallest_bytes", "largest_bytes"))
    fields = {"an expert": smallest if smallest == largest else f"{smallest} to {largest}"}
    if stored["shards"]:
        fields["expert shards"] = f"{stored['shards']:,}, {format_bytes(stored['shard_bytes'])}"
    return fields


def origin_fields(origin: Mapping[str, Any]) -> dict[str, str]:
    source, made_by = origin["source"] or {}, origin["made_by"] or {}
    fields = {"made from": f"{source.get('name')} ({source.get('format')})"}
    fields["made by"] = ", ".join(f"{name} {version}" for name, version in made_by.items())
    rules = [rule for rule in origin["recipe"] or [] if isinstance(rule, dict)]
    # A part whose layers differ has several rules, and a mixture some for each layer.
    fields["recipe"] = "; ".join(dict.fromkeys(map(rule_text, rules)))
    if (rotation := origin["rotation"]) is not None:
        fields["rotated"] = f"{rotation.get('kind')}, seed {rotation.get('seed')}"
    if (target := origin["target"]) is not None:
        size, bits = target.get("bytes"), target.get("bits_per_weight")
        fields["chosen for"] = f"{bits} bits a weight" if size is None else f"{size} bytes"
    reasons = "; ".join(str(reason) for reason in origin["not_portable_because"] or [])
    fields["portable"] = "yes" if origin["portable"] else f"no: {reasons}"
    if origin["left_out"] is not None:
        fields["left out"] = f"{left_out_line(origin['left_out'])} of the source"
    return fields


def rule_text(rule: Mapping[str, Any]) -> str:
    """Of one with a group size; another keeps what it matches."""
    if rule.get("group_size") is None:
        return f"{rule.get('name')} kept"
    return (
        f"{rule.get('name')} {rule.get('bits')} bits in groups of {rule.get('group_size')} "
        f"({rule.get('method')})"
    )


def quality_line(card: Mapping[str, Any]) -> str:
    """The card's measures in a line; `eval card` and --json have all of it."""

    def shown(name: str, digits: int, factor: float = 1.0) -> str:
        mean = card[name]
        error = mean.get("standard_error")
        text = f"{factor * mean['value']:.{digits}f}"
        return text if error is None else f"{text} ± {factor * error:.{digits}f}"

    return (
        f"KL {shown('kl', 4)} nats, 99th percentile {card['kl_p99']:.3f}; same top token "
        f"{shown('top1', 1, 100.0)} %; perplexity {shown('perplexity', 3)}, "
        f"{card['perplexity_ratio']:.4f} of the unquantized; {card['text']['positions']:,} "
        f"positions of {card['text']['name']}"
    )


def show(
    model: Annotated[
        str | None, typer.Argument(help="A model's directory, .gguf file, or name.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """What a model is: architecture, context, bits of each kind of weight, source."""
    settings = Settings.from_environment()
    output = Output(color=settings.color)
    document = describe(resolve_model(model, settings))
    if as_json:
        output.json(document)
        return
    output.fields(as_fields(document))
    output.line()
    output.table(
        ("weights", "type", "tensors", "parameters", "bits", "size"),
        [
            (
                group["kind"],
                group["type"],
                f"{group['tensors']:,}",
                f"{group['parameters']:,}",
                f"{group['bits']:.2f}",
                format_bytes(group["bytes"]),
            )
            for group in document["weights"]
        ],
    )
