"""Items of OpenAI's Responses: from JSON to what each of them says, and from those to the turns of a conversation.

A conversation is a flat list of items here; a chat template wants turns, so what an assistant thought, said and called
in one go is put together again. Everything wrong is refused with its exact path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from msgspec.structs import replace

from ocserve.api import fields, images, openai_wire, tools
from ocserve.api.fields import Field, Reader, Values
from ocserve.api.openai_messages import MAX_IMAGES
from ocserve.api.turns import Content
from ocserve.errors import InvalidRequest
from ocserve.generation import Message, Role, ToolCall, joined
from ocserve.modelcard import ServedModel

MAX_ITEMS = 4096
# A short request can name much that is stored. This is above what fits into any context, images included, and the work
# on it is bounded as that on a body is.
MAX_RECALLED_BYTES = 16 * 1024 * 1024
_MAX_PARTS = 1024
_MAX_NAME = 256
_TEXT = 64 * 1024 * 1024  # the body's own limit is far below


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One item: its id, its JSON as a listing shows it, and what it adds to a turn (None: nothing that can be read)."""

    id: str
    wire: bytes
    piece: Message | None


Find = Callable[[str], Item | None]


_TYPE = Field("type", "effective", fields.string(64))
_ID = Field("id", "effective", fields.string(_MAX_NAME, empty=False))
_STATUS = Field("status", "effective", fields.word("in_progress", "completed", "incomplete"))
_CALL_ID = Field("call_id", "effective", fields.string(_MAX_NAME, empty=False), required=True)
_NAME = Field("name", "effective", fields.string(_MAX_NAME, empty=False), required=True)
_PARTS = fields.items(_MAX_PARTS)
# Of calls that were made in ways that are not offered here.
_MADE_BY = (
    Field("namespace", "advisory", fields.string(_MAX_NAME)),
    Field("caller", "advisory", fields.pairs(8)),
    Field("async", "advisory", fields.boolean()),
)

_ROLE: Reader[Role] = fields.word("user", "assistant", "system", "developer")
MESSAGE = fields.table(
    _TYPE,
    _ID,
    _STATUS,
    Field("role", "effective", _ROLE, required=True),
    Field("content", "effective", required=True),
    Field("phase", "advisory", fields.word("commentary", "final_answer")),
)
CALL = fields.table(
    _TYPE,
    _ID,
    _STATUS,
    _CALL_ID,
    _NAME,
    Field("arguments", "effective", fields.string(_TEXT), required=True),
    *_MADE_BY,
)
OUTPUT = fields.table(
    _TYPE,
    _ID,
    _STATUS,
    _CALL_ID,
    Field("output", "effective", required=True),
    Field("name", "advisory", fields.string(_MAX_NAME)),
    *_MADE_BY,
)
CUSTOM_CALL = fields.table(
    _TYPE,
    _ID,
    _STATUS,
    _CALL_ID,
    _NAME,
    Field("input", "effective", fields.string(_TEXT), required=True),
    *_MADE_BY,
)
REASONING = fields.table(
    _TYPE,
    _ID,
    _STATUS,
    Field("summary", "effective", _PARTS),
    Field("content", "effective", _PARTS),
    Field("encrypted_content", "advisory", fields.string(_TEXT)),  # another server's secret
)
REFERENCE = fields.table(_TYPE, Field("id", "effective", fields.string(_MAX_NAME, empty=False), required=True))

_CACHE = Field("prompt_cache_breakpoint", "advisory", fields.pairs(8))
TEXT_PART = fields.table(
    _TYPE,
    Field("text", "effective", fields.string(_TEXT), required=True),
    Field("annotations", "effective", _PARTS),
    Field("logprobs", "effective", fields.items(1024 * 1024)),
    _CACHE,
)
REFUSAL_PART = fields.table(_TYPE, Field("refusal", "effective", fields.string(_TEXT), required=True))

IMAGE_PART = fields.table(
    _TYPE,
    Field("image_url", "effective", fields.string(_TEXT)),
    Field("file_id", "unsupported", fields.string(_MAX_NAME)),
    Field("detail", "advisory", fields.word("low", "high", "auto", "original")),
    _CACHE,
)

