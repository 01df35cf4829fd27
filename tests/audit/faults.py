"""For every probe, the faults that it must find: a provider that is right but for this one thing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from tests.audit.provider import MODEL, MOST, Answer, Fault, Refusal

Change = Callable[[Any], Any]


def ignoring(*names: str, when: Callable[[dict[str, Any]], bool] = lambda fields: True) -> Fault:
    """Parameters are taken and have no effect."""
    return altering(
        lambda fields: {name: value for name, value in fields.items() if name not in names} if when(fields) else fields
    )


def altering(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Fault:
    """The request is changed before it is looked at."""
    return Fault(fields=change)


def setting(**values: Any) -> Fault:
    return altering(lambda fields: {**fields, **values})


def refusing(name: str) -> Fault:
    """A parameter is refused."""

    def change(fields: dict[str, Any]) -> dict[str, Any]:
        if name in fields:
            raise Refusal(400, f"'{name}' is not supported here.", name, "unsupported_parameter")
        return fields

    return altering(change)


def body(end: str, change: Change, status: int = 200, verb: str = "") -> Fault:
    """The answer's JSON is changed where the path ends so; `change` may change it in place."""

    def answer(path: str, fields: dict[str, Any], given: Answer) -> Answer:
        if not path.endswith(end) or given[0] != status or isinstance(given[2], bytes):
            return given
        content = copy.deepcopy(given[2])
        changed = change(content)
        return given[0], given[1], content if changed is None else changed

    return Fault(answer=answer)


def text(end: str, change: Callable[[bytes], bytes]) -> Fault:
    """The answer's bytes are changed."""

    def answer(path: str, fields: dict[str, Any], given: Answer) -> Answer:
        if path.endswith(end) and isinstance(given[2], bytes):
            return given[0], given[1], change(given[2])
        return given

    return Fault(answer=answer)


def chat(change: Change) -> Fault:
    return body("/chat/completions", change)


def status(old: int, new: int, end: str = "") -> Fault:
    """One status instead of another."""
    return Fault(
        answer=lambda path, fields, given: (new, *given[1:]) if given[0] == old and path.endswith(end) else given
    )


def header(name: str, value: str) -> Fault:
    return Fault(answer=lambda path, fields, given: (given[0], {**given[1], name: value}, given[2]))


def chunk(change: Callable[[Any], list[Any]]) -> Fault:
    """Chunks are changed, dropped or multiplied."""
    return Fault(chunk=lambda fields, given: change(copy.deepcopy(given)))


def deltas(change: Change) -> Fault:
    """The first choice of each chunk is changed in place."""

    def changed(given: Any) -> list[Any]:
        if isinstance(given, dict) and given["choices"]:
            change(given["choices"][0])
        return [given]

    return chunk(changed)


def words(*names: str) -> Fault:
    return Fault(words=frozenset(names))


def without(*names: str) -> Change:
    """Take keys out of an object."""

    def change(content: dict[str, Any]) -> None:
        for name in names:
            content.pop(name, None)

    return change


def at(*path: str | int, change: Change) -> Change:
    """Change what lies at a path."""

    def inner(content: Any) -> None:
        for step in path:
            content = content[step]
        change(content)

    return inner


def put(*path: str | int, value: Any) -> Change:
    """Set what lies at a path."""
    *way, last = path

    def inner(content: Any) -> None:
        for step in way:
            content = content[step]
        content[last] = value(content[last]) if callable(value) else value

    return inner


def entry(change: Change) -> Fault:
    """The audited model's entry in the list is changed."""
    return body("/v1/models", at("data", 1, change=change))


def first_entry(change: Change) -> Fault:
    return body("/v1/models", at("data", 0, change=change))


def usage(name: str, value: Any, end: str = "/completions") -> Fault:
    return body(end, put("usage", name, value=value))


def hidden(*ends: str) -> Fault:
    """These addresses are not there."""
    return Fault(
        answer=lambda path, fields, given: (
            (404, {}, {"error": {"message": "no", "type": "x"}}) if path.endswith(ends) else given
        )
    )


