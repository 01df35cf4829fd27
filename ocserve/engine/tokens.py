"""From a prompt to token ids: the chat template's segments, raw text, or ids as they are.

Content never becomes a control token: only scaffolding that the template itself wrote is mapped to control ids, all
other text goes through the tokenizer with special parsing off. A raw text prompt is scaffolding that the caller wrote,
so its special tokens are parsed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ocserve.chat.messages import unread
from ocserve.chat.specials import Place, Segment, SpecialToken, SpecialTokens, Text
from ocserve.chat.speech import Speech
from ocserve.chat.template import ChatTemplate
from ocserve.engine.answers import AnswerPlan
from ocserve.engine.embedding_inputs import encoded
from ocserve.engine.encodings import PlainTokenizer
from ocserve.engine.llama import Vocab
from ocserve.engine.pictures import Pictures
from ocserve.engine.sizes import certain_bytes, text_bytes
from ocserve.engine.slots import Shown
from ocserve.engine.turns import Opening, Quoter, Turns
from ocserve.engine.vision import Tile
from ocserve.errors import ContextLengthExceeded, InvalidRequest
from ocserve.generation import (
    ChatPrompt,
    Encoded,
    EncodeRequest,
    FillPrompt,
    GenerateRequest,
    Message,
    Prompt,
    Reasoning,
    TextPrompt,
    TokenPrompt,
)

# Of text in one question: some tokenizers take a second for a few megabytes, and other requests wait behind it.
_MOST_ASKED_BYTES = 4 * 1024 * 1024
_MOST_ASKED_TOKENS = 1 << 18  # some are spelled with hundreds of bytes
# The field that a refusal names.
_FIELDS = {ChatPrompt: "messages", TextPrompt: "prompt", TokenPrompt: "prompt", FillPrompt: "prompt"}
# Two prompts for an answer, of which the words differ: what they end with is the template's.
_PROBES = ("probe", "other words")
# No mark is divided into more tokens, white space behind it included.
_THOUGHT_TOKENS = 24


class EncodedPrompt(NamedTuple):
    """A prompt's ids, below 0 where the tokens of an image are; an image's ids are its own, so that they tell it apart
    from any other."""

    ids: tuple[int, ...]
    images: tuple[Shown, ...] = ()


class PromptEncoder:
    """Encodes prompts for one model; `template` None means that the model cannot chat."""

    def __init__(
        self,
        vocab: Vocab,
        template: str | None,
        *,
        context: int,
        turns: Turns,
        tokenizer: PlainTokenizer | None = None,
        pictures: Pictures | None = None,
    ) -> None:
        """Raises `TemplateUnusable`. Without a `tokenizer` llama.cpp's is used, without `pictures` no image read."""
        self._vocab = vocab
        self.plain = tokenizer or PlainTokenizer(vocab)
        self._context = context
        self._turns = turns
        self._pictures = pictures
        self._longest_piece = vocab.longest_piece()
        self._specials = SpecialTokens(
            SpecialToken(text=token.text, id=token.id, kind=token.kind, lstrip=token.lstrip, rstrip=token.rstrip)
            for token in vocab.marked()
        )
        self._template = None
        if template is not None:
            self._template = ChatTemplate(
                template, bos=vocab.text(vocab.bos), eos=vocab.text(vocab.eos), specials=self._specials
            )
        self._quoter = self._find_quoter()
        self.speech = self._find_speech()

    @property
    def can_chat(self) -> bool:
        """Whether chat messages can be rendered."""
        return self._template is not None

    def unread(self, request: GenerateRequest) -> tuple[str, ...]:
        """Paths of message fields that this model's template passes over."""
        if self._template is None or not isinstance(request.prompt, ChatPrompt):
            return ()
        return unread(request.prompt.messages, self._template.reads)

    def encode(self, request: GenerateRequest) -> EncodedPrompt:
        """The prompt in tokens; raises `InvalidRequest` where it cannot be rendered or does not fit the context."""
        field = _FIELDS[type(request.prompt)]
        self._check_size(request.prompt, field)
        ids, images, _ = self._encoded(request.prompt, request.salt)
        bare = len(ids)
        ids = self._with_bos(ids)
        images = [replace(image, begin=image.begin + len(ids) - bare) for image in images]
        if not ids:
            raise InvalidRequest("The prompt is empty and this model has no token to begin with.", param=field)
        if len(ids) >= self._context + (request.max_tokens == 0):  # which needs no room for an answer
            raise ContextLengthExceeded(limit=self._context, prompt_tokens=len(ids), param=field)
        for token in request.sampling.logit_bias:
            if token >= self._vocab.size:
                raise InvalidRequest(
                    f"Token {token} is outside this model's vocabulary of {self._vocab.size}.", param="logit_bias"
                )
        return EncodedPrompt(tuple(ids), tuple(images))

    def answer(self, question: EncodeRequest) -> Encoded:
        """What a prompt is in tokens, whether or not it fits the context; raises as `encode`."""
        prompt = question.prompt
        self._check_bytes(prompt, _MOST_ASKED_BYTES)
        if isinstance(prompt, TokenPrompt) and len(prompt.tokens) > _MOST_ASKED_TOKENS:
            raise InvalidRequest(f"At most {_MOST_ASKED_TOKENS} tokens are spelled at once.", param="prompt")
        if question.plain and isinstance(prompt, TextPrompt):
            ids: list[int] = self.content(prompt.text)
            text: str | None = prompt.text
        else:
            ids, _, text = self._encoded(prompt, question.salt)
        if question.add_bos and not isinstance(prompt, TokenPrompt):
            ids = self._with_bos(ids)
        return encoded(question, tuple(ids), text, self._vocab)

    def content(self, text: str) -> list[int]:
        """Ids of text that never becomes a control token."""
        cuts = tuple(start + 1 for start in self._specials.starts(text))
        return self._specials.encode((Text(text, cuts),), self.plain) if text else []

    def _encoded(self, prompt: Prompt, salt: bytes) -> tuple[list[int], list[Shown], str | None]:
        """A prompt's ids, without what this model's prompts begin with, images, and text where that is known."""
        match prompt:
            case ChatPrompt():
                if self._template is None:
                    raise InvalidRequest("This model has no chat template; use /v1/completions.", param="messages")
                segments = self._render(prompt, salt)
                tiles = self._tiles(prompt)
                ids, images = self._joined(segments, tiles)
                if _without_thought(prompt.reasoning) and self.thinking(ids):
                    segments = [*segments, *self._thought_end]
                    ids, images = self._joined(segments, tiles)
                return ids, images, "".join(segment.text for segment in segments)
            case TextPrompt(text=text):
                # Partitioned here: llama.cpp's own search for special tokens takes quadratic time.
                return self._plainly(self._specials.partition(text)), [], text
            case TokenPrompt(tokens=tokens):
                return self._checked(tokens), [], None
            case FillPrompt():
                return self._filled(prompt), [], None

    def _tiles(self, prompt: ChatPrompt) -> list[list[tuple[int, ...] | Tile]]:
        """What stands for each image of the prompt, in order."""
        shown = [image for message in prompt.messages for image in message.images]
        if not shown:
            return []
        if self._pictures is None:
            raise InvalidRequest("This model reads no images.", param=shown[0].where, code="unsupported_parameter")
        return self._pictures.read(shown, self._context)

    def _joined(
        self, segments: Sequence[Segment], tiles: Iterable[Sequence[tuple[int, ...] | Tile]]
    ) -> tuple[list[int], list[Shown]]:
        """Ids of the segments with an image's own in its place."""
        ids: list[int] = []
        images: list[Shown] = []
        left = iter(tiles)
        for is_place, run in itertools.groupby(segments, lambda segment: isinstance(segment, Place)):
            if not is_place:
                ids += self._plainly(run)
                continue
            for part in itertools.chain.from_iterable(next(left) for _ in run):
                if isinstance(part, Tile):
                    images.append(Shown(len(ids), part))
                    ids += part.ids
                else:
                    ids += part
        return ids, images

    def _plainly(self, segments: Iterable[Segment]) -> list[int]:
        """Ids of segments that have no place for an image among them."""
        return self._specials.encode((each for each in segments if not isinstance(each, Place)), self.plain)

    def _filled(self, prompt: FillPrompt) -> list[int]:
        """Prefix, suffix, middle, as the models were trained; other files before them, each with its name."""
        fill = self._vocab.fill
        if fill is None:
            raise InvalidRequest(
                "This model's vocabulary has no tokens for filling in the middle.",
                param="suffix",
                code="unsupported_parameter",
            )
        ids = []
        if prompt.files:
            ids += [fill.repository, *self.content("repository\n")] if fill.repository is not None else []
            for name, text in prompt.files:
                ids += [fill.file] if fill.file is not None else []
                ids += self.content(f"{name}\n{text}\n")
            ids += [fill.file, *self.content("current\n")] if fill.file is not None else []
        return [
            *ids,
            fill.prefix,
            *self.content(prompt.prefix),
            fill.suffix,
            *self.content(prompt.suffix),
            fill.middle,
        ]

    def _check_size(self, prompt: Prompt, field: str) -> None:
        """Refuse what cannot fit however it is tokenised, before time is spent on it."""
        at_least = certain_bytes(prompt) // self._longest_piece
        if at_least >= self._context:
            raise ContextLengthExceeded(limit=self._context, prompt_tokens=at_least, param=field, at_least=True)
        self._check_bytes(prompt, max(_MOST_ASKED_BYTES, self._context * self._longest_piece))

    @staticmethod
    def _check_bytes(prompt: Prompt, most: int) -> None:
        """Refuse more text than is tokenised at once, whatever becomes of it."""
        if text_bytes(prompt) > most:
            raise InvalidRequest(f"At most {most} bytes of text are tokenised at once.", param=_FIELDS[type(prompt)])

    def plan(self, request: GenerateRequest, prompt: Sequence[int]) -> AnswerPlan:
        """How the answers to an encoded prompt are held and read."""
        thinking = isinstance(request.prompt, ChatPrompt) and self.thinking(prompt)
        closing = self._plainly(self._thought_end)
        return AnswerPlan.of(request, self.speech, thinking=thinking, closing=closing)

    def thinking(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends within a thought that the template has begun."""
        if self.speech is None or self.speech.reasoning is None:
            return False
        marks, tail = self.speech.marks, b""
        begin = marks.plain(self.speech.reasoning.begin).strip().encode()
        for token in reversed(prompt[-_THOUGHT_TOKENS:]):
            if token < 0:
                break  # an image
            mark = marks.by_id.get(token)
            tail = (self._vocab.piece(token) if mark is None else marks.plain(mark).encode()) + tail
        return tail.rstrip().endswith(begin)

    @functools.cached_property
    def _thought_end(self) -> tuple[Segment, ...]:
        """What ends a thought."""
        if self.speech is None or self.speech.reasoning is None:
            return ()
        return self._specials.partition("\n" + self.speech.marks.plain(self.speech.reasoning.end))

    def _find_speech(self) -> Speech | None:
        if self._template is None:
            return None
        marked = self._vocab.marked()
        ends = frozenset(token.id for token in marked if self._vocab.is_end(token.id))
        controls = {token.text: token.id for token in marked if token.kind != "user_defined" or token.id in ends}
        return Speech.of(self._template.tool_format, self._template.reasoning, controls, ends)

    def _render(self, chat: ChatPrompt, salt: bytes) -> Sequence[Segment]:
        """The template's segments, with the assistant's former words as they were sampled."""
        assert self._template is not None
        segments = self._template.render(chat.messages, chat.tools, chat.reasoning)
        if self._quoter is None:
            return segments
        return self._quoter.quote(segments, chat.messages, lambda text: self._turns.recall(salt, text))

    def _find_quoter(self) -> Quoter | None:
        if self._template is None:
            return None
        try:
            one, other = (self._template.render((Message(role="user", content=text),)) for text in _PROBES)
        except InvalidRequest:
            return None  # a template that wants more than a user's words: its turns are not recognised
        opening = Opening.of(one, other)
        if opening is None:
            return None
        probe = _PROBES[0]
        return Quoter(
            opening,
            self._vocab.piece,
            self._specials.never_from_text,
            apart=b"".join(map(self._vocab.piece, self.plain(probe))) == probe.encode(),
        )

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self._vocab.bos
        if bos is not None and (self._vocab.add_bos or not ids) and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def _checked(self, tokens: tuple[int, ...]) -> list[int]:
        for index, token in enumerate(tokens):
            if not 0 <= token < self._vocab.size:
                raise InvalidRequest(
                    f"Token {token} is outside this model's vocabulary of {self._vocab.size}.", param=f"prompt[{index}]"
                )
        return list(tokens)


def _without_thought(reasoning: Reasoning) -> bool:
    return reasoning.enabled is False or reasoning.effort == "none" or reasoning.max_tokens == 0