_TEXTS = ("input_text", "output_text", "text")
_UNSUPPORTED_PARTS = ("input_file", "input_audio", "computer_screenshot")
# Items of tools that only their vendor runs.
_UNSUPPORTED_ITEMS = (
    "additional_tools", "apply_patch_call", "apply_patch_call_output", "code_interpreter_call", "compaction",
    "computer_call", "computer_call_output", "file_search_call", "image_generation_call", "local_shell_call",
    "local_shell_call_output", "mcp_approval_request", "mcp_approval_response", "mcp_call", "mcp_list_tools",
    "shell_call", "shell_call_output", "tool_search_call", "tool_search_output", "web_search_call",
)  # fmt: skip


class ItemReader:
    """Reads one request's items and gathers the names of what it ignored in them.

    `find` knows the items that were stored; `token` makes ids for those that come without one.
    """

    def __init__(self, model: ServedModel, *, refuse_unknown: bool, find: Find, token: str) -> None:
        self._model = model
        self._images = 0
        self._recalled_bytes = 0
        self._referenced: set[str] = set()
        self._refuse_unknown = refuse_unknown
        self._find = find
        self._token = token
        self._made = 0
        self.ignored: list[str] = []

    def read(self, value: object, path: str, *, least: int = 1) -> tuple[Item, ...]:
        """The items of `value`, a text or an array of `least` items or more."""
        if isinstance(value, str):
            return (self.item({"role": "user", "content": value}, path),)
        if not isinstance(value, list):
            raise fields.wrong_type(path, "a string or an array of items", value)
        given = fields.array(value, path, least, MAX_ITEMS)
        return tuple(self.item(item, f"{path}[{index}]") for index, item in enumerate(given))

    def recall(self, items: Sequence[Item], path: str) -> None:
        """Count stored items, which `path` names, towards what one conversation may have."""
        self._recalled_bytes += sum(len(item.wire) for item in items)
        if self._recalled_bytes > MAX_RECALLED_BYTES:
            raise InvalidRequest(
                f"Invalid '{path}': the stored items of a request have at most {MAX_RECALLED_BYTES} bytes.", param=path
            )
        self._count_images(sum(len(item.piece.images) for item in items if item.piece is not None), path)

    def item(self, value: object, path: str) -> Item:
        """One item."""
        given = fields.mapping(value, path)
        kind = given.get("type")
        if kind is None:  # a message or a reference may leave it out
            kind = "message" if "role" in given or "content" in given or "id" not in given else "item_reference"
        if not isinstance(kind, str):
            raise fields.wrong_type(f"{path}.type", "a string", kind)
        match kind:
            case "message":
                return self._message(given, path)
            case "function_call":
                return self._call(given, path)
            case "function_call_output" | "custom_tool_call_output":
                return self._output(given, path, kind)
            case "custom_tool_call":
                return self._custom_call(given, path)
            case "reasoning":
                return self._reasoning(given, path)
            case "item_reference":
                return self._reference(given, path)
        if kind in _UNSUPPORTED_ITEMS:
            raise fields.unsupported(f"{path}.type", f"items of type '{kind}' are not supported by this server.")
        raise InvalidRequest(
            f"Invalid '{path}.type': supported are 'message', 'function_call', 'function_call_output', "
            "'custom_tool_call', 'custom_tool_call_output', 'reasoning' and 'item_reference'.",
            param=f"{path}.type",
        )

    def _message(self, given: dict[str, object], path: str) -> Item:
        values = self._fields(given, MESSAGE, path)
        role = values.made("role", _ROLE)
        assert role is not None
        kind = "output_text" if role == "assistant" else "input_text"
        said, parts = self._content(values.get("content", object), f"{path}.content", kind)
        piece = said.message(role)
        return self._made_of(values, "msg", piece, type="message", role=role, content=parts)

    def _call(self, given: dict[str, object], path: str) -> Item:
        values = self._fields(given, CALL, path)
        return self._called(values, "fc", "function_call", "arguments", _text(values, "arguments"))

    def _custom_call(self, given: dict[str, object], path: str) -> Item:
        values = self._fields(given, CUSTOM_CALL, path)
        # The arguments of a tool that takes text are that text; templates show JSON.
        arguments = openai_wire.dumps({"input": _text(values, "input")}).decode()
        return self._called(values, "ctc", "custom_tool_call", "input", arguments)

    def _called(self, values: Values, prefix: str, kind: str, field: str, arguments: str) -> Item:
        call = ToolCall(id=_text(values, "call_id"), name=_text(values, "name"), arguments=arguments)
        piece = Message(role="assistant", tool_calls=(call,))
        shown = {"call_id": call.id, "name": call.name, field: _text(values, field)}
        return self._made_of(values, prefix, piece, type=kind, **shown)

    def _output(self, given: dict[str, object], path: str, kind: str) -> Item:
        values = self._fields(given, OUTPUT, path)
        output = values.get("output", object)
        said, parts = self._content(output, f"{path}.output", "input_text")
        call_id = _text(values, "call_id")
        piece = said.message("tool", tool_call_id=call_id)
        shown = output if isinstance(output, str) else parts
        return self._made_of(values, "fco", piece, type=kind, call_id=call_id, output=shown)

    def _reasoning(self, given: dict[str, object], path: str) -> Item:
        values = self._fields(given, REASONING, path)
        summary = self._texts(values, "summary", path)
        content = self._texts(values, "content", path)
        text = "\n".join(content or summary)
        piece = Message(role="assistant", reasoning=text) if text else None
        shown: dict[str, object] = {"summary": [{"type": "summary_text", "text": text} for text in summary]}
        if content:
            shown["content"] = [{"type": "reasoning_text", "text": text} for text in content]
        return self._made_of(values, "rs", piece, type="reasoning", **shown)

    def _texts(self, values: Values, name: str, path: str) -> list[str]:
        given: list[object] = values.get(name, list) or []
        read = (self._fields(part, TEXT_PART, f"{path}.{name}[{index}]") for index, part in enumerate(given))
        return [_text(part, "text") for part in read]

    def _reference(self, given: dict[str, object], path: str) -> Item:
        name, where = _text(self._fields(given, REFERENCE, path), "id"), f"{path}.id"
        found = self._find(name)
        if found is None:
            raise InvalidRequest(
                f"Invalid '{where}': no item with this id is stored.", param=where, code="item_not_found"
            )
        if name in self._referenced:
            raise InvalidRequest(f"Invalid '{where}': this item is referenced twice.", param=where)
        self._referenced.add(name)
        self.recall((found,), where)
        return found

    def _content(self, value: object, path: str, kind: str) -> tuple[Content, list[object]]:
        """What `value` says, and its parts as they are shown; `kind` is the type of a plain string's only part."""
        if isinstance(value, str):
            return Content(value), [_shown(kind, value)]
        if not isinstance(value, list):
            raise fields.wrong_type(path, "a string or an array of parts", value)
        said = Content()
        given = fields.array(value, path, 0, _MAX_PARTS)
        return said, [self._part(part, f"{path}[{index}]", said) for index, part in enumerate(given)]

    def _part(self, value: object, path: str, said: Content) -> object:
        """Add a part to `said`, and how it is shown."""
        kind = tools.kind(value, path, (*_TEXTS, "refusal", "input_image"), refused=_UNSUPPORTED_PARTS)
        if kind == "input_image":
            return self._image(value, path, said)
        table, name = (REFUSAL_PART, "refusal") if kind == "refusal" else (TEXT_PART, "text")
        text = _text(self._fields(value, table, path), name)
        said.add_text(text)
        return {"type": "refusal", "refusal": text} if kind == "refusal" else _shown(kind, text)

    def _image(self, value: object, path: str, said: Content) -> object:
        images.require_vision(self._model, f"{path}.type")
        url = self._fields(value, IMAGE_PART, path).get("image_url", str)
        if url is None:
            raise fields.missing(f"{path}.image_url")
        self._count_images(1, path)
        said.add_image(images.of_url(url, self._model, f"{path}.image_url"))
        return {"type": "input_image", "image_url": url, "detail": "auto"}

    def _count_images(self, more: int, path: str) -> None:
        self._images += more
        if self._images > MAX_IMAGES:
            raise InvalidRequest(f"A request has at most {MAX_IMAGES} images.", param=path)

    def _fields(self, value: object, table: dict[str, Field], path: str) -> Values:
        # Items come back as SDKs hold them, with a null for whatever this server did not say of them.
        given = {name: item for name, item in fields.mapping(value, path).items() if item is not None}
        values = fields.read(given, table, refuse_unknown=self._refuse_unknown, path=path)
        self.ignored += values.ignored
        return values

    def _made_of(self, values: Values, prefix: str, piece: Message | None, **shown: object) -> Item:
        name = values.get("id", str)
        if name is None:
            name = f"{prefix}_{self._token}{self._made:04x}"
            self._made += 1
        status = values.get("status", str) or "completed"
        return Item(id=name, wire=openai_wire.dumps({"id": name, "status": status, **shown}), piece=piece)


