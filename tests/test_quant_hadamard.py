"""The matrices that rotate are orthogonal, of any order, and the same each time."""

import pytest
import torch

from localr1.errors import UsageError
from localr1.quant.hadamard import make_orthogonal
from localr1.quant.recipe import HADAMARD, RANDOM, Rotation

ORDERS = [1, 2, 3, 7, 8, 12, 20, 28, 36, 60, 64, 96, 180, 576, 896]
"""12, 20, 60, 180: Paley's first construction; 28, 36 (of 576): the second; 3, 7: no Hadamard."""
EXACT = 1e-12
"""Of float64 sums of at most 896 products; a wrong sign gives more than 1e-3."""


@pytest.mark.parametrize("kind", [HADAMARD, RANDOM])
@pytest.mark.parametrize("order", ORDERS)
def test_orthogonal(order: int, kind: str) -> None:
    matrix = make_orthogonal(Rotation(kind), order).matrix
    assert matrix.shape == (order, order)
    assert (matrix @ matrix.T - torch.eye(order)).abs().max() < EXACT


@pytest.mark.parametrize("order", [12, 28, 64, 576, 896, 7168])
def test_a_hadamard_matrix_spreads_each_value_evenly(order: int) -> None:
    found = make_orthogonal(Rotation(HADAMARD), order)
    row = torch.zeros(1, order, dtype=torch.float64)
    row[0, order // 3] = 1
    torch.testing.assert_close(
        found.applied_to_rows(row).abs(), torch.full_like(row, order**-0.5), rtol=EXACT, atol=0
    )
    assert max(len(factor) for factor in found.factors) <= 36


def test_factors_make_up_the_matrix_in_their_order() -> None:
    found = make_orthogonal(Rotation(HADAMARD, seed=3), 96)
    expected = found.factors[0]
    for factor in found.factors[1:]:
        expected = torch.kron(expected, factor)
    assert len(found.factors) > 1
    assert (found.matrix - found.signs[:, None] * expected).abs().max() < EXACT


@pytest.mark.parametrize("kind", [HADAMARD, RANDOM])
def test_same_seed_same_matrix_another_seed_another(kind: str) -> None:
    first, again, other = (make_orthogonal(Rotation(kind, seed), 48).matrix for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_rotations_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="hadamard or random"):
        Rotation("givens")
    with pytest.raises(UsageError, match="seed"):
        Rotation(RANDOM, -1)
