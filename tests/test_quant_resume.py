"""An interrupted quantization goes on where it was, to the same bytes, or says why it does not."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from arriving_shards import Download, contents, quantized, three_shards

import localr1
from localr1.errors import NumericsError, OutputError
from localr1.quant.journal import sections_done
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe
from localr1.quant.source import plan_arrival

RECIPE = Recipe.uniform(4, 32)
SECTIONS = ["embedding", "layer 0", "layer 1", "layer 2", "head"]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_shards(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def expected(complete: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(quantized(complete, tmp_path_factory.mktemp("expected") / "out", RECIPE))


class Interrupted(Download):
    """Ctrl-C while one shard is waited for."""

    def __init__(self, complete: Path, work: Path, at: str) -> None:
        super().__init__(complete, work)
        self._at = at

    def wait(self, file_name: str) -> Path:
        path = super().wait(file_name)
        if file_name == f"{self._at}.safetensors":
            raise KeyboardInterrupt
        return path


class Again(Download):
    """The same download after it was interrupted: of shards that are gone, the headers are there
    again, and waiting for one is an error."""

    def __init__(self, before: Download, complete: Path, work: Path) -> None:
        super().__init__(complete, work)
        self._gone = {name for what, name in before.events if what == "release"}

    def wait(self, file_name: str) -> Path:
        assert file_name.removesuffix(".safetensors") not in self._gone
        return super().wait(file_name)


def partial_of(folder: Path) -> Path:
    (partial,) = [path for path in folder.iterdir() if path.name.startswith(".out.partial-")]
    return partial


def interrupt(complete: Path, folder: Path, at: str = "layer-2") -> Download:
    """Begins `folder`/out and is interrupted; the partial directory is left."""
    (folder / "first").mkdir(parents=True)
    download = Interrupted(complete, folder / "first" / "complete", at)
    with pytest.raises(KeyboardInterrupt):
        quantize(download.work, folder / "out", RECIPE, arrival=download)
    assert not (folder / "out").exists()
    return download


@pytest.mark.parametrize("at", ["layer-0", "layer-1", "layer-2", "rest"])
def test_released_shards_are_not_needed_again(
    at: str, complete: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    before = interrupt(complete, tmp_path, at)
    names = ["embedding", "layer-0", "layer-1", "layer-2", "rest"]
    done = names.index(at)
    assert sections_done(tmp_path / "out") == done
    journal = (partial_of(tmp_path) / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["section"] for line in journal[1:]] == SECTIONS[:done]
    (tmp_path / "second").mkdir()
    again = Again(before, complete, tmp_path / "second" / "complete")
    remaining = plan_arrival(again.work, again, RECIPE).remaining(done)
    assert remaining == tuple(f"{name}.safetensors" for name in names[done:])
    quantize(again.work, tmp_path / "out", RECIPE, arrival=again)
    assert sections_done(tmp_path / "out") == 0
    assert [name for what, name in again.events if what == "wait"] == names[done:]
    assert contents(tmp_path / "out") == expected
    assert sorted(os.listdir(tmp_path)) == ["first", "out", "second"]


def test_interrupted_twice(complete: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    before = interrupt(complete, tmp_path, "layer-0")
    (tmp_path / "second").mkdir()
    second = Interrupted(complete, tmp_path / "second" / "complete", "rest")
    with pytest.raises(KeyboardInterrupt):
        quantize(second.work, tmp_path / "out", RECIPE, arrival=second)
    before.events += second.events
    (tmp_path / "third").mkdir()
    third = Again(before, complete, tmp_path / "third" / "complete")
    quantize(third.work, tmp_path / "out", RECIPE, arrival=third)
    assert contents(tmp_path / "out") == expected


def test_without_an_arrival(complete: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """A directory whose shards are all there; no layer is done twice."""
    local = shutil.copytree(complete, tmp_path / "complete")
    stopped: list[str] = []

    class StoppingError(Exception):
        pass

    def stop(progress: object) -> None:
        stopped.append(str(progress))
        if "layers.2.mlp" in stopped[-1]:
            raise StoppingError

    with pytest.raises(StoppingError):
        quantize(local, tmp_path / "out", RECIPE, stop)
    assert partial_of(tmp_path)
    seen: list[str] = []
    quantize(local, tmp_path / "out", RECIPE, lambda progress: seen.append(progress.name))
    assert "model.layers.0.mlp.up_proj" not in seen
    assert "model.layers.2.mlp.up_proj" in seen
    assert contents(tmp_path / "out") == expected


Change = Callable[[Path], None]


def change_config(source: Path) -> None:
    path = source / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 256}))


def change_values(source: Path) -> None:
    path = source / "layer-0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", [change_config, change_values])
def test_a_source_that_has_changed(
    change: Change, complete: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    local = shutil.copytree(complete, tmp_path / "complete")

    def stop(progress: object) -> None:
        if "layers.1.mlp" in str(progress):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(local, tmp_path / "out", RECIPE, stop)
    before = contents(partial_of(tmp_path) / "result")
    change(local)
    with pytest.raises(OutputError, match=r"unfinished result.*found another.*--restart"):
        quantize(local, tmp_path / "out", RECIPE)
    assert contents(partial_of(tmp_path) / "result") == before, "a refusal changes nothing"
    quantize(local, tmp_path / "out", RECIPE, restart=True)
    assert contents(tmp_path / "out") != expected
    assert sorted(os.listdir(tmp_path)) == ["complete", "out"]


def test_told_hashes_that_differ(complete: Path, tmp_path: Path) -> None:
    interrupt(complete, tmp_path)
    (tmp_path / "second").mkdir()
    local = shutil.copytree(complete, tmp_path / "other")
    change_values(local)
    other = Download(local, tmp_path / "second" / "complete")
    with pytest.raises(OutputError, match="found another source"):
        quantize(other.work, tmp_path / "out", RECIPE, arrival=other)


@pytest.mark.parametrize("recipe", [Recipe.uniform(8, 32), Recipe.uniform(4, 32, smooth=False)])
def test_another_recipe(recipe: Recipe, complete: Path, tmp_path: Path) -> None:
    before = interrupt(complete, tmp_path)
    (tmp_path / "second").mkdir()
    again = Again(before, complete, tmp_path / "second" / "complete")
    with pytest.raises(OutputError, match="found another recipe"):
        quantize(again.work, tmp_path / "out", recipe, arrival=again)


def test_another_version(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = interrupt(complete, tmp_path)
    (tmp_path / "second").mkdir()
    again = Again(before, complete, tmp_path / "second" / "complete")
    monkeypatch.setattr(localr1, "__version__", "99.0")
    with pytest.raises(OutputError, match="found other versions of localr1 or torch"):
        quantize(again.work, tmp_path / "out", RECIPE, arrival=again)


@pytest.mark.parametrize("tail", [b'{"section":"layer 2","che', b'{"section":1}\n', bytes(50)])
def test_a_journal_whose_last_line_is_cut(
    tail: bytes, complete: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    before = interrupt(complete, tmp_path)
    with (partial_of(tmp_path) / "journal.jsonl").open("ab") as file:
        file.write(tail)
    (tmp_path / "second").mkdir()
    again = Again(before, complete, tmp_path / "second" / "complete")
    quantize(again.work, tmp_path / "out", RECIPE, arrival=again)
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("pattern", ["result/dense-*.safetensors", "hidden-*.f32"])
def test_what_was_written_is_read_back(pattern: str, complete: Path, tmp_path: Path) -> None:
    before = interrupt(complete, tmp_path)
    (path,) = partial_of(tmp_path).glob(pattern)
    content = bytearray(path.read_bytes())
    content[-100_000 % len(content)] ^= 1
    path.write_bytes(content)
    (tmp_path / "second").mkdir()
    again = Again(before, complete, tmp_path / "second" / "complete")
    with pytest.raises(OutputError, match=r"read back: expected what was written.*--restart"):
        quantize(again.work, tmp_path / "out", RECIPE, arrival=again)
    assert not (tmp_path / "out").exists()


def test_of_a_damaged_source_nothing_is_kept_unless_shards_are_gone(
    complete: Path, tmp_path: Path
) -> None:
    local = shutil.copytree(complete, tmp_path / "complete")
    path = local / "layer-2.safetensors"
    content = bytearray(path.read_bytes())
    content[-2:] = b"\xff\x7f"  # NaN.
    path.write_bytes(content)
    (tmp_path / "a").mkdir()
    with pytest.raises(NumericsError):
        quantize(local, tmp_path / "a" / "out", RECIPE)
    assert os.listdir(tmp_path / "a") == []
    (tmp_path / "b").mkdir()
    download = Download(local, tmp_path / "b" / "complete")
    with pytest.raises(NumericsError):
        quantize(download.work, tmp_path / "b" / "out", RECIPE, arrival=download)
    assert partial_of(tmp_path / "b")
