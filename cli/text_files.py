"""Text of unknown origin: what is piped in, and files that are read into a message."""

import codecs
from pathlib import Path

from localr1.errors import LocalR1Error, NotFoundError, UsageError

MAX_BYTES = 16 << 20
BYTE_ORDER_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decode_text(data: bytes) -> tuple[str, int]:
    """The text, and how many of its characters stand for bytes that are no UTF-8. A byte order mark
    is dropped, and one of UTF-16 (what Windows PowerShell writes) obeyed; line ends become \\n."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            text = data.decode(encoding, errors="replace")
            break
    else:
        text = data.decode("utf-8-sig", errors="replace")
    replaced = text.count("\ufffd") - data.count("\ufffd".encode())
    return text.replace("\r\n", "\n").replace("\r", "\n"), max(replaced, 0)


def read_text_file(path: Path) -> tuple[str, int]:
    """As `decode_text`. Raises NotFoundError, and UsageError for what is no text file."""
    try:
        if path.is_dir():
            raise UsageError(f"{path}", expected="a text file", found="a directory")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        fix = "Tab completes the names of files."
        raise NotFoundError(f"{path}: there is no such file", fix=fix) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LocalR1Error(f"{path} cannot be read", found=reason) from error
    if len(data) > MAX_BYTES:
        expected = f"at most {MAX_BYTES >> 20} MiB of text"
        raise UsageError(f"{path}", expected=expected, found="more")
    if b"\0" in data and not data.startswith(tuple(BYTE_ORDER_MARKS)):
        fix = "Convert it to text first."
        raise UsageError(f"{path}", expected="a text file", found="binary data", fix=fix)
    return decode_text(data)
