"""What the environment can ask for."""

from pathlib import Path

import pytest

from localr1.errors import UsageError
from localr1.settings import Settings


def read(**environment: str) -> Settings:
    return Settings.from_environment(environment)


def test_one_home_holds_everything(tmp_path: Path) -> None:
    settings = read(LOCALR1_HOME=str(tmp_path))
    assert settings.data_dir == tmp_path / "data"
    assert settings.state_dir == tmp_path / "state"
    assert settings.cache_dir == tmp_path / "cache"


def test_without_a_home_the_platform_decides() -> None:
    settings = read()
    folders = (settings.data_dir, settings.state_dir, settings.cache_dir)
    assert all(folder.is_absolute() and "localr1" in str(folder) for folder in folders)
    assert settings == read(LOCALR1_HOME="", LOCALR1_THREADS=" ", NO_COLOR="", HF_HOME="")


def test_a_home_is_absolute_wherever_the_program_runs() -> None:
    assert read(LOCALR1_HOME="here").data_dir == Path.cwd() / "here" / "data"
    assert read(LOCALR1_HOME="~/x").data_dir == Path.home() / "x" / "data"


def test_the_hugging_face_cache(tmp_path: Path) -> None:
    home, cache = str(tmp_path / "home"), str(tmp_path / "cache")
    assert read(HF_HOME=home, HF_HUB_CACHE=cache).hub_cache == tmp_path / "cache"
    assert read(HF_HOME=home).hub_cache == tmp_path / "home" / "hub"
    assert read(XDG_CACHE_HOME=cache).hub_cache == tmp_path / "cache" / "huggingface" / "hub"
    assert read().hub_cache == Path.home() / ".cache" / "huggingface" / "hub"


def test_colour() -> None:
    assert read().color is None
    assert read(NO_COLOR="1").color is False
    assert read(FORCE_COLOR="1").color is True
    assert read(NO_COLOR="1", FORCE_COLOR="1").color is False


def test_threads() -> None:
    assert read().threads is None
    assert read(LOCALR1_THREADS="4").threads == 4
    for wrong in ("0", "-1", "1025", "four", "4.0", "٤", "9" * 5000):
        with pytest.raises(UsageError, match="LOCALR1_THREADS: expected a number from 1 to 1024"):
            read(LOCALR1_THREADS=wrong)
