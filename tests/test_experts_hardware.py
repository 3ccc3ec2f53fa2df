"""Budgets as users write them, profiles of machines, and what this machine is measured to be."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from localr1.errors import FormatError, LocalR1Error, NotFoundError, UsageError
from localr1.experts import measure
from localr1.experts.budget import parse_budget, parse_size
from localr1.experts.hardware import (
    LARGE_EXPERT,
    PROFILES,
    CardProfile,
    HardwareProfile,
    named_profile,
)

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("1024", 1024),
        ("24GiB", 24 * GIB),
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        (" 1.5GiB ", 3 * GIB // 2),
        ("512MiB", 512 << 20),
        ("7B", 7),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text, "--ram") == nbytes
    assert parse_budget(text, "--ram", whole=100 * GIB, available=50 * GIB) == nbytes


def test_a_share_is_of_all_experts_and_no_more_than_all_is_taken() -> None:
    assert parse_budget("50%", "--ram", whole=1000, available=600) == 500
    assert parse_budget("12.5%", "--ram", whole=1000, available=600) == 125
    assert parse_budget("0%", "--ram", whole=1000, available=600) == 0
    assert parse_budget("100%", "--ram", whole=1000, available=1000) == 1000
    assert parse_budget("5KB", "--ram", whole=1000, available=10**6) == 1000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "an amount such as 24GiB"),
        ("-1", "an amount such as"),
        ("-1GiB", "an amount such as"),
        ("lots", "an amount such as"),
        ("24 G", "an amount such as"),
        ("1e3", "an amount such as"),
        ("nan", "an amount such as"),
        ("inf", "an amount such as"),
        ("٣GiB", "an amount such as"),
        ("9" * 5000, "an amount such as"),
        ("1.2.3GB", "an amount such as"),
        ("101%", "0% to 100%"),
        ("2GiB", "at most 1.0 GiB"),
        ("90%", "at most 1.0 GiB"),
    ],
)
def test_what_is_no_budget_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=r"--vram: expected .*") as caught:
        parse_budget(text, "--vram", whole=2 * GIB, available=GIB)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_size_is_no_share() -> None:
    with pytest.raises(UsageError, match="an amount of memory"):
        parse_size("50%", "vram")


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_survive_being_written(name: str, tmp_path: Path) -> None:
    profile = PROFILES[name]
    assert profile.has_gpu == (profile.vram_bytes > 0) == (profile.gpu_small > 0)
    assert profile.gpu(LARGE_EXPERT) == profile.gpu_large >= profile.gpu(1)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(asdict(profile)))
    assert named_profile(str(path)) == named_profile(name) == profile


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "laptop.toml"
    path.write_text('ram_bytes = "16GiB"\ncpu = 40\ndense = 41.5\ndisk = 3\n')
    assert named_profile(str(path)) == HardwareProfile(
        str(path), 0, 16 * GIB, 0.0, 0.0, 0.0, 40.0, 41.5, 3.0, 0.0
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "is not valid TOML"),
        ("x = 1", "fields among name"),
        ('ram_bytes = "16GiB"\ncpu = 40\ndense = 41', "disk is missing"),
        ("cpu = 40\ndense = 41\ndisk = 3", "ram_bytes"),
        ('ram_bytes = "lots"\ncpu = 40\ndense = 41\ndisk = 3', "24GiB"),
        ("ram_bytes = -1\ncpu = 40\ndense = 41\ndisk = 3", "24GiB"),
        ("ram_bytes = true\ncpu = 40\ndense = 41\ndisk = 3", "24GiB"),
        ("ram_bytes = 9\ncpu = 0\ndense = 41\ndisk = 3", "cpu: expected a number from 0.001"),
        ("ram_bytes = 9\ncpu = nan\ndense = 41\ndisk = 3", "cpu: expected a number from 0.001"),
        ("ram_bytes = 9\ncpu = true\ndense = 41\ndisk = 3", "cpu: expected a number from 0.001"),
        ("ram_bytes = 9\ncpu = 1\ndense = 1\ndisk = 3\nvram_bytes = 9", "gpu_large is missing"),
        ("name = 3\nram_bytes = 9\ncpu = 1\ndense = 1\ndisk = 3", "name: expected a text"),
    ],
)
def test_a_bad_profile_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(FormatError) as caught:
        named_profile(str(path))
    assert said in str(caught.value)


def test_profiles_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        named_profile(str(tmp_path / "none.json"))
    with pytest.raises(UsageError, match="one of rtx3060"):
        named_profile("rtx9090")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(LocalR1Error, match="a JSON object"):
        named_profile(str(tmp_path / "list.json"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where the disk was measured, each time."""
    calls: list[Path] = []

    def disk(directory: Path) -> float:
        calls.append(directory)
        return 2.0 + len(calls)

    monkeypatch.setattr(measure, "cpu_bandwidth", lambda threads: 20.0)
    monkeypatch.setattr(measure, "cpu_products", lambda threads: 300.0)
    monkeypatch.setattr(measure, "disk_bandwidth", disk)
    return calls


