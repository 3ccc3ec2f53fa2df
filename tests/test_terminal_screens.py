"""README.md and docs/chat.md show what the program shows."""

import os

import pytest

if os.name == "nt":
    pytest.skip("needs pseudo-terminals", allow_module_level=True)

from chat_screens import all_screens, comparable, documented, with_figures_of


def test_the_screens_of_the_documents_are_true() -> None:
    taken = {name: comparable(screen) for name, screen in all_screens().items()}
    assert taken == {name: comparable(screen) for name, screen in documented().items()}


BEFORE = """\
Thought for 3 s (42 tokens)
83 (76 cached)+119 tok · 1284.5 tok/s · peak 300.2 MiB
drafts: 3 of 6 right
   1 *-%+*=**=*#+%*=@
"""


def test_figures_alone_are_neither_compared_nor_written() -> None:
    after = """\
Thought for 5 s (42 tokens)
83+119 tok · 300.0 tok/s · peak 299.2 MiB
   1 @-%+*=**=*#+%*=@
"""
    assert comparable(after) == comparable(BEFORE)
    assert with_figures_of(BEFORE, after) == BEFORE.replace("drafts: 3 of 6 right\n", "")
    for old, new in (("42", "43"), ("+119", "+120"), ("peak", "most"), ("   1", "   2")):
        assert comparable(after.replace(old, new)) != comparable(BEFORE)
        assert with_figures_of(BEFORE, after.replace(old, new)) != with_figures_of(BEFORE, after)
