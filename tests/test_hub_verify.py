"""`localr1 verify`: planted damage of every kind is found, and what is good is called good."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_cache import HubCache, add_quantized, encoded, etag_of, model_files, run, safetensors
from quant_sources import MIXTURES, save_source

from localr1.hub.library import Library
from localr1.hub.locks import repository_lock
from localr1.kernels.checksum import crc32c
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe
from localr1.settings import Settings

ONE = "1" * 40
SHARD = "model-00001-of-00002.safetensors"


def listing(cache: HubCache, repository: str, files: dict[str, bytes], commit: str) -> None:
    """The repository's files as huggingface_hub writes them down for a commit."""
    entries: dict[str, dict[str, object]] = {}
    for name, data in files.items():
        entry = entries[name] = {"size": len(data), "blob_id": etag_of("any", data)}
        if name.endswith(".safetensors"):
            entry |= {"lfs_sha256": etag_of(name, data), "lfs_size": len(data)}
    path = cache.folder(repository) / "trees" / f"{commit}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(encoded({"format_version": 1, "files": entries}))


def add(cache: HubCache, files: dict[str, bytes] | None = None) -> dict[str, bytes]:
    files = files or model_files()
    cache.add("org/m", files, commit=ONE)
    if not cache.links:  # Blobs' names are where their hashes are.
        listing(cache, "org/m", files, ONE)
    return files


def file_in(cache: HubCache, name: str) -> Path:
    return Path(os.path.realpath(cache.folder("org/m") / "snapshots" / ONE / name))


def findings(settings: Settings, *arguments: str) -> dict[str, tuple[str, str]]:
    code, stdout, _ = run(settings, "verify", *arguments, "--json")
    document = json.loads(stdout)
    assert code == (0 if document["good"] else 1)
    return {each["file"]: (each["kind"], each["detail"]) for each in document["findings"]}


def test_a_good_original(settings: Settings, cache: HubCache) -> None:
    files = add(cache)
    size = sum(map(len, files.values()))
    code, stdout, stderr = run(settings, "verify", "org/m")
    assert (code, stderr) == (0, "")
    assert stdout == f"org/m is good: 5 files, {size} B as they should be.\n"
    document = json.loads(run(settings, "verify", "org/m", "--json")[1])
    assert document == {
        "name": "org/m",
        "path": str(settings.hub_cache / "models--org--m" / "snapshots" / ONE),
        "good": True,
        "files": 5,
        "bytes": size,
        "without_hash": [],
        "findings": [],
        "moved_aside": [],
    }


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize("damage", [cut, flip, grow])
@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_damage_is_found_and_moved_aside(
    name: str, damage: Callable[[Path], None], settings: Settings, cache: HubCache
) -> None:
    files = add(cache)
    damage(file_in(cache, name))
    found = findings(settings, "org/m")
    if name == SHARD or damage is flip:
        assert {each: kind for each, (kind, _) in found.items()} == {name: "damaged"}
    else:
        assert name in found
    code, stdout, stderr = run(settings, "verify", "org/m")
    assert code == 1
    assert f"{name}: damaged: " in stdout
    assert "`localr1 verify org/m -y` moves damaged files aside" in stderr
    code, _, stderr = run(settings, "verify", "org/m", "-y")
    assert code == 1
    assert f"`localr1 pull org/m@{ONE}` fetches them" in stderr
    assert not file_in(cache, name).exists()
    (aside,) = cache.folder("org/m").glob("blobs/*.localr1-damaged")
    assert abs(aside.stat().st_size - len(files[name])) <= 7
    cache.add("org/m", files, commit=ONE)  # What a pull does.
    assert findings(settings, "org/m") == {}


def test_how_a_shard_differs_is_told(settings: Settings, cache: HubCache) -> None:
    add(cache)
    cut(file_in(cache, SHARD))
    _, detail = findings(settings, "org/m")[SHARD]
    assert "expected" in detail
    flip(file_in(cache, "model-00002-of-00002.safetensors"))
    _, detail = findings(settings, "org/m")["model-00002-of-00002.safetensors"]
    assert detail.startswith("its SHA-256 is not ")


def test_each_of_many_flipped_bits_is_found(settings: Settings, linked: HubCache) -> None:
    files = add(linked)
    chance = random.Random(5)
    for _ in range(40):
        name = chance.choice(list(files))
        path = file_in(linked, name)
        data = bytearray(files[name])
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert list(findings(settings, "org/m")) == [name]
        path.write_bytes(files[name])


def test_what_is_missing(settings: Settings, cache: HubCache) -> None:
    files = model_files()
    del files[SHARD]
    add(cache, files)
    assert findings(settings, "org/m") == {SHARD: ("missing", "it is not there")}
    code, _, stderr = run(settings, "verify", "org/m")
    assert code == 1
    assert f"`localr1 pull org/m@{ONE}` fetches what is missing" in stderr


