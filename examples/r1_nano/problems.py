"""Problems of every kind r1-nano learns, and the rule that holds some of them out.

A problem is held out when a hash of what makes it up (its operands, its word and letter, its
sentence) falls into one class of ten. Training never draws those, so the held-out list asks only
for operands that were never seen together. Pairs of single digits are facts to be learned by heart
and are never held out.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import smalltalk
from phrasings import (
    CALCULATE,
    LARGER,
    LETTERS,
    NAMED_OPERATION,
    NAMES,
    OPERATORS,
    SMALLER,
    STORIES,
    THINGS,
    Language,
)
from solutions import Expression, compare, count_letter, work
from words import ENGLISH, GERMAN, SYLLABLES

HELD_OUT_CLASSES: Final = 10
# The questions everybody tries first: never trained on.
# How many turns went before a question, and how often so many.
TURNS_BEFORE: Final = {0: 65, 1: 25, 2: 4, 3: 3, 4: 1, 6: 1, 8: 1}
ALWAYS_HELD_OUT: Final = frozenset({"pair 47 86", "decimals 9.11 9.9", "word strawberry"})


@dataclass(frozen=True)
class Problem:
    """One question with its worked solution.

    `answer` is what belongs into the box, or the whole sentence where nothing is to be boxed. The
    first line of a thought says again what is asked, those after it are the work.
    """

    kind: str
    prompt: str
    thought: str
    reply: str
    answer: str
    boxed: bool
    held_out: bool

    @property
    def is_worked(self) -> bool:
        """Whether there is work between the question and the answer."""
        return self.boxed and "\n" in self.thought

    def at_once(self) -> "Problem":
        """The same, answered without the work."""
        return replace(self, thought=self.thought.split("\n")[0])


def is_held_out(key: str) -> bool:
    """Whether the hash rule keeps this key out of training."""
    digest = hashlib.sha256(key.encode()).digest()
    return key in ALWAYS_HELD_OUT or digest[0] * 256 + digest[1] < 65536 // HELD_OUT_CLASSES


def _pair_held_out(a: int, b: int) -> bool:
    low, high = sorted((a, b))
    return high >= 10 and is_held_out(f"pair {low} {high}")


def _language(rng: random.Random) -> Language:
    return "de" if rng.random() < 0.4 else "en"


def _number(rng: random.Random, weights: tuple[float, ...]) -> int:
    """A number whose count of digits is drawn by `weights` (first entry: one digit)."""
    digits = rng.choices(range(1, len(weights) + 1), weights)[0]
    return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def _worked(kind: str, prompt: str, expression: Expression, held_out: bool) -> Problem:
    """The solution restates the expression, then works it line by line."""
    text, worked = expression.text(), work(expression)
    thought = "\n".join((text, *worked.lines))
    answer = str(worked.value)
    return Problem(kind, prompt, thought, f"{text} = \\boxed{{{answer}}}", answer, True, held_out)


def _ask(rng: random.Random, language: Language, expression: Expression) -> str:
    """The expression in a question, its operators and spaces as people write them."""
    spaces = rng.random() < 0.7
    text = ""
    for character in expression.text():
        if character in "+-*":
            written = rng.choice(OPERATORS[language][character])
            text += f" {written} " if spaces or written.isalpha() else written
        else:
            text += character
    return rng.choice(CALCULATE[language]).format(e=text)


def _binary(rng: random.Random, kind: str, operator: str, a: int, b: int) -> Problem:
    language = _language(rng)
    expression = Expression(a, operator, b)
    if rng.random() < 0.2:
        prompt = rng.choice(NAMED_OPERATION[language][operator]).format(a=a, b=b)
    else:
        prompt = _ask(rng, language, expression)
    return _worked(kind, prompt, expression, _pair_held_out(a, b))


def addition(rng: random.Random) -> Problem:
    """Two numbers of up to four digits."""
    weights = (1, 4, 4, 2)
    return _binary(rng, "addition", "+", _number(rng, weights), _number(rng, weights))


def subtraction(rng: random.Random) -> Problem:
    """Two numbers of up to four digits; one in eight results is negative."""
    weights = (1, 4, 4, 2)
    b, a = sorted((_number(rng, weights), _number(rng, weights)))
    if rng.random() < 0.125:
        a, b = b, a
    return _binary(rng, "subtraction", "-", a, b)


def product(rng: random.Random) -> Problem:
    """Two numbers of up to two digits."""
    weights = (1, 4)
    return _binary(rng, "product", "*", _number(rng, weights), _number(rng, weights))


def _factor(rng: random.Random) -> int:
    return rng.randrange(2, 10) if rng.random() < 0.7 else rng.randrange(10, 30)


def _two_steps(rng: random.Random) -> Expression:
    """An expression of two operations, never below zero, no product beyond two digits by two."""
    a, b = rng.randrange(2, 50), rng.randrange(2, 50)
    c = _factor(rng)
    high, low = max(a, b), min(a, b)
    form = rng.randrange(9)
    if form == 0:
        return Expression(Expression(a, "+", b), "*", c)
    if form == 1:
        return Expression(c, "*", Expression(a, "+", b))
    if form == 2:
        return Expression(Expression(high, "-", low), "*", c)
    if form == 3:
        return Expression(c, "*", Expression(high, "-", low))
    if form == 4:
        return Expression(rng.randrange(a + b, 200), "-", Expression(a, "+", b))
    if form == 5:
        return Expression(rng.randrange(2, 100), "+", Expression(a, "*", c))
    if form == 6:
        return Expression(Expression(a, "*", c), "-", rng.randrange(1, a * c))
    if form == 7:
        return Expression(Expression(a, "+", b), "-", rng.randrange(1, a + b))
    return Expression(rng.randrange(high, 100), "-", Expression(high, "-", low))


def expression(rng: random.Random) -> Problem:
    """Two steps with brackets; held out when any of its two operations is."""
    worked = _two_steps(rng)
    held_out = any(_pair_held_out(a, b) for a, b in worked.pairs())
    return _worked("expression", _ask(rng, _language(rng), worked), worked, held_out)


def _decimal(rng: random.Random, whole: int) -> str:
    places = rng.choices((0, 1, 2, 3), (1, 5, 6, 2))[0]
    return f"{whole}.{rng.randrange(10**places):0{places}d}" if places else str(whole)


def decimals(rng: random.Random) -> Problem:
    """Two decimals, mostly with the same whole part, which is where comparing goes wrong."""
    language = _language(rng)
    whole = _number(rng, (3, 1))
    a = _decimal(rng, whole)
    b = _decimal(rng, whole if rng.random() < 0.7 else _number(rng, (3, 1)))
    if rng.random() < 0.03:
        b = a + "0" if "." in a else a + ".0"
    held_out = is_held_out("decimals " + " ".join(sorted((a, b))))
    if language == "de" and rng.random() < 0.8:
        a, b = a.replace(".", ","), b.replace(".", ",")
    larger = rng.random() < 0.7
    prompt = rng.choice((LARGER if larger else SMALLER)[language]).format(a=a, b=b)
    order, line = compare(a, b)
    if order == "=":
        answer = "equal" if language == "en" else "gleich"
    else:
        answer = a if (order == ">") == larger else b
    thought = f"{'max' if larger else 'min'} {a} {b}\n{line}"
    return Problem("decimals", prompt, thought, f"\\boxed{{{answer}}}", answer, True, held_out)


def _invented(rng: random.Random) -> str:
    """A word nobody knows, up to 14 letters, often with one letter many times."""
    word = "".join(rng.choice(SYLLABLES) for _ in range(rng.randrange(2, 5)))
    if rng.random() < 0.3:
        letters = list(word)
        repeated = rng.choice(letters)
        for _ in range(2):
            letters.insert(rng.randrange(len(letters) + 1), repeated)
        word = "".join(letters)
    return word[:14]


def letters(rng: random.Random, *, compared: bool = True, doubled: bool = False) -> Problem:
    """How often a letter occurs in a word; half of the words are invented."""
    language = _language(rng)
    word = rng.choice(ENGLISH if language == "en" else GERMAN)
    held_out = is_held_out(f"word {word}")
    if rng.random() < 0.5:
        word, held_out = _invented(rng), False
    if doubled:
        place = rng.randrange(len(word))
        word = word[:place] + word[place] + word[place:]
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghiklmnoprstuwxyz")
    shown_letter = rng.choice((letter, letter, letter.upper(), f'"{letter}"', f"'{letter}'"))
    shown_word = rng.choice((word, word, word.capitalize(), f'"{word}"'))
    prompt = rng.choice(LETTERS[language]).format(l=shown_letter, w=shown_word)
    count, spelled = count_letter(word, letter, compared=compared)
    # The word as it was asked: other spaces or capitals would be other tokens.
    thought = f"{letter} {shown_word}\n{spelled} ={count}"
    reply = f"{letter}: \\boxed{{{count}}}"
    return Problem("letters", prompt, thought, reply, str(count), True, held_out)


def word_problem(rng: random.Random) -> Problem:
    """A short story about one or two operations."""
    language = _language(rng)
    form = rng.choice(("a+b", "a-b", "a*b", "a+b-c", "a*b+c"))
    a, b, c = rng.randrange(2, 100), rng.randrange(2, 100), rng.randrange(2, 50)
    if form == "a*b" or form == "a*b+c":
        a, b = rng.randrange(2, 13), rng.randrange(2, 31)
    if form == "a-b":
        a, b = max(a, b), min(a, b)
    if form == "a+b-c":
        c = rng.randrange(1, a + b)
    worked = {
        "a+b-c": Expression(Expression(a, "+", b), "-", c),
        "a*b+c": Expression(Expression(a, "*", b), "+", c),
    }.get(form) or Expression(a, form[1], b)
    n, m = rng.sample(NAMES[language], 2)
    prompt = rng.choice(STORIES[language][form]).format(
        n=n, m=m, t=rng.choice(THINGS[language]), a=a, b=b, c=c
    )
    held_out = any(_pair_held_out(x, y) for x, y in worked.pairs())
    return _worked("word_problem", prompt, worked, held_out)


def chat(rng: random.Random) -> Problem:
    """A greeting, a question about the model, or something it cannot do."""
    language = _language(rng)
    sort = rng.choices(("greeting", "identity", "single", "request", "hard"), (3, 3, 2, 3, 3))[0]
    if sort == "request":
        topic = rng.choice(smalltalk.TOPICS[language])
        prompt = rng.choice(smalltalk.REQUESTS[language]).format(t=topic)
    elif sort == "hard":
        prompt = rng.choice(smalltalk.TOO_HARD[language]).format(
            a=rng.randrange(10, 1000),
            b=rng.randrange(2, 100),
            big=rng.randrange(10**5, 10**8),
            big2=rng.randrange(10**3, 10**6),
        )
    else:
        source = {
            "greeting": smalltalk.GREETINGS,
            "identity": smalltalk.IDENTITY,
            "single": smalltalk.SINGLE,
        }[sort]
        prompt = rng.choice(source[language])
    topic = sort if sort in smalltalk.OPENINGS else "other"
    answer = smalltalk.OPENINGS[topic][language] + smalltalk.ABILITIES[language]
    thought = smalltalk.THOUGHTS[topic]
    return Problem("chat", prompt, thought, answer, answer, False, is_held_out(f"chat {prompt}"))


KINDS: Final[dict[str, Callable[[random.Random], Problem]]] = {
    "addition": addition,
    "subtraction": subtraction,
    "product": product,
    "expression": expression,
    "decimals": decimals,
    "letters": letters,
    "word_problem": word_problem,
    "chat": chat,
}


def spelling(rng: random.Random) -> Problem:
    """A problem of letters whose solution only spells the word, numbering what is counted: the
    warm-up learns that first."""
    return letters(rng, compared=False)


def doubles(rng: random.Random) -> Problem:
    """A problem of letters with one letter of the word doubled, which is easily spelled once where
    a token ends with it and the next one begins with it."""
    return letters(rng, doubled=True)


EXERCISES: Final = KINDS | {"spelling": spelling, "doubles": doubles}
"""What the warm-up draws from; only KINDS are asked for in the end."""


def draw(rng: random.Random, kind: str, *, held_out: bool = False) -> Problem:
    """Draws one problem of a kind of EXERCISES, from the training side or the held-out side."""
    while True:
        problem = EXERCISES[kind](rng)
        if problem.held_out == held_out:
            return problem


def draw_history(rng: random.Random) -> list[tuple[str, str]]:
    """Earlier turns of a conversation, mostly none: questions of any kind with their answers, their
    thoughts left out as the chat template does."""
    turns = rng.choices(list(TURNS_BEFORE), list(TURNS_BEFORE.values()))[0]
    problems = [draw(rng, rng.choice(list(KINDS))) for _ in range(turns)]
    return [(problem.prompt, problem.reply) for problem in problems]
