"""Finds the fenced blocks of a Markdown document."""

import re
from typing import NamedTuple

FENCE = re.compile(r" *(?P<marks>`{3,}|~{3,}) *(?P<language>[^`]*)")


class Block(NamedTuple):
    document: str
    line: int
    language: str
    text: str


def fenced_blocks(document: str, text: str) -> list[Block]:
    """Every fenced block, also an indented one.

    Raises:
      ValueError: a fence is not closed.
    """
    blocks, opened = [], None
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.fullmatch(line)
        if opened is None and fence:
            opened, first, lines = fence, number, []
        elif opened and fence and not fence["language"] and fence["marks"].startswith(opened["marks"]):
            blocks.append(Block(document, first, opened["language"].strip(), "\n".join(lines)))
            opened = None
        elif opened:
            lines.append(line)
    if opened:
        raise ValueError(f"{document}:{first}: the fence is not closed")
    return blocks