def test_without_links_and_without_a_listing_there_is_no_hash(settings: Settings) -> None:
    cache = HubCache(settings.hub_cache, links=False)
    cache.add("org/m", model_files(), commit=ONE)
    code, stdout, stderr = run(settings, "verify", "org/m")
    assert code == 0
    assert "0 files" in stdout
    assert "No hash is known of 5 more" in stderr


@pytest.mark.parametrize("text", [b"{", b'{"files": {"config.json": 3, "x": {"size": "a"}}}'])
def test_a_damaged_listing_is_none(text: bytes, settings: Settings) -> None:
    cache = HubCache(settings.hub_cache, links=False)
    add(cache)
    (cache.folder("org/m") / "trees" / f"{ONE}.json").write_bytes(text)
    assert "0 files" in run(settings, "verify", "org/m")[1]


def test_a_file_the_user_put_there_has_no_hash(settings: Settings, linked: HubCache) -> None:
    add(linked)
    (linked.folder("org/m") / "snapshots" / ONE / "notes.txt").write_text("mine")
    code, stdout, stderr = run(settings, "verify", "org/m")
    assert code == 0
    assert "5 files" in stdout
    assert "No hash is known of 1 more (notes.txt)" in stderr


def test_damage_in_the_shared_store_is_moved_from_all(settings: Settings, linked: HubCache) -> None:
    files = model_files()
    linked.add("org/m", files, commit=ONE, shared=[SHARD])
    linked.add("org/other", files, shared=[SHARD])
    flip(file_in(linked, SHARD))
    assert run(settings, "verify", "org/m", "-y")[0] == 1
    missing = {model.name: model.missing for model in Library.of(settings).models()}
    assert missing == {"org/m": (SHARD,), "org/other": (SHARD,)}


def test_by_the_snapshots_path(settings: Settings, cache: HubCache) -> None:
    add(cache)
    path = str(cache.folder("org/m") / "snapshots" / ONE)
    assert findings(settings, path) == {}
    flip(file_in(cache, SHARD))
    assert list(findings(settings, path)) == [SHARD]


def test_one_of_several_gguf_files(
    settings: Settings, linked: HubCache, smollm2_gguf: Path
) -> None:
    data = smollm2_gguf.read_bytes()[: 4 << 20]
    files = {"a.gguf": data, "b.gguf": data + b"b"}
    snapshot = linked.add("org/m", files, commit=ONE)
    flip(file_in(linked, "a.gguf"))
    for name in ("org/m/a.gguf", str(snapshot / "a.gguf"), str(snapshot)):
        assert list(findings(settings, name)) == ["a.gguf"], name
    for name in ("org/m/b.gguf", str(snapshot / "b.gguf")):
        assert findings(settings, name) == {}, name


def test_a_gguf_file_of_no_cache(settings: Settings, smollm2_gguf: Path, tmp_path: Path) -> None:
    assert findings(settings, str(smollm2_gguf)) == {}
    short = tmp_path / "short.gguf"
    short.write_bytes(smollm2_gguf.read_bytes()[: 4 << 20])
    kind, detail = findings(settings, str(short))["short.gguf"]
    assert kind == "unreadable"
    assert "the file ends early" in detail


def test_what_hf_download_wrote_into_a_directory(settings: Settings, tmp_path: Path) -> None:
    """It leaves commit, hash and time of each file in .cache/huggingface/download."""
    folder = tmp_path / "model"
    files = {"config.json": model_files()["config.json"], "model.safetensors": safetensors()}
    records = folder / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
        etag = etag_of(name, data)
        (records / f"{name}.metadata").write_text(f"{ONE}\n{etag}\n1700000000.0\n")
    assert findings(settings, str(folder)) == {}
    flip(folder / "model.safetensors")
    assert list(findings(settings, str(folder))) == ["model.safetensors"]
    for path in records.iterdir():
        path.unlink()
    assert findings(settings, str(folder)) == {}
    cut(folder / "model.safetensors")
    ((kind, detail),) = findings(settings, str(folder)).values()
    assert kind == "unreadable"
    assert "model.safetensors" in detail


def test_nothing_of_that_name(settings: Settings) -> None:
    code, _, stderr = run(settings, "verify", "other")
    assert code == 4
    assert "`localr1 list`" in stderr


