"""Text of a model on its way to a stream, piece by piece."""

from typing import Protocol

from localr1.cli.output import Output


class TextView(Protocol):
    """add() each piece; finish() leaves the cursor at the beginning of a line."""

    def add(self, text: str) -> None: ...

    def finish(self) -> None: ...


class HiddenText:
    """Nothing is shown."""

    def add(self, text: str) -> None:
        pass

    def finish(self) -> None:
        pass


class PlainText:
    """As it comes, control characters escaped."""

    def __init__(self, output: Output, stream: str, *, dim: bool = False) -> None:
        self._output = output
        self._stream = stream
        self._dim = dim
        self._ends_line = True

    def add(self, text: str) -> None:
        self._output.text(text, dim=self._dim, stream=self._stream)
        self._ends_line = text.endswith("\n")

    def finish(self) -> None:
        if not self._ends_line:
            self._output.text("\n", stream=self._stream)
            self._ends_line = True
