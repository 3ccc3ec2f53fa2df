"""How much memory the experts may take, as a user says it. No torch."""

import re
from typing import Final

from localr1.checkpoint.paths import quoted
from localr1.errors import UsageError

UNITS: Final = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
_AMOUNT: Final = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,9})?) ?(%|[A-Za-z]{0,3})")


def parse_size(text: str, option: str) -> int:
    """Bytes: "24GiB", "8 GB", "1.5GiB", "1073741824". Raises UsageError, which names `option`."""
    amount, unit = _parse(text, option)
    if unit == "%":
        raise _no_amount(text, option, "an amount of memory such as 24GiB or 8GB")
    return int(amount * UNITS[unit])


def parse_budget(text: str, option: str, *, whole: int, available: int) -> int:
    """Bytes: a size as `parse_size` reads it, or a share such as "50%" of `whole`, the bytes of all
    experts. "0" is none. Raises UsageError, which names `option`, for what is no amount, and for
    more than `available`; but no more than `whole` is ever needed, so that more than that is it."""
    amount, unit = _parse(text, option)
    if unit == "%" and amount > 100:
        raise _no_amount(text, option, "0% to 100% of the experts")
    nbytes = int(amount / 100 * whole) if unit == "%" else int(amount * UNITS[unit])
    if unit != "%" and nbytes > available:
        raise _too_much(text, option, nbytes, available)
    nbytes = min(nbytes, whole)
    if nbytes > available:
        raise _too_much(text, option, nbytes, available)
    return nbytes


def _parse(text: str, option: str) -> tuple[float, str]:
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or (match[2] != "%" and match[2].upper() not in UNITS):
        raise _no_amount(text, option, "an amount such as 24GiB, 8GB, 50% or 0")
    return float(match[1]), match[2].upper()


def _no_amount(text: str, option: str, expected: str) -> UsageError:
    return UsageError(option, expected=expected, found=quoted(text, 40))


def _too_much(text: str, option: str, nbytes: int, available: int) -> UsageError:
    return UsageError(
        option,
        expected=f"at most {available / 2**30:.1f} GiB, what there is for experts",
        found=f"{text.strip()}, {nbytes / 2**30:.1f} GiB",
    )
