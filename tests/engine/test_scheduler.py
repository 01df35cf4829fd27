"""The decisions of a step, as pure functions of the sequences' facts and a cost model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocserve.engine import composer as composing
from ocserve.engine.attention import Attention, Span
from ocserve.engine.composer import Chunk, Composer
from ocserve.engine.scheduler import admit, preempt
from ocserve.engine.slots import Group, Move, Phase, Sequence
from ocserve.engine.speculation import Speculator
from ocserve.generation import GenerateRequest, Sampling, TextPrompt


class NoSampler:
    def accept(self, token: int) -> None: ...
    def close(self) -> None: ...


class Machine:
    """A synthetic machine: seconds by row count."""

    def __init__(self, step_s: float, row_s: float, free_rows: int) -> None:
        self._step_s, self._row_s, self._free = step_s, row_s, free_rows

    def seconds(self, rows: int, cells: int = 0, *, prefill: bool = False) -> float:
        return self._step_s + self._row_s * max(0, rows - self._free)

    def rows_within(self, seconds: float, *, rows: int, cells_per_row: int, most: int) -> int:
        return max((more for more in range(most + 1) if self.seconds(rows + more) <= seconds), default=0)


CPU = Machine(0.005, 0.0025, 0)  # every row costs
GPU = Machine(0.010, 0.0001, 64)  # up to 64 rows are free, further ones nearly


def sequence(name: str, prompt: int, *, tenant: str = "a", max_tokens: int = 32) -> Sequence:
    request = GenerateRequest(
        request_id=name,
        model="m",
        prompt=TextPrompt(text=""),
        sampling=Sampling(),
        max_tokens=max_tokens,
        salt=tenant.encode(),
    )
    return Sequence(Group(request), tuple(range(prompt)), max_tokens=max_tokens, sampler=NoSampler(), deadline=1e9)


def running(name: str, prompt: int, *, generated: int = 0, **rest: object) -> Sequence:
    made = sequence(name, prompt, **rest)  # type: ignore[arg-type]
    made.move(Move.ADMIT)
    made.attached = True
    if generated:
        made.move(Move.COMPUTED)
        made.generated = [0] * generated
        made.computed = prompt + generated - 1
    return made


def names(sequences: tuple[Sequence, ...]) -> list[str]:
    return [each.id for each in sequences]


def counts(chunks: tuple[Chunk, ...]) -> list[tuple[str, int]]:
    return [(chunk.sequence.id, chunk.count) for chunk in chunks]


def composer(machine: Machine = CPU, **rest: object) -> Composer:
    return Composer(machine, batch_tokens=256, outputs=72, slots=8, **rest)  # type: ignore[arg-type]


def decoding(count: int) -> list[Sequence]:
    return [running(f"d{index}", 10, generated=2) for index in range(count)]


def two_steps(machine: Machine, sequences: list[Sequence], prompt: Sequence) -> tuple[Chunk, float]:
    """The chunk of `prompt`, and the time from one token of each of `sequences` to the next."""
    put_together = composer(machine)
    decoded: list[Chunk] = []
    prefilled: list[Chunk] = []
    seconds = 0.0
    while not (decoded and prefilled):
        decode, prefill = put_together.compose(sequences, [prompt], 0)
        decoded += decode
        prefilled += prefill
        batch = (*decode, *prefill)
        seconds += machine.seconds(sum(chunk.rows for chunk in batch), Attention().cells(chunk.span for chunk in batch))
    (chunk,) = prefilled
    return chunk, seconds


def test_prompts_are_served_one_after_another() -> None:
    assert counts(composer().compose([], [running("first", 300), running("second", 300)], 0)[1]) == [("first", 150)]


def test_where_rows_cost_the_first_prompt_does_not_wait_for_the_second() -> None:
    prompts = [running("first", 100), running("second", 100)]
    assert counts(composer(CPU).compose([], prompts, 0)[1]) == [("first", 100)]


def test_where_rows_are_free_prompts_share_a_batch() -> None:
    prompts = [running("first", 20), running("second", 20), running("third", 20)]
    assert counts(composer(GPU).compose([], prompts, 0)[1]) == [("first", 20), ("second", 20), ("third", 20)]


def test_what_is_left_of_a_batch_goes_to_a_prompt_that_goes_on_later() -> None:
    prompts = [running("first", 60), running("second", 300)]
    larger_gpu = Machine(0.020, 0.0001, 64)
    assert counts(composer(larger_gpu).compose([], prompts, 0)[1]) == [("first", 60), ("second", 150)]


def test_joint_order_gives_every_prompt_the_same_share() -> None:
    prompts = [running("first", 300), running("second", 300), running("short", 10)]
    shares = dict(counts(composer(order="joint").compose([], prompts, 0)[1]))
    assert shares["short"] == 10
    assert shares["first"] == shares["second"] == 100  # thirds of what 123 rows at most would need


@pytest.mark.parametrize("machine", [CPU, GPU])
def test_a_step_with_prompts_stays_within_the_bound(machine: Machine) -> None:
    """The time that running streams wait is the stated multiple of what decoding alone takes, or the floor."""
    chunk, seconds = two_steps(machine, decoding(4), running("long", 4000))
    alone = machine.seconds(4)
    bound = composing.bound_s(alone)
    assert 7 * alone <= bound <= 10 * alone
    assert 0.5 * bound <= seconds <= bound or chunk.count == 252


def test_rows_that_are_no_cheaper_together_take_turns() -> None:
    cpu, gpu = composer(CPU), composer(GPU)
    prompt = running("long", 4000)
    kinds = [[bool(part) for part in cpu.compose(decoding(4), [prompt], 0)] for _ in range(4)]
    assert kinds in ([[True, False], [False, True]] * 2, [[False, True], [True, False]] * 2)
    assert all(all(gpu.compose(decoding(4), [prompt], 0)) for _ in range(4))


class Tiles(Machine):
    """Attending a cell costs a third from 64 rows on, as on llama.cpp's CPUs."""

    def seconds(self, rows: int, cells: int = 0, *, prefill: bool = False) -> float:
        return 0.03 + 0.0025 * rows + cells * (2e-6 if rows >= 64 else 6e-6)

    def rows_within(self, seconds: float, *, rows: int, cells_per_row: int, most: int) -> int:
        return max(
            (n for n in range(most + 1) if self.seconds(rows + n, (rows + n) * cells_per_row) <= seconds), default=0
        )


