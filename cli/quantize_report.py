"""What a quantization did, or would do, as `localr1 quantize` tells it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from localr1.cli.memory import peak_memory_bytes
from localr1.cli.output import Output, format_bytes
from localr1.cli.show import left_out_line

if TYPE_CHECKING:
    from localr1.quant.moments import ExpertUse
    from localr1.quant.report import Report, TensorReport


def as_document(report: "Report", *, with_tensors: bool = False) -> dict[str, Any]:
    document = {
        "source": str(report.source),
        "out": None if report.out is None else str(report.out),
        "parameters": report.parameters,
        "source_bytes": report.source_nbytes,
        "bytes": report.nbytes,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "portable": not report.reasons_not_portable,
        "not_portable_because": list(report.reasons_not_portable),
        "smoothed": report.num_smoothed,
        "rotation": None if report.rotation is None else asdict(report.rotation),
        "left_out": None if report.left_out is None else asdict(report.left_out),
        "calibration": calibration_document(report),
        "seconds": round(report.seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "parts": [asdict(part) for part in report.parts],
    }
    if with_tensors:
        document["tensors"] = [asdict(tensor) for tensor in report.tensors]
    return document


def print_tensors(output: Output, tensors: Sequence["TensorReport"]) -> None:
    output.table(
        ("tensor", "part", "type", "parameters", "size"),
        [
            (
                tensor.name,
                tensor.part,
                tensor.scheme,
                f"{tensor.parameters:,}",
                format_bytes(tensor.nbytes),
            )
            for tensor in tensors
        ],
    )
    output.line()


def calibration_document(report: "Report") -> dict[str, Any] | None:
    """What text was read; None where none was."""
    if report.calibrated is None:
        return None
    use = report.expert_use
    return {
        "text": report.calibrated.text,
        "tokens": report.calibrated.tokens,
        "experts": None if use is None else asdict(use),
    }


def expert_use_line(use: "ExpertUse") -> str:
    return (
        f"{use.experts:,}, of which each saw {use.median:,} tokens in the median, "
        f"{use.fewest:,} at least; {use.unseen:,} saw none"
    )


def print_report(output: Output, report: "Report") -> None:
    output.table(
        ("part", "type", "tensors", "parameters", "size", "relative error"),
        [
            (
                part.part,
                part.scheme,
                f"{part.num_tensors:,}",
                f"{part.parameters:,}",
                format_bytes(part.nbytes),
                "" if part.relative_error is None else f"{part.relative_error:.2e}",
            )
            for part in report.parts
        ],
    )
    output.line()
    fields = {
        "weights": f"{format_bytes(report.source_nbytes)} -> {format_bytes(report.nbytes)}, "
        f"{report.bits_per_weight:.2f} bits for each weight of the source",
        "opens in": "localr1 only: " + "; ".join(report.reasons_not_portable)
        if report.reasons_not_portable
        else f"localr1, transformers and what else reads {report.layout}",
    }
    if report.num_smoothed:
        fields["smoothed"] = f"the inputs of {report.num_smoothed} groups of matrices"
    if report.rotation is not None:
        fields["rotated"] = f"{report.rotation.kind}, seed {report.rotation.seed}"
    if report.calibrated is not None:
        read = f"{report.calibrated.tokens:,} tokens of {report.calibrated.text}"
        if report.out is None:
            fields["calibrates"] = f"{read}, a layer in memory at a time"
        else:
            fields["calibrated"] = read
    if report.expert_use is not None:
        fields["experts"] = expert_use_line(report.expert_use)
    if report.left_out is not None:
        fields["left out"] = left_out_line(asdict(report.left_out))
    if report.out is not None:
        peak = peak_memory_bytes()
        fields["written"] = str(report.out)
        fields["took"] = f"{report.seconds:.1f} s, {format_bytes(peak)} of memory at most"
    output.fields(fields)
