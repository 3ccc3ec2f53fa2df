"""CommonMark with tables and mathematics, as models write it: what is parsed, and what is left.

Formulas pass as they are, so that no backslash, star or underscore in them is taken for markup:
\\(...\\) and $...$ in a line, \\[...\\] and $$...$$ there or on lines of their own. HTML is text
like any other. A reference definition ("[1]: http://...") stays visible.
"""

import re
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

DELIMITERS = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}
DISPLAY = {"\\[": "\\]", "$$": "$$"}
# Pandoc's rule, so that "$5 and $6" are prices: no space inside the dollars, no digit behind.
DOLLARS = re.compile(r"\$(?![\s$])(?:\\.|[^$\\\n])*?(?<![\s\\])\$(?!\d)")


def _inline(state: StateInline, silent: bool) -> bool:
    source, begin = state.src, state.pos
    opening = source[begin : begin + 2]
    if opening in DELIMITERS:
        close = source.find(DELIMITERS[opening], begin + 2, state.posMax)
        end = close + 2 if close > begin + 2 else -1
    else:
        match = DOLLARS.match(source, begin, state.posMax)
        end = match.end() if match else -1
    if end < 0:
        return False
    if not silent:
        state.push("math_inline", "", 0).content = source[begin:end]
    state.pos = end
    return True


def _block(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """From a line that begins with a display delimiter to the one that ends with its partner; a
    blank line ends it too, as TeX has none in a formula."""
    if state.is_code_block(start_line):
        return False

    def line_at(number: int) -> str:
        return state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]]

    first = line_at(start_line)
    if first[:2] not in DISPLAY:
        return False
    closing = DISPLAY[first[:2]]
    if closing in first[2:] and not first.rstrip().endswith(closing):
        return False  # A formula at the beginning of a sentence.
    if silent:
        return True
    last = start_line
    text = first[2:]
    while not text.rstrip().endswith(closing):
        if last + 1 >= end_line or state.isEmpty(last + 1) or state.sCount[last + 1] < 0:
            break
        last += 1
        text = line_at(last)
    token = state.push("math_block", "", 0)
    token.content = state.getLines(start_line, last + 1, state.blkIndent, False)
    token.map = [start_line, last + 1]
    state.line = last + 1
    return True


def _new_parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    parser.disable(["html_block", "html_inline", "reference"])
    parser.inline.ruler.before("escape", "math_inline", _inline)
    parser.block.ruler.before(
        "fence", "math_block", _block, {"alt": ["paragraph", "blockquote", "list"]}
    )
    return parser


@cache
def parser() -> MarkdownIt:
    """For blocks and what is in them."""
    return _new_parser()


@cache
def block_parser() -> MarkdownIt:
    """For the limits of blocks alone."""
    return _new_parser().disable("inline")