def test_deep_in_a_long_prompt_chunks_are_whole_tiles() -> None:
    """There a small chunk would nearly be within the bound and take almost three times the time for each token."""
    machine, deep = Tiles(0, 0, 0), running("deep", 8000)
    deep.computed = 2000
    chunk, seconds = two_steps(machine, decoding(4), deep)
    assert 64 <= chunk.count <= 96
    assert seconds <= 2.5 * composing.bound_s(machine.seconds(4, 48))
    chunk, seconds = two_steps(machine, decoding(4), running("shallow", 8000))
    assert seconds <= composing.bound_s(machine.seconds(4, 48))


class Dense(Machine):
    """Every row attends every cell in use, at the same price in any batch, as on CPUs without flash attention."""

    def seconds(self, rows: int, cells: int = 0, *, prefill: bool = False) -> float:
        return 0.005 + 0.0045 * rows + cells * 2e-6

    rows_within = Tiles.rows_within


def test_where_rows_attend_all_cells_a_long_prompt_meets_both_aims() -> None:
    """Beside a prompt of 4,000 tokens the others' steps stay within the bound, and the prompt keeps its pace."""
    machine, prompt = Dense(0, 0, 0), running("deep", 4001)
    attention = Attention(lambda: prompt.computed + 4 * 12)
    put_together, others = composer(machine, attention=attention), decoding(4)
    alone_s = machine.seconds(4, attention.cells([Span(12, 1)] * 4))
    spent_s, step_s, steps = 0.0, 0.0, []
    while prompt.computed < 4000:
        decode, prefill = put_together.compose(others, [prompt], 0)
        chunks = [*decode, *prefill]
        seconds = machine.seconds(sum(chunk.rows for chunk in chunks), put_together.cells(chunks))
        spent_s, step_s = spent_s + seconds, step_s + seconds
        prompt.computed += sum(chunk.rows for chunk in prefill)
        if decode:
            steps.append(step_s)
            step_s = 0.0
    uncontended_s = sum(machine.seconds(250, 250 * (done + 250)) for done in range(0, 4000, 250))
    assert max(steps) <= 1.1 * composing.bound_s(alone_s)  # llama.cpp rounds cells up
    assert spent_s <= 1.4 * uncontended_s


def test_a_machine_that_is_too_slow_for_the_bound_still_advances_prompts() -> None:
    chunk, _ = two_steps(Machine(1.0, 1.0, 0), decoding(1), running("long", 4000))
    assert chunk.count >= composing.LEAST_CHUNK


def test_a_chunk_ends_where_a_state_is_to_be_kept() -> None:
    prompt = running("p", 300)
    prompt.stops = [100, 250]
    assert counts(composer().compose([], [prompt], 0)[1]) == [("p", 100)]
    prompt.computed, prompt.stops = 100, [250]
    assert counts(composer().compose([], [prompt], 0)[1]) == [("p", 150)]


def test_slots_are_given_in_order_while_there_are_some() -> None:
    waiting = [sequence(str(index), 8) for index in range(5)]
    assert names(admit([running("r", 8, generated=1)], waiting, slots=4, room=4096)) == ["0", "1", "2"]


def test_a_sequence_that_does_not_fit_beside_the_others_waits_and_nobody_passes_it() -> None:
    waiting = [sequence("next", 120), sequence("small", 1)]
    assert admit([running("big", 900, generated=1)], waiting, slots=4, room=124) == ()


def test_alone_any_sequence_is_admitted() -> None:
    assert names(admit([], [sequence("big", 1020)], slots=4, room=1020)) == ["big"]


def test_what_is_shared_needs_no_room() -> None:
    candidate = sequence("next", 1000)
    candidate.expected = 990
    assert names(admit([running("big", 900, generated=1)], [candidate], slots=4, room=300)) == ["next"]


