"""The plan of a step, as a pure function of the sequences' facts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ocserve.engine.scheduler import PrefillPace, plan
from ocserve.engine.slots import Move, Phase, Sequence
from ocserve.generation import GenerateRequest, Sampling, TextPrompt


class NoSampler:
    def close(self) -> None: ...


def sequence(name: str, prompt: int, *, tenant: str = "a", max_tokens: int = 32) -> Sequence:
    request = GenerateRequest(
        request_id=name,
        model="m",
        prompt=TextPrompt(text=""),
        sampling=Sampling(),
        max_tokens=max_tokens,
        salt=tenant.encode(),
    )
    return Sequence(request, tuple(range(prompt)), max_tokens=max_tokens, sampler=NoSampler(), deadline=1e9)


def running(name: str, prompt: int, *, generated: int = 0, **rest: object) -> Sequence:
    made = sequence(name, prompt, **rest)  # type: ignore[arg-type]
    made.move(Move.ADMIT)
    if generated:
        made.move(Move.COMPUTED)
        made.generated = [0] * generated
        made.computed = prompt + generated - 1
    return made


def names(sequences: tuple[Sequence, ...]) -> list[str]:
    return [each.id for each in sequences]


def test_prompts_are_served_one_after_another() -> None:
    step = plan([running("first", 300), running("second", 300)], [], slots=4, pool_tokens=4096, prefill_budget=256)
    assert [(chunk.sequence.id, chunk.count) for chunk in step.prefill] == [("first", 256)]


def test_what_the_first_prompt_leaves_of_the_budget_goes_to_the_next() -> None:
    step = plan([running("first", 100)], [sequence("second", 300)], slots=4, pool_tokens=4096, prefill_budget=256)
    assert [(chunk.sequence.id, chunk.count) for chunk in step.prefill] == [("first", 100), ("second", 156)]


def test_every_decoding_sequence_decodes_in_every_step() -> None:
    decoding = [running(str(index), 10, generated=2) for index in range(4)]
    step = plan([*decoding, running("new", 500)], [], slots=8, pool_tokens=4096, prefill_budget=64)
    assert names(step.decode) == ["0", "1", "2", "3"]
    assert step.prefill[0].count == 64


def test_a_slot_goes_to_the_tenant_with_the_fewest_and_then_to_the_earliest() -> None:
    waiting = [sequence("a2", 8), sequence("a3", 8), sequence("b1", 8, tenant="b"), sequence("b2", 8, tenant="b")]
    step = plan([running("a1", 8, generated=1)], waiting, slots=4, pool_tokens=4096, prefill_budget=256)
    assert names(step.admit) == ["b1", "a2", "b2"]


def test_a_sequence_that_does_not_fit_beside_the_others_waits() -> None:
    step = plan(
        [running("big", 900, generated=1)], [sequence("next", 120)], slots=4, pool_tokens=1024, prefill_budget=256
    )
    assert step.admit == ()


def test_alone_any_sequence_is_admitted() -> None:
    assert names(plan([], [sequence("big", 1020)], slots=4, pool_tokens=1024, prefill_budget=256).admit) == ["big"]


def test_a_full_pool_preempts_the_newest_and_admits_nobody() -> None:
    sequences = [running("old", 500, generated=100), running("new", 400, generated=25)]
    step = plan(sequences, [sequence("waiting", 1)], slots=4, pool_tokens=1024, prefill_budget=256)
    assert names(step.preempt) == ["new"]
    assert names(step.decode) == ["old"]
    assert step.admit == ()


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 80), st.sampled_from("abc")), max_size=6),
    st.lists(st.tuples(st.integers(1, 400), st.sampled_from("abc")), max_size=6),
    st.integers(0, 256),
)
def test_a_plan_never_exceeds_slots_pool_or_budget_and_always_advances(
    held: list[tuple[int, int, str]], asked: list[tuple[int, str]], budget: int
) -> None:
    now = [running(f"r{i}", p, generated=g, tenant=t) for i, (p, g, t) in enumerate(held)]
    waiting = [sequence(f"w{i}", p, tenant=t) for i, (p, t) in enumerate(asked)]
    step = plan(now, waiting, slots=6, pool_tokens=512, prefill_budget=budget)
    after = [each for each in now if each not in step.preempt] + list(step.admit)
    assert len(after) <= 6
    assert sum(each.length for each in after) <= 512 or len(after) == 1
    assert sum(chunk.count for chunk in step.prefill) <= budget
    assert all(0 < chunk.count <= chunk.sequence.remaining for chunk in step.prefill)
    if budget and (now or waiting):
        assert step.decode or step.prefill
    assert set(step.decode) == {each for each in after if each.phase is Phase.DECODE}


def test_prefill_takes_the_whole_batch_alone_and_a_time_slice_beside_streams() -> None:
    pace = PrefillPace(256, target_s=0.1)
    for _ in range(50):
        pace.observe(200, 0.5)  # 400 tokens a second
    assert pace.budget(0) == 256
    assert 35 <= pace.budget(4) <= 45
