"""`localr1 doctor` as a whole: speeds it remembers, the way to the Hub, what is printed."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import FakeCard, FakeNvml

from localr1.cli.main import main
from localr1.doctor import examine, nvidia, software, speeds
from localr1.doctor.copies import CopySpeeds
from localr1.doctor.finding import Verdict
from localr1.doctor.network import NetworkFacts, bare_address, network_findings, read_network
from localr1.doctor.speeds import SpeedFacts, read_speeds, speed_findings
from localr1.doctor.storage import read_places
from localr1.experts import measure
from localr1.settings import Surroundings

SECRET = "hf_thisMustNotBeSeen"


def surroundings(**environment: str) -> Surroundings:
    return Surroundings.from_environment(environment)


# The environment


def test_surroundings_of_an_empty_environment() -> None:
    found = surroundings()
    assert found.token_file == Path.home() / ".cache" / "huggingface" / "token"
    assert replace(found, token_file=Path()) == Surroundings(
        "", Path(), "", False, None, "", "", ""
    )


def test_surroundings(tmp_path: Path) -> None:
    found = surroundings(
        HF_TOKEN=" ",
        HUGGING_FACE_HUB_TOKEN=SECRET,
        HF_HOME=str(tmp_path),
        HF_ENDPOINT="https://mirror.example/",
        HF_HUB_OFFLINE="yes",
        CUDA_VISIBLE_DEVICES="",
        LC_ALL="",
        LC_CTYPE="C.UTF-8",
        LANG="de_DE",
        TERM="xterm",
        NO_COLOR="1",
        FORCE_COLOR="1",
    )
    assert found == Surroundings(
        token_variable="HUGGING_FACE_HUB_TOKEN",
        token_file=tmp_path / "token",
        endpoint="https://mirror.example",
        is_offline=True,
        visible_cards="",
        locale="C.UTF-8",
        terminal="xterm",
        color_variable="NO_COLOR",
    )
    assert SECRET not in repr(found)
    assert surroundings(HF_TOKEN_PATH=str(tmp_path / "t")).token_file == tmp_path / "t"
    assert not surroundings(HF_HUB_OFFLINE="0").is_offline


# The way to the Hub


def test_a_token_is_found_and_never_kept(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{SECRET}\n")
    found = read_network(surroundings(HF_HOME=str(tmp_path)), dict)
    assert found.token_from == str(tmp_path / "token")
    assert read_network(surroundings(HF_TOKEN=SECRET), dict).token_from == "HF_TOKEN"
    (tmp_path / "token").write_text("\n")
    none = read_network(surroundings(HF_HOME=str(tmp_path)), dict)
    assert none.token_from == ""
    assert "hf auth login" in network_findings(none)[1].value
    for facts in (found, none):
        assert SECRET not in repr(facts) + repr(network_findings(facts))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("", ""),
        ("https://huggingface.co", "https://huggingface.co"),
        (f"http://me:{SECRET}@proxy.example:3128/x/", "http://proxy.example:3128/x"),
        (f"me:{SECRET}@proxy.example:3128", "http://proxy.example:3128"),
        (f"https://mirror.example/hub?key={SECRET}#{SECRET}", "https://mirror.example/hub"),
        ("socks5h://[::1]:1080", "socks5h://[::1]:1080"),
        (f"http://{SECRET}@", "(not an address)"),
        (f"http://host:{SECRET}", "(not an address)"),
        ("http://[::1", "(not an address)"),
    ],
)
def test_addresses_are_shown_without_secrets(address: str, shown: str) -> None:
    assert bare_address(address) == shown


def test_proxies() -> None:
    proxies = {"https": f"http://me:{SECRET}@proxy:3128", "no": "localhost,.example"}
    facts = read_network(surroundings(), lambda: proxies)
    finding = network_findings(facts)[2]
    assert finding.value == "https http://proxy:3128, not for localhost,.example"


@pytest.mark.parametrize(
    ("facts", "verdict", "said"),
    [
        (NetworkFacts("", "", False, ()), Verdict.OK, ""),
        (NetworkFacts("HF_TOKEN", "https://mirror.example", False, ()), Verdict.OK, ""),
        (NetworkFacts("", "", True, ()), Verdict.NOTE, "HF_HUB_OFFLINE is set"),
        (NetworkFacts("", "(not an address)", False, ()), Verdict.PROBLEM, "not to an address"),
        (
            NetworkFacts("HF_TOKEN", "http://mirror.example", False, ()),
            Verdict.NOTE,
            "without encryption",
        ),
        (NetworkFacts("", "http://mirror.example", False, ()), Verdict.OK, ""),
        (NetworkFacts("HF_TOKEN", "http://localhost:8080", False, ()), Verdict.OK, ""),
    ],
)
def test_the_server(facts: NetworkFacts, verdict: Verdict, said: str) -> None:
    server = network_findings(facts)[0]
    assert server.verdict is verdict
    assert said in server.why


# Speeds


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where a disk was measured, each time."""
    calls: list[Path] = []

    def disk(directory: Path) -> float:
        calls.append(directory)
        return 0.5 if len(calls) > 1 else 3.0

    monkeypatch.setattr(measure, "cpu_bandwidth", lambda threads: 20.0)
    monkeypatch.setattr(measure, "cpu_products", lambda threads: 300.0)
    monkeypatch.setattr(measure, "disk_bandwidth", disk)
    monkeypatch.setattr(speeds, "_busy", lambda: 0.0)
    return calls


