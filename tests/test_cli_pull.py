"""`localr1 pull` as a user sees it, against a Hub on loopback."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from arriving_shards import split
from bnb_parts import save_quantized
from forward_proxy import ForwardProxy
from hub_faults import slow
from hub_repositories import Repository, Token
from hub_server import HubServer
from huggingface_hub import constants, scan_cache_dir, snapshot_download
from quant_sources import MIXTURES, save_source
from released_mixtures import R1
from sharded_models import write_sharded

from localr1.cli.main import main
from localr1.hub.partial import BLOCK
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe
from localr1.quant.recipe_file import find_recipe

pytestmark = pytest.mark.usefixtures("hub_client")

NAME = "maker/nano"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded(tmp_path_factory.mktemp("source") / "nano")


@pytest.fixture
def server(sharded: Path) -> Iterator[HubServer]:
    with HubServer(Repository.from_directory(NAME, sharded)) as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where everything lies: hub (the cache) and localr1's own."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LOCALR1_HOME", str(tmp_path / "localr1"))
    return tmp_path


@pytest.fixture
def run(
    home: Path,
    server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """`localr1 ARGUMENTS` with the stand-in as the Hub: (exit code, stdout, stderr)."""
    point_at(monkeypatch, server)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))

    def command(*arguments: str) -> tuple[int, str, str]:
        code: Any = 0
        try:
            main(list(arguments))
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def point_at(monkeypatch: pytest.MonkeyPatch, server: HubServer) -> None:
    """huggingface_hub reads HF_ENDPOINT when it is imported."""
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def environment(server: HubServer, home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_CACHE": str(home / "hub"),
        "LOCALR1_HOME": str(home / "localr1"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN_PATH": str(home / "no-token"),
    }


def start(
    server: HubServer, home: Path, *arguments: str, **variables: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from localr1.cli.main import main; main()", *arguments],
        env={**environment(server, home), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def shard_bytes(server: HubServer) -> int:
    return sum(
        server.fetched_bytes(path)
        for path in {r.path for r in server.requests(kind="bytes")}
        if path.endswith(".safetensors")
    )


def test_pull_then_chat(run: Run, server: HubServer, home: Path, sharded: Path) -> None:
    code, out, err = run("pull", NAME)
    assert code == 0, err
    snapshot = Path(out.strip())
    names = {path.name for path in sharded.iterdir()}
    assert {path.name for path in snapshot.iterdir()} == names
    assert all((snapshot / name).read_bytes() == (sharded / name).read_bytes() for name in names)
    for expected in (f"{NAME}@main is commit {snapshot.name}", "16.2 MiB to fetch", "tok/s"):
        assert expected in err
    # What every other tool makes of it.
    assert snapshot_download(NAME, cache_dir=home / "hub", local_files_only=True) == str(snapshot)
    assert scan_cache_dir(home / "hub").warnings == []
    server.forget()
    code, out, err = run("pull", NAME)
    assert (code, out.strip(), err.count("\n")) == (0, str(snapshot), 1)
    assert "already here" in err
    assert shard_bytes(server) == 0
    code, out, err = run("chat", NAME, "-p", "What is 47 * 86?")
    assert code == 0, err
    assert "4042" in out


def test_what_huggingface_hub_has_is_not_fetched_again(
    run: Run, server: HubServer, home: Path
) -> None:
    snapshot_download(NAME, cache_dir=home / "hub", endpoint=server.endpoint)
    (lost,) = (home / "hub").rglob("config.json")
    lost.unlink()  # Of the commit; its bytes are still there.
    server.forget()
    before = {path: os.lstat(path).st_mtime_ns for path in (home / "hub").rglob("*")}
    assert run("pull", NAME, "--dry-run")[0] == 0
    assert {path: os.lstat(path).st_mtime_ns for path in (home / "hub").rglob("*")} == before
    code, _, err = run("pull", NAME)
    assert (code, server.requests(kind="bytes")) == (0, [])
    assert json.loads(lost.read_text())["model_type"] == "deepseek_v3"
    assert "already here" in err


def test_a_dry_run_writes_nothing(run: Run, home: Path) -> None:
    code, out, err = run("pull", NAME, "--dry-run", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["bytes_to_fetch"] == document["bytes"]
    assert document["fits"] is True
    assert {file["here"] for file in document["files"]} == {False}
    assert not (home / "hub").exists()
    code, out, err = run("pull", NAME, "--dry-run", "--hardware", "rtx3060-12g-ddr4-32g")
    assert "On RTX 3060 12 GB, 32 GB DDR4 at 4 bits, 6.1 MiB: fits" in err
    assert "model-00006-of-00006.safetensors" in out


def test_only_what_is_needed(run: Run, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[str, bytes | Path] = {path.name: path for path in sharded.iterdir()}
    files |= {
        "pytorch_model.bin": b"pickle",
        "modeling_nano.py": b"import os",
        "onnx/model.onnx": b"x",
        "original/consolidated.00.pth": b"x",
        "optimizer.safetensors": b"x" * 100,
        ".gitattributes": b"x",
    }
    with HubServer(Repository.of("maker/full", files)) as other:
        point_at(monkeypatch, other)
        code, out, err = run("pull", "maker/full")
        assert code == 0, err
        assert {path.name for path in Path(out.strip()).rglob("*")} == {
            path.name for path in sharded.iterdir()
        }
        code, _, err = run("pull", "maker/full", "--include", "*.py")
        assert code == 2
        assert "never fetched" in err
        code, out, err = run("pull", "maker/full", "--include", "optimizer*")
        assert code == 0, err
        assert (Path(out.strip()) / "optimizer.safetensors").read_bytes() == b"x" * 100


def quantized_directly(source: Path, out: Path) -> dict[str, bytes]:
    quantize(source, out, Recipe.uniform(4, 32))
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("deletes", [False, True])
def test_quantizing_what_arrives(
    deletes: bool, run: Run, server: HubServer, home: Path, sharded: Path, tmp_path: Path
) -> None:
    options = ["--delete-source-shards"] if deletes else []
    code, out, err = run("pull", NAME, "--quantize", "4", *options)
    assert code == 0, err
    result = Path(out.strip())
    assert result == home / "localr1" / "data" / "models" / "nano-int4"
    expected = quantized_directly(sharded, tmp_path / "direct")
    found = {path.name: path.read_bytes() for path in result.iterdir()}
    manifest, plain = (json.loads(each.pop("localr1.json")) for each in (found, expected))
    assert found == expected
    assert manifest["source"]["repository"] == NAME
    assert len(manifest["source"]["commit"]) == 40
    assert plain["source"]["files"] == manifest["source"]["files"]
    assert shard_bytes(server) == sum(p.stat().st_size for p in sharded.glob("*.safetensors"))
    left = list((home / "hub").rglob("*.safetensors"))
    assert len(left) == (0 if deletes else 6)
    assert run("list", "--partial", "-q")[1] == ""
    assert run("list", "-q")[1].split() == (["nano-int4"] if deletes else ["nano-int4", NAME])
    code, out, _ = run("chat", NAME, "-p", "What is 47 * 86?")
    assert "4042" in out
    code, _, err = run("pull", NAME, "--quantize", "4", *options)
    assert code == 0
    assert "here already" in err


def test_quantizing_by_a_recipe(
    run: Run, server: HubServer, home: Path, sharded: Path, tmp_path: Path
) -> None:
    code, _, err = run("pull", NAME, "--quantize", "smal")
    assert code == 4
    assert "recipe 'smal': expected small, balanced" in err
    assert shard_bytes(server) == 0
    code, out, err = run("pull", NAME, "--quantize", "balanced")
    assert code == 0, err
    assert Path(out.strip()) == home / "localr1" / "data" / "models" / "nano-balanced"
    quantize(sharded, tmp_path / "direct", find_recipe("balanced", ["rtn"]))
    for path in (tmp_path / "direct").glob("*.safetensors"):
        assert (Path(out.strip()) / path.name).read_bytes() == path.read_bytes()


def test_a_source_that_was_there_before_is_not_deleted_unasked(
    run: Run, home: Path, server: HubServer
) -> None:
    run("pull", NAME)
    command = ("pull", NAME, "--quantize", "4", "--delete-source-shards")
    code, _, err = run(*command)
    assert code == 2
    assert "nobody can be asked" in err
    assert len(list((home / "hub").rglob("*.safetensors"))) == 6
    assert run(*command[:4])[0] == 0
    # Quantized already: there is nothing that a shard would have to go for.
    assert run(*command, "-y")[0] == 0
    assert len(list((home / "hub").rglob("*.safetensors"))) == 6
    run("rm", "nano-int4", "-y")
    assert run(*command, "-y")[0] == 0
    assert not list((home / "hub").rglob("*.safetensors"))


def test_a_name_that_another_model_has(
    run: Run, server: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("pull", NAME, "--quantize", "4")
    other_model = Repository.from_directory("else/nano", sharded)
    with HubServer(other_model) as other:
        point_at(monkeypatch, other)
        code, _, err = run("pull", "else/nano", "--quantize", "4")
        assert code == 1
        assert "found one quantized from maker/nano" in err
        assert shard_bytes(other) == 0


def test_a_branch_that_has_moved_since(
    run: Run, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pinned commit stays what it was; a model quantized from an older one is not silently it."""
    repository = Repository.from_directory(NAME, sharded)
    with HubServer(repository) as other:
        point_at(monkeypatch, other)
        old = Path(run("pull", NAME)[1].strip())
        run("pull", NAME, "--quantize", "4")
        repository.commit({"README.md": b"newer"})
        new = Path(run("pull", NAME)[1].strip())
        assert new.name != old.name
        code, out, err = run("pull", f"{NAME}@{old.name}")
        assert (code, Path(out.strip())) == (0, old)
        assert "already here" in err
        code, _, err = run("pull", NAME, "--quantize", "4")
        assert code == 0
        assert f"made from commit {old.name}" in err


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_quantizing_goes_on_after_a_kill(
    run: Run, server: HubServer, home: Path, sharded: Path, tmp_path: Path
) -> None:
    """With shards that were deleted on the way: they do not come again."""
    server.add(slow(1 << 20), "*.safetensors")
    command = ("pull", NAME, "--quantize", "4", "--delete-source-shards", "--jobs", "2")
    child = start(server, home, *command)
    models = home / "localr1" / "data" / "models"

    def has_begun() -> bool:
        """Whether the first layers are done."""
        return any(models.glob(".nano-int4*/*/experts-002.safetensors"))

    deadline = time.monotonic() + 120
    while not has_begun() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    child.kill()
    child.wait()
    assert not (models / "nano-int4").exists()
    server.remove_rules()
    server.forget()
    code, out, err = run(*command)
    assert code == 0, err
    first = "model-00001-of-00006.safetensors"
    assert server.fetched_bytes(first) <= BLOCK  # Its header, and nothing behind it.
    expected = quantized_directly(sharded, tmp_path / "direct")
    found = {path.name: path.read_bytes() for path in Path(out.strip()).iterdir()}
    del found["localr1.json"], expected["localr1.json"]
    assert found == expected
    assert not list((home / "hub").rglob("*.localr1-*"))
    assert not list((home / "hub").rglob("*.safetensors"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_ends_it_within_a_second(server: HubServer, home: Path) -> None:
    server.add(slow(200_000), "*.safetensors")
    child = start(server, home, "pull", NAME, "--jobs", "4")
    server.wait_until(lambda hub: shard_bytes(hub) > BLOCK, seconds=120)
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    # A second is the promise; a busy machine is given some more.
    assert time.monotonic() - began < 5
    assert child.returncode == 130
    assert "goes on where it was" in err
    assert "Traceback" not in err


def test_of_two_at_once_the_second_waits_and_finds_it_done(server: HubServer, home: Path) -> None:
    server.add(slow(1 << 20), "*.safetensors")
    children = [start(server, home, "pull", NAME) for _ in range(2)]
    outcomes = [child.communicate(timeout=200) for child in children]
    assert [child.returncode for child in children] == [0, 0], outcomes
    assert outcomes[0][0] == outcomes[1][0]
    total = sum(
        len((Path(outcomes[0][0].strip()) / f"model-0000{i}-of-00006.safetensors").read_bytes())
        for i in range(1, 7)
    )
    assert shard_bytes(server) == total


def test_all_of_it_goes_through_a_proxy(server: HubServer, home: Path) -> None:
    with ForwardProxy() as proxy:
        child = start(server, home, "pull", NAME, http_proxy=proxy.url, no_proxy="")
        out, err = child.communicate(timeout=200)
    assert child.returncode == 0, err
    assert (Path(out.strip()) / "config.json").is_file()
    asked = {request.target for request in server.requests()}
    assert {urlsplit(url)._replace(scheme="", netloc="").geturl() for url in proxy.passed} == asked
    assert any(server.cdn_endpoint in url for url in proxy.passed)


def test_no_proxy_is_heeded(server: HubServer, home: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    child = start(server, home, "pull", NAME, http_proxy=nowhere, no_proxy="127.0.0.1")
    _, err = child.communicate(timeout=200)
    assert child.returncode == 0, err


@pytest.mark.parametrize(("token", "code"), [("hf_friend", 0), ("hf_stranger", 4), ("hf_wrong", 4)])
def test_the_token_of_the_environment(token: str, code: int, home: Path, sharded: Path) -> None:
    repository = replace(Repository.from_directory("maker/gated", sharded), gated="auto")
    tokens = {"hf_friend": Token.accepting(["maker/gated"]), "hf_stranger": Token()}
    with HubServer(repository, tokens=tokens) as other:
        child = start(other, home, "pull", "maker/gated", HF_TOKEN=token)
        _, err = child.communicate(timeout=200)
        assert child.returncode == code, err
        assert token not in err


def test_what_does_not_fit_is_asked_about(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": json.dumps(R1).encode(), "model.safetensors": b"x" * 1000}
    with HubServer(Repository.of("maker/large", files)) as other:
        point_at(monkeypatch, other)
        memory = SimpleNamespace(total=8 << 30, available=4 << 30)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        code, _, err = run("pull", "maker/large")
        assert code == 3
        assert "will not fit" in err
        assert "-y" in err
        assert other.fetched_bytes("model.safetensors") == 0
        code, out, _ = run("pull", "maker/large", "-y")
        assert code == 0
        assert (Path(out.strip()) / "model.safetensors").stat().st_size == 1000


def test_a_disk_too_small_is_told_before_the_first_shard(
    run: Run, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 100 << 20, "total": 1 << 40, "used": 1 << 40})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    code, _, err = run("pull", NAME)
    assert code == 1
    assert "room on the disk" in err
    assert shard_bytes(server) == 0


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "llama", "hidden_size": 64}, "num_attention_heads"),
        ([], "object"),
    ],
)
def test_what_cannot_be_run_is_told_before_the_first_shard(
    config: Any, text: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": b"x"}
    with HubServer(Repository.of("maker/other", files)) as other:
        point_at(monkeypatch, other)
        code, _, err = run("pull", "maker/other")
        assert code == 1
        assert text in err
        assert other.fetched_bytes("model.safetensors") == 0


def test_repositories_with_several_gguf_files(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"nano-Q4_K_M.gguf": b"GGUF" * 9, "nano-Q8_0.gguf": b"GGUF" * 99, "README.md": b"x"}
    with HubServer(Repository.of("maker/nano-GGUF", files)) as other:
        point_at(monkeypatch, other)
        code, _, err = run("pull", "maker/nano-GGUF")
        assert code == 2
        assert "nano-Q4_K_M.gguf" in err
        assert "--include" in err
        code, out, _ = run("pull", "maker/nano-GGUF", "--include", "*Q8_0*")
        assert code == 0
        assert {p.name for p in Path(out.strip()).iterdir()} == {"nano-Q8_0.gguf", "README.md"}


def test_a_mixture_with_random_weights_in_shards(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_source(tmp_path / "whole", "deepseek_v3", **MIXTURES["deepseek_v3"])
    source = split(tmp_path / "whole", tmp_path / "source")
    with HubServer(Repository.from_directory("maker/mixture", source)) as other:
        point_at(monkeypatch, other)
        assert len(list(source.glob("*.safetensors"))) > 2
        for options in ((), ("--quantize", "4")):  # As it is, and quantized.
            code, _, err = run("pull", "maker/mixture", *options)
            assert code == 0, err
            code, _, err = run("chat", "maker/mixture", "-p", "hello", "--max-tokens", "4")
            assert code == 0, err


def test_a_repository_in_4_bits_of_bitsandbytes(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_quantized(tmp_path / "bnb", "llama", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with HubServer(Repository.from_directory("maker/bnb", tmp_path / "bnb")) as other:
        point_at(monkeypatch, other)
        code, _, err = run("pull", "maker/bnb")
        assert code == 0, err
        code, _, err = run("chat", "maker/bnb", "-p", "hello", "--max-tokens", "4")
        assert code == 0, err


@pytest.mark.smollm2
def test_a_repository_with_a_gguf_file(
    run: Run, monkeypatch: pytest.MonkeyPatch, smollm2_gguf: Path
) -> None:
    files: dict[str, bytes | Path] = {"SmolLM2-Q4_1.gguf": smollm2_gguf, "README.md": b"x"}
    with HubServer(Repository.of("maker/smol-GGUF", files)) as other:
        point_at(monkeypatch, other)
        code, _, err = run("pull", "maker/smol-GGUF")
        assert code == 0, err
        code, out, err = run("chat", "maker/smol-GGUF", "-p", "Hello", "--max-tokens", "4")
        assert code == 0, err
        assert out.strip()


def test_a_repository_that_is_quantized_already(
    run: Run, sharded: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It runs as it is, and is not quantized again."""
    quantize(sharded, tmp_path / "packed", Recipe.uniform(8, 32))
    with HubServer(Repository.from_directory("maker/nano-w8", tmp_path / "packed")) as other:
        point_at(monkeypatch, other)
        code, _, err = run("pull", "maker/nano-w8", "--quantize", "4")
        assert code == 1
        assert "quantization_config" in err
        code, out, err = run("pull", "maker/nano-w8")
        assert code == 0, err
        assert err.count("Here as it is") == 1
        assert "as it is" in err
        code, out, _ = run("chat", "maker/nano-w8", "-p", "What is 47 * 86?")
        assert "4042" in out


def test_offline_what_is_here_is_found(
    run: Run, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = run("pull", NAME)
    assert code == 4
    assert "HF_HUB_OFFLINE" in err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    _, path, _ = run("pull", NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("pull", NAME)[:2] == (0, path)


def test_names_without_a_model_are_listed(run: Run) -> None:
    code, out, _ = run("pull")
    assert code == 0
    assert out.splitlines()[0].split() == [
        "NAME",
        "LICENCE",
        "HERE,",
        "AT",
        "4",
        "BITS",
        "REPOSITORY",
    ]
    assert "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B" in out
    (first, *_) = json.loads(run("pull", "--json")[1])
    assert {"model", "repository", "licence", "verdict"} <= first.keys()


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("r1-distil-qwen-7b", 4, "Did you mean r1-distill-qwen-7b?"),
        ("r1-nano", 2, "comes with localr1"),
        ("../etc/passwd", 2, "organization/name"),
        ("maker/../x", 2, "organization/name"),
        ("maker/nano@../x", 2, "a branch"),
        ("maker/nano@none", 4, "no such branch"),
        ("maker/none", 4, "knows no such model"),
        ("maker/nano\x1b[2J", 2, "organization/name"),
    ],
)
def test_names_that_mean_nothing(name: str, code: int, text: str, run: Run) -> None:
    found, _, err = run("pull", name)
    assert (found, text in err) == (code, True), err
    assert "\x1b" not in err


@pytest.mark.parametrize(
    "arguments",
    [("--quantize", "3"), ("--jobs", "0"), ("--jobs", "65"), ("--delete-source-shards",)],
)
def test_options_that_cannot_be_meant(arguments: tuple[str, ...], run: Run) -> None:
    assert run("pull", NAME, *arguments)[0] == 2
