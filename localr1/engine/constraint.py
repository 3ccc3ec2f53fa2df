"""What an answer must look like, as the loop of tokens sees it."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """One answer on its way."""

    def allowed(self) -> NDArray[np.bool_]:
        """[vocab]: the tokens that may come next, at least one; what ends a turn is among them
        where the answer may end."""
        ...

    def accept(self, token: int) -> None:
        """An allowed token has come."""
        ...

    def accept_text(self, text: str) -> None:
        """Text has come that nobody could choose: in the token that ended the thought. Raises
        UnsupportedError where the answer cannot begin so."""
        ...


class Grammar(Protocol):
    """Of all answers."""

    def start(self) -> Constraint: ...
