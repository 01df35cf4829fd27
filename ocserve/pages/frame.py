"""What published pages share: one style without scripts, links from each to the others, and texts of the operator.

Such a text may use a little Markdown (headings, lists, `code`, links to web addresses); everything else in it is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

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
_HEADING = re.compile(r"(#{1,4})\s+(.+)")
_BULLET = re.compile(r"[-*]\s+(.+)")


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


def written(text: str) -> str:
    """A text of the operator's as HTML. Its headings stand below the page's."""
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").strip()):
        lines = [line.strip() for line in block.split("\n")]
        if heading := _HEADING.fullmatch(lines[0]):
            level = min(len(heading[1]) + 1, 5)
            blocks.append(f"<h{level}>{prose(heading[2])}</h{level}>")
            lines = lines[1:]
        bullets = [_BULLET.fullmatch(line) for line in lines]
        if lines and all(bullets):
            blocks.append(f"<ul>{''.join(f'<li>{prose(found[1])}</li>' for found in bullets if found)}</ul>")
        elif lines:
            blocks.append(f"<p>{prose(chr(10).join(lines))}</p>")
    return "\n".join(blocks)
