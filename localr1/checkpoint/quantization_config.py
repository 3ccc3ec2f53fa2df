"""`quantization_config` of config.json as compressed-tensors writes it: which modules are packed,
and what their codes mean. Whatever changes the mathematics there and is not honoured here is
refused by name.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from localr1.checkpoint.name_patterns import matches
from localr1.checkpoint.paths import quoted
from localr1.checkpoint.strict_json import expect, optional, required
from localr1.errors import ConfigError, UnsupportedError
from localr1.qtypes import CARD_BITS, SUPPORTED_BITS, SUPPORTED_GROUPS, QuantScheme

FORMAT = "pack-quantized"
MAX_PATTERNS = 200
_WHERE = "config.json: quantization_config"
_PATTERN_MARK = "re:"
_DIGIT = re.compile("[0-9]")

_WEIGHT_KEYS = frozenset({"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"})
_HARMLESS_WEIGHT_KEYS = frozenset(
    # How the values were found or are stored, not what they mean.
    {"observer", "observer_kwargs", "scale_dtype", "zp_dtype", "block_structure"}
)
_ORDERS_KEPT = (None, False, "weight", "static")
"""Activation orders that leave the columns where they are."""
_GROUP_KEYS = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
_MUST_BE_EMPTY = ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config")
_STATUSES = (None, "compressed", "frozen")
"""How far the writer got; packed tensors are packed under either word."""
START_FROM_FLOATS = "Start from the original model and use `localr1 quantize`."


@dataclass(frozen=True)
class _Names:
    """Modules by whole name (or name of a class) and by pattern."""

    whole: frozenset[str]
    patterns: tuple[str, ...]

    def match_pattern(self, prefix: str) -> bool:
        """A mixture has tens of thousands of modules whose names differ in their numbers alone.
        Patterns without a digit cannot tell one digit from another, so names alike but for the
        values of their digits are matched once."""
        if self._tells_digits:
            return self._matches(prefix)
        return self._matches_alike(_DIGIT.sub("0", prefix))

    @cached_property
    def _tells_digits(self) -> bool:
        return any(_DIGIT.search(pattern) for pattern in self.patterns)

    @cached_property
    def _matches_alike(self) -> Callable[[str], bool]:
        return cache(self._matches)

    def _matches(self, prefix: str) -> bool:
        return any(matches(pattern, prefix) for pattern in self.patterns)


@dataclass(frozen=True)
class ChannelScheme:
    """Integer weights with one scale, and one zero point unless symmetric, for a whole row."""

    bits: int
    symmetric: bool

    def in_groups(self, columns: int) -> QuantScheme | None:
        """The scheme of the same numbers with the scale of a row repeated for each of its groups;
        None when no group divides the columns."""
        dividing = [group for group in SUPPORTED_GROUPS if columns % group == 0]
        return QuantScheme(self.bits, max(dividing), self.symmetric) if dividing else None


@dataclass(frozen=True)
class _Group:
    targets: _Names
    scheme: QuantScheme | ChannelScheme


@dataclass(frozen=True)
class QuantizationConfig:
    """The part of a `quantization_config` that says what codes mean."""

    groups: tuple[_Group, ...]
    ignored: _Names

    def scheme_for(self, prefix: str) -> QuantScheme | ChannelScheme | None:
        """The scheme of module `prefix`, None when it is ignored or no target names it.

        As in compressed-tensors a target that is the whole name goes before a pattern, a pattern
        before the name of a class; among equals the first in the file.
        """
        module_class = "Embedding" if prefix.endswith("embed_tokens") else "Linear"
        if {prefix, module_class} & self.ignored.whole or self.ignored.match_pattern(prefix):
            return None
        for group in self.groups:
            if prefix in group.targets.whole:
                return group.scheme
        for group in self.groups:
            if group.targets.match_pattern(prefix):
                return group.scheme
        for group in self.groups:
            if module_class in group.targets.whole:
                return group.scheme
        return None


def parse_quantization_config(document: object) -> QuantizationConfig:
    """Validate `quantization_config`. Raises FormatError, ConfigError, UnsupportedError."""
    values = expect(document, dict, _WHERE)
    method = required(values, "quant_method", str, _WHERE)
    if method != "compressed-tensors":
        raise UnsupportedError(
            f"{_WHERE}: quant_method", expected="compressed-tensors", found=quoted(method)
        )
    for key in _MUST_BE_EMPTY:
        if values.get(key) and not _is_dense(key, values[key]):
            raise UnsupportedError(f"{_WHERE}: {key} is not honoured", found=quoted(values[key]))
    status = optional(values, "quantization_status", str, _WHERE)
    if status not in _STATUSES:
        raise UnsupportedError(
            f"{_WHERE}: quantization_status", expected="compressed", found=quoted(status)
        )
    groups = required(values, "config_groups", dict, _WHERE)
    if not groups:
        raise ConfigError(f"{_WHERE}: config_groups is empty", expected="at least one group")
    stored = optional(values, "format", str, _WHERE)
    config = QuantizationConfig(
        groups=tuple(
            _group(group, f"{_WHERE}: {quoted(name)}", stored) for name, group in groups.items()
        ),
        ignored=_names(optional(values, "ignore", list, _WHERE) or [], f"{_WHERE}: ignore"),
    )
    num_patterns = sum(
        len(names.patterns) for names in (config.ignored, *(g.targets for g in config.groups))
    )
    if num_patterns > MAX_PATTERNS:
        raise UnsupportedError(
            f"{_WHERE}: patterns", expected=f"at most {MAX_PATTERNS:,}", found=f"{num_patterns:,}"
        )
    return config


def _is_dense(key: str, value: object) -> bool:
    """Whether a `sparsity_config` says that nothing is left out of the stored tensors."""
    if key != "sparsity_config" or not isinstance(value, Mapping):
        return False
    return bool(value.get("format") == "dense")


def _group(value: object, where: str, default_format: str | None) -> _Group:
    fields = expect(value, dict, where)
    _only(fields, _GROUP_KEYS, where)
    stored = optional(fields, "format", str, where) or default_format
    if stored != FORMAT:
        raise UnsupportedError(
            f"{where}: format", expected=FORMAT, found=quoted(stored), fix=START_FROM_FLOATS
        )
    for key in ("input_activations", "output_activations"):
        if fields.get(key) is not None:
            raise UnsupportedError(
                f"{where}: {key} is not honoured",
                expected="null: localr1 quantizes activations in its own way",
                found=quoted(fields[key]),
                fix=START_FROM_FLOATS,
            )
    targets = _names(required(fields, "targets", list, where), f"{where}: targets")
    weights = required(fields, "weights", dict, where)
    return _Group(targets, _scheme(weights, f"{where}: weights"))


def _scheme(weights: Mapping[str, Any], where: str) -> QuantScheme | ChannelScheme:
    _only(weights, _WEIGHT_KEYS | _HARMLESS_WEIGHT_KEYS | {"actorder"}, where)
    strategy = optional(weights, "strategy", str, where)
    for key, found, honoured in (
        ("type", weights.get("type", "int"), ("int",)),
        ("strategy", strategy, ("group", "channel")),
        ("dynamic", weights.get("dynamic", False), (False,)),
        ("actorder", weights.get("actorder"), _ORDERS_KEPT),
    ):
        if found not in honoured:
            raise UnsupportedError(
                f"{where}: {key}",
                expected=" or ".join(str(value) for value in honoured),
                found=quoted(found),
                fix=START_FROM_FLOATS,
            )
    symmetric = optional(weights, "symmetric", bool, where) is not False
    if strategy == "group":
        bits = _supported(weights, "num_bits", SUPPORTED_BITS, where)
        return QuantScheme(
            bits, _supported(weights, "group_size", SUPPORTED_GROUPS, where), symmetric
        )
    # How many bits a row of 5 or 6 has cannot be told from the shapes that memory is planned by.
    bits = _supported(weights, "num_bits", CARD_BITS, where)
    if weights.get("group_size") not in (None, -1):
        raise ConfigError(
            f"{where}: group_size",
            expected="null or -1 with strategy channel",
            found=quoted(weights["group_size"]),
        )
    return ChannelScheme(bits, symmetric)


def _supported(weights: Mapping[str, Any], key: str, sizes: tuple[int, ...], where: str) -> int:
    value = required(weights, key, int, where)
    if value not in sizes:
        raise UnsupportedError(
            f"{where}: {key}",
            expected=" or ".join(map(str, sizes)),
            found=quoted(value),
            fix=START_FROM_FLOATS,
        )
    return value


def _only(fields: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for key in fields:
        if key not in known:
            raise UnsupportedError(f"{where}: {quoted(key)} is not honoured")


def _names(values: list[Any], where: str) -> _Names:
    names = [expect(value, str, where) for value in values]
    return _Names(
        frozenset(name for name in names if not name.startswith(_PATTERN_MARK)),
        tuple(name.removeprefix(_PATTERN_MARK) for name in names if name.startswith(_PATTERN_MARK)),
    )
