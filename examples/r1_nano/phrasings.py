"""How people ask: templates in English ("en") and German ("de") for every kind of problem."""

from typing import Final, Literal

Language = Literal["en", "de"]

# {e} is an expression such as "47 * 86".
CALCULATE: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "{e}",
        "{e}?",
        "{e} =",
        "{e} = ?",
        "What is {e}?",
        "what is {e}",
        "What's {e}?",
        "How much is {e}?",
        "how much is {e}",
        "Calculate {e}.",
        "Calculate {e}",
        "Compute {e}.",
        "compute {e}",
        "Please calculate {e}.",
        "Can you compute {e}?",
        "Can you tell me what {e} is?",
        "Tell me {e}.",
        "Work out {e}.",
        "Solve {e}.",
        "Solve: {e}",
        "What does {e} equal?",
        "What is the result of {e}?",
        "Find {e}.",
        "Evaluate {e}.",
        "I need {e}.",
        "Could you work out {e} for me?",
        "What do you get for {e}?",
        "Hi, what is {e}?",
    ),
    "de": (
        "Was ist {e}?",
        "was ist {e}",
        "Wie viel ist {e}?",
        "wie viel ist {e}",
        "Wieviel ist {e}?",
        "Was ergibt {e}?",
        "Wie viel ergibt {e}?",
        "Berechne {e}.",
        "Berechne {e}",
        "berechne {e}",
        "Bitte berechne {e}.",
        "Rechne {e}.",
        "Rechne {e} aus.",
        "Kannst du {e} ausrechnen?",
        "Kannst du {e} berechnen?",
        "Was kommt bei {e} heraus?",
        "Wie lautet das Ergebnis von {e}?",
        "Sag mir, was {e} ist.",
        "Löse {e}.",
        "Wie viel macht {e}?",
        "Was macht {e}?",
        "Ich brauche {e}.",
        "Hallo, was ist {e}?",
    ),
}

# Whole sentences that name the operation themselves.
NAMED_OPERATION: Final[dict[Language, dict[str, tuple[str, ...]]]] = {
    "en": {
        "+": (
            "Add {a} and {b}.",
            "What is the sum of {a} and {b}?",
            "Sum of {a} and {b}?",
            "Add {b} to {a}.",
        ),
        "-": (
            "Subtract {b} from {a}.",
            "What is the difference of {a} and {b}?",
            "Take {b} away from {a}.",
            "What is {a} less {b}?",
        ),
        "*": (
            "Multiply {a} by {b}.",
            "What is the product of {a} and {b}?",
            "Multiply {a} and {b}.",
            "Product of {a} and {b}?",
        ),
    },
    "de": {
        "+": (
            "Addiere {a} und {b}.",
            "Was ist die Summe von {a} und {b}?",
            "Summe von {a} und {b}?",
            "Zähle {a} und {b} zusammen.",
        ),
        "-": (
            "Ziehe {b} von {a} ab.",
            "Was ist die Differenz von {a} und {b}?",
            "Subtrahiere {b} von {a}.",
            "Nimm {b} von {a} weg.",
        ),
        "*": (
            "Multipliziere {a} mit {b}.",
            "Was ist das Produkt von {a} und {b}?",
            "Nimm {a} mal {b}.",
            "Produkt von {a} und {b}?",
        ),
    },
}

# How an operator is written in a question.
OPERATORS: Final[dict[Language, dict[str, tuple[str, ...]]]] = {
    "en": {"+": ("+", "+", "plus"), "-": ("-", "-", "minus"), "*": ("*", "*", "×", "x", "times")},
    "de": {"+": ("+", "+", "plus"), "-": ("-", "-", "minus"), "*": ("*", "*", "×", "x", "mal")},
}

LARGER: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "Which is larger, {a} or {b}?",
        "which is larger, {a} or {b}",
        "Which is bigger, {a} or {b}?",
        "Which is greater: {a} or {b}?",
        "Which number is larger, {a} or {b}?",
        "Which number is bigger: {a} or {b}?",
        "What is larger, {a} or {b}?",
        "What is bigger, {a} or {b}?",
        "Is {a} or {b} larger?",
        "Is {a} or {b} bigger?",
        "Compare {a} and {b}: which is larger?",
        "Which one is greater, {a} or {b}?",
        "{a} or {b}, which is larger?",
        "{a} or {b}, which is bigger?",
    ),
    "de": (
        "Was ist größer, {a} oder {b}?",
        "was ist größer, {a} oder {b}",
        "Was ist größer: {a} oder {b}?",
        "Welche Zahl ist größer, {a} oder {b}?",
        "Welche Zahl ist größer: {a} oder {b}?",
        "Ist {a} oder {b} größer?",
        "Welche ist größer, {a} oder {b}?",
        "Vergleiche {a} und {b}: was ist größer?",
        "{a} oder {b}, was ist größer?",
        "Was ist mehr, {a} oder {b}?",
    ),
}

SMALLER: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "Which is smaller, {a} or {b}?",
        "Which number is smaller, {a} or {b}?",
        "What is smaller, {a} or {b}?",
        "Is {a} or {b} smaller?",
        "Which is less, {a} or {b}?",
        "Compare {a} and {b}: which is smaller?",
    ),
    "de": (
        "Was ist kleiner, {a} oder {b}?",
        "Welche Zahl ist kleiner, {a} oder {b}?",
        "Welche Zahl ist kleiner: {a} oder {b}?",
        "Ist {a} oder {b} kleiner?",
        "Was ist weniger, {a} oder {b}?",
    ),
}

