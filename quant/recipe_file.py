"""Recipes as TOML files, and those that come with localr1. Never imports torch.

    description = "MLP in 4 bits, all else in 8"
    smooth = true               # even out a dense model's activations first; true if left out
    group = 32                  # of the rules that name none; 32 if left out
    method = "rtn"              # of the rules that name none; rtn if left out
    awq = false                 # scale columns before what has fewer than 8 bits is rounded; true,
                                # or "dense": of dense models alone

    [[dense]]                   # rules of dense models; the first that matches a module is its
    part = "attention"          # a name of PARTS, or
    pattern = '.*\\.down_proj$'  # a regular expression, matched from the start of a module's name
    name = "down"               # for people; the part or the pattern if left out
    bits = 8                    # 4, 5, 6, 8, or 16: kept as it is
    group = [64, 32]            # the first that divides the rows of all that the rule matches
    method = "rtn"
    symmetric = true            # false: zero points, for fewer than 8 bits, not portable

    [[mixture]]                 # rules of mixtures of experts
    ...

A rule has `part` or `pattern`. What no rule matches is kept. A key that is not one of these is an
error: it would change nothing and seem to.
"""

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from localr1.checkpoint.files import read_text
from localr1.checkpoint.name_patterns import matches
from localr1.checkpoint.paths import quoted
from localr1.errors import FormatError, NotFoundError, UnsupportedError
from localr1.qtypes import SUPPORTED_BITS, SUPPORTED_GROUPS, QuantScheme
from localr1.quant import recipe as patterns
from localr1.quant.recipe import KEEP_BITS, Keep, Recipe, Rule

FOLDER: Final = Path(__file__).parent / "recipes"
PRESETS: Final = ("small", "balanced", "quality", "local")
"""Each is FOLDER/NAME.toml. The first three open elsewhere, from the fewest bytes to the most; the
last opens in localr1 alone."""
SUFFIX: Final = ".toml"
MAX_BYTES: Final = 1 << 20
DEFAULT_GROUP: Final = 32
DEFAULT_METHOD: Final = "rtn"

DENSE, MIXTURE = "dense", "mixture"
PARTS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        DENSE: {
            "attention": patterns.ATTENTION,
            "mlp": patterns.MLP,
            "head": patterns.HEAD,
            "embedding": patterns.EMBEDDING,
        },
        MIXTURE: {
            "experts": patterns.ROUTED_EXPERTS,
            "attention": patterns.MIXTURE_ATTENTION,
            "shared": patterns.SHARED_EXPERTS,
            "mlp": patterns.MLP,
            "head": patterns.HEAD,
            "embedding": patterns.EMBEDDING,
        },
    }
)
"""What `part` may be, by the kind of model; "mlp" of a mixture are its first, dense layers."""

_TOP_KEYS: Final = ("description", "smooth", "awq", "group", "method", DENSE, MIXTURE)
_RULE_KEYS: Final = ("part", "pattern", "name", "bits", "group", "method", "symmetric")
_FIX: Final = "docs/quantization.md has the format."


def find_recipe(
    name: str, methods: Collection[str], asymmetric_methods: Collection[str] = ()
) -> Recipe:
    """A preset by its name, or the recipe in a file, which ends in .toml. methods: that there are.
    asymmetric_methods: those with zero points.

    Raises NotFoundError for a name of neither, and as `read_recipe`.
    """
    if name in PRESETS:
        return read_recipe(FOLDER / f"{name}{SUFFIX}", methods, asymmetric_methods)
    if not name.endswith(SUFFIX):
        raise NotFoundError(
            f"recipe {quoted(name)}",
            expected=f"{', '.join(PRESETS)}, or a file whose name ends in {SUFFIX}",
        )
    return read_recipe(Path(name), methods, asymmetric_methods)


