"""From a prompt to token ids: the chat template's segments, raw text, or ids as they are.

Content never becomes a control token: only scaffolding that the template itself wrote is mapped to control ids, all
other text goes through the tokenizer with special parsing off. A raw text prompt is scaffolding that the caller wrote,
so its special tokens are parsed.
"""

from __future__ import annotations

from collections.abc import Sequence

from ocserve.chat.messages import unread
from ocserve.chat.specials import Segment, SpecialToken, SpecialTokens
from ocserve.chat.template import ChatTemplate
from ocserve.engine.encodings import PlainTokenizer
from ocserve.engine.llama import Vocab
from ocserve.engine.turns import Opening, Quoter, Turns
from ocserve.errors import ContextLengthExceeded, InvalidRequest
from ocserve.generation import ChatPrompt, FillPrompt, GenerateRequest, Message, TextPrompt, TokenPrompt

# Two prompts for an answer, of which the words differ: what they end with is the template's.
_PROBES = ("probe", "other words")


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
    ) -> None:
        """Raises `TemplateUnusable`. Without a `tokenizer`, llama.cpp's is used."""
        self._vocab = vocab
        self.plain = tokenizer or PlainTokenizer(vocab)
        self._context = context
        self._turns = turns
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

    @property
    def can_chat(self) -> bool:
        """Whether chat messages can be rendered."""
        return self._template is not None

    def unread(self, request: GenerateRequest) -> tuple[str, ...]:
        """Paths of message fields that this model's template passes over; raises where that would lose content."""
        if self._template is None or not isinstance(request.prompt, ChatPrompt):
            return ()
        return unread(request.prompt.messages, self._template.reads)

    def encode(self, request: GenerateRequest) -> tuple[int, ...]:
        """The prompt's ids; raises `InvalidRequest` where it cannot be rendered or does not fit the context."""
        match request.prompt:
            case ChatPrompt(messages=messages):
                field = "messages"
                if self._template is None:
                    raise InvalidRequest("This model has no chat template; use /v1/completions.", param=field)
                self._check_size(sum(len(message.content.encode()) for message in messages), field)
                ids = self._with_bos(self._specials.encode(self._render(messages, request.salt), self.plain))
            case TextPrompt(text=text):
                field = "prompt"
                # Partitioned here: llama.cpp's own search for special tokens takes quadratic time.
                self._check_size(len(text.encode()), field)
                ids = self._with_bos(self._specials.encode(self._specials.partition(text), self.plain))
            case TokenPrompt(tokens=tokens):
                field = "prompt"
                ids = self._checked(tokens)
            case FillPrompt():
                raise InvalidRequest("This model cannot fill in the middle.", param="suffix")
        if not ids:
            raise InvalidRequest("The prompt is empty and this model has no token to begin with.", param=field)
        if len(ids) >= self._context:
            raise ContextLengthExceeded(limit=self._context, prompt_tokens=len(ids), param=field)
        for token in request.sampling.logit_bias:
            if token >= self._vocab.size:
                raise InvalidRequest(
                    f"Token {token} is outside this model's vocabulary of {self._vocab.size}.", param="logit_bias"
                )
        return tuple(ids)

    def _check_size(self, size_bytes: int, field: str) -> None:
        """Refuse what cannot fit however it is tokenised, before time is spent on it."""
        at_least = size_bytes // self._longest_piece
        if at_least >= self._context:
            raise ContextLengthExceeded(limit=self._context, prompt_tokens=at_least, param=field, at_least=True)

    def _render(self, messages: tuple[Message, ...], salt: bytes) -> Sequence[Segment]:
        """The template's segments, with the assistant's former words as they were sampled."""
        assert self._template is not None
        segments = self._template.render(messages)
        if self._quoter is None:
            return segments
        return self._quoter.quote(segments, messages, lambda text: self._turns.recall(salt, text))

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