def test_a_full_pool_preempts_the_newest() -> None:
    old, new = running("old", 500, generated=100), running("new", 400, generated=25)
    assert names(preempt([old, new], 1, lambda sequence: sequence.computed)) == ["new"]
    assert preempt([old, new], 2, lambda sequence: sequence.computed) == ()


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 50)), min_size=1, max_size=8), st.integers(0, 400))
def test_the_oldest_always_stays_and_what_stays_fits(shapes: list[tuple[int, int]], room: int) -> None:
    sequences = [running(str(index), prompt, generated=made) for index, (prompt, made) in enumerate(shapes)]
    gone = preempt(sequences, room, lambda sequence: sequence.computed)
    staying = [each for each in sequences if each not in gone]
    assert sequences[0] in staying
    assert staying == sequences[: len(staying)]
    freed = sum(each.computed for each in gone)
    assert len(staying) == 1 or sum(each.claim for each in staying) <= room + freed


@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=8),
    st.integers(0, 8),
    st.sampled_from([CPU, GPU]),
    st.sampled_from(["serial", "joint"]),
)
def test_a_batch_never_exceeds_its_size_and_always_advances(
    prompts: list[int], decoders: int, machine: Machine, order: str
) -> None:
    decode = decoding(decoders)
    waiting = [running(str(index), length) for index, length in enumerate(prompts)]
    put_together = composer(machine, order=order)
    chunks = put_together.compose(decode, waiting, 0)[1] or put_together.compose(decode, waiting, 0)[1]
    assert chunks
    assert sum(chunk.count for chunk in chunks) + decoders <= 256
    assert all(1 <= chunk.count <= chunk.sequence.remaining for chunk in chunks)
    assert len({chunk.sequence.id for chunk in chunks}) == len(chunks)


@pytest.mark.parametrize("known", [2, 5, 30])
def test_forced_tokens_are_batched_where_that_pays(known: int) -> None:
    def batched(others: int, machine: Machine, **rest: object) -> int:
        forced = running("forced", 10, generated=known + 1)
        forced.computed = 10
        sequences = [*decoding(others), forced]
        return composer(machine, **rest).compose(sequences, (), 0)[0][-1].count - 1

    assert batched(3, GPU) == known
    assert batched(3, GPU, fast_forward=False) == 0
    assert batched(0, Machine(0, 0.01, 0)) == 0


class Sure:
    """A drafter that always has something to say."""

    def extend(self, tokens: object) -> None: ...
    def ready(self) -> bool:
        return True

    def draft(self, most: int) -> list[int]:
        return [7] * most

    def close(self) -> None: ...


def drafting(count: int) -> list[Sequence]:
    """Decoding sequences whose drafts have always been right."""
    sequences = decoding(count)
    for each in sequences:
        each.speculator = Speculator(Sure(), clock=lambda: 0.0)
        for _ in range(20):
            each.speculator.propose(lambda rows: 1.0, most=8)
            each.speculator.accept([7] * 9)
    return sequences


def test_each_draft_is_weighed_beside_the_drafts_before_it() -> None:
    """Where rows beyond the twelfth cost what they yield, four sequences do not draft as if each were the only one."""

    class Knee(Machine):
        def seconds(self, rows: int, cells: int = 0, *, prefill: bool = False) -> float:
            return 0.010 + 0.010 * max(0, rows - 12)

    drafted = [len(chunk.drafts) for chunk in composer(Knee(0, 0, 0)).compose(drafting(4), (), 1000)[0]]
    assert sum(drafted) == 8
    assert len([count for count in drafted if count]) < 4


def test_nothing_is_drafted_in_the_time_that_prompts_wait_for() -> None:
    prompt = running("long", 4000)
    assert [len(chunk.drafts) for chunk in composer(Machine(0.03, 0.001, 8)).compose(drafting(2), (), 1000)[0]] != [
        0,
        0,
    ]
    assert [
        len(chunk.drafts) for chunk in composer(Machine(0.03, 0.001, 8)).compose(drafting(2), [prompt], 1000)[0]
    ] == [
        0,
        0,
    ]
    assert [len(chunk.drafts) for chunk in composer(GPU).compose(drafting(2), [prompt], 1000)[0]] == [8, 8]


def test_forced_tokens_do_not_stretch_the_bound() -> None:
    """They are computed beside the prompt's rows, not beside more of them."""
    machine, prompt = Machine(0.02, 0.002, 16), running("long", 4000)
    plain = decoding(4)
    forced = decoding(4)
    for each in forced:
        each.generated += [7] * 4  # known and not computed
    for sequences in (plain, forced):
        decode, prefill = composer(machine).compose(sequences, [prompt], 0)
        rows = sum(chunk.rows for chunk in (*decode, *prefill))
        assert machine.seconds(rows) <= composing.bound_s(machine.seconds(4))


def test_phases_of_the_fixture() -> None:
    assert running("a", 5).phase is Phase.PREFILL
    assert running("a", 5, generated=1).phase is Phase.DECODE
