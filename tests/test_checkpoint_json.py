"""JSON from strangers, and names that become paths."""

import json
import os
import random
import sys
from pathlib import Path

import pytest
from checkpoint_files import refused

from localr1.checkpoint import files
from localr1.checkpoint.files import RandomAccessFile
from localr1.checkpoint.paths import model_root, resolve
from localr1.checkpoint.strict_json import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_VALUES,
    optional,
    parse_json,
    parse_object,
    required,
)
from localr1.errors import CheckpointError, FormatError, NotFoundError, TruncatedError

BAD_DOCUMENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "not JSON": (b"{'a': 1}", "line 1"),
    "trailing": (b"{} x", "Extra data"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "Infinity": (b'{"a": -Infinity}', "-Infinity"),
    "1e999": (b'{"a": 1e999}', "1e999"),
    "many digits of a float": (b'{"a": 0.' + b"1" * 1000 + b"}", "finite number"),
    "duplicate key": (b'{"a": 1, "b": 2, "a": 3}', "'a' appears twice"),
    "duplicate key, escaped": (b'{"a": 1, "\\u0061": 3}', "'a' appears twice"),
    "duplicate key below": (b'[{"x": {"a": 1, "a": 3}}]', "'a' appears twice"),
    "5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "5,000 characters"),
    "65 bits": (b'{"a": 18446744073709551616}', "64 bits"),
    "-65 bits": (b'{"a": -9223372036854775809}', "64 bits"),
    "depth 10^5": (b"[" * 100_000 + b"]" * 100_000, "100,000"),
    "depth of objects": (b'{"a":' * 1000 + b"1" + b"}" * 1000, "1,000"),
    "depth without end": (b"[" * 100_000, "nested too deeply"),
    "closed only": (b"[" * 60 + b"]" * 300, "not valid JSON"),
    "too many values": (b"[" + b"0," * MAX_VALUES + b"0]", "too many values"),
    "too large": (b" " * (MAX_BYTES + 1), "too large"),
    "not UTF-8": (b'{"a": "\xff"}', "0xff"),
    "a surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
    "lone high surrogate": (b'{"a": "\\ud83d"}', "surrogate"),
    "lone low surrogate": (b'{"a": "\\ude00"}', "surrogate"),
    "halves apart": (b'{"a": "\\ud83d \\ude00"}', "surrogate"),
    "halves around an escape": (b'{"a": "\\ud83d\\n\\ude00"}', "surrogate"),
    "halves swapped": (b'{"a": "\\ude00\\ud83d"}', "surrogate"),
    "a lone surrogate as key": (b'{"\\uD800": 1}', "surrogate"),
    "a list": (b"[]", "a list"),
    "a string": (b'"x"', "a string"),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_bad_json_is_refused(name: str, tmp_path: Path) -> None:
    data, said = BAD_DOCUMENTS[name]
    with refused(tmp_path, FormatError, said):
        parse_object(data, "config.json")


def test_brackets_in_strings_are_no_depth() -> None:
    text = "[{" * 1000 + '\\"' + "," * 100
    document = json.dumps({"a": text, "b\\": [[]] * 100}).encode()
    assert parse_json(document, "x") == {"a": text, "b\\": [[]] * 100}


def test_good_documents_pass() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude00", "b": "\\\\ud83d", "c": -1.5e3}', "x") == {
        "a": "\U0001f600",
        "b": "\\ud83d",
        "c": -1500.0,
    }
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_json(deep, "x") == json.loads(deep)
    assert parse_json(b"18446744073709551615", "x") == (1 << 64) - 1


def test_fields_have_kinds() -> None:
    values = {"layers": True, "name": None, "size": 3}
    assert required(values, "size", int, "config.json") == 3
    assert optional(values, "name", str, "config.json") is None
    with pytest.raises(FormatError, match="layers: expected an integer, found true or false True"):
        required(values, "layers", int, "config.json")
    with pytest.raises(FormatError, match="heads is missing"):
        required(values, "heads", int, "config.json")


# Paths.

