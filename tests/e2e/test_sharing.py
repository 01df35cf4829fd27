"""Nothing is computed twice, seen from outside: a real server, real clients, and the usage that they are told."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
from platformdirs import user_cache_path

from ocserve.engine.profile import FOLDER
from tests.e2e.daemon import RunningDaemon, daemon, wait_until

PROFILES = user_cache_path("ocserve-tests") / FOLDER
KEY = "sk-sharing-between-keys-is-not-done-0123"
WORDS = (
    *("harbour", "light", "tide", "keeper", "storm", "bell", "lantern", "rope"),
    *("stone", "window", "gull", "salt", "winter", "letter", "boat", "map"),
)


def text(words: int, seed: int) -> str:
    """Ordinary words in an order that depends on the seed."""
    return " ".join(WORDS[(index * index + seed * (index + 3)) % len(WORDS)] for index in range(words))


def client(server: RunningDaemon, key: str = "any") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.base_url, api_key=key, timeout=120, max_retries=0)


async def ask(
    api: openai.AsyncOpenAI, messages: list[dict[str, str]], max_tokens: int = 8, **rest: Any
) -> tuple[str, int, int]:
    """The answer, the prompt's tokens and how many of them were not computed."""
    answer = await api.chat.completions.create(
        model="default",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        temperature=0,
        **rest,
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    cached = answer.usage.prompt_tokens_details.cached_tokens or 0
    return answer.choices[0].message.content or "", answer.usage.prompt_tokens, cached


def asks(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


async def test_simultaneous_requests_compute_what_they_share_once(model_cache: Path, full: bool) -> None:
    """And requests of another key compute all of it: what is shared is not visible across keys."""
    shared = text(700 if full else 250, 1)
    with daemon("smollm2:135m", store=model_cache, env={"OCSERVE_API_KEY": KEY}) as server:
        async with client(server, KEY) as api:
            answers = await asyncio.gather(*(ask(api, asks(shared, text(8, seed))) for seed in range(2, 10)))
            prompts = sum(prompt for _, prompt, _ in answers)
            computed = prompts - sum(cached for _, _, cached in answers)
            longest = max(prompt for _, prompt, _ in answers)
            print(f"8 prompts of about {longest} tokens: {computed} of {prompts} computed")
            assert computed <= 1.05 * (longest + 7 * 24)
            _, prompt, cached = await ask(api, asks(shared, text(8, 99)))
            assert cached > 0.9 * (prompt - 24)  # the positive control
            without_key = {"Authorization": openai.Omit()}
            assert (await ask(api, asks(shared, text(8, 99)), extra_headers=without_key))[2] == 0


@pytest.mark.parametrize("ending", ["stopped", "killed"])
async def test_a_conversation_goes_on_after_a_restart(model_cache: Path, tmp_path: Path, ending: str) -> None:
    """Each turn computes only what is new, and after a restart the stored blocks come back from disk."""
    env = {"OCSERVE_CACHE_DIRECTORY": str(tmp_path), "OCSERVE_CACHE_DISK_BYTES": str(1 << 30)}
    if PROFILES.exists():  # of earlier starts, so that the server need not measure
        shutil.copytree(PROFILES, tmp_path / FOLDER)
    messages = asks(text(200, 1), text(20, 2))
    with daemon("smollm2:135m", store=model_cache, env=env) as server:
        async with client(server) as api:
            before = 0
            for turn in range(3):
                answer, prompt, cached = await ask(api, messages, max_tokens=24)
                if turn:
                    assert prompt - cached <= 1.1 * (prompt - before)
                before = prompt + 23  # the last token of an answer is computed with the next turn
                messages += [
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": text(20, 3 + turn)},
                ]
        if ending == "killed":
            # Kept prefixes are stored when nothing is to be computed, in blocks of 128 tokens.
            await asyncio.to_thread(wait_until, lambda: len([*tmp_path.rglob("*.kv")]) >= before // 128)
            server.process.kill()
    files = list((tmp_path / "prefixes").rglob("*"))
    assert all(not file.stat().st_mode & 0o077 for file in files)
    with daemon("smollm2:135m", store=model_cache, env=env) as server:
        async with client(server) as api:
            _, prompt, cached = await ask(api, messages)
            assert cached >= (before // 128) * 128 > 200
            assert (await ask(api, asks(text(200, 7), "Hi")))[2] < 40