HOLD = """
import sys, time
from pathlib import Path
from localr1.hub.locks import held
with held(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_model_that_is_being_pulled_is_refused(settings: Settings, cache: HubCache) -> None:
    add(cache)
    lock = str(repository_lock(cache.folder("org/m")))
    holder = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        code, _, stderr = run(settings, "verify", "org/m")
        assert code == 1
        assert "org/m is in use" in stderr
    finally:
        holder.kill()
        holder.communicate()


def test_a_cache_that_cannot_be_written_is_verified(
    settings: Settings, cache: HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(cache)
    flip(file_in(cache, SHARD))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert list(findings(settings, "org/m")) == [SHARD]
    code, _, stderr = run(settings, "verify", "org/m", "-y")
    assert code == 1
    assert "Read-only file system" in stderr


# Quantized models: one that the quantizer wrote, damaged in every way.


@pytest.fixture
def mixture(settings: Settings, tmp_path: Path) -> Path:
    source = tmp_path / "source"
    save_source(source, "deepseek_v3", **MIXTURES["deepseek_v3"])
    out = settings.data_dir / "models" / "mine"
    quantize(source, out, Recipe.uniform(4, 32))
    return out


def shard_of_experts(mixture: Path) -> Path:
    return next(iter(sorted(mixture.glob("experts-*.safetensors"))))


def rewrite_manifest(mixture: Path, name: str) -> None:
    """As one who knows the format would, so that only what is inside the file tells."""
    path = mixture / "localr1.json"
    document = json.loads(path.read_text())
    data = (mixture / name).read_bytes()
    for record in document["files"]:
        if record["name"] == name:
            record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_bytes(encoded(document))


def test_a_good_quantized_model(settings: Settings, mixture: Path) -> None:
    code, stdout, _ = run(settings, "verify", "mine")
    assert code == 0
    assert stdout.startswith("mine is good: ")
    assert not list(mixture.parent.glob(".*"))  # Nor does a lock stay beside it.


@pytest.mark.parametrize("damage", [cut, flip, grow])
def test_a_damaged_file_of_a_quantized_model(
    damage: Callable[[Path], None], settings: Settings, mixture: Path
) -> None:
    for path in sorted(mixture.glob("*.safetensors")):
        data = path.read_bytes()
        damage(path)
        assert {name: kind for name, (kind, _) in findings(settings, "mine").items()} == {
            path.name: "damaged"
        }
        path.write_bytes(data)
    assert findings(settings, "mine") == {}


def test_missing_and_extra_files_of_a_quantized_model(settings: Settings, mixture: Path) -> None:
    extra = mixture / "other.safetensors"
    extra.write_bytes(safetensors())
    assert findings(settings, "mine")["other.safetensors"][0] == "extra"
    code, _, stderr = run(settings, "verify", "mine")
    assert code == 1
    assert "Delete what does not belong to it" in stderr
    extra.unlink()
    shard = shard_of_experts(mixture)
    shard.unlink()
    assert findings(settings, str(mixture)) == {shard.name: ("missing", "it is not there")}
    assert "Quantize the model again" in run(settings, "verify", "mine")[2]


def test_an_expert_that_is_not_its_checksum(settings: Settings, mixture: Path) -> None:
    shard = shard_of_experts(mixture)
    data = bytearray(shard.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + 3] ^= 1
    shard.write_bytes(data)
    rewrite_manifest(mixture, shard.name)
    ((name, (kind, detail)),) = findings(settings, "mine").items()
    assert (name, kind) == (shard.name, "damaged")
    assert detail.startswith("expert 0: checksum ")


def test_a_scale_that_is_no_number(settings: Settings, mixture: Path) -> None:
    shard = next(path for path in mixture.glob("*.safetensors") if "experts-" not in path.name)
    data = bytearray(shard.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:header])
    scale = next(name for name in tensors if name.endswith(".weight_scale"))
    begin = header + tensors[scale]["data_offsets"][0]
    for bad in (b"\x80\x7f", b"\xc0\xff"):  # Inf and a NaN, in bfloat16.
        data[begin + 4 : begin + 6] = bad
        shard.write_bytes(data)
        rewrite_manifest(mixture, shard.name)
        assert findings(settings, "mine") == {scale: ("damaged", "NaN or Inf")}
    data[begin + 4 : begin + 6] = b"\x7f\x7f"  # The largest finite one.
    shard.write_bytes(data)
    rewrite_manifest(mixture, shard.name)
    assert findings(settings, "mine") == {}


def test_checksums_that_are_too_few(settings: Settings, mixture: Path) -> None:
    path = mixture / "localr1.json"
    document = json.loads(path.read_text())
    name = shard_of_experts(mixture).name
    document["expert_checksums"][name] = document["expert_checksums"][name][:-1]
    path.write_bytes(encoded(document))
    _, detail = findings(settings, "mine")[name]
    assert "no checksum of expert" in detail


@pytest.mark.parametrize(
    "manifest",
    [b"{", b"{}", b'{"files": [{"name": "../x", "sha256": "", "bytes": 1}]}', b'{"files": [3]}'],
)
def test_a_damaged_manifest_is_one_error(manifest: bytes, settings: Settings) -> None:
    folder = add_quantized(settings, "mine")
    (folder / "localr1.json").write_bytes(manifest)
    code, _, stderr = run(settings, "verify", "mine")
    assert code == 1
    assert len(stderr.splitlines()) == 1


def test_the_checksum_is_the_one_of_the_kernels() -> None:
    """The check value of CRC-32C (RFC 3720): what is read in pieces comes to the same."""
    assert crc32c(b"123456789") == crc32c(b"456789", crc32c(b"123")) == 0xE3069283
