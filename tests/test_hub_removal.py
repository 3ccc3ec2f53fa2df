"""`localr1 rm`: what goes, what stays because others use it, and what a fault in between leaves."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_cache import HubCache, add_quantized, model_files, run, safetensors
from huggingface_hub import scan_cache_dir

from localr1.errors import NotFoundError, OutputError
from localr1.hub import trash
from localr1.hub.library import Library
from localr1.hub.locks import BusyError, held, model_lock, repository_lock
from localr1.hub.removal import plan_removals, remove
from localr1.settings import Settings

ONE, TWO = "1" * 40, "2" * 40
SHARD = "model-00001-of-00002.safetensors"


def names(settings: Settings) -> list[str]:
    return [model.name for model in Library.of(settings).models()]


def blobs(cache: HubCache, repository: str) -> set[str]:
    return {path.name for path in (cache.folder(repository) / "blobs").glob("*")}


def test_a_transcript(settings: Settings, cache: HubCache) -> None:
    files = model_files()
    cache.add("org/m", files)
    mine = add_quantized(settings, "mine")
    add_quantized(settings, "yours")
    total = sum(map(len, files.values()))
    own = sum(each.stat().st_size for each in mine.iterdir())
    code, stdout, stderr = run(settings, "rm", "-y", "mine", "org/m")
    assert (code, stdout) == (0, "")
    assert stderr.splitlines() == [
        f"mine: {own} B ({mine})",
        f"org/m: {total} B ({cache.folder('org/m')})",
        "Deleted mine.",
        "Deleted org/m.",
    ]
    assert names(settings) == ["yours"]
    assert not cache.folder("org/m").exists()
    assert os.listdir(settings.data_dir / "models") == ["yours"]
    assert [each for each in os.listdir(settings.hub_cache) if each != ".locks"] == []


def test_what_went_as_a_document(settings: Settings, cache: HubCache) -> None:
    cache.add("org/m", model_files())
    mine = add_quantized(settings, "mine")
    add_quantized(settings, "yours")
    own = sum(each.stat().st_size for each in mine.iterdir())
    busy = repository_lock(cache.folder("org/m"))
    with held(busy, "org/m"):
        code, stdout, stderr = run(settings, "rm", "-y", "--json", "mine", "org/m", "yours")
    assert code == 1
    assert "Deleted mine." in stderr
    documents = json.loads(stdout)
    assert documents[0] == {
        "names": ["mine"],
        "path": str(mine),
        "repository": None,
        "bytes": own,
        "shared_bytes": 0,
        "deleted": True,
    }
    deleted = {name: each["deleted"] for each in documents for name in each["names"]}
    assert deleted == {"mine": True, "yours": True, "org/m": False}
    assert documents[-1]["repository"] == "org/m"
    assert names(settings) == ["org/m"]


def test_without_a_terminal_nothing_is_deleted(settings: Settings, cache: HubCache) -> None:
    cache.add("org/m", model_files())
    code, _, stderr = run(settings, "rm", "org/m")
    assert code == 2
    assert "org/m: " in stderr
    assert names(settings) == ["org/m"]


def test_what_is_not_here(settings: Settings, cache: HubCache) -> None:
    cache.add("org/m", model_files())
    code, _, stderr = run(settings, "rm", "-y", "org/m", "other")
    assert code == 4
    assert "other is not here. Models here: org/m." in stderr
    assert names(settings) == ["org/m"]


def test_an_alias_is_the_original(settings: Settings, cache: HubCache) -> None:
    repository = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    cache.add(repository, model_files())
    add_quantized(settings, "mine", repository=repository)
    assert run(settings, "rm", "-y", "r1-distill-qwen-7b")[0] == 0
    assert names(settings) == ["mine"]


def test_what_another_revision_uses_stays(settings: Settings, cache: HubCache) -> None:
    """Both have the same shards; config.json differs."""
    old, new = model_files(torch_dtype="float16"), model_files()
    cache.add("org/m", old, commit=ONE, revisions=["old", "refs/pr/1"])
    cache.add("org/m", new, commit=TWO)
    (removal,) = plan_removals(["org/m@old"], Library.of(settings))
    differing = len(old["config.json"])
    total = sum(map(len, old.values()))
    if cache.links:
        assert (removal.nbytes, removal.kept) == (differing, total - differing)
    else:
        assert (removal.nbytes, removal.kept) == (total, 0)
    remove(removal, Library.of(settings))
    (model,) = Library.of(settings).models()
    assert (model.name, model.commit, model.is_complete) == ("org/m", TWO, True)
    assert not (cache.folder("org/m") / "refs" / "old").exists()
    report = scan_cache_dir(settings.hub_cache)
    assert not report.warnings
    (repository,) = report.repos
    assert {each.commit_hash for each in repository.revisions} == {TWO}
    if cache.links:
        assert len(blobs(cache, "org/m")) == len(new)


def test_both_revisions_at_once_leave_nothing(settings: Settings, cache: HubCache) -> None:
    cache.add("org/m", model_files(torch_dtype="float16"), commit=ONE, revisions=["old"])
    cache.add("org/m", model_files(), commit=TWO)
    (removal,) = plan_removals(["org/m", "org/m@old", "org/m"], Library.of(settings))
    assert removal.names == ("org/m", "org/m@old")
    assert removal.kept == 0
    remove(removal, Library.of(settings))
    assert not cache.folder("org/m").exists()


def test_another_repositorys_use_of_the_shared_store(settings: Settings, linked: HubCache) -> None:
    files = model_files()
    for repository in ("org/a", "org/b"):
        linked.add(repository, files, shared=[SHARD])
    total, common = sum(map(len, files.values())), len(files[SHARD])
    library = Library.of(settings)
    (removal,) = plan_removals(["org/a"], library)
    assert (removal.nbytes, removal.kept) == (total - common, common)
    remove(removal, Library.of(settings))
    (model,) = library.models()
    assert (model.name, model.is_complete) == ("org/b", True)
    payloads = list((settings.hub_cache / "blobs").glob("??/" + "?" * 64))
    assert len(payloads) == 1
    (removal,) = plan_removals(["org/b"], library)
    assert (removal.nbytes, removal.kept) == (total, 0)
    remove(removal, Library.of(settings))
    assert not payloads[0].exists()


def test_one_revision_of_the_shared_store(settings: Settings, linked: HubCache) -> None:
    linked.add("org/m", model_files(), commit=ONE, revisions=["old"], shared=[SHARD])
    other = {**model_files(), SHARD: safetensors(32)}
    linked.add("org/m", other, commit=TWO, shared=[SHARD])
    (removal,) = plan_removals(["org/m@old"], Library.of(settings))
    remove(removal, Library.of(settings))
    (model,) = Library.of(settings).models()
    assert model.is_complete
    assert len(list((settings.hub_cache / "blobs").glob("??/" + "?" * 64))) == 1


def test_one_of_several_gguf_files(settings: Settings, cache: HubCache, smollm2_gguf: Path) -> None:
    data = smollm2_gguf.read_bytes()[: 4 << 20]
    cache.add("org/m", {"README.md": b"hello", "a.gguf": data, "b.gguf": data + b"b"}, commit=ONE)
    library = Library.of(settings)
    (removal,) = plan_removals(["org/m/a.gguf"], library)
    assert removal.nbytes == len(data)
    remove(removal, Library.of(settings))
    assert names(settings) == ["org/m"]
    assert (cache.folder("org/m") / "snapshots" / ONE / "README.md").read_bytes() == b"hello"
    assert not any(data == path.read_bytes() for path in cache.folder("org/m").rglob("blobs/*"))
    (removal,) = plan_removals(["org/m"], library)
    remove(removal, Library.of(settings))
    assert not cache.folder("org/m").exists()


def test_a_download_that_was_cut_off(settings: Settings, linked: HubCache) -> None:
    files = model_files()
    there = {name: data for name, data in files.items() if name != SHARD}
    linked.add("org/m", there, commit=ONE)
    linked.pull_record("org/m", files, ONE)
    partial = linked.folder("org/m") / "blobs" / f"{'a' * 64}.localr1-partial"
    partial.write_bytes(b"x" * 4096)
    assert run(settings, "rm", "-y", "org/m")[0] == 0
    assert not linked.folder("org/m").exists()

    linked.pull_record("org/new", files, ONE)  # Nothing of it is here yet.
    assert run(settings, "rm", "-y", "org/new")[0] == 0
    assert not linked.folder("org/new").exists()


def test_a_pull_of_another_revision_goes_on(settings: Settings, linked: HubCache) -> None:
    linked.add("org/m", model_files(), commit=ONE)
    linked.pull_record("org/m", model_files(torch_dtype="float16"), TWO, "next")
    partial = linked.folder("org/m") / "blobs" / f"{'a' * 64}.localr1-partial"
    partial.write_bytes(b"x")
    linked.add("org/m", {"config.json": b"{}"}, commit=TWO, revisions=["next"])
    assert run(settings, "rm", "-y", "org/m")[0] == 0
    assert partial.exists()
    assert (linked.folder("org/m") / "localr1-pull.json").exists()


def test_what_was_begun_of_a_revision_goes_with_it(settings: Settings, linked: HubCache) -> None:
    files = model_files(torch_dtype="float16")
    linked.add("org/m", model_files(), commit=ONE)
    there = {name: data for name, data in files.items() if name != SHARD}
    linked.add("org/m", there, commit=TWO, revisions=["next"])
    linked.pull_record("org/m", files, TWO, "next")
    blob = linked.folder("org/m") / "blobs" / ("a" * 64)
    begun = [blob.with_name(blob.name + end) for end in (".localr1-partial", ".localr1-blocks")]
    for path in begun:
        path.write_bytes(b"x")
    assert run(settings, "rm", "-y", "org/m@next")[0] == 0
    assert not any(path.exists() for path in begun)
    assert not (linked.folder("org/m") / "localr1-pull.json").exists()
    assert names(settings) == ["org/m"]


def test_another_programs_download_is_left_alone(settings: Settings, linked: HubCache) -> None:
    linked.add("org/m", model_files())
    theirs = linked.folder("org/m") / "blobs" / f"{'b' * 64}.0123abcd.incomplete"
    theirs.write_bytes(b"x")
    assert run(settings, "rm", "-y", "org/m")[0] == 0
    assert names(settings) == []
    assert blobs(linked, "org/m") == {theirs.name}


HOLD = """
import sys, time
from pathlib import Path
from localr1.hub.locks import held
with held(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("what", ["repository", "quantized"])
def test_what_another_process_works_on_is_refused(
    what: str, settings: Settings, cache: HubCache
) -> None:
    cache.add("org/m", model_files())
    mine = add_quantized(settings, "mine")
    lock = repository_lock(cache.folder("org/m")) if what == "repository" else model_lock(mine)
    name = "org/m" if what == "repository" else "mine"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        code, _, stderr = run(settings, "rm", "-y", name)
        assert code == 1
        assert f"{name} is in use" in stderr
        assert set(names(settings)) == {"mine", "org/m"}
    finally:
        holder.kill()
        holder.communicate()
    assert run(settings, "rm", "-y", name)[0] == 0  # Its death let go of the lock.
    assert name not in names(settings)


def test_the_quantizers_lock_is_the_same(settings: Settings, tmp_path: Path) -> None:
    from localr1.quant.atomic import AtomicDirectory

    out = settings.data_dir / "models" / "mine"
    with AtomicDirectory(out):
        with pytest.raises(BusyError, match="mine is in use"):
            plan_removals(["mine"], Library.of(settings))
        with pytest.raises(BusyError), held(model_lock(out), "mine"):
            pass
    with held(model_lock(out), "mine"), pytest.raises(OutputError, match="another process"):
        AtomicDirectory(out).__enter__()


def test_a_quantized_model_that_was_never_finished(settings: Settings) -> None:
    (settings.data_dir / "models" / ".mine.partial-0123").mkdir(parents=True)
    with pytest.raises(NotFoundError, match=r"never finished\. `localr1 prune`"):
        plan_removals(["mine"], Library.of(settings))


@pytest.mark.parametrize("fails_at", range(12))
def test_a_fault_between_any_two_steps_leaves_what_the_next_run_removes(
    fails_at: int, settings: Settings, linked: HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill would, each rename, in turn, is the last that happens."""
    linked.add("org/m", model_files(torch_dtype="float16"), commit=ONE, revisions=["old"])
    linked.add("org/m", model_files(), commit=TWO)
    add_quantized(settings, "mine")
    library = Library.of(settings)
    wanted = plan_removals(["org/m@old", "mine"], library)
    count = 0
    rename, rmtree = os.rename, shutil.rmtree

    class Killed(BaseException):
        pass

    def step() -> None:
        nonlocal count
        if count == fails_at:
            raise Killed
        count += 1

    def counted_rename(*arguments: Path) -> None:
        step()
        rename(*arguments)

    def counted_rmtree(*arguments: Path, **options: object) -> None:
        step()
        rmtree(*arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", counted_rename)
        patch.setattr(shutil, "rmtree", counted_rmtree)
        try:
            for removal in wanted:
                remove(removal, Library.of(settings))
        except Killed:
            pass
    kept = [model for model in library.models() if model.name == "org/m"]
    assert [model.is_complete for model in kept] == [True]
    for name in [each for each in names(settings) if each != "org/m"]:
        assert run(settings, "rm", "-y", name)[0] == 0
    run(settings, "rm", "-y", "org/m")
    left = [path.name for path in settings.data_dir.rglob("*") if trash.TRASH_PREFIX in path.name]
    left += [path.name for path in linked.root.iterdir() if path.name != ".locks"]
    assert not left


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_a_link_goes_and_what_it_leads_to_stays(
    settings: Settings, linked: HubCache, tmp_path: Path
) -> None:
    mine = add_quantized(settings, "mine")
    elsewhere = tmp_path / "elsewhere"
    shutil.move(mine, elsewhere)
    mine.symlink_to(elsewhere)
    assert run(settings, "rm", "-y", "mine")[0] == 0
    assert not os.path.lexists(mine)
    assert (elsewhere / "config.json").exists()
    linked.add("org/m", model_files())
    shutil.move(linked.folder("org/m"), tmp_path / "models--org--m")
    linked.folder("org/m").symlink_to(tmp_path / "models--org--m")
    code, _, stderr = run(settings, "rm", "-y", "org/m")
    assert code == 1
    assert "is a link to" in stderr
    assert (tmp_path / "models--org--m" / "snapshots").exists()


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_nothing_outside_the_cache_is_deleted(
    settings: Settings, linked: HubCache, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "treasure.safetensors").write_bytes(b"x")
    snapshot = linked.add("org/m", model_files())
    (snapshot / "folder").symlink_to(outside)
    (snapshot / "file.safetensors").symlink_to(outside / "treasure.safetensors")
    assert run(settings, "rm", "-y", "org/m")[0] == 0
    assert not linked.folder("org/m").exists()
    assert (outside / "treasure.safetensors").read_bytes() == b"x"


def test_a_cache_that_cannot_be_written_says_so(
    settings: Settings, cache: HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.add("org/m", model_files())

    def refuse(source: Path, target: Path) -> None:
        raise OSError(30, "Read-only file system", str(source))

    monkeypatch.setattr(os, "rename", refuse)
    code, _, stderr = run(settings, "rm", "-y", "org/m")
    assert code == 1
    assert "org/m cannot be removed" in stderr
    assert "Read-only file system" in stderr
    assert names(settings) == ["org/m"]


@pytest.mark.skipif(os.name == "nt", reason="files are removed by another call there")
def test_what_another_process_deleted_first_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(b"x")
    unlink = os.unlink

    def too_late(path: str, *, dir_fd: int | None = None) -> None:
        unlink(path, dir_fd=dir_fd)
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(os, "unlink", too_late)
    trash.delete(folder)
    assert not folder.exists()
    trash.delete(folder)


def test_two_at_once(settings: Settings, cache: HubCache) -> None:
    """Ten processes remove the same two models: each is removed once, none sees a traceback."""
    cache.add("org/m", model_files())
    add_quantized(settings, "mine")
    environment = {
        **os.environ,
        "LOCALR1_HOME": str(settings.data_dir.parent),
        "HF_HUB_CACHE": str(settings.hub_cache),
    }
    code = "from localr1.cli.main import main; main(['rm', '-y', 'org/m', 'mine'])"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment)
        for _ in range(6)
    ]
    begin = time.monotonic()
    errors = [each.communicate(timeout=60)[1].decode() for each in runs]
    assert time.monotonic() - begin < 60
    assert not [text for text in errors if "Traceback" in text]
    for _ in range(2):  # Whoever was refused because another was at it may try again.
        for name in names(settings):
            run(settings, "rm", "-y", name)
    assert names(settings) == []
