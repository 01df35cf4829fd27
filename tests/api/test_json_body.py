"""The strict decoder: quirks of lenient ones are refused, and no body costs more than a moment."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest

from ocserve.api import json_body
from ocserve.errors import InvalidRequest


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"\xef\xbb\xbf{}",
        b"{}\x00",
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":"\\ud800"}',
        b'{"\\udfff":1}',
        b'{"a":["\\ud83d\\ude00","\\ud83d"]}',
        b'{"a":1,"a":1}',
        b'{"a":{"b":1,"b":2}}',
        b'{"a":"\xff"}',
        '{"a":1}'.encode("utf-16"),
        b'{"a":' + b"9" * 33 + b"}",
        b'{"a":-' + b"9" * 5000 + b"}",
        b'{"a":"tab\there"}',
    ],
)
def test_what_lenient_decoders_accept_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        json_body.decode(body)
    assert caught.value.status == 400


def test_a_surrogate_pair_is_a_character() -> None:
    assert json_body.decode(b'{"a":"\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def test_a_lone_surrogate_and_a_duplicate_key_are_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        json_body.decode(b'{"messages":[{"content":"\\ud800"}]}')
    assert caught.value.param == "messages[0].content"
    with pytest.raises(InvalidRequest) as caught:
        json_body.decode(b'{"stop":"a","stop":"b"}')
    assert caught.value.param == "stop"


def test_depth_counts_brackets_outside_of_strings() -> None:
    json_body.check_shape(b'{"a":"[[[[[[[[["}', 2)
    json_body.check_shape(b'{"a":"\\"[[[[[[["}', 2)
    json_body.check_shape(b"[" * 64 + b"]" * 64, 64)
    with pytest.raises(InvalidRequest):
        json_body.check_shape(b"[" * 65 + b"]" * 65, 64)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 4_000_000,
        b'{"a":' * 800_000,
        b"[]," * 1_300_000,
        b'"",' * 1_300_000,
        b'"\\' * 2_000_000,
        b'\\"' * 2_000_000,
        b'"' + b'\\"' * 2_000_000,
        b'{"a":"' + b"x" * 4_000_000 + b'"}',
    ],
    ids=["arrays", "objects", "empty arrays", "empty strings", "escapes", "quotes", "unterminated", "one string"],
)
def test_a_hostile_body_of_4_mib_costs_milliseconds(body: bytes) -> None:
    begun = time.process_time()
    with suppress(InvalidRequest):  # some of them are merely large
        json_body.check_shape(body, 64)
    assert time.process_time() - begun < 0.5  # the dearest takes 0.05 s
