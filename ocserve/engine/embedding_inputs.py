"""From texts to the token ids of an embedding or reranking model's inputs.

Texts are content: whatever a text spells, it never becomes a control token. The frame around it ([CLS] … [SEP], or what
the vocabulary has) is the vocabulary's own. Too much is refused with the limit, never cut.
"""

from __future__ import annotations

import re

from ocserve.engine.llama import Vocab
from ocserve.errors import InputTooLong, InvalidRequest
from ocserve.generation import Encoded, EncodeRequest, TextPrompt, TokenPrompt

Ids = tuple[int, ...]
_PLACES = re.compile(r"(\{query\}|\{document\})")


def encoded(question: EncodeRequest, ids: Ids, text: str | None, vocab: Vocab) -> Encoded:
    """As much of the answer as the question wants; `text` None is what the tokens spell. An image's tokens are -1."""
    if question.count_only:
        return Encoded(count=len(ids))
    ids = tuple(max(token, -1) for token in ids)
    pieces = tuple(vocab.spelled(token) if token >= 0 else b"" for token in ids)
    if text is None:
        text = b"".join(pieces).decode(errors="replace")
    return Encoded(count=len(ids), tokens=ids, pieces=pieces, text=text)


class InputEncoder:
    """Encodes inputs of at most `context` tokens.

    `template` is a reranking model's own layout of a query and a document (`tokenizer.chat_template.rerank`), in which
    everything but the two places is scaffolding.
    """

    def __init__(self, vocab: Vocab, *, context: int, template: str | None = None) -> None:
        self._vocab = vocab
        self._context = context
        self._template = _PLACES.split(template) if template else None
        frame = vocab.tokenize("", parse_special=False, framed=True)
        opens = vocab.bos is not None and frame[:1] == [vocab.bos]
        self._opening, self._closing = (frame[:1], frame[1:]) if opens else ([], frame)

    def encode(self, given: TextPrompt | TokenPrompt, param: str) -> Ids:
        """The ids of one input; raises `InvalidRequest`, which names `param`."""
        if isinstance(given, TextPrompt):
            ids = tuple(self._vocab.tokenize(given.text, parse_special=False, framed=True))
        else:
            ids = self._known(given.tokens, param)
        return self._checked(ids, param)

    def answer(self, question: EncodeRequest) -> Encoded:
        """What a text is in tokens, with its frame if `add_bos`, whether or not it fits."""
        text: str | None
        match question.prompt:
            case TextPrompt(text=text):
                ids = tuple(self._vocab.tokenize(text, parse_special=False, framed=question.add_bos))
            case TokenPrompt(tokens=tokens):
                ids, text = self._known(tokens, "tokens"), None
            case _:
                raise InvalidRequest("This model does not chat.", param="model", code="model_not_capable")
        return encoded(question, ids, text, self._vocab)

    def query(self, text: str) -> Ids:
        """What `pair` takes for a query, alone within the context: else each document would be blamed for it."""
        self.encode(TextPrompt(text=text), "query")
        return tuple(self._vocab.tokenize(text, parse_special=False))

    def pair(self, asked: Ids, document: str, param: str) -> Ids:
        """The ids of a query and a document, as the model was trained to compare them."""
        read = self._vocab.tokenize(document, parse_special=False)
        if self._template is not None:
            places = {"{query}": list(asked), "{document}": read}
            ids: list[int] = []
            for part in self._template:
                ids += places[part] if part in places else self._vocab.tokenize(part, parse_special=True)
        else:
            ids = [*self._opening, *asked, *self._between(), *read, *self._closing]
        return self._checked(tuple(ids), param)

    def _between(self) -> list[int]:
        """What parts a query from a document: the end of the one and, in some vocabularies, one more mark."""
        ids = [self._vocab.eos] if self._vocab.add_eos else []
        if self._vocab.add_sep:
            ids.append(self._vocab.sep)
        return [token for token in ids if token is not None] or self._closing

    def _known(self, tokens: Ids, param: str) -> Ids:
        for token in tokens:
            if not 0 <= token < self._vocab.size:
                raise InvalidRequest(
                    f"Token {token} is outside this model's vocabulary of {self._vocab.size}.", param=param
                )
        return tokens

    def _checked(self, ids: Ids, param: str) -> Ids:
        if not ids:
            raise InvalidRequest(f"'{param}' holds nothing that this model reads.", param=param, code="empty_input")
        if len(ids) > self._context:
            raise InputTooLong(limit=self._context, tokens=len(ids), param=param)
        return ids
