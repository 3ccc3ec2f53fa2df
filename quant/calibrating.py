"""`localr1 calibrate`: measures a model's inputs on a text, once, section by section.

What a layer's matrices were given is written when the layer is done, and a line is added to the
journal (journal.py); after a kill the same command goes on behind it, to the same bytes.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from localr1.errors import UnsupportedError
from localr1.models.config import LAYER_PREFIX, ModelConfig
from localr1.models.registry import parse_config
from localr1.quant.atomic import AtomicDirectory, open_file, write_all
from localr1.quant.calibrate import DEFAULT_TEXT, Calibration, calibration_windows
from localr1.quant.calibration_file import Calibrated, section_specs, section_tensors
from localr1.quant.calibration_options import DEFAULT_TOKENS
from localr1.quant.evaluate import read_text
from localr1.quant.hidden import HiddenFiles
from localr1.quant.journal import JOURNAL_NAME, Entry, Journal, refusal, versions
from localr1.quant.layout import TensorSpec, plan_file
from localr1.quant.moments import ExpertUse, SectionMoments
from localr1.quant.plan import EMBEDDING_WEIGHT, HEAD_WEIGHT
from localr1.quant.progress import Progress, ProgressCallback, of_stage
from localr1.quant.source import Source
from localr1.quant.writer import DTYPES, READ_CHUNK, FileRecord

RESULT = "result.safetensors"


@dataclass(frozen=True)
class CalibrationReport:
    """seconds: wall clock, of this run. experts: None of a dense model."""

    out: Path
    calibrated: Calibrated
    nbytes: int
    experts: ExpertUse | None
    seconds: float


def text_identity(path: Path, tokens: int) -> dict[str, object]:
    """What tells one text from another, for a journal."""
    return {"text_sha256": text_sha256(path), "tokens": tokens}


def text_sha256(path: Path) -> str:
    return hashlib.sha256(read_text(path).encode()).hexdigest()


def calibrate(
    source: Path,
    out: Path,
    text: Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    progress: ProgressCallback | None = None,
    *,
    restart: bool = False,
    open_file: Callable[[Path], BinaryIO] = open_file,
) -> CalibrationReport:
    """Read the first `tokens` tokens of `text` (DEFAULT_TEXT for None; fewer if it has no more)
    with the model `source` and write the new file `out` (calibration_file.py).

    Memory: see calibrate.py. Raises the errors of `open_checkpoint` and `parse_config`,
    UnsupportedError for a model that is quantized, UsageError for a text that is too short,
    NumericsError for NaN or Inf in a weight or in what the model makes of the text, OutputError
    when `out` cannot be written. After any error or a kill nothing is left under the name `out`,
    and the same call goes on behind the layers that were done, to the same bytes; with another
    source, text, number of tokens or version it raises OutputError instead, unless `restart`.
    """
    started = time.monotonic()
    directory = AtomicDirectory(out, open_file, None if restart else JOURNAL_NAME)
    with Source(source) as opened:
        config = parse_config(opened.checkpoint.config)
        if opened.checkpoint.config.get("quantization_config") is not None:
            raise UnsupportedError(
                f"{source}",
                expected="an unquantized model (BF16, F16, F32 or FP8)",
                found="a quantized one",
                fix="Calibrate the model that it was made from.",
            )
        run = _Calibrating(opened, config, text or DEFAULT_TEXT, tokens, progress)
        directory.check(run.nbytes)
        with directory:
            run.measure(directory)
            calibrated = run.finish(directory)
    seconds = time.monotonic() - started
    return CalibrationReport(out, calibrated, run.nbytes, run.expert_use(), seconds)


class _Calibrating:
    """One run: its sections are the embedding, the layers and the head."""

    def __init__(
        self,
        source: Source,
        config: ModelConfig,
        text: Path,
        tokens: int,
        progress: ProgressCallback | None,
    ) -> None:
        self._source = source
        self._config = config
        self._text = text
        self._progress = progress
        checkpoint = source.checkpoint
        windows = calibration_windows(checkpoint, config, read_text(text), tokens)
        self._tokens = sum(map(len, windows))
        self._calibration = Calibration(checkpoint, config, windows)
        self._specs: list[list[TensorSpec]] = [[], *section_specs(checkpoint.tensors, config)]
        self._expert_tokens: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Of the tensors in the result."""
        return sum(spec.nbytes for section in self._specs for spec in section)

    def measure(self, directory: AtomicDirectory) -> None:
        """Every section that the journal does not say is measured."""
        hidden = HiddenFiles(directory)
        identity = {
            "versions": versions(),
            "source": self._source.identity(self._source.documents()),
            "calibration": text_identity(self._text, self._tokens),
        }
        journal = Journal(directory, identity)
        done = len(journal.entries)
        if done:
            sha256 = {
                n: digest for each in journal.entries for n, digest in each.source_sha256.items()
            }
            changed = self._source.resume(sha256, of_stage("hash source", self._progress))
            if changed:
                raise refusal(directory.path, f"another {changed[0]}")
            for number, entry in enumerate(journal.entries):
                self._check(directory, number, entry)
            last = journal.entries[-1].hidden
            if last is not None:
                self._calibration.hidden = hidden.read(done - 1, last).view(
                    -1, self._config.hidden_size
                )
        for number in range(done, len(self._specs)):
            known = set(self._source.sha256)
            for file_name in self._files(number):
                self._source.require(file_name, of_stage("hash source", self._progress))
            moments = self._section(number)
            record = self._write(directory, number, moments)
            is_last = number == len(self._specs) - 1
            sha256 = {n: d for n, d in self._source.sha256.items() if n not in known}
            written = None if is_last else hidden.write(number, self._calibration.hidden)
            journal.append(Entry(_name(number), {}, {}, [record], sha256, written))
            hidden.remove(but=number)
            if self._progress is not None:
                total = len(self._specs)
                self._progress(Progress("calibrate", number + 1, total, self._text.name))

    def finish(self, directory: AtomicDirectory) -> Calibrated:
        """Join the sections and give the result its name."""
        calibrated = Calibrated(
            dict(self._source.sha256),
            self._text.name,
            text_sha256(self._text),
            self._tokens,
        )
        specs = [spec for section in self._specs for spec in section]
        shard = plan_file(RESULT, specs, calibrated.metadata())
        file = directory.open(RESULT)
        try:
            with directory.errors():
                write_all(file, memoryview(shard.header))
                for number in range(len(self._specs)):
                    with open(directory.beside(_name(number)), "rb", buffering=0) as part:
                        while block := part.read(READ_CHUNK):
                            write_all(file, memoryview(block))
        except BaseException:
            file.close()
            raise
        directory.close(file)
        directory.commit(RESULT)
        return calibrated

    def expert_use(self) -> ExpertUse | None:
        return ExpertUse.of(torch.cat(self._expert_tokens)) if self._expert_tokens else None

    def _section(self, number: int) -> SectionMoments:
        if number == 0:
            self._calibration.embed()
            return SectionMoments()
        if number == len(self._specs) - 1:
            return self._calibration.head()
        return self._calibration.layer(number - 1)

    def _files(self, number: int) -> list[str]:
        """Those that a section is read from."""
        tensors = self._source.checkpoint.tensors
        if number == 0:
            names = [EMBEDDING_WEIGHT]
        elif number == len(self._specs) - 1:
            head = EMBEDDING_WEIGHT if self._config.tie_embeddings else HEAD_WEIGHT
            names = ["model.norm.weight", head]
        else:
            prefix = f"{LAYER_PREFIX}{number - 1}."
            names = [name for name in tensors if name.startswith(prefix)]
        # One that is missing is an error of whoever reads it, which says what is wrong.
        return sorted({f for n in names if n in tensors for f in self._source.files_of(n)})

    def _write(
        self, directory: AtomicDirectory, number: int, moments: SectionMoments
    ) -> FileRecord:
        values = section_tensors(moments, number - 1)
        data = b""
        for spec in self._specs[number]:
            value = values.pop(spec.name)
            assert value.dtype == DTYPES[spec.dtype]
            assert tuple(value.shape) == spec.shape
            data += value.contiguous().numpy().tobytes()
        assert not values, f"measured, and not stored: {sorted(values)}"
        directory.write_path(directory.beside(_name(number)), data)
        if moments.experts is not None:
            self._expert_tokens.append(moments.experts.tokens)
        return FileRecord(_name(number), len(data), hashlib.sha256(data).hexdigest())

    def _check(self, directory: AtomicDirectory, number: int, entry: Entry) -> None:
        """Read a section back that was measured before an interruption."""
        name = _name(number)
        with directory.errors():
            data = directory.beside(name).read_bytes()
        if [record.sha256 for record in entry.files] != [hashlib.sha256(data).hexdigest()]:
            raise directory.damaged(name)
        begin = 0
        for spec in self._specs[number]:
            if spec.name.endswith(".experts.tokens"):
                values = bytearray(data[begin : begin + spec.nbytes])
                self._expert_tokens.append(torch.frombuffer(values, dtype=torch.int32).long())
            begin += spec.nbytes


def _name(number: int) -> str:
    return f"section-{number:05d}"
