"""Activation-aware weight quantization: columns whose inputs are large are multiplied, before they
are rounded, by how much is searched (Lin et al. 2023, "AWQ: Activation-aware Weight Quantization",
section 3.2).

Multiplying column j by s_j and dividing its input by s_j changes no product, but the error of the
column then counts 1 / s_j^2 times, while the step of its group grows little if few columns of it
grow. The search (equations 4 and 5) is over s = s_X^a, where s_X is how large the inputs are, for
a grid of exponents a from 0, which changes nothing, to 1; beside it, as one more family,
SmoothQuant's s_X^a / s_W^(1 - a) (Xiao et al. 2022, section 4). Two things are not the paper's: s_X
is the root mean square, not the mean magnitude, and the error of the outputs is taken from second
moments (moments.py) instead of from tokens: so a search needs no activations.

What is divided where is smoothing's affair (smoothing.py).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from localr1.models.config import ModelConfig
from localr1.quant.calibration_options import calibrated_method
from localr1.quant.experts import EXPERTS_PART
from localr1.quant.methods.imatrix import rounding
from localr1.quant.moments import SectionMoments, floored, importance
from localr1.quant.recipe import Rule
from localr1.quant.smoothing import STEPS, Link, shared_by_heads

EXPONENTS = tuple(index / 10 for index in range(11))
"""The paper's grid has 20 steps; the error hardly differs between neighbours of these."""

ROWS = 64
"""Of each matrix that the search rounds, evenly spread: it is as good on those as on all."""

EXPERTS = 16
"""Whose gate and up the search for a mixture's norm rounds: those that saw the most tokens."""


class ScaleSearch:
    """The scales of one section. read: of a matrix, by its module's name, the rows that
    `searched_rows` names. rules: of those that are
    quantized; what is searched is what is best before such a rounding, weighted where its method
    knows of the inputs."""

    def __init__(
        self,
        moments: SectionMoments,
        read: Callable[[str], Tensor],
        rules: Mapping[str, Rule],
        config: ModelConfig,
        scale_dtype: torch.dtype,
    ) -> None:
        self._moments = moments
        self._read = read
        self._rules = rules
        self._config = config
        self._scale_dtype = scale_dtype

    def scale_of(self, link: Link) -> Tensor:
        """float32 [in], the best of the candidates. Raises NumericsError for NaN or Inf in a
        weight."""
        readers = self._readers(link)
        # Of every reader with its own inputs; a dense norm's all have the same.
        inputs = torch.stack([floored(self._moments.inputs(reader)) for reader in readers])
        # All at once: small tensors that stay, made between matrices that go, would keep the
        # allocator from putting the next matrix where the last was.
        room = torch.empty(len(readers), ROWS, inputs.shape[1])
        rows = {
            reader: _filled(place, self._read(reader))
            for reader, place in zip(readers, room, strict=True)
        }
        sizes = inputs.mean(0).log2() / 2
        weights = torch.cat(list(rows.values())).to(torch.float64).square().mean(0)
        of_weights = floored(weights).log2() / 2
        best, least = torch.zeros(0), float("inf")
        for candidate in self._candidates(link, sizes, of_weights):
            error = sum(self._error(reader, rows[reader], candidate) for reader in readers)
            if error < least:
                best, least = candidate, error
        assert len(best), "the errors of finite weights are finite"
        return best

    def _candidates(self, link: Link, sizes: Tensor, of_weights: Tensor) -> list[Tensor]:
        """sizes, of_weights: binary logarithms."""
        logarithms = [exponent * sizes for exponent in EXPONENTS]
        logarithms += [a * sizes - (1 - a) * of_weights for a in EXPONENTS[1:-1]]
        # A router in 16 bits can be multiplied by a power of two alone and choose as before.
        steps = 1 if link.kept else STEPS
        scales = []
        for logarithm in logarithms:
            centred = logarithm - logarithm.mean()
            scale = torch.exp2(torch.round(centred * steps) / steps).to(torch.float32)
            if link.maker.endswith(".v_proj"):
                scale = shared_by_heads(scale, self._config)
            scales.append(scale)
        return scales

    def _error(self, reader: str, rows: Tensor, scale: Tensor) -> float:
        """Of the outputs of these rows, by the diagonal of the quadratic form."""
        rule, scaled = self._rules[reader], rows * scale
        inputs = floored(self._moments.inputs(reader)) / scale.to(torch.float64).square()
        weights = None if calibrated_method(rule.method) is None else importance(inputs)
        found = rounding(rule.scheme).quantize(
            scaled, rule.scheme, self._scale_dtype, f"{reader}.weight", weights
        )
        steps = found.codes.to(torch.float32).view(*found.scale.shape, -1)
        if found.zero_point is not None:
            steps = steps - found.zero_point.to(torch.float32)[:, :, None]
        back = (steps * found.scale.to(torch.float32)[:, :, None]).view_as(scaled)
        return float(((back - scaled).to(torch.float64).square() @ inputs).sum())

    def _readers(self, link: Link) -> Sequence[str]:
        """Those that the search looks at."""
        experts = [reader for reader in link.readers if EXPERTS_PART in reader]
        if self._moments.experts is None or len(experts) < 2:
            return link.readers
        most = self._moments.experts.tokens.argsort(descending=True, stable=True)[:EXPERTS]
        chosen = set(most.tolist())
        return [
            reader
            for reader in link.readers
            if EXPERTS_PART not in reader
            or int(reader.partition(EXPERTS_PART)[2].partition(".")[0]) in chosen
        ]


def searched_rows(out_features: int) -> Tensor:
    """int64 [<= ROWS]: those of a matrix that the search rounds."""
    return torch.arange(0, out_features, max(out_features // ROWS, 1))[:ROWS]


def _filled(place: Tensor, rows: Tensor) -> Tensor:
    """The first rows of `place` [ROWS, in]."""
    return place[: len(rows)].copy_(rows)
