"""The samples for proxies: their access logs have nothing of what an answer says of a key's limits and balance."""

from __future__ import annotations

import re

from ocserve.accounts.buckets import Dimension, LimitState
from ocserve.http import limit_headers
from tests.test_layers import ROOT


def test_caddys_log_leaves_out_every_header_of_limits_and_balance() -> None:
    sample = (ROOT / "packaging" / "Caddyfile").read_text(encoding="utf-8")
    state = LimitState(requests=Dimension(1, 1, 1), tokens=Dimension(1, 1, 1))
    told = {**limit_headers.openai(state), **limit_headers.anthropic(state, 0), **limit_headers.balance(1)}
    left_out = re.findall(r"^\s*resp_headers>([A-Za-z-]+) delete$", sample, re.MULTILINE)
    # Caddy knows a header by this spelling only.
    assert sorted(left_out) == sorted(name.decode().title() for name in told)
