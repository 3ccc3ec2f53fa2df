"""Smoothing as a quantization goes on: what each section is smoothed by, when its turn comes."""

from collections.abc import Callable

from torch import Tensor

from localr1.checkpoint.api import Checkpoint
from localr1.models.config import ModelConfig
from localr1.quant.calibrate import (
    DEFAULT_TEXT,
    SMOOTHING_TOKENS,
    Calibration,
    calibration_windows,
)
from localr1.quant.evaluate import read_text
from localr1.quant.moments import SectionMoments
from localr1.quant.plan import Plan
from localr1.quant.sections import Section
from localr1.quant.smoothing import Smoothing, smoothing
from localr1.quant.writer import DTYPES

NOTHING = Smoothing({}, {}, {})

LayerProgress = Callable[[int, int], None]
"""Called with layers measured and layers in all."""


class Smoother:
    """Hand it every section, in order: the calibration text goes through each.

    Of a plan without links it reads nothing and smooths nothing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        config: ModelConfig,
        progress: LayerProgress | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._plan = plan
        self._config = config
        self._progress = progress
        self._calibration: Calibration | None = None
        if plan.links:
            text = read_text(DEFAULT_TEXT)
            tokens = min(SMOOTHING_TOKENS, config.max_positions)
            windows = calibration_windows(checkpoint, config, text, tokens)
            self._calibration = Calibration(checkpoint, config, windows)

    @property
    def hidden(self) -> Tensor | None:
        """float32 [T, hidden_size], what the next section starts from; None if it is not needed."""
        return None if self._calibration is None else self._calibration.hidden

    def resume(self, hidden: Tensor) -> None:
        """Go on behind the section after which `hidden` was this, in any shape."""
        assert self._calibration is not None
        self._calibration.hidden = hidden.view(-1, self._config.hidden_size)

    def smoothing_of(self, section: Section) -> Smoothing:
        """Raises as Calibration's methods."""
        if self._calibration is None:
            return NOTHING
        if section.layer is not None:
            measured = self._calibration.layer(section.layer)
            if self._progress is not None:
                self._progress(section.layer + 1, self._config.num_layers)
            return self._smoothing(measured)
        if section.name == "embedding":
            self._calibration.embed()
            return NOTHING
        if all("lm_head" not in link.readers for link in self._plan.links):
            return NOTHING
        return self._smoothing(self._calibration.head())

    def _smoothing(self, moments: SectionMoments) -> Smoothing:
        """By the links whose readers were measured."""
        measured = moments.columns
        links = [link for link in self._plan.links if link.readers[0] in measured]
        norms = {
            link.maker: self._checkpoint.read(f"{link.maker}.weight")
            for link in links
            if link.is_norm
        }
        return smoothing(links, measured, norms, DTYPES[self._plan.dtype], self._config)
