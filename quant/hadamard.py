"""Orthogonal matrices that mix every column with every other, and multiplying by them quickly.

A Hadamard matrix of order n has entries of 1 and -1 and orthogonal rows; divided by sqrt(n) it is
orthogonal and spreads each value evenly over all. Those of powers of two are Sylvester's
(H_2n = H_2 x H_n), others are Paley's (Paley 1933, "On orthogonal matrices", constructions I and
II). The Kronecker product of two is one of the product of their orders, so that a row of n values
is multiplied factor by factor: for 7168 = 16 * 16 * 28 that is 60 products a value instead of 7168.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from localr1.quant.recipe import HADAMARD, Rotation

SYLVESTER_BITS = 4
"""Factors of at most 2^4: small enough for a core's nearest cache."""


@dataclass(frozen=True)
class Orthogonal:
    """R = diag(signs) @ (factors[0] x factors[1] x ...), an orthogonal matrix of order n.

    signs: float64 [n]. factors: float64, orthogonal each, the product of their orders n.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    @property
    def order(self) -> int:
        return len(self.signs)

    def applied_to_rows(self, rows: Tensor) -> Tensor:
        """float64 [t, n] @ R, a new tensor."""
        result = rows * self.signs
        for factor in self.factors:
            # One axis of the product at a time; after the last they stand as they stood before.
            split = result.view(len(rows), len(factor), -1)
            result = (split.transpose(1, 2) @ factor).flatten(1)
        return result

    @cached_property
    def matrix(self) -> Tensor:
        """R itself, float64 [n, n]."""
        return self.applied_to_rows(torch.eye(self.order, dtype=torch.float64))


def make_orthogonal(rotation: Rotation, order: int) -> Orthogonal:
    """The matrix of this kind and seed: the same on every call.

    "hadamard": signs drawn at random, a Sylvester matrix and a Paley one of the least order that
    makes up `order`; where there is none, of the odd part of `order` a random orthogonal matrix
    (QuaRot, Ashkboos et al. 2024, section 3, draws the signs; 576 = 16 * 36, 7168 = 16 * 16 * 28).
    "random": one random orthogonal matrix, uniformly distributed, of 8 * order^2 bytes.
    """
    generator = torch.Generator().manual_seed(rotation.seed)
    if rotation.kind != HADAMARD:
        ones = torch.ones(order, dtype=torch.float64)
        return Orthogonal(ones, (_random_orthogonal(order, generator),))
    signs = torch.randint(0, 2, (order,), generator=generator).to(torch.float64) * 2 - 1
    twos = (order & -order).bit_length() - 1
    odd = order >> twos
    for taken in range(twos + 1 if odd > 1 else 0):
        paley = _paley(odd << taken)
        if paley is not None:
            return Orthogonal(signs, (*_sylvester_factors(twos - taken), paley))
    last = (_random_orthogonal(odd, generator),) if odd > 1 else ()
    return Orthogonal(signs, (*_sylvester_factors(twos), *last))


def _sylvester_factors(exponent: int) -> list[Tensor]:
    """Of the product 2^exponent."""
    factors = []
    while exponent:
        step = min(exponent, SYLVESTER_BITS)
        factor = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(step):
            factor = torch.cat((torch.cat((factor, factor), 1), torch.cat((factor, -factor), 1)))
        factors.append(factor / factor.shape[0] ** 0.5)
        exponent -= step
    return factors


def _paley(order: int) -> Tensor | None:
    """Orthogonal; None where neither construction over a prime has this order."""
    if order % 4 == 0 and _is_prime(order - 1):  # order - 1 = 3 mod 4: construction I.
        conference = _bordered_residues(order - 1)
        conference[1:, 0] = -1
        return torch.div(conference + torch.eye(order, dtype=torch.float64), order**0.5)
    prime = order // 2 - 1
    if order % 4 == 0 and prime % 4 == 1 and _is_prime(prime):
        conference = _bordered_residues(prime)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        unit = torch.eye(prime + 1, dtype=torch.float64)
        return torch.div(torch.kron(conference, plus) + torch.kron(unit, minus), order**0.5)
    return None


def _bordered_residues(prime: int) -> Tensor:
    """[prime + 1, prime + 1]: at (i + 1, j + 1) whether i - j is a square modulo `prime` (1), is
    none (-1) or is 0; a first row and column of ones with a 0 in the corner."""
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[torch.arange(1, prime).square() % prime] = 1
    character[0] = 0
    index = torch.arange(prime)
    result = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    result[0, 0] = 0
    result[1:, 1:] = character[(index[:, None] - index) % prime]
    return result


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _random_orthogonal(order: int, generator: torch.Generator) -> Tensor:
    """Uniformly distributed: Q of a Gaussian matrix's QR decomposition with the diagonal of R made
    positive (Mezzadri 2007, "How to generate random matrices from the classical compact groups",
    section 5)."""
    gaussian = torch.randn(order, order, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return torch.mul(q, torch.where(r.diagonal() < 0, -1.0, 1.0))
