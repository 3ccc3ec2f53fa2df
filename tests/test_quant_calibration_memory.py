"""Reading a text with a model holds a matrix or two at a time, not the experts of a layer."""

import subprocess
import sys
from pathlib import Path

import pytest
from quant_sources import save_source
from test_quant_memory import LARGE, save_large

GROWTH = 64 << 20
"""Bytes beyond the peak of the same with a tiny model. The largest tensors have 4 MB each, the
sources 156 and 152 MB in one file, the experts of the second's one layer 150."""

PROGRAM = """
import sys
from pathlib import Path
import torch
from localr1.quant.calibrating import calibrate
from localr1.quant.calibration_options import CalibrationOptions
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10

def run(source, name):
    if what == "calibrate":
        calibrate(source, out / name, tokens=64)
    else:
        options = CalibrationOptions(tokens=64)
        quantize(source, out / name, Recipe.uniform(4, 32, method=what), calibration=options)

torch.set_num_threads(1)
small, large, out = map(Path, sys.argv[1:4])
what = sys.argv[4]
run(small, "small")  # Imports and warms.
Path("/proc/self/clear_refs").write_text("5")  # The peak is counted anew from what is held now.
before = peak()
run(large, "large")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("model_type", LARGE)
@pytest.mark.parametrize("what", ["calibrate", "awq+imatrix"])
def test_memory_does_not_grow_with_the_model(what: str, model_type: str, tmp_path: Path) -> None:
    save_source(tmp_path / "small")
    nbytes = save_large(tmp_path / "large", model_type)
    assert nbytes > 2 * GROWTH
    places = [str(tmp_path / name) for name in ("small", "large", "out")]
    completed = subprocess.run(
        [sys.executable, "-c", PROGRAM, *places, what],
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    grown = int(completed.stdout)
    assert 0 <= grown < GROWTH, f"{grown:,}"
