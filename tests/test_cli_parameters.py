"""Parameters as people type them."""

import pytest

from localr1.cli.parameters import parse_assignments, parse_parameter
from localr1.errors import UsageError


def test_numbers_get_their_kind() -> None:
    assert parse_parameter("temperature", "1") == 1.0
    assert isinstance(parse_parameter("temperature", "1"), float)
    assert isinstance(parse_parameter("top_k", "40"), int)


def test_an_option_wins_over_an_assignment() -> None:
    values = parse_assignments(["top_k=10", " seed = 3 "], {"top_k": 20, "top_p": None})
    assert values == {"top_k": 20, "seed": 3}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("topk", "1", "Did you mean top_k?"),
        ("colour", "1", "There are: temperature, top_k"),
        ("top_k", "1.5", "expected a whole number, found '1.5'"),
        ("temperature", "hot", "expected a number, found 'hot'"),
    ],
)
def test_what_cannot_be_meant_is_an_error(name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_parameter(name, text)
    assert message in str(caught.value)


def test_an_assignment_needs_its_equals_sign() -> None:
    with pytest.raises(UsageError, match="expected NAME=VALUE, found 'seed'"):
        parse_assignments(["seed"], {})
