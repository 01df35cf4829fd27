"""The bare loop runs as a child process and answers line by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ocserve.bench import ceiling


def test_every_rate_that_was_asked_for_is_measured(tiny_model: Path) -> None:
    found = ceiling.bare(tiny_model, threads=[1], batches=[1, 3], chunks=[16, 64], tokens=16)
    (rates,) = found.rates
    assert rates.threads == 1
    assert set(rates.prefill) == {16, 64}
    assert set(rates.decode) == {1, 3}
    assert all(rate > 0 for rate in (*rates.prefill.values(), *rates.decode.values()))


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"nothing")
    with pytest.raises(ceiling.CeilingFailed, match="error"):
        ceiling.bare(tmp_path / "no.gguf", threads=[1], batches=[1])


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "going"])
def test_the_child_that_is_killed_between_two_questions_is_said_to_have_ended(tiny_model: Path, is_gone: bool) -> None:
    with ceiling.BareLoop(tiny_model, most_sequences=2, tokens=16) as loop:
        assert loop.end_tokens
        assert loop.decode(2, 1) > 0
        loop._process.kill()
        if is_gone:
            loop._process.wait()
        with pytest.raises(ceiling.CeilingFailed, match="ended with status -9"):
            loop.decode(2, 1)