def _text(values: Values, name: str) -> str:
    """A string that the table requires."""
    text = values.get(name, str)
    assert text is not None
    return text


def _shown(kind: str, text: str) -> dict[str, object]:
    if kind == "output_text":
        return {"type": kind, "text": text, "annotations": [], "logprobs": []}
    return {"type": "input_text", "text": text}


def check_calls(before: Sequence[Item], items: Sequence[Item], path: str) -> None:
    """Every result needs its call and every call its result; `items` stand at `path`, after the stored ones `before`.

    Chat templates would otherwise fail, or show the model a call that it has to finish.
    """
    open_calls: set[str] = set()
    known: set[str] = set()
    for index, item in enumerate((*before, *items), -len(before)):
        if item.piece is None:
            continue
        calls = {call.id for call in item.piece.tool_calls}
        known |= calls
        open_calls |= calls
        answered = item.piece.tool_call_id
        if answered is not None and answered not in known:
            where = f"{path}[{index}].call_id" if index >= 0 else path
            raise InvalidRequest(f"Invalid '{where}': no call of the conversation has this id.", param=where)
        open_calls.discard(answered or "")
    if open_calls:
        raise InvalidRequest(f"Invalid '{path}': a function call of the conversation has no output.", param=path)


def turns(instructions: str | None, items: Sequence[Item]) -> tuple[Message, ...]:
    """The conversation as a chat template wants it; a thought that led to nothing is left out."""
    names: dict[str | None, str] = {}
    runs = [[Message(role="system", content=instructions)]] if instructions else []
    spoken = False  # whether the last turn has words or calls
    for piece in (item.piece for item in items if item.piece is not None):
        names |= {call.id: call.name for call in piece.tool_calls}
        named = replace(piece, name=names.get(piece.tool_call_id)) if piece.role == "tool" else piece
        joins = bool(runs) and _joins(runs[-1][0], named, leading=len(runs) == 1, spoken=spoken)
        if joins:
            runs[-1].append(named)
        else:
            runs.append([named])
        spoken = (joins and spoken) or bool(named.content or named.tool_calls)
    found = (joined(run, gap="" if run[0].role == "assistant" else "\n\n") for run in runs)
    return tuple(turn for turn in found if not turn.reasoning or turn.content or turn.tool_calls)


def _joins(turn: Message, piece: Message, *, leading: bool, spoken: bool) -> bool:
    """Whether `piece` belongs to the turn that begins with `turn`.

    1. Instructions at the beginning are one system turn: many templates take only one, and only there.
    2. A call belongs to what the assistant thought and said before it; words belong to the thought before them.
    """
    if leading and turn.role in _SYSTEM and piece.role in _SYSTEM:  # 1
        return True
    return turn.role == piece.role == "assistant" and (bool(piece.tool_calls) or not spoken)  # 2


_SYSTEM = ("system", "developer")