def test_nothing_is_measured_unasked(measured: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    facts = read_speeds(cache, None, read_places({"data": tmp_path}), {}, anew=False)
    assert facts == SpeedFacts()
    assert not cache.exists()
    assert not measured
    (finding,) = speed_findings(facts, 2, 0.0)
    assert "localr1 doctor --measure" in finding.value


def test_what_was_measured_is_remembered(measured: list[Path], tmp_path: Path) -> None:
    """Both places lie on the cache's disk, which is measured once; another disk is by itself."""
    places = read_places({"data": tmp_path, "hub cache": tmp_path, "state": tmp_path})
    elsewhere = replace(places[1], device=-77, nearest=str(tmp_path / "other"))
    cache = tmp_path / "cache"
    same = read_speeds(cache, None, places, {}, anew=True)
    assert [(disk.places, disk.speed) for disk in same.disks] == [(("data", "hub cache"), 3.0)]
    assert measured == [cache]
    two = read_speeds(cache, None, (places[0], elsewhere), {}, anew=True)
    assert measured[1:] == [cache, tmp_path / "other"]
    again = read_speeds(cache, None, (places[0], elsewhere), {}, anew=False)
    assert again == replace(two, measured_at=again.measured_at)
    assert len(measured) == 3
    found = {finding.value: finding for finding in speed_findings(again, 2, time.time() + 7200)}
    assert "2 hours ago" in next(iter(found))
    assert "20.0 GB/s read by the kernels with 2 threads" in found
    assert found["0.50 GB/s, of hub cache"].verdict is Verdict.NOTE
    (cache / speeds.FILE_NAME).write_text("{")
    damaged = read_speeds(cache, None, (places[0], elsewhere), {}, anew=False)
    assert [disk.places for disk in damaged.disks] == [("data",)], "that is in measure's own file"


def test_a_measurement_that_others_spoiled(
    measured: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(speeds, "_busy", lambda: 0.85)
    for anew in (True, False):
        facts = read_speeds(tmp_path, None, (), {}, anew=anew)
        finding = speed_findings(facts, 2, time.time())[0]
        assert finding.sentence.startswith("Other programs took 85% of the processor's time then")
    monkeypatch.setattr(speeds, "_busy", lambda: 0.1)
    facts = read_speeds(tmp_path, None, (), {}, anew=True)
    assert speed_findings(facts, 2, time.time())[0].verdict is Verdict.OK


def test_a_disk_that_cannot_be_measured_is_not_given_the_assumed_speed(
    measured: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "disk_bandwidth", lambda directory: None)
    places = read_places({"data": tmp_path})
    for anew in (True, False):
        facts = read_speeds(tmp_path / "cache", None, places, {}, anew=anew)
        assert [disk.speed for disk in facts.disks] == [None]
    (tmp_path / "cache" / speeds.FILE_NAME).unlink()
    assert read_speeds(tmp_path / "cache", None, places, {}, anew=False).disks == ()
    assert "no read can pass by" in speed_findings(facts, 2, 0.0)[-1].value


def test_copies_to_a_card(
    measured: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        speeds,
        "cuda_copy_speeds",
        lambda number, cards: CopySpeeds(cards[f"GPU-{number}"], 24.0, 25.0, 6.0, 300.0),
    )
    cards = {"GPU-0": 1, "GPU-1": 0}
    facts = read_speeds(tmp_path / "cache", None, (), cards, anew=True)
    kept = read_speeds(tmp_path / "cache", None, (), cards, anew=False)
    assert facts.copies == kept.copies
    values = {finding.name: finding.value for finding in speed_findings(kept, 2, 0.0)}
    assert values["card 1"] == (
        "24.0 GB/s to it, 25.0 from it, 6.0 to it from ordinary memory, 300 within it"
    )

    def fail(number: int, cards: object) -> CopySpeeds:
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    monkeypatch.setattr(speeds, "cuda_copy_speeds", fail)
    failed = read_speeds(tmp_path / "cache", None, (), cards, anew=True)
    assert speed_findings(failed, 2, 0.0)[-1].sentence.startswith(
        "The card could not be copied to (CUDA error: out of memory): close"
    )


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"disks": 3, "copies": 3},
        {"disks": {"x": 1.0, "1": "fast"}, "copies": [1, {}, {"card": 0}]},
    ],
)
def test_a_damaged_memory_is_none(document: dict[str, Any]) -> None:
    assert speeds.read_document(document) == ({}, [])


