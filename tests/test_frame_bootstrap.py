"""The three ways a bare machine fails to install, each one sentence on stderr and nothing else."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BOOTSTRAP = Path(__file__).resolve().parent.parent / "scripts" / "bootstrap.py"


def run_bootstrap(venv: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BOOTSTRAP), "run", "--venv", str(venv)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def one_error(stderr: str) -> str:
    """The only error line; progress lines may precede it, a traceback may not."""
    assert "Traceback" not in stderr
    errors = [line for line in stderr.splitlines() if not line.startswith("localr1: ")]
    assert len(errors) == 1, stderr
    assert errors[0].startswith("error: ")
    return errors[0]


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 6, 0), (3, 10, 13)])
def test_an_old_python_is_one_sentence(
    version: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(BOOTSTRAP), run_name="__main__")
    sentence = one_error(str(caught.value))
    assert "needs Python 3.11 or newer" in sentence
    assert f"is Python {version[0]}.{version[1]}:" in sentence


def test_an_old_python_parses_the_bootstrap() -> None:
    """It says its sentence only if it parses: nothing newer than Python 2.7 in it."""
    newer = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Starred, ast.Nonlocal, ast.Match)
    for node in ast.walk(ast.parse(BOOTSTRAP.read_text(encoding="ascii"))):
        assert not isinstance(node, newer), ast.dump(node)
        if isinstance(node, (ast.FunctionDef, ast.arg)):
            assert getattr(node, "returns", getattr(node, "annotation", None)) is None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print"


@pytest.mark.skipif(os.name == "nt", reason="Visual Studio announces itself outside the path")
def test_no_compiler_is_one_sentence(tmp_path: Path) -> None:
    result = run_bootstrap(tmp_path / "venv", PATH=str(tmp_path), CXX="")
    assert result.returncode == 1
    assert "no C++ compiler found" in one_error(result.stderr)
    assert not (tmp_path / "venv").exists()


def test_no_network_is_one_sentence(tmp_path: Path) -> None:
    result = run_bootstrap(
        tmp_path / "venv",
        # A port nobody listens on stands for every index; no other source of packages.
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_CONFIG_FILE=os.devnull,
        PIP_FIND_LINKS="",
        PIP_EXTRA_INDEX_URL="",
        PIP_NO_CACHE_DIR="1",
        PIP_RETRIES="1",
    )
    assert result.returncode == 1
    sentence = one_error(result.stderr)
    assert "could not be downloaded" in sentence
    assert "network" in sentence


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / "precious").write_text("kept")
    result = run_bootstrap(venv)
    assert result.returncode == 1
    assert "not made by this command" in one_error(result.stderr)
    assert (venv / "precious").read_text() == "kept"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", False),
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", True),
    ],
)
def test_a_torch_with_cuda_brings_its_own_compiler(
    line: str, expected: bool, tmp_path: Path
) -> None:
    install = runpy.run_path(str(BOOTSTRAP.with_name("install.py")))
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    for package, text in (("torch", line), ("other", "cuda: Optional[str] = '11.0'\n")):
        (packages / package).mkdir(parents=True)
        (packages / package / "version.py").write_text(text)
    assert install["Installer"](tmp_path).torch_has_cuda() is expected