def test_this_machine_is_measured_once(measured: list[Path], tmp_path: Path) -> None:
    first = measure.this_machine(tmp_path)
    assert (first.cpu, first.disk, first.vram_bytes) == (20.0, 3.0, 0)
    assert measure.this_machine(tmp_path) == first
    assert len(measured) == 1
    assert measure.this_machine(tmp_path, anew=True).disk == 4.0
    assert measure.this_machine(tmp_path).disk == 4.0
    assert measure.this_machine(tmp_path, threads=3).disk == 5.0, "other threads, other machine"


@pytest.mark.parametrize("text", ["", "{", '{"identity": 3}', '{"identity": {}, "profile": 1}'])
def test_a_damaged_memory_is_no_memory(text: str, measured: list[Path], tmp_path: Path) -> None:
    (tmp_path / measure.CACHE_NAME).write_text(text)
    assert measure.this_machine(tmp_path).cpu == 20.0
    assert measure.this_machine(tmp_path).cpu == 20.0
    assert len(measured) == 1


def test_a_memory_of_another_machine_is_not_used(measured: list[Path], tmp_path: Path) -> None:
    measure.this_machine(tmp_path)
    path = tmp_path / measure.CACHE_NAME
    document = json.loads(path.read_text())
    document["identity"]["processor"] = "another"
    path.write_text(json.dumps(document))
    assert measure.this_machine(tmp_path).disk == 4.0


def test_what_is_remembered_has_an_age_and_is_never_measured(
    measured: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measure.remembered(tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    profile = measure.this_machine(tmp_path / "cache")
    kept = measure.remembered(tmp_path / "cache")
    assert kept == measure.Remembered(profile, 1_700_000_000.0)
    assert measure.remembered(tmp_path / "cache", threads=3) is None
    path = tmp_path / "cache" / measure.CACHE_NAME
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "measured_at": "yesterday"}))
    assert measure.remembered(tmp_path / "cache") is None
    assert len(measured) == 1


def test_a_memory_that_cannot_be_written_costs_nothing(
    measured: list[Path], tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert measure.this_machine(blocked / "cache").cpu == 20.0


def test_bandwidths_are_measured(tmp_path: Path) -> None:
    """No figure is expected of a machine, but that it is one and nothing is left behind."""
    assert 0.01 < measure.cpu_bandwidth(1) < 10_000
    assert 0.1 < measure.cpu_products(1) < 1e6
    disk = measure.disk_bandwidth(tmp_path)
    assert disk is None or 0.001 < disk < 1_000
    assert list(tmp_path.iterdir()) == []
    assert measure.disk_bandwidth(tmp_path / "file" / "below") is not None or disk is None
    (tmp_path / "plain").write_text("")
    assert measure.disk_bandwidth(tmp_path / "plain") is None


def test_more_cards_of_a_file(tmp_path: Path) -> None:
    first = asdict(PROFILES["rtx3060-12g-ddr4-32g"])
    path = tmp_path / "cards.json"
    more: list[Any] = [{"vram_bytes": "24GiB", "dense": 700, "gmacs": 78_000}]
    path.write_text(json.dumps({**first, "more_cards": [*more, {"vram_bytes": 8, "dense": 9}]}))
    profile = named_profile(str(path))
    assert profile.cards == (
        CardProfile(12 * GIB, 250, 9_400),
        CardProfile(24 * GIB, 700, 78_000),
        CardProfile(8, 9),
    )
    assert PROFILES["cpu-ddr5-64g"].cards == ()
    for wrong, said in (
        ([{"vram_bytes": 1}], "tables with vram_bytes, dense and gmacs"),
        ([{"vram_bytes": 1, "dense": 1, "speed": 1}], "tables with vram_bytes"),
        ([7], "tables with vram_bytes"),
        (7, "tables with vram_bytes"),
        ([{"vram_bytes": "lots", "dense": 1}], "more_cards: vram_bytes"),
        ([{"vram_bytes": 1, "dense": 0}], "more_cards: dense"),
    ):
        path.write_text(json.dumps({**first, "more_cards": wrong}))
        with pytest.raises(FormatError, match=said):
            named_profile(str(path))
    no_gpu = {"ram_bytes": 1, "cpu": 1, "dense": 1, "disk": 1, "more_cards": more}
    path.write_text(json.dumps(no_gpu))
    with pytest.raises(FormatError, match="more_cards: expected a first GPU"):
        named_profile(str(path))
