"""What published pages share: one style without scripts, links from each to the others, and texts of the operator.

Such a text is Markdown (CommonMark, with tables) without HTML and images: pages load nothing from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

STYLE = """
:root { color-scheme: light dark; } body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem; border-top: 1px solid #8884; }
nav a { margin-right: 1rem; } code { font: .9em ui-monospace, monospace; }
"""
Link = tuple[str, str]  # a page's name in the path, and its title
# Those that every server has.
LINKS: tuple[Link, ...] = (
    ("docs", "API"),
    ("limits", "Limits"),
    ("pricing", "Pricing"),
    ("privacy", "Privacy"),
    ("status", "Status"),
)

_LINK = re.compile(r"\[([^\[\]]{1,200})\]\(((?:https?://|mailto:)[^\s()<>\"']{1,500})\)")
_ADDRESS = re.compile(r"(?:https?://|mailto:)[^\s<>\"']{1,500}", re.IGNORECASE)


def page(title: str, body: str, links: Sequence[Link] = LINKS) -> bytes:
    """A whole page. `body` is HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>{navigation(links)}<h1>{escape(title)}</h1>
{body}
</body></html>
""".encode()


def navigation(links: Sequence[Link]) -> str:
    """Links to the pages, relative, since the page cannot know under which address it was reached."""
    return "<nav>" + "".join(f'<a href="{name}">{escape(title)}</a>' for name, title in links) + "</nav>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts; none of them is HTML."""
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{prose(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def prose(text: str) -> str:
    """Text with its `code` and its links marked up."""
    parts = escape(text, quote=False).split("`")
    return "".join(
        f"<code>{part}</code>" if index % 2 else _LINK.sub(r'<a href="\2">\1</a>', part)
        for index, part in enumerate(parts)
    )


@dataclass(frozen=True, slots=True)
class Text:
    """A text of the operator's, as it wrote it and as HTML. False where there is none."""

    markdown: str = ""
    html: str = ""

    @staticmethod
    def of(markdown: str) -> Text:
        """Rendered here once and for all: long ones take a moment, and some take seconds."""
        return Text(markdown, written(markdown)) if markdown else NO_TEXT

    def __bool__(self) -> bool:
        return bool(self.markdown)


NO_TEXT = Text()


def written(text: str) -> str:
    """A text of the operator's as HTML. Its headings stand below the page's."""
    markdown = _markdown()
    tokens = markdown.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 1, 6)}"
    return str(markdown.renderer.render(tokens, markdown.options, {})).strip()


@cache
def _markdown() -> MarkdownIt:
    from markdown_it import MarkdownIt  # 150 ms that a server without such texts does not spend

    found = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    found.validateLink = _leads_on  # type: ignore[method-assign]
    return found


def _leads_on(url: str) -> bool:
    return _ADDRESS.fullmatch(url) is not None