BAD_NAMES = [
    "", ".", "..", "../x", "a/../b", "a/../../x", "/etc/passwd", "//server/share", "a//b", "a/",
    "C:x", "c:/x", "\\\\server\\share", "..\\x", "a\\b", "a\0b", "a\nb", "\x1b[31m", ".../x",
    ".. /x", "x.", "x ", "con", "NUL", "nul.safetensors", "COM1.bin", "lpt9", "a/aux/b", "a*b",
    "a?b", "x" * 2000, "a|b", '"a"', "\x7f",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_could_leave_are_refused(name: str, tmp_path: Path) -> None:
    with refused(tmp_path, FormatError, "file name"):
        resolve(model_root(tmp_path), name)


def test_names_inside_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.safetensors").write_bytes(b"x")
    root = model_root(tmp_path)
    assert resolve(root, "sub/a.safetensors") == root / "sub" / "a.safetensors"
    with refused(tmp_path, NotFoundError, "'b' is not there"):
        resolve(root, "b")
    with refused(tmp_path, FormatError, "a directory"):
        resolve(root, "sub")


def test_no_name_of_a_thousand_opens_outside(tmp_path: Path) -> None:
    """Random names of dangerous parts, with and without a file behind: inside, or refused."""
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    for place in (tmp_path / "x", root / "x", root / "a" / "x", root / "a" / "b" / "x"):
        place.write_bytes(b"x")
    parts = [
        "..",
        ".",
        "a",
        "b",
        "x",
        "",
        "...",
        "\\..",
        " ",
        "~",
        "%2e%2e",
        "..%2f",
        "\u2024.",
        "/",
    ]
    generator = random.Random(1)
    inside = 0
    for _ in range(1000):
        name = "/".join(generator.choices(parts, k=generator.randint(1, 5)))
        try:
            path = resolve(model_root(root), name)
        except (FormatError, NotFoundError):
            continue
        inside += 1
        assert path.is_relative_to(root.resolve())
    assert inside > 5


posix = pytest.mark.skipif(
    sys.platform == "win32", reason="needs links, pipes and devices of POSIX"
)


@posix
def test_links_stay_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "real").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x")
    (root / "good").symlink_to("real")
    (root / "bad").symlink_to("../secret")
    (root / "folder").symlink_to("..")
    (root / "loop").symlink_to("loop")
    assert resolve(model_root(root), "good").name == "real"
    for name in ("bad", "folder/secret"):
        with refused(tmp_path, FormatError, "a link to"):
            resolve(model_root(root), name)
    with refused(tmp_path, NotFoundError):
        resolve(model_root(root), "loop")
    (tmp_path / "alias").symlink_to(root)
    assert resolve(model_root(tmp_path / "alias"), "real") == root.resolve() / "real"


@posix
def test_links_of_the_hugging_face_cache(tmp_path: Path) -> None:
    """Of a snapshot only the blobs of its own repository may be reached, from any depth."""
    ours, other = tmp_path / "models--a--b", tmp_path / "models--c--d"
    snapshot = ours / "snapshots" / "0123"
    (snapshot / "sub").mkdir(parents=True)
    for repository in (ours, other):
        (repository / "blobs").mkdir(parents=True)
        (repository / "blobs" / "abc").write_bytes(b"x")
    (ours / "refs").mkdir()
    (ours / "refs" / "main").write_bytes(b"x")
    (snapshot / "good").symlink_to("../../blobs/abc")
    (snapshot / "sub" / "good").symlink_to("../../../blobs/abc")
    (snapshot / "other").symlink_to("../../../models--c--d/blobs/abc")
    (snapshot / "refs").symlink_to("../../refs/main")
    root = model_root(snapshot)
    assert resolve(root, "good").read_bytes() == b"x"
    assert resolve(root, "sub/good").read_bytes() == b"x"
    for name in ("other", "refs"):
        with refused(tmp_path, FormatError, "a link to"):
            resolve(root, name)
    # The same links in a directory that is no cache lead outside.
    plain = tmp_path / "plain" / "x" / "0123"
    plain.mkdir(parents=True)
    (tmp_path / "plain" / "blobs").mkdir()
    (tmp_path / "plain" / "blobs" / "abc").write_bytes(b"x")
    (plain / "good").symlink_to("../../blobs/abc")
    with refused(tmp_path, FormatError, "a link to"):
        resolve(model_root(plain), "good")


@posix
def test_pipes_and_devices_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with refused(tmp_path, FormatError, "a named pipe"):
        resolve(model_root(tmp_path), "pipe")
    with refused(tmp_path, FormatError, "a character device"):
        RandomAccessFile(Path("/dev/zero"))
    (tmp_path / "zero").symlink_to("/dev/zero")
    with refused(tmp_path, FormatError, "a link to"):
        resolve(model_root(tmp_path), "zero")


# Reading by position.


@pytest.mark.parametrize("positional", [True, False])
def test_reading_by_position(
    positional: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways: with preadv, and with a lock as on Windows; in pieces smaller than the request."""
    if not positional:
        monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.setattr(files, "READ_CHUNK", 7)
    path = tmp_path / "f"
    content = bytes(range(100))
    path.write_bytes(content)
    file = RandomAccessFile(path)
    assert file.read(10, 50) == content[10:60]
    assert bytes(file.read_tensor(90, 10).tolist()) == content[90:]
    assert file.read_tensor(5, 0).tolist() == []
    os.truncate(path, 50)
    with refused(tmp_path, TruncatedError, "expected 60 bytes, found 50"):
        file.read(10, 50)
    file.close()


def test_a_failing_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    (tmp_path / "f").write_bytes(b"abc")
    file = RandomAccessFile(tmp_path / "f")
    monkeypatch.setattr(RandomAccessFile, "_read_once", fail)
    with refused(tmp_path, CheckpointError, "Input/output error"):
        file.read(0, 3)
    file.close()
