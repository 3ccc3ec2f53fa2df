"""Names of tens of thousands of matrices in a few lines."""

import pytest

from localr1.quant.name_ranges import name_ranges

NORMS = [f"model.layers.{layer}.norm" for layer in range(3)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["model.norm"], ["model.norm"]),
        ([*NORMS, "model.norm"], ["model.layers.0-2.norm", "model.norm"]),
        ([NORMS[2], NORMS[0]], ["model.layers.0.norm", "model.layers.2.norm"]),
        # As of R1: layers of dense MLPs, then 58 of 256 experts.
        (
            [
                *(f"layers.{layer}.mlp.up_proj" for layer in range(3)),
                *(
                    f"layers.{layer}.mlp.experts.{e}.up"
                    for layer in range(3, 61)
                    for e in range(256)
                ),
            ],
            ["layers.0-2.mlp.up_proj", "layers.3-60.mlp.experts.0-255.up"],
        ),
        # Layers whose experts are others are not put together.
        (
            ["0.experts.0", "0.experts.1", "1.experts.0", "2.experts.0"],
            ["0.experts.0-1", "1-2.experts.0"],
        ),
    ],
)
def test_names(names: list[str], expected: list[str]) -> None:
    assert name_ranges(names) == expected
    assert name_ranges(dict.fromkeys(reversed(names))) == name_ranges(reversed(names))
