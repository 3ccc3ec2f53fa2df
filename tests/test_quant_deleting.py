"""Shards that are deleted as they are quantized: none before what was made of it is safe."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from arriving_shards import contents, quantized, three_shards
from typer.testing import CliRunner

from localr1.checkpoint.safetensors_file import SafetensorsFile
from localr1.cli.main import app
from localr1.errors import FormatError, NotFoundError, NumericsError, OutputError, UsageError
from localr1.quant.deleting import DeletingArrival, source_held
from localr1.quant.pipeline import quantize
from localr1.quant.progress import Progress
from localr1.quant.recipe import Recipe

RECIPE = Recipe.uniform(4, 32)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_shards(tmp_path_factory.mktemp("deleting"))


@pytest.fixture(scope="module")
def expected(complete: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(quantized(complete, tmp_path_factory.mktemp("expected") / "out", RECIPE))


@pytest.fixture
def source(complete: Path, tmp_path: Path) -> Path:
    return shutil.copytree(complete, tmp_path / "complete")


def shards_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.safetensors"))


class Stop:
    """Ctrl-C when a tensor's turn comes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, progress: Progress) -> None:
        if self._name in progress.name:
            raise KeyboardInterrupt


def test_only_what_was_made_into_something_is_deleted(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    seen: dict[str, list[str]] = {}

    def look(progress: Progress) -> None:
        if progress.stage == "quantize":
            seen.setdefault(progress.name, shards_in(source))

    (source / "other.safetensors").write_bytes((source / "rest.safetensors").read_bytes())
    quantize(source, tmp_path / "with-other", RECIPE)
    arrival = DeletingArrival(source)
    quantize(source, tmp_path / "out", RECIPE, look, arrival=arrival)
    assert seen["model.layers.1.mlp.up_proj"] == ["layer-1", "layer-2", "other", "rest"]
    assert seen["lm_head"] == ["other", "rest"]
    assert shards_in(source) == ["other"], "the index does not name it"
    assert contents(tmp_path / "out") == contents(tmp_path / "with-other")
    arrival.finish()
    assert not list(source.glob("*localr1-header"))
    assert (source / "config.json").exists()


def test_a_shard_goes_after_its_line_is_in_the_journal(source: Path, tmp_path: Path) -> None:
    made_last = {"embedding": "embedding", "rest": "head"}
    made_last |= {f"layer-{number}": f"layer {number}" for number in range(3)}
    released: list[str] = []

    class Looking(DeletingArrival):
        def release(self, file_name: str) -> None:
            (journal,) = tmp_path.glob(".out.partial-*/journal.jsonl")
            lines = [json.loads(line) for line in journal.read_text().splitlines()]
            name = file_name.removesuffix(".safetensors")
            assert made_last[name] in [line["section"] for line in lines[1:]]
            released.append(name)

    quantize(source, tmp_path / "out", RECIPE, arrival=Looking(source))
    assert released == ["embedding", "layer-0", "layer-1", "layer-2", "rest"]


@pytest.mark.parametrize("deletes", [True, False])
def test_an_interrupted_run_goes_on_without_what_it_has_deleted(
    deletes: bool, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(
            source, tmp_path / "out", RECIPE, Stop("layers.1.mlp"), arrival=DeletingArrival(source)
        )
    assert shards_in(source) == ["layer-1", "layer-2", "rest"]
    with pytest.raises(UsageError, match=r"2 of its shards are deleted.*Leave --restart out"):
        quantize(source, tmp_path / "out", RECIPE, restart=True)
    arrival = DeletingArrival(source) if deletes else None
    quantize(source, tmp_path / "out", RECIPE, arrival=arrival)
    assert contents(tmp_path / "out") == expected
    assert len(shards_in(source)) == (0 if deletes else 3)


def test_without_its_unfinished_result_a_deleted_shard_is_missed(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(
            source, tmp_path / "out", RECIPE, Stop("layers.1.mlp"), arrival=DeletingArrival(source)
        )
    with pytest.raises(NotFoundError, match=r"was deleted when it had been quantized.*Download"):
        quantize(source, tmp_path / "elsewhere", RECIPE)


def test_a_damaged_shard_loses_nothing_that_was_made_of_others(
    source: Path, complete: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The good shard in its place, the run goes on."""
    (source / "layer-2.safetensors").write_bytes(
        (source / "layer-2.safetensors").read_bytes()[:-2] + b"\xff\x7f"
    )
    with pytest.raises(NumericsError, match=r"model\.layers\.2.*finite"):
        quantize(source, tmp_path / "out", RECIPE, arrival=DeletingArrival(source))
    assert shards_in(source) == ["layer-2", "rest"]
    shutil.copy(complete / "layer-2.safetensors", source)
    quantize(source, tmp_path / "out", RECIPE, arrival=DeletingArrival(source))
    assert contents(tmp_path / "out") == expected


@pytest.mark.skipif(sys.platform == "win32", reason="kills by SIGKILL after a fork")
@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.soak)])
def test_kills_while_shards_are_deleted(kills: int, complete: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    completed = subprocess.run(
        [
            sys.executable, str(TESTS / "quant_crashes.py"), str(complete), str(work), str(kills),
            "2", "delete",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    runs = [json.loads(line) for line in completed.stdout.splitlines()]
    assert sum(run["killed"] for run in runs) >= kills
    undisturbed = contents(work / "undisturbed" / "out")
    assert "dense-00001-of-00001.safetensors" in undisturbed
    for place in {run["place"] for run in runs}:
        assert contents(work / str(place) / "out") == undisturbed, f"in place {place}"


def snapshot_of(source: Path, cache: Path, commit: str = COMMIT) -> Path:
    """As the Hugging Face cache has it: links to blobs."""
    repository = cache / "models--maker--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    for path in source.iterdir():
        blob = repository / "blobs" / f"{path.name}-blob"
        shutil.copy(path, blob)
        try:
            (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
        except OSError:
            pytest.skip("links need a privilege here")
    return snapshot


def test_in_the_cache_links_go_with_their_blobs(
    complete: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    snapshot = snapshot_of(complete, tmp_path / "hub")
    with pytest.raises(KeyboardInterrupt):
        quantize(
            snapshot, tmp_path / "out", RECIPE, Stop("layers.2.mlp"),
            arrival=DeletingArrival(snapshot),
        )  # fmt: skip
    blobs = tmp_path / "hub" / "models--maker--model" / "blobs"
    left = sorted(path.name for path in blobs.glob("*.safetensors-blob"))
    assert left == ["layer-2.safetensors-blob", "rest.safetensors-blob"]
    # As a kill between the two leaves it: the blob is gone, its link is not.
    (snapshot / "layer-1.safetensors").symlink_to("../../blobs/layer-1.safetensors-blob")
    arrival = DeletingArrival(snapshot)
    quantize(snapshot, tmp_path / "out", RECIPE, arrival=arrival)
    arrival.finish()
    assert not [path for path in snapshot.iterdir() if "safetensors" in path.suffix]
    assert not list(blobs.glob("*.safetensors-blob"))
    weights = [name for name in expected if name.endswith(".safetensors")]
    found = contents(tmp_path / "out")
    assert [found[name] for name in weights] == [expected[name] for name in weights]
    assert json.loads(found["localr1.json"])["source"]["commit"] == COMMIT


def test_a_blob_of_two_snapshots_stays(complete: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(complete, tmp_path / "hub")
    other = snapshot.with_name("f" * 40)
    other.mkdir()
    (other / "rest.safetensors").symlink_to("../../blobs/rest.safetensors-blob")
    with pytest.raises(UsageError, match=r"a blob that no other file is a link to, found .*ffff"):
        DeletingArrival(snapshot)


def test_a_link_elsewhere_stays(source: Path, tmp_path: Path) -> None:
    (source / "rest.safetensors").rename(source / "elsewhere.bin")
    try:
        (source / "rest.safetensors").symlink_to("elsewhere.bin")
    except OSError:
        pytest.skip("links need a privilege here")
    with pytest.raises(UsageError, match=r"a link to .*which others may use"):
        DeletingArrival(source)


def test_a_repository_that_another_process_holds(complete: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(complete, tmp_path / "hub")
    with (
        source_held(snapshot),
        pytest.raises(OutputError, match="maker/model is in use"),
        source_held(snapshot),
    ):
        pass
    with source_held(complete), source_held(complete):
        assert not (tmp_path / ".locks").exists()


def test_what_has_no_shards(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(UsageError, match="directory of safetensors"):
            DeletingArrival(path)


@pytest.mark.parametrize("content", [b"", b"\2" + bytes(7) + b"{}", b"\2" + bytes(7) + b"{}1x"])
def test_a_kept_header_that_is_none(content: bytes, source: Path, tmp_path: Path) -> None:
    (source / "rest.safetensors").unlink()
    (source / "rest.safetensors.localr1-header").write_bytes(content)
    with pytest.raises(FormatError, match="header of a shard, then its size"):
        quantize(source, tmp_path / "out", RECIPE)


def test_the_kept_header_says_what_the_shard_said(source: Path) -> None:
    shard = SafetensorsFile(source / "layer-0.safetensors")
    shard.close()
    arrival = DeletingArrival(source)
    arrival.release("layer-0.safetensors")
    file = arrival.files["layer-0.safetensors"]
    kept = SafetensorsFile(file.path, file.size)
    assert (kept.size, kept.header_sha256, kept.tensors) == (
        shard.size,
        shard.header_sha256,
        shard.tensors,
    )


def test_a_shard_that_cannot_be_deleted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == "layer-0.safetensors":
            raise PermissionError(13, "Permission denied")
        really(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OutputError, match=r"layer-0\.safetensors cannot be deleted"):
        quantize(source, tmp_path / "out", RECIPE, arrival=DeletingArrival(source))
    monkeypatch.undo()
    quantize(source, tmp_path / "out", RECIPE, arrival=DeletingArrival(source))
    assert shards_in(source) == []


def test_the_command_asks(
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["quantize", str(source), str(tmp_path / "out"), "--delete-source-shards"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UsageError)
    assert "nobody can be asked" in str(result.exception)
    monkeypatch.setattr("localr1.cli.confirm.can_ask", lambda: True)
    result = CliRunner().invoke(app, arguments, input="n\n")
    assert result.exit_code == 1
    assert "Delete 5 files" in result.stderr
    assert len(shards_in(source)) == 5
    result = CliRunner().invoke(app, [*arguments, "-y"])
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "out") == expected
    assert not list(source.glob("*.safetensors*[!n]")), "n: of the index, .json"


def test_the_embedded_model_stays(tmp_path: Path) -> None:
    arguments = ["quantize", "r1-nano", str(tmp_path / "out"), "--delete-source-shards", "-y"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UsageError)
    assert "a part of localr1" in str(result.exception)


def test_the_command_begins_anew_where_it_is_told_to(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", RECIPE, Stop("layers.1.mlp"))
    arguments = ["quantize", str(source), str(tmp_path / "out"), "--bits", "8"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, OutputError)
    assert "another recipe" in str(result.exception)
    assert CliRunner().invoke(app, [*arguments, "--restart"]).exit_code == 0
    assert sorted(os.listdir(tmp_path)) == ["complete", "out"]
