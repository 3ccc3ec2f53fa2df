"""A quantization that fails or dies leaves nothing under the final name, and can be run again."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quant_sources import MIXTURES, save_source
from quant_steps import count_steps
from safetensors.torch import load_file, save_file

from localr1.errors import NumericsError, OutputError, TensorError, UnsupportedError, UsageError
from localr1.quant.atomic import AtomicDirectory
from localr1.quant.pipeline import dry_run, quantize
from localr1.quant.progress import Progress
from localr1.quant.recipe import Recipe

RECIPE = Recipe.uniform(4, 32)
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "source"
    save_source(folder, num_hidden_layers=1)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As small as one with an expert shard can be."""
    folder = tmp_path_factory.mktemp("faults") / "mixture"
    sizes = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    layers = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    small = {"hidden_size": 32, "moe_intermediate_size": 32}
    save_source(folder, "deepseek_v3", **{**MIXTURES["deepseek_v3"], **sizes, **layers, **small})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_source_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "a", RECIPE)
    quantize(source, tmp_path / "b", RECIPE)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(contents(tmp_path / "a")) == [
        "config.json",
        "dense-00001-of-00001.safetensors",
        "generation_config.json",
        "localr1.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


class Failing:
    """Raises OSError at one step; knows whether it came to that, and how many steps there were."""

    def __init__(self, step: int, code: int) -> None:
        self.step = step
        self.code = code
        self.failed_at: str | None = None
        self.steps = 0

    def __call__(self, number: int, name: str) -> None:
        self.steps = number + 1
        if number == self.step:
            self.failed_at = name
            raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize(
    ("kind", "code"),
    [("source", errno.ENOSPC), ("mixture", errno.EIO)],
)
def test_every_step_on_the_disk_may_fail(
    kind: str, code: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Nothing is left under the final name, and the next run goes on to the same bytes."""
    source: Path = request.getfixturevalue(kind)
    quantize(source, tmp_path / "undisturbed", RECIPE)
    expected = contents(tmp_path / "undisturbed")
    seen: list[str] = []
    kept: list[bool] = []
    steps_behind: list[int] = []
    while True:
        out = tmp_path / str(len(seen)) / "out"
        failing = Failing(len(seen), code)
        with count_steps(failing) as open_file, contextlib.suppress(OutputError):
            quantize(source, out, RECIPE, open_file=open_file)
        if failing.failed_at is None:
            break
        seen.append(failing.failed_at)
        left = os.listdir(out.parent) if out.parent.exists() else []
        kept.append(left != [])
        if "out" in left:  # Only what is not of it could not be removed.
            assert seen[-1] == "unlink"
            assert contents(out) == expected
            continue
        assert all(name.startswith(".out.partial-") for name in left), f"step {len(seen) - 1}"
        assert len(left) <= 1
        counted = Failing(-1, 0)
        with count_steps(counted) as open_file:
            quantize(source, out, RECIPE, open_file=open_file)
        steps_behind.append(counted.steps)
        assert contents(out) == expected, f"after a failure of step {len(seen) - 1}, {seen[-1]}"
        assert os.listdir(out.parent) == ["out"]
        shutil.rmtree(out.parent)
    assert len(seen) > 30
    assert {"open", "write", "fsync", "mkdir", "rename", "unlink"} == set(seen)
    # From the first section's entry in the journal on, what was done is kept.
    first = kept.index(True)
    assert kept == [False] * first + [True] * (len(kept) - first)
    assert min(steps_behind[:first]) >= len(seen) - 1, "the directory above is there already"
    assert steps_behind[-1] < steps_behind[first] < len(seen)


def test_an_error_of_the_disk_is_told_in_its_words(source: Path, tmp_path: Path) -> None:
    failing = Failing(12, errno.ENOSPC)
    with (
        count_steps(failing) as open_file,
        pytest.raises(OutputError, match=rf"cannot be written.*{os.strerror(errno.ENOSPC)}"),
    ):
        quantize(source, tmp_path / "out", RECIPE, open_file=open_file)


@pytest.mark.skipif(sys.platform == "win32", reason="kills by SIGKILL after a fork")
@pytest.mark.parametrize("kind", ["source", "mixture"])
@pytest.mark.parametrize("kills", [8, pytest.param(200, marks=pytest.mark.soak)])
def test_kills_before_random_steps(
    kind: str, kills: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each run finds what the killed one before it left, and goes on with it."""
    source: Path = request.getfixturevalue(kind)
    work = tmp_path / "work"
    completed = subprocess.run(
        [sys.executable, str(TESTS / "quant_crashes.py"), str(source), str(work), str(kills), "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    runs = [json.loads(line) for line in completed.stdout.splitlines()]
    assert sum(run["killed"] for run in runs) >= kills
    for run in runs:
        partials = [name for name in run["left"] if name.startswith(".out.partial-")]
        assert len(partials) <= 1
        assert set(run["left"]) <= {"out", ".out.lock", *partials}
        assert run["killed"] or run["left"] == ["out"]
    undisturbed = contents(work / "undisturbed" / "out")
    for place in {run["place"] for run in runs}:
        assert contents(work / str(place) / "out") == undisturbed, f"in place {place}"


def test_two_runs_into_one_directory(source: Path, tmp_path: Path) -> None:
    with AtomicDirectory(tmp_path / "out"):
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(OutputError, match="written by another process"):
            quantize(source, tmp_path / "out", RECIPE)
        assert sorted(os.listdir(tmp_path)) == before, "the other's files are left alone"
    assert os.listdir(tmp_path) == []
    quantize(source, tmp_path / "out", RECIPE)


def test_what_the_dead_left_is_removed_and_nothing_else(source: Path, tmp_path: Path) -> None:
    stale = tmp_path / ".out.partial-00c0ffee"
    stale.mkdir()
    (stale / "dense-00001-of-00001.safetensors").write_bytes(b"half")
    (tmp_path / ".out.lock").write_bytes(b"")
    (tmp_path / ".other.partial-1").mkdir()
    quantize(source, tmp_path / "out", RECIPE)
    assert sorted(os.listdir(tmp_path)) == [".other.partial-1", "out"]


@pytest.mark.parametrize("kind", ["file", "empty directory", "dangling link"])
def test_a_name_that_is_taken(source: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "empty directory":
        out.mkdir()
    else:
        try:
            out.symlink_to(tmp_path / "nowhere")
        except OSError:
            pytest.skip("links need a privilege here")
    with pytest.raises(OutputError, match=r"exists.*Remove it or choose another name"):
        quantize(source, out, RECIPE)
    assert os.listdir(tmp_path) == ["out"]


def test_a_disk_that_is_too_small(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"disk is too small.*found 1"):
        quantize(source, tmp_path / "deep" / "out", RECIPE)
    assert os.listdir(tmp_path) == []


def test_a_parent_that_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a directory"):
        quantize(source, tmp_path / "file" / "out", RECIPE)
    with pytest.raises(UsageError, match="name of a new directory"):
        quantize(source, Path(tmp_path.anchor), RECIPE)


def changed_source(source: Path, folder: Path, name: str, value: torch.Tensor | None) -> Path:
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_nan_in_the_source(source: Path, tmp_path: Path, name: str) -> None:
    value = load_file(source / "model.safetensors")[name]
    value.view(-1)[-1] = float("nan")
    bad = changed_source(source, tmp_path / "bad", name, value)
    with pytest.raises(NumericsError, match=name):
        quantize(bad, tmp_path / "out", RECIPE)
    assert os.listdir(tmp_path) == ["bad"]


def test_a_tensor_that_is_missing(source: Path, tmp_path: Path) -> None:
    bad = changed_source(source, tmp_path / "bad", "model.layers.0.mlp.up_proj.weight", None)
    with pytest.raises(TensorError, match="parameters in all tensors"):
        quantize(bad, tmp_path / "out", RECIPE)
    assert os.listdir(tmp_path) == ["bad"]


def test_a_source_that_is_quantized_already(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", RECIPE)
    with pytest.raises(UnsupportedError, match=r"original model"):
        quantize(tmp_path / "out", tmp_path / "again", RECIPE)
    assert os.listdir(tmp_path) == ["out"]


def test_a_group_that_does_not_divide_a_row(tmp_path: Path) -> None:
    save_source(tmp_path / "source", hidden_size=192, num_attention_heads=6)
    with pytest.raises(UnsupportedError, match=r"192 columns, found 128. Use --group 32 or 64"):
        dry_run(tmp_path / "source", Recipe.uniform(4, 128))
    assert dry_run(tmp_path / "source", Recipe.uniform(4, 64)).out is None


def test_the_report_and_the_progress(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    planned = dry_run(source, RECIPE)
    assert os.listdir(tmp_path) == []
    report = quantize(source, tmp_path / "out", RECIPE, seen.append)
    assert report.nbytes == planned.nbytes
    assert [part.part for part in report.parts] == [part.part for part in planned.parts]
    errors = {part.part: part.relative_error for part in report.parts}
    assert errors["kept"] is None
    assert errors["attention"] is not None
    assert errors["mlp"] is not None
    assert 0 < 50 * errors["attention"] < errors["mlp"] < 0.01
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.nbytes
    for stage in ("hash source", "quantize", "verify"):
        of_stage = [event for event in seen if event.stage == stage]
        assert [event.done for event in of_stage] == sorted(event.done for event in of_stage)
        assert of_stage[-1].done == of_stage[-1].total
    assert any(event.name == "model.layers.0.mlp.down_proj" for event in seen)