def both(*faults: Fault) -> Fault:
    """Answers are changed by one after the other."""

    def answer(path: str, fields: dict[str, Any], given: Answer) -> Answer:
        for each in faults:
            given = each.answer(path, fields, given)
        return given

    return Fault(answer=answer)


def _answered_anew() -> Fault:
    numbers = iter(range(10**6))
    return chat(put("id", value=lambda old: f"{old}-{next(numbers)}"))


DONE = b"[DONE]"
NO_DONE = chunk(lambda given: [] if given == DONE else [given])
NO_USAGE = chunk(lambda given: [] if isinstance(given, dict) and not given["choices"] else [given])


def _usage_unasked(fields: dict[str, Any], given: Any) -> list[Any]:
    return [] if "stream_options" not in fields and isinstance(given, dict) and not given["choices"] else [given]


def _repeating_role(choice: Any) -> None:
    choice["delta"]["role"] = "assistant"


def _text_changed(choice: Any) -> None:
    if choice["delta"].get("content"):
        choice["delta"]["content"] += "x"


def _mangled(choice: Any) -> None:
    if content := choice["delta"].get("content"):
        choice["delta"]["content"] = content.encode("ascii", "replace").decode()


def _messages(change: Callable[[list[Any]], list[Any]]) -> Fault:
    return altering(
        lambda fields: {**fields, "messages": change(fields["messages"])} if "messages" in fields else fields
    )


def _only_text(messages: Any) -> Any:
    """Images are dropped from messages."""
    if not isinstance(messages, list):
        return messages
    return [
        {**each, "content": [part for part in each["content"] if part.get("type") != "image_url"]}
        if isinstance(each, dict) and isinstance(each.get("content"), list)
        else each
        for each in messages
    ]


def _one_image(messages: list[Any]) -> list[Any]:
    return [
        {**each, "content": each["content"][:2]} if isinstance(each["content"], list) else each for each in messages
    ]


def _calls(change: Change) -> Fault:
    """Whole answers' first call is changed."""

    def changed(content: Any) -> None:
        for call in content["choices"][0]["message"].get("tool_calls", []):
            change(call)

    return chat(changed)


def _call_deltas(change: Change) -> Fault:
    def changed(choice: Any) -> None:
        for delta in choice["delta"].get("tool_calls", []):
            change(delta)

    return deltas(changed)


def _repeated_id(delta: Any) -> None:
    delta["id"] = "call_x"


def _cut_arguments(call: Any) -> None:
    call["function"]["arguments"] = call["function"].get("arguments", "")[:-1]


def _format(fields: dict[str, Any]) -> str:
    return json.dumps(fields.get("response_format") or {})


def _plain_control(path: str, fields: dict[str, Any], given: Answer) -> Answer:
    """Control tokens' names in messages are read as control tokens."""
    if given[0] == 200 and "<|im_end|>" in json.dumps(fields.get("messages", "")):
        given = (given[0], given[1], copy.deepcopy(given[2]))
        given[2]["usage"]["prompt_tokens"] -= 9
    return given


def _drifting() -> Fault:
    count = iter(range(10**6))
    return usage("prompt_tokens", lambda value: value + next(count))


def _fails_on(test: Callable[[str], bool]) -> Fault:
    """A server error where the request's text is of some kind."""

    def answer(path: str, fields: dict[str, Any], given: Answer) -> Answer:
        said = json.dumps([fields.get("messages"), fields.get("prompt")], ensure_ascii=False)
        return (500, {}, {"error": {"message": "…", "type": "x"}}) if test(said) else given

    return Fault(answer=answer)


def _pair_refused(fields: dict[str, Any]) -> dict[str, Any]:
    if "seed" in fields and "top_k" in fields:
        raise Refusal(400, "'seed' and 'top_k' exclude each other.", "seed")
    return fields


def _clipped(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "max_tokens": min(fields["max_tokens"], MOST)} if "max_tokens" in fields else fields


def _shortened(messages: list[Any]) -> list[Any]:
    return [{**each, "content": each["content"][:10_000]} for each in messages]


def _in_range(name: str) -> Fault:
    return ignoring(name, when=lambda fields: name in fields and not 0 < fields[name] <= 1)


