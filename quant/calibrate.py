"""A text goes through the unquantized model, layer by layer, and what reaches each matrix is
measured.

Every token goes through a matrix as soon as it is read, before the next one is. The text is cut
into windows that are read each by itself. Memory holds a few rows of one matrix, whatever its size
and the number of layers, and what the tokens of the text come to in one layer; where there are more
windows, also matrices of one attention or one dense MLP, up to HELD_BYTES (observe.py).
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from localr1.checkpoint.api import Checkpoint
from localr1.checkpoint.expert_ranges import GATE
from localr1.checkpoint.stored import CheckpointInPieces
from localr1.errors import NumericsError
from localr1.kernels.reference import ReferenceKernels
from localr1.layers.moe import MoeBlock, SeparateExperts
from localr1.layers.norm import rms_norm
from localr1.layers.rope import Rope
from localr1.models.config import LAYER_PREFIX, ModelConfig
from localr1.models.decoder import load_layer, make_cache
from localr1.quant import evaluate
from localr1.quant.hessians import HessianSums
from localr1.quant.moments import Columns, ExpertMoments, SectionMoments
from localr1.quant.observe import ObservedExperts, ObservingLoader, check_finite
from localr1.quant.one_thread import one_thread_an_operation
from localr1.quant.stored_rows import float_pieces
from localr1.tokenizer import Tokenizer

DEFAULT_TEXT = Path(__file__).parent / "data" / "calibration_text.txt"
"""Of the kinds of `evaluate.DEFAULT_TEXT`, but another text: what is measured must not be what was
fitted. Written for this purpose (MIT, as all of localr1)."""

WINDOW = 1024
"""Tokens read at a time, fewer where the model was made for fewer."""

SMOOTHING_TOKENS = 1024
"""Root mean squares of columns need no more."""


def calibration_windows(
    checkpoint: Checkpoint, config: ModelConfig, text: str, tokens: int
) -> list[Tensor]:
    """int64 [<= WINDOW] each, the first `tokens` tokens of a text. Raises UsageError when it is too
    short."""
    tokenizer = Tokenizer.from_files(checkpoint.tokenizer_files(), config.vocab_size)
    size = min(WINDOW, config.max_positions, tokens)
    windows = evaluate.windows_of(tokenizer, text, size)
    chosen: list[Tensor] = []
    for window in windows:
        left = tokens - sum(map(len, chosen))
        if left < 2:
            break
        chosen.append(window[:left])
    return chosen


class Calibration:
    """Reads a text with a decoder, layer by layer, and measures every linear on its way.

    Call `embed`, `layer` for each in order, `head`; or set `hidden` to what it was after a layer
    and go on with the next. Each raises what reading raises, and NumericsError for NaN or Inf in a
    weight or in what the model makes of the text.
    """

    def __init__(
        self,
        checkpoint: CheckpointInPieces,
        config: ModelConfig,
        windows: Sequence[Tensor],
        *,
        observes: bool = True,
    ) -> None:
        """windows: int64 [T] each. observes: otherwise nothing is measured, and the model may be
        quantized. Reads no weights."""
        self._checkpoint = checkpoint
        self._config = config
        self._ids = torch.cat(list(windows))
        self._windows: list[slice] = []
        for window in windows:
            begin = self._windows[-1].stop if self._windows else 0
            self._windows.append(slice(begin, begin + len(window)))
        self._threads = torch.get_num_threads()
        self._observes = observes
        self._loader = ObservingLoader(checkpoint, self._threads, observes=observes)
        longest = max(map(len, windows))
        self._rope = Rope(config.rope, config.rope_size).table(longest)
        # Of one layer: the next one's keys and values take the place of those before.
        self._cache = make_cache(replace(config, num_layers=1), torch.float32, longest)
        self._cache.reserve(longest)
        self.hidden = torch.empty(0)
        """float32 [T, hidden_size] of all windows: what the next layer reads."""

    def embed(self) -> None:
        sizes = self._config.vocab_size, self._config.hidden_size
        self.hidden = self._loader.embedded("model.embed_tokens", *sizes, self._ids)
        check_finite(self.hidden, "model.embed_tokens.weight")

    def layer(self, index: int, wanted: Collection[str] = ()) -> SectionMoments:
        """Of its linears, and of its experts together. wanted: modules whose Hessians are."""
        hessians = HessianSums(wanted, self._threads) if wanted else None
        self._loader.begin(hessians)
        with one_thread_an_operation():
            attention, mlp = load_layer(self._loader, index, self._config, ReferenceKernels())
            self._loader.hold(len(self._windows) > 1)
            for window in self._windows:
                attention(self.hidden[window], self._rope, self._cache.layer(0), 0)
                if self._observes and self._config.latent is not None:
                    self._observe_latent(index, self._config.latent.latent_size, window)
            self._loader.hold(False)
            experts = None
            if isinstance(mlp, MoeBlock):
                experts = self._mix(mlp, f"{LAYER_PREFIX}{index}.mlp.experts", hessians)
            else:
                self._loader.hold(len(self._windows) > 1)
                for window in self._windows:
                    mlp(self.hidden[window])
                self._loader.hold(False)
        return self._measured(experts, hessians)

    def head(self, wanted: Collection[str] = ()) -> SectionMoments:
        """Of "lm_head", though it be the embedding."""
        self._loader.begin()
        hessians = HessianSums(wanted, self._threads) if wanted else None
        with one_thread_an_operation():
            norm = self._loader.vector("model.norm.weight", self._config.hidden_size)
            name = "model.embed_tokens" if self._config.tie_embeddings else "lm_head"
            sums = self._loader.observe("lm_head", self._config.hidden_size)
            blocks = self._loader.blocks
            normed = rms_norm(self.hidden, norm, self._config.rms_norm_eps)
            blocks.add_squares([normed], sums.inputs)
            if hessians is not None and (keep := hessians.keeper("lm_head")) is not None:
                keep(normed)
            blocks.add_squares(float_pieces(self._checkpoint, f"{name}.weight"), sums.weights)
        check_finite(sums.weights, f"{name}.weight")
        return self._measured(None, hessians)

    def _mix(self, block: MoeBlock, name: str, hessians: HessianSums | None) -> ExpertMoments:
        moe = self._config.moe
        assert moe is not None
        assert isinstance(block.experts, SeparateExperts)
        matrices, inner = block.experts.experts, moe.intermediate_size
        observed = ObservedExperts(
            matrices,
            (self._config.hidden_size, inner),
            self._loader.blocks,
            None if hessians is None else hessians.keeper(f"{name}.0.{GATE}"),
            None if hessians is None else hessians.expert_keeper(name, matrices, inner),
        )
        replace(block, experts=observed)(self.hidden)
        moments = observed.moments(name)
        for each in (moments.gate_up, moments.down, moments.mass):
            _check_inputs(each, name)
        return moments

    def _observe_latent(self, index: int, latent_size: int, window: slice) -> None:
        """The input of kv_b_proj, which attention takes apart, is what the cache keeps."""
        name = f"{LAYER_PREFIX}{index}.self_attn.kv_b_proj"
        blocks, is_first = self._loader.blocks, name not in self._loader.sums
        sums = self._loader.observe(name, latent_size) if is_first else self._loader.sums[name]
        rows: Tensor = self._cache.layer(0)
        blocks.add_squares([rows[: window.stop - window.start, :latent_size]], sums.inputs)
        if is_first:
            blocks.add_squares(float_pieces(self._checkpoint, f"{name}.weight"), sums.weights)

    def _measured(
        self, experts: ExpertMoments | None, hessians: HessianSums | None
    ) -> SectionMoments:
        """Copies: the next layer's sums take the place of these."""
        self._loader.blocks.clear()
        columns = {}
        for name, sums in self._loader.sums.items():
            _check_inputs(sums.inputs, name)
            columns[name] = Columns(sums.inputs / len(self._ids), sums.weights.clone())
        return SectionMoments(columns, experts, hessians)


def _check_inputs(sums: Tensor, name: str) -> None:
    if not sums.isfinite().all():
        raise NumericsError(
            f"{name}: its inputs on the calibration text",
            expected="finite numbers",
            found="NaN or Inf",
            fix="Quantize with --no-smooth and --method rtn, which do not run the model.",
        )
