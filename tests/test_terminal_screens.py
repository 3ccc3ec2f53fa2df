"""docs/chat.md shows what the program shows."""

import os

import pytest

if os.name == "nt":
    pytest.skip("needs pseudo-terminals", allow_module_level=True)

from chat_screens import all_screens, comparable, documented


def test_the_screens_of_the_document_are_true() -> None:
    taken = {name: comparable(screen) for name, screen in all_screens().items()}
    assert taken == {name: comparable(screen) for name, screen in documented().items()}
