"""Texts of the operator's become HTML that holds nothing but what is allowed."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from ocserve.pages.frame import page, written


def test_a_little_markdown_is_understood() -> None:
    text = """# Our *policy*

We keep `nothing`. See [the terms](https://example.com/terms?a=1&b=2)
and <b>this</b>.

- one
- two <i>

## Further"""
    assert written(text) == (
        "<h2>Our *policy*</h2>\n"
        '<p>We keep <code>nothing</code>. See <a href="https://example.com/terms?a=1&amp;b=2">the terms</a>\n'
        "and &lt;b&gt;this&lt;/b&gt;.</p>\n"
        "<ul><li>one</li><li>two &lt;i&gt;</li></ul>\n"
        "<h3>Further</h3>"
    )


def test_addresses_that_a_browser_would_run_are_no_links() -> None:
    for address in ("javascript:alert(1)", "data:text/html,x", "//example.com", 'https://x"onclick="y'):
        assert "<a" not in written(f"[here]({address})")


@given(st.text(alphabet="<>&\"'`[]()#*- \nahtps:/.", max_size=200))
def test_whatever_is_written_no_other_tag_appears(text: str) -> None:
    tags = set(re.findall(r"<(/?\w*)", written(text)))
    assert tags <= {
        f"{slash}{name}" for name in ("p", "h2", "h3", "h4", "h5", "ul", "li", "code", "a") for slash in ("", "/")
    }


def test_a_page_needs_nothing_from_elsewhere() -> None:
    text = page("T & C", "<p>x</p>", (("docs", "API"),)).decode()
    assert "<title>T &amp; C</title>" in text
    assert '<nav><a href="docs">API</a></nav>' in text
    assert "<script" not in text
    assert "http" not in text
