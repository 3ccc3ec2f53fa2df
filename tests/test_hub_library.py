"""What is on this machine, by name: quantized models, and the Hugging Face cache as other programs
leave it, with all that can be broken in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_cache import INT4, HubCache, add_quantized, encoded, model_files, models, run, safetensors

from localr1.checkpoint.paths import resolve
from localr1.cli.library import age
from localr1.cli.models import resolve_model
from localr1.errors import FormatError, NotFoundError, UsageError
from localr1.hub.library import Library
from localr1.settings import Settings

ONE, TWO = "1" * 40, "2" * 40
QWEN_7B = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"


def test_an_original_and_a_quantized_model(settings: Settings, cache: HubCache) -> None:
    files = model_files()
    snapshot = cache.add("org/Model", files, commit=ONE)
    mine = add_quantized(settings, "mine", repository="org/Model", commit=ONE)
    found = models(settings)
    assert list(found) == ["mine", "org/Model"]
    original = found["org/Model"]
    assert original.path == snapshot
    assert (original.kind, original.quantization, original.context) == ("original", "BF16", 4096)
    assert original.nbytes == sum(map(len, files.values()))
    assert (original.repository, original.commit) == ("org/Model", ONE)
    assert original.revisions == ("main",)
    assert original.is_complete
    quantized = found["mine"]
    assert quantized.path == mine
    assert (quantized.kind, quantized.quantization) == ("quantized", "int4 g32")
    assert (quantized.repository, quantized.commit) == ("org/Model", ONE)


def test_each_blob_counts_once(settings: Settings, linked: HubCache) -> None:
    files = model_files()
    alike = {"config.json": files["config.json"], "model.safetensors": safetensors()}
    linked.add("org/m", {**alike, "copy.safetensors": safetensors()})
    assert models(settings)["org/m"].nbytes == sum(map(len, alike.values()))


@pytest.mark.parametrize(
    ("config", "kind", "text"),
    [
        ({"torch_dtype": "float16"}, "original", "F16"),
        ({"torch_dtype": None, "dtype": "float32"}, "original", "?"),
        ({"quantization_config": {"quant_method": "fp8"}}, "original", "FP8"),
        (INT4, "pre-quantized", "int4 g32"),
        (
            {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "nf4",
                }
            },
            "pre-quantized",
            "bnb-nf4",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "pre-quantized",
            "bnb-int8",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "pre-quantized",
            "gptq-int4",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {
                        "a": {"weights": {"num_bits": 4, "group_size": 32}},
                        "b": {"weights": {"num_bits": 8, "group_size": 32}},
                        "c": {"weights": {"num_bits": 4, "group_size": 32}},
                        "d": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
                    },
                }
            },
            "pre-quantized",
            "int4 g32 + int8 g32 + fp8 channel",
        ),
        ({"quantization_config": {"quant_method": ["\x1b"], "bits": True}}, "pre-quantized", "?"),
    ],
)
def test_what_a_config_says(
    config: dict[str, object], kind: str, text: str, settings: Settings, cache: HubCache
) -> None:
    cache.add("org/m", model_files(**config))
    (model,) = models(settings).values()
    assert (model.kind, model.quantization) == (kind, text)


def test_what_is_no_language_model_is_left_out(settings: Settings, cache: HubCache) -> None:
    cache.add("org/encoder", model_files(architectures=["BertModel"]))
    cache.add("org/pictures", {"model_index.json": b"{}", "unet/config.json": b"{}"})
    cache.add("org/tokenizer", {"tokenizer.json": b"{}"})
    data = settings.hub_cache / "datasets--org--data" / "snapshots" / ONE
    data.mkdir(parents=True)
    (data / "config.json").write_bytes(model_files()["config.json"])
    assert models(settings) == {}


def test_a_config_that_names_no_class(settings: Settings, cache: HubCache) -> None:
    kinds: list[object] = ["deepseek_v3", "bert", [], None]
    for number, kind in enumerate(kinds):
        config = {"model_type": kind, "max_position_embeddings": 64}
        cache.add(f"org/m{number}", {**model_files(), "config.json": encoded(config)})
    assert list(models(settings)) == ["org/m0"]


def test_missing_shards_are_named(settings: Settings, cache: HubCache) -> None:
    files = model_files()
    del files["model-00002-of-00002.safetensors"]
    cache.add("org/m", files)
    model = models(settings)["org/m"]
    assert model.missing == ("model-00002-of-00002.safetensors",)
    assert not model.is_complete
    code, stdout, stderr = run(settings, "list")
    assert code == 0
    assert "org/m" in stdout
    assert "org/m is incomplete, 1 file missing (model-00002-of-00002.safetensors): " in stderr
    assert "`localr1 pull org/m`" in stderr


def test_a_link_to_a_blob_that_is_gone(settings: Settings, linked: HubCache) -> None:
    snapshot = linked.add("org/m", model_files())
    (snapshot / "tokenizer.json").resolve().unlink()
    assert models(settings)["org/m"].missing == ("tokenizer.json",)


def test_what_a_pull_still_wants_is_missing(settings: Settings, cache: HubCache) -> None:
    files = model_files()
    wanted = {**files, "chat_template.jinja": b"{{ messages }}"}
    cache.add("org/m", files, commit=ONE)
    cache.pull_record("org/m", wanted, ONE)
    assert models(settings)["org/m"].missing == ("chat_template.jinja",)


@pytest.mark.parametrize("config", [b"{", b"\xff", b"[]", b'{"a": 1, "a": 2}', b""], ids=range(5))
def test_a_damaged_config_is_a_row(config: bytes, settings: Settings, cache: HubCache) -> None:
    cache.add("org/good", model_files())
    cache.add("org/bad", {**model_files(), "config.json": config})
    broken = add_quantized(settings, "broken")
    (broken / "config.json").write_bytes(config)
    found = models(settings)
    assert set(found) == {"broken", "org/bad", "org/good"}
    assert found["org/good"].problem is None
    for name in ("broken", "org/bad"):
        assert "config.json" in str(found[name].problem)
        assert found[name].nbytes > 0
    code, stdout, stderr = run(settings, "list")
    assert code == 0
    assert len(stdout.splitlines()) == 4
    assert "org/bad cannot be read: " in stderr


@pytest.mark.parametrize("index", [b"{}", b'{"weight_map": {"a": 1}}', b"no"])
def test_a_damaged_index_is_a_row(index: bytes, settings: Settings, cache: HubCache) -> None:
    cache.add("org/m", {**model_files(), "model.safetensors.index.json": index})
    assert "index.json" in str(models(settings)["org/m"].problem)


def test_an_index_that_leaves_the_directory_finds_nothing(settings: Settings) -> None:
    folder = add_quantized(settings, "mine")
    outside = folder.parent.parent / "outside.safetensors"
    outside.write_bytes(safetensors())
    names = {"a": "../../outside.safetensors", "b": str(outside)}
    (folder / "model.safetensors.index.json").write_bytes(encoded({"weight_map": names}))
    assert set(models(settings)["mine"].missing) == set(names.values())


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_links_that_leave_the_cache_are_not_followed(
    settings: Settings, linked: HubCache, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.json"
    secret.write_bytes(model_files()["config.json"])
    snapshot = linked.add("org/direct", model_files())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(secret)
    snapshot = linked.add("org/blob", model_files())
    blob = Path(os.path.abspath(snapshot / os.readlink(snapshot / "config.json")))
    blob.unlink()
    blob.symlink_to(secret)
    snapshot = linked.add("org/folder", model_files())
    (snapshot / "more").symlink_to(tmp_path)
    found = models(settings)
    for name in found:
        assert "a link to" in str(found[name].problem), name
    assert len(found) == 3


@pytest.mark.skipif(os.name == "nt", reason="a pipe in the file system")
def test_a_pipe_does_not_hang(settings: Settings, linked: HubCache) -> None:
    snapshot = linked.add("org/m", model_files())
    (snapshot / "config.json").unlink()
    os.mkfifo(snapshot / "config.json")
    assert "no regular file" in str(models(settings)["org/m"].problem)


def test_the_store_that_repositories_share(settings: Settings, linked: HubCache) -> None:
    """huggingface_hub 2 makes blobs links into a store beside the repositories."""
    files = model_files()
    shard = "model-00001-of-00002.safetensors"
    snapshot = linked.add("org/m", files, shared=[shard])
    model = models(settings)["org/m"]
    assert model.is_complete
    assert model.nbytes == sum(map(len, files.values()))
    assert resolve(Path(os.path.realpath(snapshot)), shard).read_bytes() == files[shard]
    (settings.hub_cache / "blobs" / ".huggingface-shared-blobs").unlink()
    assert "a link to" in str(models(settings)["org/m"].problem)
    with pytest.raises(FormatError, match="a link to"):
        resolve(Path(os.path.realpath(snapshot)), shard)


def test_revisions_have_names(settings: Settings, cache: HubCache) -> None:
    cache.add("org/m", model_files(), commit=ONE)
    cache.add("org/m", model_files(torch_dtype="float16"), commit=TWO, revisions=["refs/pr/1"])
    cache.add("org/m", model_files(torch_dtype="float32"), commit="3" * 40, revisions=[])
    texts = {name: model.quantization for name, model in models(settings).items()}
    assert texts == {"org/m": "BF16", "org/m@refs/pr/1": "F16", f"org/m@{'3' * 12}": "F32"}
    pulls = [model.pull_name for model in models(settings).values()]
    assert pulls == ["org/m", "org/m@refs/pr/1", f"org/m@{'3' * 40}"]
    for name, commit in (
        ("org/m", ONE),
        ("org/m@main", ONE),
        (f"org/m@{ONE}", ONE),
        ("org/m@refs/pr/1", TWO),
        ("Org/M@2222222", TWO),
        (f"org/m@{'3' * 12}", "3" * 40),
    ):
        assert resolve_model(name, settings).name == commit, name
    for name in ("org/m@other", "org/m@222222"):  # Six digits of a commit are too few.
        assert Library.of(settings).snapshot(name) is None
        with pytest.raises(NotFoundError):
            resolve_model(name, settings)


def test_a_repository_without_main_and_several_commits(settings: Settings, cache: HubCache) -> None:
    for commit in (ONE, TWO):
        cache.add("org/m", model_files(), commit=commit, revisions=[])
    with pytest.raises(UsageError, match=r"one of org/m@1{12}, org/m@2{12}"):
        resolve_model("org/m", settings)


@pytest.mark.parametrize("ref", [b"\xff\xfe", b"", b"4" * 40, b"1" * 999])
def test_a_bad_ref_hides_nothing(ref: bytes, settings: Settings, cache: HubCache) -> None:
    cache.add("org/m", model_files(), commit=ONE, revisions=[])
    (cache.folder("org/m") / "refs").mkdir()
    (cache.folder("org/m") / "refs" / "main").write_bytes(ref)
    assert resolve_model("org/m", settings).name == ONE


def test_names_of_repositories_are_found_in_any_case(settings: Settings, cache: HubCache) -> None:
    snapshot = cache.add(QWEN_7B, model_files())
    for name in (QWEN_7B, QWEN_7B.lower(), "r1-distill-qwen-7b", "R1-Distill-Qwen-7B"):
        assert resolve_model(name, settings) == snapshot


def test_the_model_quantized_from_it_goes_first(settings: Settings, cache: HubCache) -> None:
    snapshot = cache.add(QWEN_7B, model_files(), commit=ONE)
    cache.add(QWEN_7B, model_files(), commit=TWO, revisions=["old"])
    mine = add_quantized(settings, "mine", repository=QWEN_7B, commit=ONE)
    assert resolve_model("r1-distill-qwen-7b", settings) == mine
    assert resolve_model(QWEN_7B, settings) == mine
    assert resolve_model(f"{QWEN_7B}@{ONE}", settings) == mine
    assert resolve_model(f"{QWEN_7B}@old", settings).name == TWO
    yours = add_quantized(settings, "yours", repository=QWEN_7B, commit=ONE)
    assert resolve_model(QWEN_7B, settings) == snapshot
    assert resolve_model("yours", settings) == yours


def test_two_quantized_models_without_the_original(settings: Settings) -> None:
    add_quantized(settings, "a", repository=QWEN_7B)
    assert resolve_model(QWEN_7B, settings).name == "a"
    add_quantized(settings, "b", repository=QWEN_7B)
    with pytest.raises(UsageError, match="one of a, b"):
        resolve_model("r1-distill-qwen-7b", settings)


def test_a_part_of_a_model_does_not_run(settings: Settings, cache: HubCache) -> None:
    files = model_files()
    del files["model-00001-of-00002.safetensors"]
    cache.add("org/m", files)
    with pytest.raises(NotFoundError, match=r"only a part .*`localr1 pull org/m` fetches the rest"):
        resolve_model("org/m", settings)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("r1", "`localr1 pull r1` fetches it: deepseek-ai/DeepSeek-R1."),
        (QWEN_7B, f"`localr1 pull r1-distill-qwen-7b` fetches it: {QWEN_7B}."),
        ("r1@v1", "`localr1 pull r1@v1` fetches it: deepseek-ai/DeepSeek-R1."),
        ("org/m", "`localr1 pull org/m` fetches it."),
        ("org/m@v1", "`localr1 pull org/m@v1` fetches it."),
        ("nothing", "Give the directory of a model"),
    ],
)
def test_what_is_not_here_is_told_how_to_get(name: str, told: str, settings: Settings) -> None:
    with pytest.raises(NotFoundError) as error:
        resolve_model(name, settings)
    assert told in str(error.value)


def test_gguf_files(settings: Settings, cache: HubCache, smollm2_gguf: Path) -> None:
    """One in a repository has the repository's name; of several each its file's."""
    data = smollm2_gguf.read_bytes()[: 4 << 20]
    one = cache.add("org/one-GGUF", {"m-Q4_1.gguf": data, "config.json": b"{}"})
    two = cache.add("org/two-GGUF", {"Q4/m.gguf": data, "Q8/m.gguf": data + b"x"})
    cache.add("org/split", {"m-00001-of-00002.gguf": data})
    found = models(settings)
    assert set(found) == {
        "org/one-GGUF",
        "org/two-GGUF/Q4/m.gguf",
        "org/two-GGUF/Q8/m.gguf",
        "org/split",
    }
    model = found["org/one-GGUF"]
    assert (model.kind, model.quantization, model.context) == ("gguf", "Q4_1", 8192)
    assert model.path == one / "m-Q4_1.gguf" == resolve_model("org/one-GGUF", settings)
    assert found["org/two-GGUF/Q4/m.gguf"].nbytes == len(data)
    assert resolve_model("org/two-GGUF/Q8/m.gguf", settings) == two / "Q8" / "m.gguf"
    assert resolve_model("org/two-GGUF@main/Q8/m.gguf", settings) == two / "Q8" / "m.gguf"
    assert found["org/split"].missing == ("m-00002-of-00002.gguf",)
    assert found["org/split"].pull_name == "org/split"
    assert found["org/two-GGUF/Q4/m.gguf"].pull_name == "org/two-GGUF"
    with pytest.raises(UsageError, match="several"):
        resolve_model("org/two-GGUF", settings)


def test_a_damaged_gguf_file_is_a_row(settings: Settings, cache: HubCache) -> None:
    cache.add("org/m", {"m.gguf": b"GGUF" + b"\xff" * 100})
    assert "GGUF version" in str(models(settings)["org/m"].problem)


def test_list_as_people_see_it(settings: Settings, cache: HubCache) -> None:
    cache.add("org/Model", model_files())
    mine = add_quantized(settings, "mine")
    code, stdout, stderr = run(settings, "ls")
    lines = stdout.splitlines()
    assert code == 0
    assert lines[0].split() == ["NAME", "QUANT", "SIZE", "CTX", "MODIFIED"]
    nbytes = sum(each.stat().st_size for each in mine.iterdir())
    assert lines[1].split() == ["mine", "int4", "g32", f"{nbytes}", "B", "4,096", "just", "now"]
    assert lines[2].split()[:2] == ["org/Model", "BF16"]
    assert stderr == ""
    assert run(settings, "list", "-q")[1] == "mine\norg/Model\n"


def test_list_as_json(settings: Settings, cache: HubCache) -> None:
    cache.add("org/Model", model_files(), commit=ONE)
    code, stdout, _ = run(settings, "list", "--json")
    (model,) = json.loads(stdout)
    assert code == 0
    assert model.pop("modified") > 0
    assert model == {
        "name": "org/Model",
        "path": str(settings.hub_cache / "models--org--Model" / "snapshots" / ONE),
        "kind": "original",
        "quantization": "BF16",
        "bytes": sum(map(len, model_files().values())),
        "context": 4096,
        "repository": "org/Model",
        "commit": ONE,
        "revisions": ["main"],
        "complete": True,
        "missing": [],
        "problem": None,
    }


def test_an_empty_list_says_what_to_do(settings: Settings) -> None:
    code, stdout, stderr = run(settings, "list")
    assert (code, stdout) == (0, "")
    assert len(stderr.splitlines()) == 1
    assert "`localr1 pull`" in stderr
    assert run(settings, "list", "--json")[:2] == (0, "[]\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_odd_names_stay_one_line_and_drive_no_terminal(
    settings: Settings, linked: HubCache
) -> None:
    linked.add("org/a\x1b[2J\nb", model_files())
    linked.add("org/gone", {**model_files(), "config.json": b'{"\x1b]0;x\x07'})
    _, stdout, stderr = run(settings, "list")
    assert r"org/a\x1b[2J\nb" in stdout
    assert len(stdout.splitlines()) == 3
    assert "\x1b" not in stdout + stderr


@pytest.mark.parametrize("place", ["hub", "models--org--m", "snapshots", "1" * 40])
def test_a_directory_that_cannot_be_read_is_a_row(
    place: str, settings: Settings, cache: HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.add("org/m", model_files(), commit=ONE)
    add_quantized(settings, "mine")
    listdir = os.listdir

    def refuse(path: Path) -> list[str]:
        if Path(path).name == place or (place == "models--org--m" and Path(path).name == "refs"):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    mine, other = Library.of(settings).models()
    assert mine.is_complete
    assert "Permission denied" in str(other.problem)
    code, stdout, _ = run(settings, "list")
    assert code == 0
    assert len(stdout.splitlines()) == 3


def test_ages() -> None:
    now = 1_800_000_000.0
    assert age(None, now) == "-"
    assert age(now + 5, now) == "just now"
    assert age(now - 61, now) == "1 minute ago"
    assert age(now - 7300, now) == "2 hours ago"
    assert age(now - 86_400 * 3, now) == "3 days ago"
    assert age(now - 86_400 * 400, now).startswith("202")


def test_list_needs_neither_torch_nor_the_hub() -> None:
    code = (
        "import sys\nfrom localr1.cli.main import main\n"
        "try:\n    main(['list'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "loaded = {'torch', 'huggingface_hub'} & set(sys.modules)\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
