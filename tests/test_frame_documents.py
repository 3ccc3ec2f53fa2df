"""The frame says what is true: pins cover what is required, documents name what exists."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from localr1 import __version__
from localr1.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
# CUDA builds of torch pin these to what they were built with, which a pin of ours would refuse.
LEFT_TO_TORCH = {"cuda-bindings", "nvidia-cuda-nvrtc"}


def project() -> dict[str, object]:
    document: dict[str, dict[str, object]] = tomllib.loads(
        (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )
    return document["project"]


def requirements() -> list[Requirement]:
    fields = project()
    groups = fields["optional-dependencies"]
    assert isinstance(groups, dict)
    lines = fields["dependencies"]
    assert isinstance(lines, list)
    return [
        Requirement(line) for line in [*lines, *(x for group in groups.values() for x in group)]
    ]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    stated = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {name: version for name, _, version in stated}


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_is_pinned_to_a_version_it_allows(requirement: Requirement) -> None:
    if requirement.name in LEFT_TO_TORCH:
        assert requirement.name not in pins()
        return
    assert requirement.specifier.contains(pins()[requirement.name]), requirement


def test_the_version_is_said_once() -> None:
    assert project()["version"] == __version__
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in target:
            assert (ROOT / target).exists(), f"{name} links to {target}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_named_in_documents_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:localr1|quant|cli|cuda|tests|scripts|docs)/[\w./]+)`", text):
        if "NAME" not in path:
            assert (ROOT / path).exists(), f"{name} names {path}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_and_options_in_documents_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    helps: dict[str, str] = {}
    for line in re.findall(r"^localr1 (?!-)(.+?)(?:#|$)", text, flags=re.MULTILINE):
        words = line.split()
        count = 2 if words[0] == "eval" else 1
        command = " ".join(words[:count])
        if command not in helps:
            result = CliRunner().invoke(app, [*words[:count], "--help"])
            assert result.exit_code == 0, f"{name}: localr1 {command}"
            helps[command] = result.stdout
        for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", line):
            assert re.search(rf"(?<![\w-]){option}\b", helps[command]), f"{name}: {line}"
