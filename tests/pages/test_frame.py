"""Texts of the operator's become HTML that holds nothing but what is allowed."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from ocserve.pages.frame import page, written


def test_markdown_is_understood_and_html_is_text() -> None:
    text = """# Our *policy*

We keep `nothing`, **never**. See [the terms](https://example.com/terms?a=1&b=2)
and <b>this</b>.

- one
- two <i>

1. first
2. second

| a | b |
|---|---|
| 1 | 2 |

## Further"""
    assert written(text).replace("\n", "") == (
        "<h2>Our <em>policy</em></h2>"
        '<p>We keep <code>nothing</code>, <strong>never</strong>. See <a href="https://example.com/terms?a=1&amp;b=2">'
        "the terms</a>and &lt;b&gt;this&lt;/b&gt;.</p>"
        "<ul><li>one</li><li>two &lt;i&gt;</li></ul>"
        "<ol><li>first</li><li>second</li></ol>"
        "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>"
        "<h3>Further</h3>"
    )


def test_addresses_that_a_browser_would_run_are_no_links() -> None:
    for address in ("javascript:alert(1)", "data:text/html,x", "//example.com", "file:///etc/passwd"):
        assert "<a" not in written(f"[here]({address})")
    assert '"onclick' not in written('[here](https://x"onclick="y)')


def test_a_page_loads_no_picture() -> None:
    assert "<img" not in written("![seen](https://example.com/pixel.png)")


@given(st.text(alphabet="<>&\"'`[]()#*-!|_1. \nahtps:/", max_size=200))
def test_whatever_is_written_no_other_tag_appears(text: str) -> None:
    tags = set(re.findall(r"<(/?\w*)", written(text)))
    lists, cells = ("ul", "ol", "li"), ("table", "thead", "tbody", "tr", "th", "td")
    names = ("p", "h2", "h3", "h4", "h5", "h6", "code", "pre", "a", "em", "strong", "blockquote", "hr", "br")
    assert tags <= {f"{slash}{name}" for name in (*names, *lists, *cells) for slash in ("", "/")}


def test_a_page_needs_nothing_from_elsewhere() -> None:
    text = page("T & C", "<p>x</p>", (("docs", "API"),)).decode()
    assert "<title>T &amp; C</title>" in text
    assert '<nav><a href="docs">API</a></nav>' in text
    assert "<script" not in text
    assert "http" not in text
