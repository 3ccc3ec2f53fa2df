"""The program `localr1`: its commands, and the one place where errors become sentences.

Everything imported here is light (typer and the standard library), so that `localr1 --help` answers
at once; commands import torch and the runtime when they run.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from localr1 import __version__
from localr1.cli.bench import bench
from localr1.cli.chat import chat
from localr1.cli.doctor import doctor
from localr1.cli.eval import app as eval_app
from localr1.cli.library import list_models
from localr1.cli.output import Output
from localr1.cli.plan import plan
from localr1.cli.prune import paths, prune
from localr1.cli.pull import pull
from localr1.cli.quantize import quantize
from localr1.cli.remove import remove_models
from localr1.cli.sessions import app as sessions_app
from localr1.cli.show import show
from localr1.cli.simulate import simulate
from localr1.cli.trace import trace
from localr1.cli.verify import verify_model
from localr1.errors import LocalR1Error, MemoryLimitError

app = typer.Typer(
    name="localr1",
    help="Run and quantize DeepSeek-R1-style models on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    if wanted:
        Output().line(f"localr1 {__version__}")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True),
    ] = False,
) -> None:
    """Run and quantize DeepSeek-R1-style models on this machine."""


app.command()(chat)
app.command("run", hidden=True)(chat)
app.command()(pull)
app.command()(plan)
app.command()(quantize)
app.command("list")(list_models)
app.command("ls", hidden=True)(list_models)
app.command()(show)
app.command("rm")(remove_models)
app.command("verify")(verify_model)
app.command()(prune)
app.command()(paths)
app.add_typer(eval_app, name="eval")
app.add_typer(sessions_app, name="sessions")
app.command()(bench)
app.command()(doctor)
app.command()(trace)
app.command()(simulate)


def leave_quietly() -> NoReturn:
    """The reader of our output went away (`localr1 ... | head`): no traceback, also not when the
    interpreter flushes stdout on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command line; ends the process with interface's exit codes: 0 ok, 1 error, 2 usage,
    3 does not fit, 4 not found, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        # A console or pipe that is not UTF-8 (Windows) shows a replacement instead of failing.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    output = Output()
    try:
        app(args=arguments, prog_name="localr1")
    except LocalR1Error as error:
        output.error(str(error))
        sys.exit(error.exit_code)
    except MemoryError:
        output.error("this machine has not enough memory for that: try a smaller --context.")
        sys.exit(MemoryLimitError.exit_code)
    except BrokenPipeError:
        leave_quietly()
    except Exception as error:  # The last resort: what is not ours to explain is shown whole.
        traceback.print_exc()
        output.error(
            f"unexpected {type(error).__name__}: this is a fault in localr1 {__version__}; please "
            "report it with the lines above and the command that led to it."
        )
        sys.exit(1)
