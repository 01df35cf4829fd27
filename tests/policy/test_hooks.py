"""Programs and servers that judge: what they are given, what is taken of their answers, and how they end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx

from ocserve import config
from ocserve.config import ConfigError
from ocserve.policy.hooks import CommandHook, UrlHook, open_hook
from ocserve.policy.protocol import NoVerdict
from tests.policy.moderation import ALLOWED, Moderator, by_word, moderating

QUESTION = b'{"version":1,"text":"hello"}'


def shell(script: str) -> CommandHook:
    return CommandHook(("/bin/sh", "-c", script))


@pytest.fixture(scope="module")
def moderator() -> Iterator[Moderator]:
    with moderating() as found:
        yield found


async def test_a_program_reads_the_question_and_writes_the_answer() -> None:
    assert await shell("cat").ask(QUESTION) == QUESTION


async def test_a_large_question_passes_both_ways_at_once() -> None:
    assert len(await shell("wc -c").ask(b"x" * 3_000_000)) < 20
    assert await shell(f"echo '{ALLOWED.decode()}'").ask(b"x" * 3_000_000) == ALLOWED + b"\n"  # it reads nothing


async def test_a_program_has_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCSERVE_API_KEY", "sk-secret-secret-secret")
    names = {line.partition(b"=")[0] for line in (await CommandHook(("/usr/bin/env",)).ask(b"")).splitlines()}
    assert names == {b"PATH", b"LANG"}


@pytest.mark.parametrize(
    ("script", "why"),
    [("exit 3", "status 3"), ("kill -9 $$", "status -9"), ("head -c 70000 /dev/zero", "more than 65536 bytes")],
)
async def test_a_program_that_fails_gives_no_verdict(script: str, why: str) -> None:
    with pytest.raises(NoVerdict, match=why):
        await shell(script).ask(QUESTION)


async def test_a_program_that_is_not_there_gives_no_verdict() -> None:
    with pytest.raises(NoVerdict, match="cannot be started: No such file"):
        await CommandHook(("/nowhere/judge",)).ask(QUESTION)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


async def test_a_start_that_nobody_waits_for_leaves_no_child(tmp_path: Path) -> None:
    """The program has begun, and has a child, before its start has been told of."""
    pids = tmp_path / "pids"
    asked = asyncio.create_task(shell(f"sleep 60 & echo $! > {pids}.part; mv {pids}.part {pids}; wait").ask(QUESTION))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    deadline = time.monotonic() + 5
    while not pids.exists():  # this blocks the loop, so that the start cannot go on
        assert time.monotonic() < deadline
        time.sleep(0.002)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asked, 5)
    while alive(int(pids.read_text())):
        assert time.monotonic() < deadline, "a child goes on"
        await asyncio.sleep(0.005)


async def test_a_program_is_killed_with_its_children_when_its_time_is_up(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    hook = shell(f"sleep 60 & echo $! > {pids}.part; echo $$ >> {pids}.part; mv {pids}.part {pids}; wait")
    asked = asyncio.create_task(hook.ask(QUESTION))
    while not pids.exists():
        await asyncio.sleep(0.005)
    found = [int(line) for line in pids.read_text().split()]
    assert all(alive(pid) for pid in found)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in found):
        assert time.monotonic() < deadline, "a process goes on"
        await asyncio.sleep(0.005)


async def test_a_server_is_posted_the_question_with_its_token_over_one_connection(moderator: Moderator) -> None:
    before, hook = moderator.connections, UrlHook(moderator.url, "s3cret")
    try:
        assert [await hook.ask(QUESTION) for _ in range(3)] == [ALLOWED] * 3
    finally:
        await hook.close()
    assert moderator.asked[-1] == {"version": 1, "text": "hello"}
    assert moderator.headers[-1]["authorization"] == "Bearer s3cret"
    assert moderator.headers[-1]["content-type"] == "application/json"
    assert moderator.connections == before + 1


@pytest.mark.parametrize(
    ("status", "size", "why"),
    [(302, 0, "status 302"), (500, 0, "status 500"), (204, 0, "status 204"), (200, 70_000, "more than 65536 bytes")],
)
async def test_a_server_that_answers_otherwise_gives_no_verdict(
    moderator: Moderator, status: int, size: int, why: str
) -> None:
    moderator.answer = lambda question: (status, b"x" * size, {"location": "/elsewhere"})
    hook = UrlHook(moderator.url, None)
    asked = len(moderator.asked)
    try:
        with pytest.raises(NoVerdict, match=why):
            await hook.ask(QUESTION)
    finally:
        await hook.close()
    assert len(moderator.asked) == asked + 1  # a redirect is not followed


async def test_a_server_that_is_not_there_gives_no_verdict() -> None:
    hook = UrlHook("http://127.0.0.1:1/", None)
    try:
        with pytest.raises(NoVerdict, match="ConnectError"):
            await hook.ask(QUESTION)
    finally:
        await hook.close()


async def test_neither_has_the_event_loop_wait(moderator: Moderator) -> None:
    moderator.answer = by_word
    hook = UrlHook(moderator.url, None)
    with blockbuster_ctx():
        assert await shell("cat").ask(QUESTION) == QUESTION
        assert await hook.ask(QUESTION) == ALLOWED
        await hook.close()


def test_settings_without_a_hook_open_none() -> None:
    assert open_hook(config.Policy(text=Path("/policy.md"))) is None


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("https://judge.example/check", ()),
        ("http://127.0.0.1:9/check", ()),
        ("http://[::1]:9", ()),
        ("http://localhost", ()),
        ("http://judge.internal:9/", ("judge.internal",)),
    ],
)
def test_addresses_that_may_be_asked(url: str, hosts: tuple[str, ...]) -> None:
    assert isinstance(open_hook(config.Policy(url=url, http_hosts=hosts)), UrlHook)


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (config.Policy(url="http://judge.example/"), "plain http"),
        (config.Policy(url="http://127.0.0.1.judge.example/"), "plain http"),
        (config.Policy(url="http://judge.internal/", http_hosts=("internal",)), "plain http"),
        (config.Policy(url="https://me:secret@judge.example/"), "a name or a password"),
        (config.Policy(url="ftp://judge.example/"), "not an address"),
        (config.Policy(url="judge"), "not an address"),
        (config.Policy(url="https://judge.example:port/"), "not an address"),
        (config.Policy(url="https://judge.example/", command=("judge",)), "both set"),
        (config.Policy(command=("judge",), checks=()), "policy.checks is empty"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(policy: config.Policy, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as refused:
        open_hook(policy)
    assert "secret" not in refused.value.message


def test_a_server_without_a_hook_does_not_load_the_client() -> None:
    code = "import sys, ocserve.policy.hooks; sys.exit('httpx2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
