"""A source whose shards arrive while it is quantized gives what one that is there gives."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from arriving_shards import Download, by_layer, split
from quant_sources import MIXTURES, save_source
from test_checkpoint_fp8 import in_fp8

from localr1.checkpoint.paths import HubOrigin
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import CheckpointError, FormatError, UsageError
from localr1.quant.pipeline import dry_run, quantize
from localr1.quant.recipe import Recipe
from localr1.quant.schedule import make_schedule
from localr1.quant.source import plan_arrival

RECIPE = Recipe.uniform(4, 32)
COMMIT = "0123456789abcdef0123456789abcdef01234567"

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smoothed": ("llama", {"num_hidden_layers": 3}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "mixture": ("deepseek_v3", MIXTURES["deepseek_v3"]),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """A dense model of three layers, a shard for each."""
    save_source(tmp_path / "whole", num_hidden_layers=3)
    return split(tmp_path / "whole", tmp_path / "complete")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shards", ["layers", "scattered"])
def test_in_whatever_order_shards_arrive(kind: str, shards: str, tmp_path: Path) -> None:
    """scattered: each tensor's shard has nothing to do with its place in the model."""
    model_type, changes = MODELS[kind]
    save_source(tmp_path / "whole", model_type, **changes)
    order: list[str] = []

    def scattered(name: str) -> str:
        order.append(name)
        return f"shard-{len(order) % 3}"

    shard_of = by_layer if shards == "layers" else scattered
    complete = split(tmp_path / "whole", tmp_path / "complete", shard_of)
    (tmp_path / "there").mkdir()
    quantize(complete, tmp_path / "there" / "out", RECIPE)
    expected = contents(tmp_path / "there" / "out")
    names = sorted(path.name for path in complete.glob("*.safetensors"))
    for number, ahead in enumerate((names, [], names[:1], names[-1:])):
        folder = tmp_path / str(number)
        folder.mkdir()
        download = Download(complete, folder / "complete", ahead)
        quantize(download.work, folder / "out", RECIPE, arrival=download)
        assert contents(folder / "out") == expected, f"with {ahead} there before the rest"


def test_a_shard_is_released_before_the_next_is_waited_for(layers: Path, tmp_path: Path) -> None:
    download = Download(layers, tmp_path / "source")
    schedule = plan_arrival(download.work, download, RECIPE)
    quantize(download.work, tmp_path / "out", RECIPE, arrival=download)
    names = ["embedding", "layer-0", "layer-1", "layer-2", "rest"]
    assert download.events == [(what, name) for name in names for what in ("wait", "release")]
    assert schedule.order == tuple(f"{name}.safetensors" for name in names)
    assert os.listdir(tmp_path / "source-blobs") == []


def test_a_tied_embedding_is_kept_for_the_head(tmp_path: Path) -> None:
    save_source(tmp_path / "whole", "qwen3", tie_word_embeddings=True)
    complete = split(tmp_path / "whole", tmp_path / "complete")
    download = Download(complete, tmp_path / "source")
    quantize(download.work, tmp_path / "out", RECIPE, arrival=download)
    assert download.events[-3:] == [
        ("wait", "rest"),
        ("release", "embedding"),
        ("release", "rest"),
    ]


def test_a_shard_that_nothing_is_made_from_is_never_waited_for(
    layers: Path, tmp_path: Path
) -> None:
    (layers / "unused.safetensors").write_bytes((layers / "rest.safetensors").read_bytes())
    download = Download(layers, tmp_path / "source")
    assert plan_arrival(download.work, download, RECIPE).unused == ("unused.safetensors",)
    quantize(download.work, tmp_path / "out", RECIPE, arrival=download)
    assert ("wait", "unused") not in download.events
    assert download.events.index(("release", "unused")) <= 2
    manifest = json.loads((tmp_path / "out" / "localr1.json").read_text())
    assert "unused.safetensors" in [file["name"] for file in manifest["source"]["files"]]


def test_codes_and_scales_in_different_shards(tmp_path: Path) -> None:
    save_source(tmp_path / "fp8", intermediate_size=160)
    in_fp8(tmp_path / "fp8")
    complete = split(
        tmp_path / "fp8",
        tmp_path / "complete",
        lambda name: "scales" if name.endswith("_scale_inv") else by_layer(name),
    )
    quantize(complete, tmp_path / "expected", RECIPE)
    (tmp_path / "work").mkdir()
    download = Download(complete, tmp_path / "work" / "complete")
    quantize(download.work, tmp_path / "out", RECIPE, arrival=download)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert download.events.index(("wait", "scales")) < download.events.index(("wait", "layer-1"))
    released = [name for what, name in download.events if what == "release"]
    assert released == ["embedding", "layer-0", "layer-1", "scales", "rest"]


class Failing(Download):
    """Fails, or hands out another file, when one shard is waited for."""

    def __init__(self, complete: Path, work: Path, instead: bytes | Exception) -> None:
        super().__init__(complete, work)
        self._instead = instead

    def wait(self, file_name: str) -> Path:
        path = super().wait(file_name)
        if file_name == "layer-1.safetensors":
            if isinstance(self._instead, Exception):
                raise self._instead
            path.write_bytes(self._instead)
        return path


