"""`localr1 quantize`: its options, and which of them go together."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localr1.errors import UsageError

if TYPE_CHECKING:
    from localr1.quant.calibration_options import CalibrationOptions

Source = Annotated[str, typer.Argument(help="A model's directory, .gguf file, or name.")]
Out = Annotated[Path, typer.Argument(help="The directory to make; must not exist.")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="small, balanced, quality, local, or a .toml file: bits by names."
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option("--target-size", help="Choose bits so that all files fit in 40GiB."),
]
TargetBpw = Annotated[
    float | None,
    typer.Option("--target-bpw", min=0.0, help="Choose bits for 4.5 a weight on average."),
]
NotPortable = Annotated[
    bool,
    typer.Option(
        "--not-portable",
        help="With a target: also 5 and 6 bits, bits expert by expert, a packed embedding.",
    ),
]
Routing = Annotated[
    Path | None,
    typer.Option("--routing", help="With a target: a routing trace, how much experts count."),
]
Bits = Annotated[
    int, typer.Option("--bits", "-b", help="Of the MLP, or the routed experts: 4, 5, 6 or 8.")
]
Group = Annotated[
    int, typer.Option("--group", "-g", help="Weights that share a scale: 32, 64 or 128.")
]
Asymmetric = Annotated[
    bool,
    typer.Option(
        "--asymmetric", help="Zero points for less than 8 bits: closer, but not portable."
    ),
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        help="How codes are chosen: rtn, imatrix, gptq or nf4; awq+ before it scales columns.",
    ),
]
AttentionBits = Annotated[
    int, typer.Option("--attention-bits", help="4, 5, 6, 8, or 16 to keep attention as it is.")
]
SharedBits = Annotated[
    int,
    typer.Option("--shared-bits", help="4, 5, 6, 8, 16: shared experts, a mixture's dense MLPs."),
]
HeadBits = Annotated[
    int, typer.Option("--head-bits", help="4, 5, 6, 8, or 16 to keep the output head as it is.")
]
EmbeddingBits = Annotated[
    int,
    typer.Option(
        "--embedding-bits",
        help="16 as it is; 8, 6, 5 or 4: smaller, but opens in localr1 only.",
    ),
]
Smooth = Annotated[bool, typer.Option(help="Even out the activations of a dense model first.")]
Rotate = Annotated[
    str | None,
    typer.Option(
        "--rotate", help="Rotate the residual stream first: hadamard or random. Unties a head."
    ),
]
RotationSeed = Annotated[int, typer.Option("--rotation-seed", help="Of what --rotate draws.")]
Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", help="What `localr1 calibrate` wrote of SOURCE."),
]
Text = Annotated[
    Path | None,
    typer.Option("--text", help="To calibrate with instead, UTF-8; by default a built-in one."),
]
Tokens = Annotated[
    int | None, typer.Option("--tokens", min=2, help="Of the text; by default 8192 at most.")
]
Restart = Annotated[
    bool,
    typer.Option("--restart", help="Throw away what an interrupted run left; begin anew."),
]
DeleteSourceShards = Annotated[
    bool,
    typer.Option(
        "--delete-source-shards",
        help="Delete each file of SOURCE's weights when what is made of it is safe.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before deleting.")]
WithCard = Annotated[
    bool,
    typer.Option("--quality-card", help="Measure the result against SOURCE, for `show`."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be written; write nothing.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="With --dry-run: a line for each tensor.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]

CHOSEN_FOR_A_TARGET = ("bits", "attention_bits", "shared_bits", "head_bits", "embedding_bits")
"""Options for which --target-size and --target-bpw leave no room."""
SAID_BY_A_RECIPE = (*CHOSEN_FOR_A_TARGET, "group", "method", "smooth", "asymmetric")
"""Those for which --recipe leaves none."""


def was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_alone(context: typer.Context, name: str, option: str) -> None:
    """Raises UsageError for an option that was given and means nothing without another."""
    if was_given(context, name):
        raise UsageError(f"--{name.replace('_', '-')}", expected=f"{option} beside it")


def refuse_beside(context: typer.Context, option: str, names: Sequence[str]) -> None:
    """Raises UsageError for an option that was given although `option` says what it would."""
    for name in names:
        if was_given(context, name):
            raise UsageError(
                f"--{name.removesuffix('_name').replace('_', '-')} beside {option}",
                expected="one of the two",
                found="both",
                fix=f"Leave one out: {option} says it all.",
            )


def calibration_options(
    file: Path | None, text: Path | None, tokens: int | None
) -> "CalibrationOptions":
    from localr1.quant.calibration_options import CalibrationOptions

    if file is not None and (text is not None or tokens is not None):
        raise UsageError(
            "--calibration beside --text or --tokens",
            expected="one of the two",
            found="both",
            fix="Leave one out: the file says what text was read.",
        )
    if text is None:
        return CalibrationOptions(file, tokens=tokens)
    return CalibrationOptions(text=text, tokens=tokens)
