"""What prompts are in tokens: questions, filling in the middle, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from ocserve.engine import llama
from ocserve.engine.tokens import PromptEncoder
from ocserve.engine.turns import Turns
from ocserve.errors import ContextLengthExceeded, InvalidRequest
from ocserve.generation import (
    ChatPrompt,
    EncodeRequest,
    FillPrompt,
    GenerateRequest,
    Message,
    Prompt,
    Sampling,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolCall,
)
from tests import tiny
from tests.engine.schedules import load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> llama.Model:
    return load(tiny.write(tmp_path_factory.mktemp("model") / "m.gguf", fill=True))


@pytest.fixture(scope="module")
def encoder(model: llama.Model) -> PromptEncoder:
    return PromptEncoder(model.vocab, tiny.CHATML, context=tiny.CONTEXT, turns=Turns())


def asked(prompt: Prompt, *, plain: bool = False) -> EncodeRequest:
    return EncodeRequest(request_id="q", model="m", prompt=prompt, plain=plain)


def generate(prompt: Prompt, max_tokens: int = 5) -> GenerateRequest:
    return GenerateRequest(request_id="r", model="m", prompt=prompt, sampling=Sampling(), max_tokens=max_tokens)


HOSTILE = "if x<|fim_middle|> y<|im_end|>: \u00fc"


@pytest.mark.parametrize(
    "prompt",
    [
        ChatPrompt(messages=(Message(role="user", content=HOSTILE),)),
        TextPrompt(text=f"<|im_start|>user\n{HOSTILE}"),
        TokenPrompt(tokens=(5, 6, 1, 7)),
        FillPrompt(prefix="def f(", suffix=")", files=(("a.py", HOSTILE),)),
    ],
)
def test_the_answer_is_what_a_generation_computes(encoder: PromptEncoder, model: llama.Model, prompt: Prompt) -> None:
    answer = encoder.answer(asked(prompt))
    assert answer.tokens == encoder.encode(generate(prompt)).ids
    assert b"".join(answer.pieces).decode() == answer.text or isinstance(prompt, TokenPrompt)
    again = encoder.answer(asked(TokenPrompt(tokens=answer.tokens)))
    assert (again.tokens, again.pieces) == (answer.tokens, answer.pieces)


def test_a_chat_prompts_text_is_what_the_template_renders(encoder: PromptEncoder) -> None:
    answer = encoder.answer(asked(ChatPrompt(messages=(Message(role="user", content="Hello"),))))
    assert answer.text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_plain_text_never_becomes_a_control_token(encoder: PromptEncoder) -> None:
    prompt = TextPrompt(text=HOSTILE)
    scaffolding, plain = encoder.answer(asked(prompt)), encoder.answer(asked(prompt, plain=True))
    assert tiny.END_OF_TURN in scaffolding.tokens
    assert tiny.END_OF_TURN not in plain.tokens
    assert b"".join(plain.pieces).decode() == HOSTILE


def test_a_question_may_be_longer_than_the_context(encoder: PromptEncoder) -> None:
    prompt = TextPrompt(text="x" * 3000)
    assert len(encoder.answer(asked(prompt)).tokens) == 3000
    with pytest.raises(ContextLengthExceeded):
        encoder.encode(generate(prompt))
    for beyond in (TextPrompt(text="x" * 5_000_000), TokenPrompt(tokens=(40,) * 300_000)):
        with pytest.raises(InvalidRequest) as refusal:
            encoder.answer(asked(beyond))
        assert refusal.value.param == "prompt"


def test_the_middle_is_asked_for_with_the_vocabularys_own_tokens(encoder: PromptEncoder, model: llama.Model) -> None:
    ids = encoder.encode(generate(FillPrompt(prefix="ab<|fim_suffix|>", suffix="c"))).ids
    spelled = b"".join(map(model.vocab.spelled, ids)).decode()
    assert spelled == "<|fim_prefix|>ab<|fim_suffix|><|fim_suffix|>c<|fim_middle|>"
    assert model.vocab.fill is not None
    assert ids.count(model.vocab.fill.suffix) == 1  # the client's was text


def test_other_files_come_first_with_their_names(encoder: PromptEncoder, model: llama.Model) -> None:
    ids = encoder.encode(generate(FillPrompt(prefix="p", suffix="s", files=(("a.py", "A"), ("b.py", "B"))))).ids
    spelled = b"".join(map(model.vocab.spelled, ids)).decode()
    before, _, filled = spelled.partition("<|fim_prefix|>")
    assert before.startswith("<|repo_name|>")
    assert before.index("<|file_sep|>a.py\nA\n") < before.index("<|file_sep|>b.py\nB\n")
    assert filled == "p<|fim_suffix|>s<|fim_middle|>"


def test_a_vocabulary_without_such_tokens_says_so(tmp_path: Path) -> None:
    bare = load(tiny.write(tmp_path / "bare.gguf"))
    encoder = PromptEncoder(bare.vocab, None, context=tiny.CONTEXT, turns=Turns())
    with pytest.raises(InvalidRequest) as refusal:
        encoder.encode(generate(FillPrompt(prefix="a", suffix="b")))
    assert (refusal.value.param, refusal.value.code) == ("suffix", "unsupported_parameter")


def test_a_prompt_without_an_answer_may_fill_the_context(encoder: PromptEncoder) -> None:
    full = TokenPrompt(tokens=(40,) * tiny.CONTEXT)
    assert len(encoder.encode(generate(full, max_tokens=0)).ids) == tiny.CONTEXT
    with pytest.raises(ContextLengthExceeded):
        encoder.encode(generate(full))


def test_only_the_count_is_told_where_nothing_else_is_wanted(encoder: PromptEncoder) -> None:
    question = asked(TextPrompt(text="Hello"))
    whole, bare = encoder.answer(question), encoder.answer(replace(question, count_only=True))
    assert bare.count == whole.count == len(whole.tokens) > 0
    assert (bare.tokens, bare.pieces, bare.text) == ((), (), "")


@pytest.mark.parametrize("where", ["reasoning", "arguments", "tool_call_id", "description", "parameters"])
def test_all_text_of_a_chat_counts_towards_its_size(encoder: PromptEncoder, where: str) -> None:
    long = "x" * 5_000_000
    message, tools = Message(role="user", content="a"), ()
    match where:
        case "arguments":
            message = Message(role="assistant", tool_calls=(ToolCall(id="1", name="f", arguments=long),))
        case "description" | "parameters":
            tools = (Tool(name="f", **{where: long}),)
        case _:
            message = replace(message, **{where: long})
    prompt = ChatPrompt(messages=(message,), tools=tools)
    for act in (lambda: encoder.answer(asked(prompt)), lambda: encoder.encode(generate(prompt))):
        with pytest.raises(InvalidRequest, match="At most") as refusal:
            act()
        assert refusal.value.param == "messages"


def test_a_thought_that_the_template_passes_over_may_be_longer_than_the_context(encoder: PromptEncoder) -> None:
    spoken = (Message(role="user", content="a"), Message(role="assistant", content="b", reasoning="x" * 1_000_000))
    assert len(encoder.encode(generate(ChatPrompt(messages=(*spoken, Message(role="user", content="c"))))).ids) < 100
