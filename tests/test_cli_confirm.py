"""Nothing is deleted unless a person says yes."""

import io
import sys

import pytest

from localr1.cli.confirm import confirmed
from localr1.cli.output import Output
from localr1.errors import UsageError


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("typed", "agreed"),
    [("y\n", True), ("YES\n", True), (" y \n", True), ("n\n", False), ("\n", False), ("", False)],
)
def test_only_yes_is_yes(typed: str, agreed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Keyboard(typed))
    stdout, stderr = io.StringIO(), io.StringIO()
    assert confirmed(Output(stdout, stderr, color=False), "Delete 3 GiB?", False) == agreed
    assert (stdout.getvalue(), stderr.getvalue()) == ("", "Delete 3 GiB? [y/N] ")


@pytest.mark.parametrize("stdin", [io.StringIO("y\n"), None])
def test_a_pipe_cannot_agree(stdin: io.StringIO | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    output = Output(io.StringIO(), io.StringIO())
    with pytest.raises(UsageError, match="Give -y"):
        confirmed(output, "Delete?", False)
    assert confirmed(output, "Delete?", True)