def _properties(change: Change) -> Fault:
    return body("/openapi.json", at("components", "schemas", "Chat", "properties", change=change))


def _without_bounds(properties: Any) -> None:
    for name in list(properties):
        properties[name] = {"type": "number"}


def _no_defaults() -> Fault:
    hidden, bare = entry(without("defaults")), _properties(_without_bounds)
    return Fault(answer=lambda path, fields, given: bare.answer(path, fields, hidden.answer(path, fields, given)))


def _no_features() -> Fault:
    plain = entry(without("supported_parameters", "capabilities"))
    return Fault(answer=plain.answer, fields=refusing("structured_outputs").fields)


def _repaired_tools(fields: dict[str, Any]) -> dict[str, Any]:
    choice = fields.get("tool_choice")
    return {**fields, "tool_choice": "auto"} if choice == "sometimes" else fields


def _same_code(path: str, fields: dict[str, Any], given: Answer) -> Answer:
    if given[0] >= 400:
        return 400, given[1], {"error": {"message": "That is wrong.", "type": "x", "param": None, "code": "x"}}
    return given


def _nameless(path: str, fields: dict[str, Any], given: Answer) -> Answer:
    if given[0] == 400:
        return 400, given[1], {"error": {"message": "Wrong.", "type": "x", "param": None, "code": "x"}}
    return given


def _no_retry(path: str, fields: dict[str, Any], given: Answer) -> Answer:
    return (given[0], {}, given[2]) if given[0] == 429 else given


def _known_schema(fields: dict[str, Any]) -> dict[str, Any]:
    return ignoring("response_format").fields(fields) if "no-such-type" in _format(fields) else fields


def _two_indices(delta: Any) -> None:
    delta["index"] = 0


def _tools_forgotten(messages: list[Any]) -> list[Any]:
    return [each for each in messages if each["role"] == "user"]


def _leak(choice: Any) -> None:
    if choice["finish_reason"] == "stop":
        choice["delta"]["content"] = " w" + "0123456789 w" * 40


def _below_top(content: Any) -> None:
    for item in content["choices"][0]["logprobs"]["content"]:
        item["top_logprobs"] = item["top_logprobs"][:1]


def _positive(content: Any) -> None:
    content["choices"][0]["logprobs"]["content"][0]["logprob"] = 0.5


def _swapped(name: str) -> Change:
    """Another known name in the tool choice's place."""
    return put("function", "name", value=name)


def _headless(given: Any) -> list[Any]:
    if isinstance(given, dict):
        given["id"] = f"x{id(given)}"
    return [given]


def _dearer(given: Any) -> Any:
    if isinstance(given, dict) and "usage" in given:
        given["usage"]["cost"] *= 2
    return given


def _cut_at(limit: int) -> Callable[[Any], list[Any]]:
    seen: list[Any] = []

    def changed(given: Any) -> list[Any]:
        seen.append(given)
        return [given] if len(seen) < limit else []

    return changed