def read_recipe(
    path: Path, methods: Collection[str], asymmetric_methods: Collection[str] = ()
) -> Recipe:
    """Raises NotFoundError, FormatError (no TOML, a key or a value that is none of the format's)
    and UnsupportedError (bits, groups or methods that do not exist); each names file and key."""
    shown = str(path)
    if not path.is_file():
        raise NotFoundError(f"{shown}: there is no such recipe")
    try:
        document = tomllib.loads(read_text(path, shown, MAX_BYTES))
    except tomllib.TOMLDecodeError as error:
        raise FormatError(f"{shown}: is not valid TOML", found=str(error), fix=_FIX) from error
    _only(document, _TOP_KEYS, shown)
    _value(document, "description", str, shown, "")
    smooth = _value(document, "smooth", bool, shown, True)
    awq = document.get("awq", False)
    if awq != DENSE:
        awq = _value(document, "awq", bool, shown, False)
    known = {True: methods, False: asymmetric_methods}
    defaults = {
        "group": document.get("group", DEFAULT_GROUP),
        "method": _value(document, "method", str, shown, DEFAULT_METHOD),
    }
    rules = {
        kind: tuple(
            _rule(each, kind, f"{shown}: {kind} rule {number}", defaults, known)
            for number, each in enumerate(_value(document, kind, list, shown, []), 1)
        )
        for kind in (DENSE, MIXTURE)
    }
    if not any(isinstance(rule, Rule) for each in rules.values() for rule in each):
        raise FormatError(
            shown,
            expected="a rule, [[dense]] or [[mixture]], of 4, 5, 6 or 8 bits",
            found="none",
            fix=_FIX,
        )
    return Recipe(rules[DENSE], rules[MIXTURE], smooth, awq=bool(awq), awq_mixtures=awq != DENSE)


def _rule(
    values: Any,
    kind: str,
    where: str,
    defaults: Mapping[str, Any],
    methods: Mapping[bool, Collection[str]],
) -> Rule | Keep:
    """methods: those for symmetric schemes, and for others."""
    if not isinstance(values, dict):
        raise FormatError(where, expected=f"a table, [[{kind}]]", found=quoted(values), fix=_FIX)
    _only(values, _RULE_KEYS, where)
    name, pattern = _matched(values, kind, where)
    name = _value(values, "name", str, where, name)
    where += f" ({name})"
    bits = _value(values, "bits", int, where)
    if bits == KEEP_BITS:
        for key in ("group", "method", "symmetric"):
            if key in values:
                raise FormatError(
                    f"{where}: {key}", expected=f"none beside bits = {KEEP_BITS}", found=values[key]
                )
        return Keep(name, pattern)
    groups = {**defaults, **values}["group"]
    if not isinstance(groups, list):
        groups = [groups]
    if not groups:
        raise FormatError(f"{where}: group", expected="at least one", found="an empty list")
    method = _value({**defaults, **values}, "method", str, where)
    symmetric = _value(values, "symmetric", bool, where, True)
    if not symmetric and bits == 8:
        raise UnsupportedError(
            f"{where}: symmetric = false", expected="fewer bits: 8 gain nothing by it", found=bits
        )
    for key, found, known in (
        ("bits", bits, (*SUPPORTED_BITS, KEEP_BITS)),
        *(("group", group, SUPPORTED_GROUPS) for group in groups),
        ("method", method, methods[symmetric]),
    ):
        if found not in known:
            expected = " or ".join(map(str, known))
            raise UnsupportedError(f"{where}: {key}", expected=expected, found=quoted(found))
    return Rule(
        name, pattern, QuantScheme(bits, groups[0], symmetric=symmetric), method, tuple(groups[1:])
    )


def _matched(values: Mapping[str, Any], kind: str, where: str) -> tuple[str, str]:
    """Name and pattern of a rule."""
    if ("part" in values) == ("pattern" in values):
        found = "both" if "part" in values else "neither"
        raise FormatError(where, expected="either part or pattern", found=found, fix=_FIX)
    if "part" in values:
        part = _value(values, "part", str, where)
        if part not in PARTS[kind]:
            raise FormatError(
                f"{where}: part", expected=" or ".join(PARTS[kind]), found=quoted(part), fix=_FIX
            )
        return part, PARTS[kind][part]
    pattern = _value(values, "pattern", str, where)
    try:
        matches(pattern, "model.layers.0.mlp.up_proj")
    except UnsupportedError as error:
        # As every reader of the checkpoint would say of its config.json.
        raise FormatError(
            f"{where}: pattern", expected="a regular expression", found=str(error), fix=_FIX
        ) from error
    return pattern, pattern


def _only(values: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise FormatError(
                f"{where}: key {quoted(key)}", expected=f"one of {', '.join(known)}", fix=_FIX
            )


def _value(values: Mapping[str, Any], key: str, kind: type, where: str, default: Any = None) -> Any:
    if key not in values and default is None:
        raise FormatError(f"{where}: {key} is missing", expected=_KINDS[kind], fix=_FIX)
    value = values.get(key, default)
    if type(value) is not kind:
        raise FormatError(f"{where}: {key}", expected=_KINDS[kind], found=quoted(value), fix=_FIX)
    return value


_KINDS: Final = {str: "a string", int: "a whole number", bool: "true or false", list: "tables"}
