"""Tables in Markdown, and the blocks of pages that programs write.

A block stands between the lines ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_BLOCK = re.compile(r"(<!-- begin ([\w-]+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, without a line break at its end."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def block_names(page: str) -> list[str]:
    """The names of a page's blocks."""
    return [name for _, name, _ in _BLOCK.findall(page)]


def fill_blocks(page: str, texts: Mapping[str, str]) -> str:
    """A page with new text in some of its blocks.

    Args:
        page: the page as it is.
        texts: the new text of each block, by name.

    Raises:
        ValueError: the page has no block of that name.
    """
    names = block_names(page)
    for name in texts:
        if name not in names:
            raise ValueError(
                f"the page has no block {name!r}, but {', '.join(names) or 'none at all'}. Put the "
                f"lines <!-- begin {name} --> and <!-- end {name} --> where the text is to stand."
            )

    def filled(block: re.Match[str]) -> str:
        begin, name, end = block.groups()
        return f"{begin}\n{texts[name].strip()}\n\n{end}" if name in texts else block[0]

    return _BLOCK.sub(filled, page)
