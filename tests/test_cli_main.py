"""The program as a process: quick help, exit codes, errors of one line, a reader that goes away."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from localr1 import __version__
from localr1.cli import main as program
from localr1.errors import ConfigError, LocalR1Error, MemoryLimitError, NotFoundError

HEAVY = (
    "torch",
    "numpy",
    "rich",
    "prompt_toolkit",
    "gguf",
    "tokenizers",
    "jinja2",
    "transformers",
    "huggingface_hub",
    "filelock",
)


def localr1(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from localr1.cli.main import main; main()", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
        timeout=60,
    )


def test_help_and_version_import_nothing_heavy() -> None:
    """Importing torch takes seconds; `localr1 --help` has 0.3 s. What was imported does not depend
    on how busy the machine is, so that is what is tested."""
    code = (
        "import sys\n"
        "from localr1.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    for command in ([], ["chat"], ["bench"], ["show"], ["plan"], ["list"], ["prune"]):
        arguments = [*command, "--help"]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=60)


def test_version() -> None:
    result = localr1("--version")
    assert (result.returncode, result.stdout) == (0, f"localr1 {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["shwo"],
        ["show", "--no-such-option"],
        ["bench", "-r", "0"],
        ["bench", "-o", "xml"],
        ["chat", "--top-k", "many"],
        ["chat", "-o", "top_k"],
        ["chat", "-o", "topk=1"],
        ["chat", ".", "-p", "  "],
    ],
)
def test_bad_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = localr1(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_mistyped_command_is_suggested() -> None:
    assert "Did you mean 'show'" in localr1("shwo").stderr


def test_a_missing_model_is_exit_code_4_and_one_line(tmp_path: Path) -> None:
    result = localr1("show", str(tmp_path / "nothing"))
    assert result.returncode == 4
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (ConfigError("config.json: layers", expected="1", found="0"), 1, "expected 1, found 0"),
        (NotFoundError("gone", fix="Look elsewhere."), 4, "error: gone. Look elsewhere.\n"),
        (MemoryLimitError("too big"), 3, "error: too big\n"),
        (LocalR1Error("a name \x1b[2J from a file"), 1, r"error: a name \x1b[2J from a file"),
        (MemoryError(), 3, "not enough memory"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_known_errors_are_one_line(
    raised: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("localr1.cli.show.describe", fail)
    monkeypatch.setattr("localr1.cli.show.resolve_model", lambda *_: Path())
    with pytest.raises(SystemExit) as end:
        program.main(["show"])
    printed = capsys.readouterr()
    assert end.value.code == code
    assert line in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_an_unexpected_error_is_shown_whole_and_says_where_it_belongs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr("localr1.cli.show.resolve_model", fail)
    with pytest.raises(SystemExit) as end:
        program.main(["show"])
    printed = capsys.readouterr().err
    assert end.value.code == 1
    assert "Traceback" in printed
    assert "a fault of ours" in printed
    assert f"this is a fault in localr1 {__version__}; please report it" in printed


@pytest.mark.skipif(os.name == "nt", reason="pipes end differently on Windows")
def test_a_reader_that_leaves_costs_no_traceback() -> None:
    code = (
        "from localr1.cli import main as program, show\n"
        "show.resolve_model = lambda *_: None\n"
        "show.describe = lambda *_: [str(number) * 100 for number in range(10000)]\n"
        "program.main(['show', '--json'])"
    )
    read, write = os.pipe()
    os.close(read)  # Nobody reads: the first write to the pipe fails.
    try:
        result = subprocess.run(
            [sys.executable, "-c", code],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(write)
    assert result.stderr == ""
    assert result.returncode == 1