# The command


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALR1_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("https_proxy", f"http://me:{SECRET}@proxy.example:3128")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    code: Any = 0
    try:
        main(["doctor", *arguments])
    except SystemExit as end:
        code = end.code or 0
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_this_machine(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert code == 0
    assert err == ""
    assert SECRET not in out
    titles = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert titles[:-2] == [
        "software",
        "processor",
        "graphics",
        "memory",
        "storage",
        "speed",
        "network",
        "terminal",
    ]
    assert titles[-2] == "what localr1 does with it"
    assert titles[-1].startswith("localr1 runs here") or titles[-1] == "Nothing needs to be done."
    assert "http://proxy.example:3128" in out.replace("\n", " ")
    assert max(map(len, out.splitlines())) <= 100 + len(str(home))
    assert list(home.iterdir()) == [], "it looks, and leaves nothing behind"


def test_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["can_run"] is True
    assert SECRET not in out
    assert {each["verdict"] for each in document["findings"]} <= {"ok", "note", "problem"}
    assert {each["area"] for each in document["findings"]} >= {"software", "memory", "terminal"}
    facts = document["facts"]
    assert facts["memory"]["total"] > 0
    assert [place["name"] for place in facts["places"]] == ["data", "hub cache", "cache", "state"]
    assert facts["network"]["token_from"] == "HF_TOKEN"
    assert facts["processor"]["isas"][-1] == "generic"


def test_measuring(home: Path, capsys: pytest.CaptureFixture[str], measured: list[Path]) -> None:
    assert "not yet: " in run(capsys)[1]
    assert "20.0 GB/s read by the kernels" in run(capsys, "--measure")[1]
    assert "20.0 GB/s read by the kernels" in run(capsys)[1]
    assert len(measured) == 1, "the hub cache lies on the same disk"


def test_a_localr1_that_cannot_run(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch cannot be imported: everything else is told, and the exit code is 1."""
    monkeypatch.setattr(
        examine, "read_torch", lambda: software.TorchFacts(error="OSError: libcudart.so")
    )
    code, out, _ = run(capsys, "--measure")
    assert code == 1
    assert out.endswith("localr1 cannot run here until this is mended: torch.\n")
    assert "OSError: libcudart.so" in out
    assert " not used  processor" in out
    assert json.loads(run(capsys, "--json")[1])["can_run"] is False


def test_what_fails_on_import_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert software.read_torch().error.startswith("ModuleNotFoundError: import of torch halted")
    monkeypatch.setitem(sys.modules, "localr1.kernels._native", None)
    monkeypatch.delattr("localr1.kernels._native", raising=False)
    native = software.read_native()
    assert native.isas is None
    assert "_native" in native.error


def test_a_sentence_is_not_said_twice(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "_pynvml", lambda: FakeNvml(error=9))
    monkeypatch.setattr(nvidia, "_displays", lambda root: ())
    _, out, _ = run(capsys)
    flat = " ".join(out.split())
    assert flat.count("installed, but not loaded") == 1
    assert "none (see the end)" in flat


def test_a_card_is_shown(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = FakeCard(name="RTX \x1b[31m3060")
    monkeypatch.setattr(nvidia, "_pynvml", lambda: FakeNvml(evil))
    code, out, _ = run(capsys)
    assert code == 0
    assert "\x1b" not in out
    assert "compute capability 8.6" in out
    assert "4.0 x16, now 1.0 x16" in out
