"""An answer on its way to a terminal: Markdown, block by block."""

from typing import TYPE_CHECKING

from localr1.cli.live import LiveRegion
from localr1.cli.output import Output, escape_controls

if TYPE_CHECKING:
    from localr1.cli.markdown_blocks import Piece


class MarkdownAnswer:
    """Each block is printed once, rendered, when it is closed; what is still open shows as it came
    in a live region below, so that no token waits to be seen."""

    def __init__(self, output: Output, region: LiveRegion) -> None:
        from localr1.cli.markdown_blocks import BlockSplitter

        self._output = output
        self._region = region
        self._splitter = BlockSplitter()
        self._has_printed = False

    def add(self, text: str) -> None:
        self._print(self._splitter.feed(escape_controls(text)))
        if self._region.is_due():
            self._paint_tail()

    def finish(self) -> None:
        self._print(self._splitter.flush())
        self._region.clear()

    def _paint_tail(self) -> None:
        from localr1.cli.cells import wrapped

        columns, rows = self._region.size()
        # Only what can be on the screen is wrapped anew for each painting.
        tail = self._splitter.tail[-columns * rows :].rstrip("\n")
        lines = list(wrapped(tail, columns)) if tail else []
        if self._has_printed and lines and not self._splitter.is_in_code:
            lines = ["", *lines]
        last = self._region.last_lines(lines, narrowed_to=(columns + 1) // 2)
        self._region.paint(last, dim_from=len(last))

    def _print(self, pieces: "list[Piece]") -> None:
        if not pieces:
            return
        from localr1.cli.markdown_blocks import Block
        from localr1.cli.markdown_render import render_block, render_code

        self._region.clear()
        console = self._output.console("stdout")
        for piece in pieces:
            if isinstance(piece, Block):
                starts = piece.is_spaced
                lines = render_block(piece.source, self._region.size()[0])
            else:
                starts = piece.opening is not None
                lines = render_code(piece.text, piece.begin, piece.info)
            if starts and self._has_printed:
                console.out()
            if not isinstance(piece, Block) and piece.opening is not None:
                console.out(piece.opening, style="dim", highlight=False)
            for line in lines:
                # soft_wrap: a line too long to break is left to the terminal, not cut.
                console.print(line, soft_wrap=True, highlight=False)
            if not isinstance(piece, Block) and piece.closing is not None:
                console.out(piece.closing, style="dim", highlight=False)
            self._has_printed = True
        console.file.flush()