LETTERS: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "How many {l} are in {w}?",
        "how many {l} are in {w}",
        "How many {l}'s are in {w}?",
        "How many {l}s are there in {w}?",
        "How many {l} are there in {w}?",
        "How many times does {l} appear in {w}?",
        "How many times does the letter {l} occur in {w}?",
        "How many letters {l} are in {w}?",
        "How many {l} are in the word {w}?",
        "How many {l}'s are in the word {w}?",
        "Count the letter {l} in {w}.",
        "Count the {l} in {w}.",
        "How often does {l} occur in {w}?",
        "How often is {l} in {w}?",
    ),
    "de": (
        "Wie viele {l} sind in {w}?",
        "wie viele {l} sind in {w}",
        "Wie viele {l} hat {w}?",
        "Wie viele {l} hat das Wort {w}?",
        "Wie viele {l} gibt es in {w}?",
        "Wie viele {l} stecken in {w}?",
        "Wie oft kommt {l} in {w} vor?",
        "Wie oft kommt der Buchstabe {l} in {w} vor?",
        "Wie oft steht {l} in {w}?",
        "Zähle die {l} in {w}.",
        "Zähle den Buchstaben {l} in {w}.",
        "Wie viele {l} sind im Wort {w}?",
    ),
}

NAMES: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "Anna",
        "Tom",
        "Mia",
        "Ben",
        "Lucy",
        "Sam",
        "Kate",
        "Max",
        "Emma",
        "Paul",
        "Alice",
        "Bob",
    ),
    "de": (
        "Anna",
        "Tim",
        "Mia",
        "Ben",
        "Lena",
        "Jan",
        "Eva",
        "Max",
        "Emma",
        "Paul",
        "Lisa",
        "Karl",
    ),
}
THINGS: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "apples",
        "books",
        "coins",
        "marbles",
        "cookies",
        "stamps",
        "pens",
        "cards",
        "eggs",
        "cups",
    ),
    "de": (
        "Äpfel",
        "Bücher",
        "Münzen",
        "Murmeln",
        "Kekse",
        "Briefe",
        "Stifte",
        "Karten",
        "Eier",
        "Nüsse",
    ),
}

# {n} and {m} are names, {t} things, {a} {b} {c} numbers; the key is the expression to be found.
STORIES: Final[dict[Language, dict[str, tuple[str, ...]]]] = {
    "en": {
        "a+b": (
            "{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?",
            "{n} has {a} {t}. {m} has {b} {t}. How many {t} do they have together?",
            "There are {a} {t} in one box and {b} in another. How many {t} are there in all?",
            "{n} finds {a} {t} and then {b} more. How many {t} is that?",
        ),
        "a-b": (
            "{n} has {a} {t} and gives away {b}. How many {t} are left?",
            "{n} had {a} {t} and lost {b}. How many {t} does {n} have now?",
            "There are {a} {t} in a box. {n} takes {b}. How many {t} remain?",
            "{n} has {a} {t}, {m} has {b}. How many more {t} does {n} have?",
        ),
        "a*b": (
            "There are {a} boxes with {b} {t} each. How many {t} are there?",
            "{n} buys {a} bags of {b} {t}. How many {t} is that?",
            "Each of {a} children has {b} {t}. How many {t} do they have together?",
        ),
        "a+b-c": ("{n} has {a} {t}, buys {b} more and gives away {c}. How many {t} are left?",),
        "a*b+c": (
            "{n} has {a} boxes with {b} {t} each and {c} more {t}. How many {t} does {n} have?",
        ),
    },
    "de": {
        "a+b": (
            "{n} hat {a} {t} und kauft {b} dazu. Wie viele {t} hat {n} jetzt?",
            "{n} hat {a} {t}. {m} hat {b} {t}. Wie viele {t} haben sie zusammen?",
            "In einer Kiste sind {a} {t}, in einer anderen {b}. Wie viele {t} sind es insgesamt?",
            "{n} findet {a} {t} und dann noch {b}. Wie viele {t} sind das?",
        ),
        "a-b": (
            "{n} hat {a} {t} und verschenkt {b}. Wie viele {t} bleiben übrig?",
            "{n} hatte {a} {t} und verlor {b}. Wie viele {t} hat {n} jetzt?",
            "In einer Kiste sind {a} {t}. {n} nimmt {b}. Wie viele {t} bleiben?",
            "{n} hat {a} {t}, {m} hat {b}. Wie viele {t} hat {n} mehr?",
        ),
        "a*b": (
            "Es gibt {a} Kisten mit je {b} {t}. Wie viele {t} sind das?",
            "{n} kauft {a} Beutel mit je {b} {t}. Wie viele {t} sind das?",
            "Jedes von {a} Kindern hat {b} {t}. Wie viele {t} haben sie zusammen?",
        ),
        "a+b-c": (
            "{n} hat {a} {t}, kauft {b} dazu und verschenkt {c}. Wie viele {t} bleiben übrig?",
        ),
        "a*b+c": ("{n} hat {a} Kisten mit je {b} {t} und noch {c} {t}. Wie viele {t} hat {n}?",),
    },
}
