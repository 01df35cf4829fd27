"""How large requests are, as far as it can be seen before anything is tokenised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ocserve.engine.wire import Prepared
from ocserve.errors import InvalidRequest
from ocserve.generation import (
    ChatPrompt,
    EmbedRequest,
    FillPrompt,
    GenerateRequest,
    Prompt,
    ScoreRequest,
    TextPrompt,
    TokenPrompt,
)

_ID_BYTES = 8  # of a token id that waits in a queue
# At most: a byte is one token or less, but a normaliser may first write a character of three bytes as eighteen others.
_TOKENS_PER_BYTE = 6
_ADDED = 8  # tokens that no text has: where one begins, is separated and ends
# Log-probabilities in one answer, those of prompts, of all choices and of alternatives: about a hundred megabytes.
_MOST_CHANCES = 1 << 19


def text_bytes(prompt: Prompt) -> int:
    """Bytes of all the text that a client wrote; 0 for token ids, of which none are to be made."""
    return sum(len(text.encode()) for text in _texts(prompt))


def certain_bytes(prompt: Prompt) -> int:
    """Those of `text_bytes` that are sure to be in the prompt: a template may pass over thoughts, tools and calls."""
    if isinstance(prompt, ChatPrompt):
        return sum(len(message.content.encode()) for message in prompt.messages)
    return text_bytes(prompt)


def queued_bytes(prompt: Prompt) -> int:
    """Bytes of a prompt that waits, about: of its text, its ids and the files of its images."""
    if isinstance(prompt, TokenPrompt):
        return _ID_BYTES * len(prompt.tokens)
    return text_bytes(prompt) + image_bytes(prompt)


def image_bytes(prompt: Prompt) -> int:
    """Bytes of the images' files; 0 for those that are still to be fetched."""
    if not isinstance(prompt, ChatPrompt):
        return 0
    return sum(len(image.data) for message in prompt.messages for image in message.images)


def image_count(prompt: Prompt) -> int:
    """How many images a prompt has."""
    return sum(len(message.images) for message in prompt.messages) if isinstance(prompt, ChatPrompt) else 0


def check_chances(requests: Sequence[GenerateRequest], prepared: Sequence[Prepared]) -> None:
    """Refuse answers that would be too large. A single one may always run to the context's end."""
    told = 0
    for request, found in zip(requests, prepared, strict=True):
        for tokens, top in (
            (found.prompt_tokens, request.prompt_logprobs),
            (found.max_tokens, request.logprobs),
        ):
            told += 0 if top is None else request.choices * tokens * (1 + top)
    single = len(requests) == requests[0].choices == 1 and requests[0].prompt_logprobs is None
    if told > _MOST_CHANCES and not single:
        raise InvalidRequest(
            f"This request may be told {told} log-probabilities, those of prompts and of alternatives included, and at "
            f"most {_MOST_CHANCES} are told at once. Please ask for fewer answers or tokens.",
            param="logprobs",
        )


def most_tokens(question: EmbedRequest | ScoreRequest, context: int) -> int:
    """How many tokens a question has at most, by the bytes of its texts; what is longer than the context is refused."""
    if isinstance(question, ScoreRequest):
        asked = len(question.query.encode())
        return sum(_most(asked + len(text.encode()), context) for text in question.documents)
    return sum(
        min(context, len(each.tokens) + _ADDED) if isinstance(each, TokenPrompt) else _most(text_bytes(each), context)
        for each in question.inputs
    )


def _most(size: int, context: int) -> int:
    return min(context, size * _TOKENS_PER_BYTE + _ADDED)


def _texts(prompt: Prompt) -> Iterator[str]:
    match prompt:
        case ChatPrompt(messages=messages, tools=tools):
            for message in messages:
                yield from (message.content, message.reasoning, message.name or "", message.tool_call_id or "")
                for call in message.tool_calls:
                    yield from (call.id, call.name, call.arguments)
            for tool in tools:
                yield from (tool.name, tool.description, tool.parameters or "")
        case TextPrompt(text=text):
            yield text
        case FillPrompt(prefix=prefix, suffix=suffix, files=files):
            yield from (prefix, suffix)
            for file in files:
                yield from file
        case TokenPrompt():
            pass
