"""Worked solutions: the short scratchpads that r1-nano writes between <think> and </think>.

Each line is "left: steps =result". Columns go from the lowest digit up, so that a carry is always
known before it is needed, and every column has the same form whether or not a carry arises.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Worked:
    """An arithmetic result with the lines that lead to it."""

    value: int
    lines: tuple[str, ...]


def _digits(number: int, width: int = 0) -> list[int]:
    """The decimal digits of `number`, lowest first, padded with zeros to `width`."""
    return [int(digit) for digit in reversed(str(number).zfill(width))]


def add(a: int, b: int) -> Worked:
    """a+b by columns: "47+86: 7+6+0=13 4+8+1=13 =133" (digit + digit + carry = column sum)."""
    width = max(len(str(a)), len(str(b)))
    steps = []
    carry = 0
    for x, y in zip(_digits(a, width), _digits(b, width), strict=True):
        column = x + y + carry
        steps.append(f"{x}+{y}+{carry}={column}")
        carry = column // 10
    return Worked(a + b, (f"{a}+{b}: {' '.join(steps)} ={a + b}",))


def subtract(a: int, b: int) -> Worked:
    """a-b by columns, ten lent where needed: "52-17: 12-7-0=5 5-1-1=3 =35"; a < b turned round."""
    if a < b:
        turned = subtract(b, a)
        return Worked(a - b, (*turned.lines, f"{a - b}"))
    width = len(str(a))
    steps = []
    borrow = 0
    for x, y in zip(_digits(a), _digits(b, width), strict=True):
        lent = 10 if x < y + borrow else 0
        steps.append(f"{x + lent}-{y}-{borrow}={x + lent - y - borrow}")
        borrow = lent // 10
    return Worked(a - b, (f"{a}-{b}: {' '.join(steps)} ={a - b}",))


def _times_digit(a: int, digit: int) -> str:
    """One partial product: "47*6: 7*6=42 4*6=24+4=28 =282" (fact, plus the carry)."""
    steps = []
    carry = 0
    for position, x in enumerate(_digits(a)):
        fact = x * digit
        steps.append(f"{x}*{digit}={fact}" + (f"+{carry}={fact + carry}" if position else ""))
        carry = (fact + carry) // 10
    return f"{a}*{digit}: {' '.join(steps)} ={a * digit}"


def multiply(a: int, b: int) -> Worked:
    """a*b for up to two digits each, by the digits of b from the lowest, then the sum."""
    low, high = b % 10, b // 10
    if high == 0:
        return Worked(a * b, (_times_digit(a, b),))
    total = add(a * low, a * high * 10)
    return Worked(a * b, (_times_digit(a, low), _times_digit(a, high), *total.lines))


OPERATIONS = {"+": add, "-": subtract, "*": multiply}


@dataclass(frozen=True)
class Expression:
    """A binary operation on numbers or on one nested operation."""

    left: "Expression | int"
    operator: str
    right: "Expression | int"

    def text(self) -> str:
        """The expression without spaces, brackets only where they are needed."""
        return f"{self._side(self.left, False)}{self.operator}{self._side(self.right, True)}"

    def _side(self, side: "Expression | int", is_right: bool) -> str:
        if isinstance(side, int):
            return str(side)
        binds_tighter = side.operator == "*" and self.operator != "*"
        leftmost_sum = not is_right and self.operator != "*"
        return side.text() if binds_tighter or leftmost_sum else f"({side.text()})"

    def pairs(self) -> list[tuple[int, int]]:
        """The operands of every operation, inner ones first."""
        inner = [side for side in (self.left, self.right) if isinstance(side, Expression)]
        below = [pair for side in inner for pair in side.pairs()]
        return [*below, (_value(self.left), _value(self.right))]


def _value(side: Expression | int) -> int:
    return side if isinstance(side, int) else work(side).value


def work(expression: Expression) -> Worked:
    """Works the inner operation first, then the outer one."""
    lines: tuple[str, ...] = ()
    values = []
    for side in (expression.left, expression.right):
        if isinstance(side, int):
            values.append(side)
        else:
            inner = work(side)
            lines += inner.lines
            values.append(inner.value)
    outer = OPERATIONS[expression.operator](*values)
    return Worked(outer.value, (*lines, *outer.lines))


def compare(a: str, b: str) -> tuple[str, str]:
    """Compares two decimals place by place: "9.11 9.90: 9=9 1<9". Returns ("<", "=" or ">", line).

    Both are padded with zeros to the same number of places before and after the point (or the
    comma), which is what goes wrong when 9.11 is read as more than 9.9.
    """
    mark = "," if "," in a + b else "."
    parts = [re.split("[.,]", text) if mark in text else [text, ""] for text in (a, b)]
    whole = max(len(part[0]) for part in parts)
    places = max(len(part[1]) for part in parts)
    padded = [part[0].zfill(whole) + mark + part[1].ljust(places, "0") for part in parts]
    steps = []
    order = "="
    for x, y in zip(padded[0], padded[1], strict=True):
        if x == mark:
            continue
        order = "=" if x == y else "<" if x < y else ">"
        steps.append(f"{x}{order}{y}")
        if order != "=":
            break
    return order, f"{padded[0]} {padded[1]}: {' '.join(steps)}"


def count_letter(word: str, letter: str, *, compared: bool = True) -> tuple[int, str]:
    """Spells the word with a running count beside each letter and the one that is counted, so that
    they are compared side by side: "b r0 e r0 r r1 r r2 y r2". Without: "b e r1 r2 y"."""
    count = 0
    spelled = []
    for character in word.lower():
        count += character == letter
        if compared:
            spelled.append(f"{character} {letter}{count}")
        else:
            spelled.append(f"{character}{count}" if character == letter else character)
    return count, " ".join(spelled)