def test_a_download_that_fails(layers: Path, tmp_path: Path) -> None:
    download = Failing(layers, tmp_path / "source", CheckpointError("the line is dead"))
    with pytest.raises(CheckpointError, match="the line is dead"):
        quantize(download.work, tmp_path / "out", RECIPE, arrival=download)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["shorter", "another header"])
def test_another_file_than_the_one_announced(change: str, layers: Path, tmp_path: Path) -> None:
    content = (layers / "layer-1.safetensors").read_bytes()
    if change == "shorter":
        content = content[:-1]
        said = r"size: expected [\d,]+ bytes, as was said"
    else:
        content = content.replace(b"mlp.up_proj", b"mlp.uq_proj", 1)
        said = "header: expected the one that was read before"
    download = Failing(layers, tmp_path / "source", content)
    with pytest.raises(FormatError, match=said):
        quantize(download.work, tmp_path / "out", RECIPE, arrival=download)
    assert not (tmp_path / "out").exists()


def test_a_tensor_cannot_be_read_before_its_shard_is_whole(layers: Path, tmp_path: Path) -> None:
    download = Download(layers, tmp_path / "source")
    with open_checkpoint(download.work, download.files) as checkpoint:
        assert checkpoint.shards is not None
        with pytest.raises(CheckpointError, match="the whole file, found its header alone"):
            checkpoint.read("model.norm.weight")
        checkpoint.shards.attach("rest.safetensors", download.wait("rest.safetensors"))
        assert checkpoint.read("model.norm.weight").isfinite().all()
        checkpoint.shards.detach("rest.safetensors")
        with pytest.raises(CheckpointError, match="its header alone"):
            checkpoint.read("model.norm.weight")


def test_only_directories_arrive(layers: Path, tmp_path: Path) -> None:
    download = Download(layers, tmp_path / "source")
    with pytest.raises(UsageError, match="directory of a model whose shards arrive"):
        quantize(tmp_path / "model.gguf", tmp_path / "out", RECIPE, arrival=download)


def test_where_a_source_is_from(layers: Path, tmp_path: Path) -> None:
    download = Download(layers, tmp_path / "source")
    download.origin = HubOrigin("maker/told", COMMIT)
    quantize(download.work, tmp_path / "told", RECIPE, arrival=download)
    snapshot = tmp_path / "models--maker--seen" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    layers.rename(snapshot)
    quantize(snapshot, tmp_path / "seen", RECIPE)
    for name in ("told", "seen"):
        source = json.loads((tmp_path / name / "localr1.json").read_text())["source"]
        assert (source["repository"], source["commit"]) == (f"maker/{name}", COMMIT)


def test_no_place_but_a_snapshot_tells_where_a_source_is_from(tmp_path: Path) -> None:
    save_source(tmp_path / "models--maker--name" / COMMIT, num_hidden_layers=1)
    quantize(tmp_path / "models--maker--name" / COMMIT, tmp_path / "out", RECIPE)
    source = json.loads((tmp_path / "out" / "localr1.json").read_text())["source"]
    assert source.keys() == {"name", "format", "files"}


def test_the_room_that_arriving_shards_take() -> None:
    schedule = make_schedule(
        [{"a"}, {"a", "b"}, {"c"}, {"d"}],
        [1, 10, 10, 1],
        {"a": 100, "b": 200, "c": 300, "d": 50, "e": 7},
    )
    assert schedule.order == ("a", "b", "c", "d")
    assert schedule.unused == ("e",)
    assert schedule.gone_after(0) == ["e"]
    assert schedule.gone_after(1) == ["a", "b"]
    # None there: a, then a and b, then c alone.
    assert schedule.peak((), releases=True) == max(101, 311, 321, 72)
    assert schedule.peak((), releases=False) == 22 + 650
    # All there: nothing to add, and room for the later sections where the earlier ones were.
    assert schedule.peak("abcde", releases=False) == 22
    assert schedule.peak("abcde", releases=True) == 11 - 7
    assert schedule.peak("cd", releases=True, begin=2) == 10


def test_the_check_of_the_disk_counts_what_comes_and_goes(
    layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the result and one shard at a time, but not for all shards."""
    asked: list[int] = []
    monkeypatch.setattr(
        "localr1.quant.atomic.AtomicDirectory.check", lambda _, nbytes: asked.append(nbytes)
    )
    quantize(layers, tmp_path / "a", RECIPE)
    download = Download(layers, tmp_path / "source")
    quantize(download.work, tmp_path / "b", RECIPE, arrival=download)
    there, arriving = asked[0], asked[2]  # The second is asked again when the work begins.
    sizes = [path.stat().st_size for path in layers.glob("*.safetensors")]
    assert dry_run(layers, RECIPE).nbytes < there
    assert 0 < arriving - there <= max(sizes)