FAULTS: dict[str, tuple[Fault, ...]] = {
    "models-list": (body("/v1/models", without("object")), first_entry(put("id", value=MODEL))),
    "models-context-length": (entry(without("context_length")),),
    "models-max-output-tokens": (
        entry(without("max_output_tokens")),
        entry(put("max_output_tokens", value=10**6)),
    ),
    "models-by-id": (status(404, 200), body("/toy:1", put("id", value="other"))),
    "models-match": (chat(put("model", value="other")),),
    "models-pricing": (
        entry(put("pricing", "prompt", value=2e-08)),
        entry(put("pricing", "completion", value="6e-08")),
    ),
    "models-id": (first_entry(put("id", value="")),),
    "models-object": (first_entry(put("object", value="thing")),),
    "models-created": (first_entry(put("created", value="2026")),),
    "models-owned-by": (first_entry(without("owned_by")),),
    "states-name": (entry(without("name")),),
    "states-release": (entry(without("released", "created")),),
    "states-family": (entry(without("family")),),
    "states-languages": (entry(put("languages", value=[])),),
    "states-modality": (entry(without("input_modalities")),),
    "states-quantization": (entry(without("quantization")),),
    "states-capabilities": (entry(without("capabilities", "supported_parameters")),),
    "states-description": (entry(put("description", value="")),),
    "states-license": (entry(without("license")),),
    "chat-whole": (
        chat(without("id")),
        chat(put("choices", 0, "finish_reason", value="eos")),
        chat(put("choices", 0, "message", "content", value=None)),
        header("content-type", "text/plain"),
        chat(put("choices", value=5)),
    ),
    "chat-sizes": (usage("prompt_tokens", 7),),
    "chat-roles": (_messages(lambda messages: messages[-1:]),),
    "stream-sse": (
        header("content-type", "application/json"),
        chunk(_headless),
        chunk(lambda given: [{**given, "object": "chat.completion"}] if isinstance(given, dict) else [given]),
    ),
    "stream-done": (NO_DONE, chunk(lambda given: [given, {"choices": []}])),
    "stream-deltas": (
        deltas(_repeating_role),
        deltas(put("finish_reason", value="stop")),
        deltas(put("finish_reason", value=None)),
    ),
    "stream-usage": (
        NO_USAGE,
        chunk(lambda given: [given] if given == DONE else [{**given, "choices": [{"index": 0, "delta": {}}]}]),
    ),
    "stream-usage-always": (Fault(chunk=_usage_unasked),),
    "stream-incremental": (words("late"),),
    "stream-equals-whole": (deltas(_text_changed), usage("completion_tokens", 3)),
    "stream-choices": (ignoring("n"), ignoring("n", when=lambda fields: bool(fields.get("stream")))),
    "request-ids": (header("x-request-id", ""), header("x-request-id", "req_always")),
    "completions-whole": (
        body("/v1/completions", put("object", value="chat.completion")),
        status(200, 404, "/v1/completions"),
    ),
    "completions-usage": (body("/v1/completions", without("usage")), usage("total_tokens", 1, "/v1/completions")),
    "completions-stream": (NO_DONE,),
    "completions-stream-usage": (NO_USAGE,),
    "completions-prompts": (
        altering(lambda fields: {**fields, "prompt": "x" if isinstance(fields["prompt"], list) else fields["prompt"]}),
    ),
    "completions-echo": (ignoring("echo"),),
    "usage-whole": (usage("total_tokens", 1), chat(without("usage")), usage("prompt_tokens", 0)),
    "usage-exact-text": (usage("prompt_tokens", lambda value: value + 1, "/v1/completions"),),
    "usage-exact-chat": (usage("prompt_tokens", lambda value: value + 3),),
    "usage-completion": (usage("completion_tokens", lambda value: value - 1), ignoring("max_tokens")),
    "usage-consistent": (_drifting(),),
    "usage-cache": (
        body("/completions", at("usage", change=without("prompt_tokens_details"))),
        body("/completions", put("usage", "prompt_tokens_details", "cached_tokens", value=10**6)),
        body("/completions", put("usage", "prompt_tokens_details", "cached_tokens", value=800)),
    ),
    "usage-special-text": (Fault(answer=_plain_control),),
    "max-tokens": (ignoring("max_tokens"), chat(put("choices", 0, "finish_reason", value="stop"))),
    "max-completion-tokens": (ignoring("max_completion_tokens"), refusing("max_completion_tokens")),
    "temperature": (ignoring("temperature"), setting(temperature=0)),
    "top-p": (ignoring("top_p"),),
    "top-k": (ignoring("top_k"), refusing("top_k")),
    "min-p": (ignoring("min_p"),),
    "top-a": (ignoring("top_a"), refusing("top_a")),
    "seed": (ignoring("seed"), setting(seed=1)),
    "frequency-penalty": (ignoring("frequency_penalty"),),
    "presence-penalty": (ignoring("presence_penalty"),),
    "repetition-penalty": (ignoring("repetition_penalty"), refusing("repetition_penalty")),
    "stop": (ignoring("stop"), chat(put("choices", 0, "finish_reason", value="length")), deltas(_leak)),
    "logit-bias": (ignoring("logit_bias"), setting(logit_bias={"1000": 100})),
    "logprobs": (ignoring("logprobs"), chat(_positive)),
    "top-logprobs": (ignoring("top_logprobs"), chat(_below_top)),
    "schema-flat": (ignoring("response_format"), refusing("response_format")),
    "schema-nested": (ignoring("response_format", when=lambda fields: "anyOf" in _format(fields)),),
    "schema-stream": (ignoring("response_format", when=lambda fields: bool(fields.get("stream"))),),
    "schema-hot": (ignoring("response_format", when=lambda fields: fields.get("temperature") == 2),),
    "schema-refused": (altering(_known_schema),),
    "schema-limit": (chat(put("choices", 0, "finish_reason", value="stop")),),
    "json-mode": (ignoring("response_format"), refusing("response_format")),
    "structured-outputs": (_no_features(),),
    "tools-required": (
        ignoring("tools", "tool_choice"),
        chat(put("choices", 0, "finish_reason", value="stop")),
        _calls(_cut_arguments),
        _calls(put("function", "name", value="other")),
        _calls(put("function", "arguments", value='{"city": 5}')),
    ),
    "tools-named": (setting(tool_choice="required"),),
    "tools-none": (setting(tool_choice="required"),),
    "tools-auto": (_calls(_cut_arguments), chat(put("choices", 0, "finish_reason", value="stop"))),
    "tools-stream": (_call_deltas(_repeated_id), _call_deltas(without("index")), _call_deltas(_cut_arguments)),
    "tools-stream-equals-whole": (_call_deltas(_cut_arguments),),
    "tools-parallel": (setting(parallel_tool_calls=True),),
    "tools-parallel-stream": (_call_deltas(_two_indices),),
    "tools-results": (_messages(_tools_forgotten),),
    "tools-refused": (altering(_repaired_tools),),
    "tools-count": (ignoring("tools", "tool_choice"),),
    "error-key": (words("open"), status(401, 403)),
    "error-model": (setting(model=MODEL), status(404, 400)),
    "error-json": (status(400, 500), body("", lambda content: {"detail": "no"}, status=400)),
    "error-missing": (Fault(answer=_nameless), setting(model=MODEL)),
    "error-messages": (setting(messages=[{"role": "user", "content": "x"}]), status(400, 500)),
    "error-route": (status(404, 200), status(405, 500)),
    "error-shape": (
        body("", lambda content: {"detail": "no"}, status=400),
        body("", at("error", change=without("code")), status=404),
        status(400, 500),
    ),
    "error-types-named": (Fault(answer=_same_code),),
    "error-size": (status(413, 500), body("", lambda content: {}, status=413)),
    "error-parameter": (words("swallows"), status(400, 500)),
    "error-images": (_messages(_only_text), status(400, 500)),
    "unicode-prompts": (_fails_on(lambda said: not said.isascii()),),
    "unicode-answers": (deltas(_mangled), _fails_on(lambda said: "phrase" in said or not said.isascii())),
    "empty-prompts": (_fails_on(lambda said: '""' in said),),
    "cancellation": (words("goes on"),),
    "anthropic-messages": (status(200, 404, "/messages"), body("/messages", without("stop_reason"))),
    "anthropic-stream": (text("/messages", lambda data: data.replace(b"event: message_stop\n", b"event: stop\n")),),
    "anthropic-count": (body("/count_tokens", put("input_tokens", value=1)),),
    "anthropic-errors": (body("/messages", lambda content: {"error": {"message": "no"}}, status=400),),
    "google-generate": (
        status(200, 404, ":generateContent"),
        body(":generateContent", without("usageMetadata")),
    ),
    "google-stream": (text(":streamGenerateContent", lambda data: data + b"data: [DONE]\n\n"),),
    "google-count": (body(":countTokens", put("totalTokens", value=1)),),
    "responses-whole": (status(200, 404, "/responses"), body("/responses", put("status", value="done"))),
    "responses-stream": (
        text("/responses", lambda data: data.replace(b'"sequence_number": 3', b'"sequence_number": 9')),
    ),
    "embeddings": (
        body("/embeddings", put("data", 0, "embedding", value=lambda old: old if isinstance(old, list) else "AAAA")),
        status(200, 404, "/embeddings"),
    ),
    "feed": (
        body("/openrouter/models", at("data", 0, change=lambda each: each.update(object="model"))),
        body("/openrouter/models", put("data", 0, "input_modalities", 0, "pricing", 0, "cost_usd", value="2E-8")),
        status(200, 404, "/openrouter/models"),
    ),
    "reference-endpoints": (
        status(200, 404, "/openapi.json"),
        body("/openapi.json", at("paths", change=without("/v1/completions"))),
    ),
    "reference-parameters": (_properties(without("temperature")),),
    "reference-errors": (
        body("/openapi.json", at("paths", "/v1/chat/completions", "post", "responses", change=without("429"))),
    ),
    "reference-examples": (
        body("/openapi.json", lambda content: json.loads(json.dumps(content).replace('"example"', '"ex"'))),
    ),
    "reference-page": (status(200, 404, "/docs"), text("/docs", lambda data: b"<html></html>")),
    "reference-curl": (text("/docs", lambda data: data.replace(b"curl", b"")),),
    "reference-sdks": (text("/docs", lambda data: data.replace(b"Python", b"")),),
    "reference-auth": (body("/openapi.json", at("components", change=without("securitySchemes"))),),
    "reference-header": (text("/docs", lambda data: data.replace(b"Authorization: Bearer", b"")),),
    "reference-rotation": (text("/docs", lambda data: data.replace(b"rotated", b"").replace(b"revoked", b"")),),
    "reference-finish-reasons": (
        body("/openapi.json", at("components", "schemas", change=without("Finish"))),
        body("/openapi.json", put("components", "schemas", "Finish", "enum", value=["stop", "length"])),
    ),
    "states-cutoff": (entry(without("knowledge_cutoff")),),
    "states-uses": (entry(without("intended_use")),),
    "states-strengths": (entry(put("strengths", value="")),),
    "states-limitations": (entry(without("limitations")),),
    "health": (status(200, 404, "/health"),),
    "says-training": (hidden("/privacy"), body("/privacy", without("training_on_completions"))),
    "says-logging": (body("/privacy", put("retention", value=[])),),
    "says-deletion": (body("/privacy", put("deletion", value=None)),),
    "says-locations": (body("/privacy", put("operator", "locations", value=[])),),
    "says-company": (body("/privacy", put("operator", "name", value="")),),
    "says-email": (hidden("/support", "/privacy"),),
    "says-cancelled": (body("/pricing", put("policy", value={})),),
    "says-failed": (body("/pricing", put("policy", value={})),),
    **{f"says-{each}": (body("/privacy", without("certifications")),) for each in ("gdpr", "soc2", "hipaa")},
    "says-tokenizer": (text("/docs", lambda data: data.replace(b"tokenizer", b"")),),
    "says-counting": (text("/docs", lambda data: data.replace(b"control", b"")), hidden("/docs")),
    "says-uptime": (hidden("/support"),),
    "says-incidents": (hidden("/support"),),
    **{
        f"says-{each}": (body("/pricing", without("payment")), hidden("/pricing"))
        for each in ("cards", "automatic", "invoices", "payment-period")
    },
    "says-maintenance": (body("/status", without("maintenance")), hidden("/status")),
    "says-tiers": (body("/pricing", at("models", 0, change=without("tiers"))),),
    "trains-on-prompts": (Fault(),),
    "spares-prompts": (body("/privacy", put("training_on_prompts", value=True)),),
    "trains-on-answers": (Fault(), hidden("/privacy")),
    "spares-answers": (body("/privacy", put("training_on_completions", value=True)),),
    "charges-cancelled": (body("/pricing", put("policy", "cancelled", value="free")),),
    "spares-cancelled": (Fault(),),
    "charges-failed": (Fault(),),
    "spares-failed": (body("/pricing", put("policy", "failed", value="used")), hidden("/pricing")),
    "prices-published": (
        hidden("/pricing"),
        body("/pricing", put("currency", value="EUR")),
        body("/pricing", put("unit", value="per token")),
        body("/pricing", put("models", 1, "id", value="other")),
        body("/pricing", put("models", 1, "prices", "prompt", value=0.02)),
    ),
    "prices-equal": (
        body("/pricing", put("models", 1, "prices", "completion", value="0.07")),
        body("/pricing", put("models", 1, "prices", "cached_prompt", value="0.02")),
        body("/openrouter/models", put("data", 0, "input_modalities", 0, "pricing", 0, "cost_usd", value="0.00000003")),
        entry(put("pricing", "prompt", value="0.00000003")),
    ),
    "price-cache-read": (
        both(
            entry(at("pricing", change=without("input_cache_read"))),
            body("/pricing", put("models", 1, "prices", "cached_prompt", value=None)),
        ),
    ),
    "price-cache-write": (
        both(
            entry(at("pricing", change=without("input_cache_write"))),
            body("/pricing", at("models", 1, "prices", change=without("cache_write"))),
        ),
    ),
    "price-images-made": (entry(put("output_modalities", value=["text", "image"])),),
    "cost-exact": (
        usage("cost", lambda value: value + 1e-8),
        usage("prompt_tokens_details", {"cached_tokens": 0}),
        entry(put("pricing", "completion", value="0.00000007")),
        chunk(lambda given: [_dearer(given)]),
    ),
    "metrics": (
        text("/metrics", lambda data: data.replace(b"toy_queue", b"toy_wait")),
        text("/metrics", lambda data: data.replace(b"toy_errors_total counter", b"toy_errors_total gauge")),
        text("/metrics", lambda data: data.replace(b'"+Inf"} 3', b'"+Inf"} 2')),
        text("/metrics", lambda data: data.replace(b'"0.1"} 1', b'"0.1"} 9')),
        text("/metrics", lambda data: data + b"not a sample\n"),
    ),
    "idempotency": (_answered_anew(),),
    "limits-published": (
        hidden("/limits"),
        body("/limits", at("limits", change=without("requests_per_day"))),
        body("/limits", put("limits", "requests_per_minute", value=7)),
        header("x-ratelimit-limit-tokens", "5"),
    ),
    "limits-raised": (body("/limits", without("raise")),),
    "token-limit-enforced": (
        both(header("x-ratelimit-remaining-tokens", "600"), header("x-ratelimit-limit-tokens", "600")),
    ),
    "latency": (deltas(lambda choice: choice["delta"].pop("content", None)),),
    "concurrent": (words("mixes"),),
    "sustained": (words("breaks under load"),),
    "same-under-load": (words("mixes"),),
    "parameters-together": (altering(_pair_refused), ignoring("seed")),
    "ranges-enforced": (_in_range("top_p"), ignoring("temperature")),
    "ranges-documented": (_properties(_without_bounds),),
    "defaults-documented": (_no_defaults(),),
    "wrong-types": (ignoring("stop"), Fault(answer=_nameless)),
    "output-limit": (altering(_clipped), entry(put("max_output_tokens", value=2 * MOST))),
    "context-near": (_messages(_shortened), status(200, 500, "/chat/completions")),
    "context-over": (words("cuts prompts"), status(400, 500)),
    "long-stream": (NO_DONE,),
    "overload": (status(429, 503), Fault(answer=_no_retry), words("never again")),
    "limit-headers": (header("x-ratelimit-remaining-requests", ""), header("x-ratelimit-limit-requests", "many")),
    "token-limit-headers": (header("x-ratelimit-remaining-tokens", "some"),),
    "error-none-of-ours": (status(400, 500),),
    "error-server": (body("", lambda content: {"detail": "no"}, status=500),),
    **{
        f"page-{kind}": (text("/page", lambda data: b"-"), status(200, 404, "/page"))
        for kind in ("privacy", "retention", "pricing", "status", "terms", "security", "support", "policy", "limits")
    },
}
# Of a provider that takes images.
VISION_FAULTS: dict[str, tuple[Fault, ...]] = {
    "models-image-pricing": (entry(put("pricing", "image", value=0)),),
    **{
        f"image-{kind}": (_messages(_only_text), status(200, 400, "/chat/completions"))
        for kind in ("png", "jpeg", "gif", "webp")
    },
    "image-several": (_messages(_one_image),),
    "image-wrong": (_messages(_only_text), status(400, 500)),
    "image-url": (_messages(_only_text), status(400, 500)),
}
