"""The life of a generation, with a scripted engine: who is refused when, and that everything is settled in the end."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.keys import Caller
from ocserve.accounts.limits import Limiter
from ocserve.engine import desk
from ocserve.engine.fleet import Fleet
from ocserve.engine.handle import LoadError
from ocserve.engine.residency import Memory, Rules
from ocserve.engine.sizes import queued_bytes
from ocserve.engine.wire import EngineFacts
from ocserve.errors import ApiError, EngineUnavailable, InvalidRequest, Overloaded, RateLimited
from ocserve.generation import (
    ChatPrompt,
    Embedded,
    EmbedRequest,
    Encoded,
    EncodeRequest,
    Failed,
    Finished,
    GenerateRequest,
    Image,
    Message,
    Sampling,
    ScoreRequest,
    Started,
    TextDelta,
    TextPrompt,
    TokenPrompt,
    Usage,
)
from ocserve.modelcard import ServedModel
from ocserve.service import Service
from ocserve.trace import Trace
from tests.http.harness import MODEL
from tests.scripted import Script, ScriptedEngine, alone

CALLER = Caller(key_id="key", salt=b"salt", anonymous=False)
REQUEST = GenerateRequest(
    request_id="", model=MODEL.id, prompt=TextPrompt(text="hi"), sampling=Sampling(), max_tokens=20
)


def service(engine: ScriptedEngine, **limits: int) -> Service:
    branch = config.Limits(**limits)  # type: ignore[arg-type]
    return alone(engine, MODEL, branch)


OTHER = replace(MODEL, id="other", aliases=("tiny", "o"), parallel=2)  # an alias never wins over an id


def service_of_two(load_s: float = 0.02, capacity: int = 2, **limits: int) -> tuple[Service, dict[str, ScriptedEngine]]:
    scripts = {MODEL.id: Script(step_s=0.001), "other": Script(tokens=("x",) * 100, step_s=0.03)}  # the other is slow
    engines = {name: ScriptedEngine(script, load_s=load_s) for name, script in scripts.items()}
    fleet = Fleet(engines, Memory(dict.fromkeys(engines, (1,)), (capacity,), lambda: capacity), Rules(), wait_s=0.05)
    branch = config.Limits(**limits)  # type: ignore[arg-type]
    describe = {model.id: partial(described, model) for model in (MODEL, OTHER)}
    return Service(fleet, describe, Limiter(branch), branch), engines


def described(model: ServedModel, facts: EngineFacts | None) -> ServedModel:
    return model if facts is None else replace(model, context_length=facts.context)


async def run(made: Service, trace: Trace | None = None, model: str = MODEL.id) -> list[object]:
    asked = replace(REQUEST, model=model)
    async with made.generation(asked, CALLER, trace or Trace("r", "/x")) as generation:
        return [event async for event in generation]


def remaining_tokens(made: Service) -> int:
    state = made.limiter.snapshot(CALLER.key_id).tokens
    assert state is not None
    return state.remaining


async def test_a_generation_is_observed_and_settled_to_the_token() -> None:
    made = service(ScriptedEngine(Script(prompt_tokens=7, tokens=("a", "b", "c"))), tokens_per_minute=1000)
    trace = Trace("mine", "/v1/x")
    events = await run(made, trace)
    assert isinstance(events[-1], Finished)
    assert remaining_tokens(made) in (1000 - 7 - 3, 1000 - 7 - 2)  # a token's refill may have come in between
    record = trace.record(200)
    assert (record.usage.prompt_tokens, record.usage.completion_tokens) == (7, 3)
    assert record.queue_ms is not None
    assert record.ttft_ms is not None
    assert record.queue_ms <= record.ttft_ms <= record.total_ms
    assert made.active == 0


async def test_tokens_are_held_while_it_runs() -> None:
    made = service(ScriptedEngine(Script(prompt_tokens=7, step_s=0.01)), tokens_per_minute=1000)
    async with made.generation(REQUEST, CALLER, Trace("r", "/x")):
        assert 1000 - remaining_tokens(made) in (27, 26)
    assert remaining_tokens(made) > 990 - 7


async def test_several_choices_reserve_and_cost_the_prompt_once() -> None:
    script = Script(prompt_tokens=7, cached_tokens=5, tokens=("a", "b"), others=(("c",), ("d", "e", "f")), step_s=0.01)
    made = service(ScriptedEngine(script), tokens_per_minute=1000)
    trace = Trace("r", "/x")
    async with made.generation(replace(REQUEST, choices=3), CALLER, trace) as generation:
        assert 1000 - remaining_tokens(made) in (7 + 3 * 20, 7 + 3 * 20 - 1)
        events = [event async for event in generation]
    assert sorted(event.index for event in events if isinstance(event, Finished)) == [0, 1, 2]
    assert (trace.usage.prompt_tokens, trace.usage.cached_tokens, trace.usage.completion_tokens) == (7, 5, 6)
    assert remaining_tokens(made) in (1000 - 7 - 6, 1000 - 7 - 5)


async def test_leaving_early_ends_every_choice_with_exact_usage() -> None:
    script = Script(tokens=("x",) * 1000, others=(("y",),), step_s=0.001)
    engine = ScriptedEngine(script)
    made = service(engine)
    trace = Trace("r", "/x")
    async with made.generation(replace(REQUEST, choices=4, max_tokens=1000), CALLER, trace) as generation:
        seen = 0
        async for _ in generation:
            seen += 1
            if seen > 20:
                break
    (only,) = engine.runs.values()
    assert trace.finish_reason == "cancelled"
    assert not only.unfinished
    assert trace.usage.completion_tokens == sum(only.completion)


async def test_choices_count_as_that_many_in_the_queue() -> None:
    made = service(ScriptedEngine(Script(step_s=30), parallel=MODEL.parallel), queue=2)
    async with made.generation(replace(REQUEST, choices=MODEL.parallel + 2), CALLER, Trace("r", "/x")):
        with pytest.raises(Overloaded):
            await run(made)


async def test_leaving_early_cancels_in_the_engine_and_charges_what_was_generated() -> None:
    engine = ScriptedEngine(Script(tokens=("x",) * 1000, step_s=0.001))
    made = service(engine, tokens_per_minute=5000)
    trace = Trace("r", "/x")
    async with made.generation(REQUEST, CALLER, trace) as generation:
        async for _ in generation:
            if trace.usage.completion_tokens:
                break
    assert trace.finish_reason == "cancelled"
    assert 0 < trace.usage.completion_tokens < 1000
    assert made.active == 0


@pytest.mark.parametrize("refusal", [InvalidRequest("no", param="prompt"), EngineUnavailable("gone")])
async def test_a_refusal_while_preparing_costs_nothing(refusal: ApiError) -> None:
    made = service(ScriptedEngine(Script(refuse=refusal)), tokens_per_minute=1000, concurrent_requests=1)
    for _ in range(3):
        with pytest.raises(ApiError) as raised:
            await run(made)
        assert raised.value is refusal
    assert remaining_tokens(made) == 1000


async def test_an_engine_crash_is_an_event_and_settles() -> None:
    made = service(ScriptedEngine(Script(crash_at=2)), concurrent_requests=1)
    for _ in range(2):
        events = await run(made)
        assert isinstance(events[-1], Failed)
    assert made.active == 0


async def test_the_limiter_refuses_before_the_engine_hears_of_it() -> None:
    engine = ScriptedEngine()
    made = service(engine, requests_per_minute=1)
    await run(made)
    with pytest.raises(RateLimited):
        await run(made)
    assert len(engine.runs) == 1


async def test_beyond_the_queue_requests_are_refused_early_with_an_estimate() -> None:
    engine = ScriptedEngine(Script(tokens=("x",) * 200, step_s=0.05), parallel=MODEL.parallel)
    made = service(engine, queue=2)
    running = [asyncio.create_task(run(made)) for _ in range(MODEL.parallel + 2)]
    await asyncio.sleep(0.05)
    told = []
    for _ in range(5):
        with pytest.raises(Overloaded) as refusal:
            await run(made)
        assert refusal.value.retry_after_s is not None
        told.append(refusal.value.retry_after_s)
    assert told == sorted(set(told))  # each one's own
    assert 0.1 < told[0] < told[-1] < 5.0  # nothing has ended yet: the guess is a second, at a third of the pace
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    assert made.active == 0


async def test_draining_refuses_new_ones_and_lets_accepted_ones_finish() -> None:
    made = service(ScriptedEngine(Script(tokens=("x",) * 20, step_s=0.005)))
    accepted = asyncio.create_task(run(made))
    await asyncio.sleep(0.02)
    draining = asyncio.create_task(made.stop(5))
    await asyncio.sleep(0)
    assert not made.ready
    with pytest.raises(EngineUnavailable):
        await run(made)
    await draining
    assert isinstance((await accepted)[-1], Finished)


@pytest.mark.parametrize("code", ["draining", "shutting_down"])
async def test_at_the_drain_deadline_the_rest_ends_with_an_error_that_says_why(code: str) -> None:
    made = service(ScriptedEngine(Script(tokens=("x",) * 10_000, step_s=0.005)))
    accepted = asyncio.create_task(run(made))
    await asyncio.sleep(0.02)
    await (made.drain(0.05) if code == "draining" else made.stop(0.05))
    last = (await accepted)[-1]
    assert isinstance(last, Failed)
    assert last.error.code == code


async def test_two_requests_with_the_same_id_do_not_meet_in_the_engine() -> None:
    engine = ScriptedEngine()
    made = service(engine)
    await asyncio.gather(run(made, Trace("same", "/x")), run(made, Trace("same", "/x")))
    assert len({each.request.request_id for each in engine.runs.values()}) == 2


async def test_the_tenants_salt_reaches_the_engine() -> None:
    engine = ScriptedEngine()
    await run(service(engine))
    assert next(iter(engine.runs.values())).request.salt == b"salt"


async def test_each_model_has_its_own_engine_and_queue() -> None:
    made, engines = service_of_two(queue=0)
    first = [asyncio.create_task(run(made, model="other")) for _ in range(OTHER.parallel)]
    await asyncio.sleep(0.05)
    with pytest.raises(Overloaded):
        await run(made, model="other")
    assert isinstance((await run(made))[-1], Finished)
    assert (made.owed("other"), made.owed(MODEL.id), made.active) == (OTHER.parallel, 0, OTHER.parallel)
    await asyncio.gather(*first)
    assert (len(engines["other"].runs), len(engines[MODEL.id].runs), made.active) == (OTHER.parallel, 1, 0)


async def test_a_model_is_busy_from_admission_to_settlement() -> None:
    """The other model has no room as long as one request of this one is anywhere between the two."""
    made, engines = service_of_two(capacity=1)
    async with made.generation(REQUEST, CALLER, Trace("r", "/x")):
        with pytest.raises(Overloaded) as refusal:
            await run(made, model="other")
        assert refusal.value.code == "model_not_loaded"
    assert engines[MODEL.id].loaded
    await run(made, model="other")
    assert not engines[MODEL.id].loaded
    assert made.active == 0


async def test_a_load_that_fails_costs_its_requests_nothing() -> None:
    made, engines = service_of_two(tokens_per_minute=1000, concurrent_requests=2)
    engines["other"].load_error = LoadError("damaged")
    for _ in range(3):
        with pytest.raises(EngineUnavailable) as refusal:
            await run(made, model="other")
        assert refusal.value.code == "model_load_failed"
    assert remaining_tokens(made) == 1000
    assert isinstance((await run(made))[-1], Finished)


async def test_readiness_is_the_default_models() -> None:
    made, engines = service_of_two()
    await run(made, model="other")
    engines[MODEL.id].facts_known = False
    assert not made.ready
    engines[MODEL.id].facts_known = True
    await run(made)
    assert made.ready
    engines[MODEL.id].ready = False  # it crashed and restarts
    assert not made.ready


async def test_a_drain_covers_every_model_and_those_that_wait_for_a_load() -> None:
    made, _ = service_of_two(load_s=0.2)
    streaming = asyncio.create_task(run(made, model="other"))
    await asyncio.sleep(0.25)
    waiting = asyncio.create_task(run(made))
    await asyncio.sleep(0.05)
    await made.drain(0.05)
    last = (await streaming)[-1]
    assert isinstance(last, Failed)
    assert last.error.code == "draining"
    with pytest.raises(EngineUnavailable) as refusal:
        await waiting
    assert refusal.value.code == "draining"
    assert made.active == 0


def test_what_a_waiting_prompt_came_to_share_is_known_at_its_end() -> None:
    """A prompt may wait for another that computes the same beginning; its start cannot tell yet."""
    trace = Trace("r", "/x")
    trace.observe(Started(prompt_tokens=50))
    trace.observe(Finished(reason="stop", usage=Usage(prompt_tokens=50, cached_tokens=40, completion_tokens=3)))
    assert (trace.usage.cached_tokens, trace.usage.completion_tokens) == (40, 3)


def embed(text: str) -> EmbedRequest:
    return EmbedRequest(request_id="q", model=MODEL.id, inputs=(TextPrompt(text=text),))


async def test_a_question_is_settled_to_the_token_and_what_only_tokenises_costs_none() -> None:
    engine = ScriptedEngine()
    made = service(engine, tokens_per_minute=1000)
    trace = Trace("req_1", "POST /v1/embeddings")
    answer = await made.ask(embed("12345"), CALLER, trace)
    assert isinstance(answer, Embedded)
    assert trace.record(200).usage == Usage(prompt_tokens=5)
    assert remaining_tokens(made) == 995
    prompt = TextPrompt(text="12345")
    await made.ask(EncodeRequest(request_id="q", model=MODEL.id, prompt=prompt), CALLER, Trace("req_2", "-"))
    assert remaining_tokens(made) == 995
    assert made.active == 0
    assert isinstance(engine.asked[1], EncodeRequest)
    assert engine.asked[1].salt == CALLER.salt
    assert {question.request_id for question in engine.asked}.isdisjoint({"q"})


async def test_a_question_holds_its_tokens_before_it_is_computed() -> None:
    """All that it may have where that is there, else those that are counted; what has too many never passes."""
    engine = ScriptedEngine()
    made = service(engine, tokens_per_minute=1000)
    await made.ask(embed("x" * 900), CALLER, Trace("req_1", "-"))
    computed = [each for each in engine.asked if isinstance(each, EmbedRequest) and not each.count_only]
    with pytest.raises(RateLimited) as refusal:
        await made.ask(embed("x" * 500), CALLER, Trace("req_2", "-"))
    assert refusal.value.limit == "tokens_per_minute"
    with pytest.raises(InvalidRequest, match=r"1001 tokens .* 1000 tokens per minute") as never:
        await made.ask(embed("x" * 1001), CALLER, Trace("req_3", "-"))
    assert never.value.param == "input"
    ranking = ScoreRequest(request_id="q", model=MODEL.id, query="q", documents=("x" * 600, "x" * 500))
    with pytest.raises(InvalidRequest, match="1100 tokens") as never:
        await made.ask(ranking, CALLER, Trace("req_4", "-"))
    assert never.value.param == "documents"
    assert [each for each in engine.asked if isinstance(each, EmbedRequest) and not each.count_only] == computed
    assert made.active == made.owed(MODEL.id) == 0


async def test_a_question_is_refused_as_a_generation_is() -> None:
    made = service(ScriptedEngine(), requests_per_minute=1)
    await made.ask(embed("a"), CALLER, Trace("req_1", "-"))
    with pytest.raises(RateLimited):
        await made.ask(embed("a"), CALLER, Trace("req_2", "-"))
    await made.drain(0.1)
    with pytest.raises(EngineUnavailable):
        await made.ask(embed("a"), CALLER, Trace("req_3", "-"))


async def test_a_question_that_takes_too_long_is_given_up() -> None:
    engine = ScriptedEngine()
    made = service(engine)
    forever = asyncio.Event()

    async def ask(question: object) -> Embedded:
        await forever.wait()
        raise AssertionError

    engine.ask = ask  # type: ignore[assignment, method-assign]
    with pytest.raises(Overloaded):
        await made.ask(replace(embed("a"), deadline_s=0.05), CALLER, Trace("req_1", "-"))
    assert made.active == made.owed(MODEL.id) == 0


async def test_more_answers_than_ever_fit_are_refused_for_good() -> None:
    engine = ScriptedEngine(Script(tokens=("x",)))
    made = service(engine, queue=2)
    most = MODEL.parallel + 2
    for request, more, param in (
        (replace(REQUEST, choices=most + 1), (), "n"),
        (replace(REQUEST, choices=most), (REQUEST,), "prompt"),
    ):
        with pytest.raises(InvalidRequest) as refusal:
            async with made.generation(request, CALLER, Trace("r", "/x"), more=more):
                pass
        assert refusal.value.param == param
    async with made.generation(REQUEST, CALLER, Trace("r", "/x")):
        with pytest.raises(Overloaded):  # it fits, though not now
            async with made.generation(replace(REQUEST, choices=most), CALLER, Trace("r", "/x")):
                pass
    assert made.owed(MODEL.id) == 0


async def test_log_probabilities_are_bounded_over_all_prompts_and_choices() -> None:
    made = service(ScriptedEngine(Script(prompt_tokens=30, tokens=("a",)), context=10_000_000), queue=300)
    long = replace(REQUEST, max_tokens=50_000, logprobs=20)
    scored = replace(REQUEST, prompt_logprobs=20_000)
    assert len(await run(made)) > 1
    async with made.generation(long, CALLER, Trace("r", "/x")):
        pass  # one answer may run to the context's end
    for request, more in ((replace(long, choices=2), ()), (scored, ()), (long, (long,))):
        with pytest.raises(InvalidRequest) as refusal:
            async with made.generation(request, CALLER, Trace("r", "/x"), more=more):
                pass
        assert refusal.value.param == "logprobs"
    assert made.active == 0


async def test_one_of_several_prompts_is_refused_by_its_place() -> None:
    bad = Script(refuse=InvalidRequest("no", param="prompt[2]"))
    made = service(ScriptedEngine(lambda request: bad if request.max_tokens == 7 else Script()))
    with pytest.raises(InvalidRequest) as refusal:
        async with made.generation(REQUEST, CALLER, Trace("r", "/x"), more=(replace(REQUEST, max_tokens=7),)):
            pass
    assert refusal.value.param == "prompt[1][2]"


async def test_what_a_question_needs_is_held_before_it_is_asked() -> None:
    engine = ScriptedEngine()
    made = service(engine, tokens_per_minute=1000)
    for huge in (TokenPrompt(tokens=(1,) * 1001), TextPrompt(text="x" * 10_000)):
        with pytest.raises(InvalidRequest) as refusal:
            await made.ask(replace(embed(""), inputs=(huge,)), CALLER, Trace("r", "-"))
        assert (refusal.value.param, refusal.value.code) == ("input", "rate_limit_exceeded")
    assert remaining_tokens(made) == 1000
    assert all(isinstance(each, EmbedRequest) and each.count_only for each in engine.asked)
    assert made.active == 0


async def test_prompts_that_are_only_tokenised_do_not_wait_without_bound() -> None:
    engine = ScriptedEngine()
    made = service(engine)
    go = asyncio.Event()

    async def ask(question: object) -> Encoded:
        await go.wait()
        return Encoded(count=1)

    engine.ask = ask  # type: ignore[assignment, method-assign]

    def count(text: str) -> asyncio.Task[object]:
        question = EncodeRequest(request_id="", model=MODEL.id, prompt=TextPrompt(text=text), count_only=True)
        return asyncio.create_task(made.ask(question, CALLER, Trace("r", "-")))

    many = [count("a") for _ in range(200)]
    await asyncio.sleep(0.05)
    assert {type(task.exception()) for task in many if task.done()} == {Overloaded}
    assert 0 < sum(not task.done() for task in many) < 100
    go.set()
    await asyncio.gather(*many, return_exceptions=True)
    go.clear()
    large = [count("a" * 20_000_000) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert [task.done() for task in large] == [False, True]
    go.set()
    await asyncio.gather(*large, return_exceptions=True)
    assert made.active == 0


def test_what_a_later_prompt_used_before_it_failed_is_counted() -> None:
    trace = Trace("r", "/x")
    trace.observe(Started(prompt_tokens=5))
    trace.observe(Finished(reason="stop", usage=Usage(prompt_tokens=5, completion_tokens=7), index=0))
    trace.observe(Started(prompt_tokens=6), 1, 1)
    trace.observe(TextDelta(text="x", tokens=2, index=2), 1, 1)
    failed = Failed(error=EngineUnavailable("gone").info, usage=Usage(prompt_tokens=6, completion_tokens=300))
    trace.observe(failed, 1, 1)
    assert (trace.usage.prompt_tokens, trace.usage.completion_tokens) == (11, 307)


def shown(size: int, url: str | None = None) -> ChatPrompt:
    image = Image(data=bytes(size), at=0, url=url)
    return ChatPrompt(messages=(Message(role="user", images=(image,)),))


async def test_the_files_of_images_count_where_prompts_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "_MOST_BYTES", 1000)
    monkeypatch.setattr(desk, "_MOST_ENCODING_BYTES", 1000)
    made = service(ScriptedEngine(Script(tokens=("x",) * 20, step_s=0.01)))
    asked = replace(REQUEST, prompt=shown(600))
    async with made.generation(asked, CALLER, Trace("r", "/x")) as generation:
        with pytest.raises(Overloaded) as caught:
            async with made.generation(asked, CALLER, Trace("r", "/x")):
                pass
        assert caught.value.retry_after_s
        assert [event async for event in generation]
    async with made.generation(replace(REQUEST, prompt=shown(5000)), CALLER, Trace("r", "/x")):
        pass  # alone it fits
    one = made._desks[MODEL.id]
    with one.encoding(queued_bytes(shown(600))), pytest.raises(Overloaded), one.encoding(queued_bytes(shown(600))):
        pass


async def test_what_is_still_fetched_holds_no_place() -> None:
    arrived = asyncio.Event()

    async def fetch(prompt: ChatPrompt, key: str) -> ChatPrompt:
        if prompt.messages[0].images[0].url is not None:
            await arrived.wait()
        assert key == CALLER.key_id
        return shown(10)

    made = service(ScriptedEngine(Script()), queue=0)
    made._fetch = fetch

    async def ask() -> None:
        async with made.generation(
            replace(REQUEST, prompt=shown(0, "https://a.test/")), CALLER, Trace("r", "/x")
        ) as generation:
            assert [event async for event in generation]

    waiting = [asyncio.create_task(ask()) for _ in range(MODEL.parallel)]
    await asyncio.sleep(0.05)
    assert (made.owed(MODEL.id), made.active) == (0, MODEL.parallel)
    assert await run(made)
    arrived.set()
    await asyncio.gather(*waiting)
    assert (made.owed(MODEL.id), made.active) == (0, 0)
