"""Every operation of the API, in one list: what it is for, what it reads and what it answers.

Parameters are the tables that requests are checked by. `route` names the line of the server's route list; a test holds
the two lists to each other.
"""

from __future__ import annotations

from collections.abc import Mapping

from ocserve.api import (
    admin,
    anthropic,
    anthropic_count,
    credit,
    google,
    google_embed,
    llama_completion,
    llama_infill,
    llama_server,
    llama_tokens,
    ollama_chat,
    ollama_embed,
    ollama_generate,
    ollama_models,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_responses_count,
    openai_responses_parameters,
    protojson,
    queries,
    rerank,
)
from ocserve.api.fields import Field
from ocserve.api.openai_responses_stored import INPUT_ITEMS, RETRIEVE
from ocserve.api.operation import LINES, SSE, Operation
from ocserve.api.operation import get as _get
from ocserve.api.operation import reads as _reads

# The default model answers to this name everywhere.
_MODEL = {"model": "default"}
_HELLO = {"role": "user", "content": "Hello"}
_CHAT_EXAMPLE = {**_MODEL, "messages": [_HELLO], "max_tokens": 16}
_PROMPT_EXAMPLE = {**_MODEL, "prompt": "Once upon a time", "max_tokens": 16}
_INPUT_EXAMPLE = {**_MODEL, "input": "Hello"}
_CONTENT = {"parts": [{"text": "Hello"}]}


def _chat(path: str, tag: str) -> Operation:
    return Operation(
        method="POST",
        path=path,
        tag=tag,
        summary="The next turn of a conversation.",
        reads=_reads(*openai_chat.PARAMETERS),
        example=_CHAT_EXAMPLE,
        answer="ChatCompletion",
        query=queries.OPENAI,
        streamed=(SSE, "ChatCompletionChunk"),
        last="[DONE]",
    )


def _completion(path: str, tag: str) -> Operation:
    return Operation(
        method="POST",
        path=path,
        tag=tag,
        summary="The continuation of a prompt, without a chat template.",
        reads=_reads(*openai_completions.PARAMETERS),
        example=_PROMPT_EXAMPLE,
        answer="Completion",
        query=queries.OPENAI,
        streamed=(SSE, "Completion"),
        last="[DONE]",
    )


def _embeddings(path: str, tag: str) -> Operation:
    return Operation(
        method="POST",
        path=path,
        tag=tag,
        summary="A vector for each text.",
        reads=_reads(*openai_embeddings.PARAMETERS),
        example=_INPUT_EXAMPLE,
        answer="Embeddings",
        query=queries.OPENAI,
    )


def _rerank(path: str) -> Operation:
    return Operation(
        method="POST",
        path=path,
        tag="Cohere and Jina",
        summary="How well each document answers the query, best first.",
        reads=_reads(*rerank.PARAMETERS),
        example={**_MODEL, "query": "Which is a fruit?", "documents": ["An apple", "A car"]},
        answer="Ranking",
        query=queries.OPENAI,
    )


_OPENAI: tuple[Operation, ...] = (
    _chat("/v1/chat/completions", "OpenAI"),
    _completion("/v1/completions", "OpenAI"),
    _embeddings("/v1/embeddings", "OpenAI"),
    _rerank("/v1/rerank"),
    _rerank("/v2/rerank"),
    _get(
        "/v1/models",
        "OpenAI",
        "ModelList",
        "The models that are served, with limits, parameters and prices.",
        query=(*queries.OPENAI, *queries.ANTHROPIC_LISTING, *queries.GOOGLE_LISTING),
    ),
    _get(
        "/v1/models/{id:path}",
        "OpenAI",
        "Model",
        "One model, by its id or an alias; both may contain slashes.",
        query=(*queries.OPENAI, *queries.ANTHROPIC, *queries.GOOGLE),
    ),
)
_RESPONSES: tuple[Operation, ...] = (
    Operation(
        method="POST",
        path="/v1/responses",
        tag="OpenAI responses",
        summary="The next turn of a conversation, as items; kept in memory for a while unless `store` is false. "
        "A WebSocket at this path takes the same as messages.",
        reads=_reads(*openai_responses_parameters.PARAMETERS),
        example=_INPUT_EXAMPLE,
        answer="Response",
        query=queries.OPENAI,
        streamed=(SSE, "ResponseEvent"),
        links=(
            "get_v1_responses_by_id",
            "get_v1_responses_by_id_input_items",
            "post_v1_responses_by_id_cancel",
            "delete_v1_responses_by_id",
        ),
    ),
    Operation(
        method="POST",
        path="/v1/responses/input_tokens",
        tag="OpenAI responses",
        summary="How many tokens a response's input is.",
        reads=_reads(*openai_responses_count.PARAMETERS),
        example=_INPUT_EXAMPLE,
        answer="InputTokens",
        query=queries.OPENAI,
    ),
    _get("/v1/responses/{id}", "OpenAI responses", "Response", "A response that is kept.", query=RETRIEVE),
    Operation(
        method="DELETE",
        path="/v1/responses/{id}",
        tag="OpenAI responses",
        summary="Forget a response.",
        answer="DeletedResponse",
        query=queries.OPENAI,
    ),
    _get(
        "/v1/responses/{id}/input_items",
        "OpenAI responses",
        "InputItems",
        "What a response was given.",
        query=INPUT_ITEMS,
    ),
    Operation(
        method="POST",
        path="/v1/responses/{id}/cancel",
        tag="OpenAI responses",
        summary="Refused: only responses in the background can be cancelled, and there are none.",
        answer="Response",
        query=queries.OPENAI,
    ),
)
_ANTHROPIC: tuple[Operation, ...] = (
    Operation(
        method="POST",
        path="/v1/messages",
        tag="Anthropic",
        summary="The next turn of a conversation.",
        reads=_reads(*anthropic.PARAMETERS),
        example=_CHAT_EXAMPLE,
        answer="AnthropicMessage",
        query=queries.ANTHROPIC,
        streamed=(SSE, "AnthropicEvent"),
        error="AnthropicError",
    ),
    Operation(
        method="POST",
        path="/v1/messages/count_tokens",
        tag="Anthropic",
        summary="How many tokens a conversation is.",
        reads=_reads(*anthropic_count.PARAMETERS),
        example={**_MODEL, "messages": [_HELLO]},
        answer="AnthropicCount",
        query=queries.ANTHROPIC,
        error="AnthropicError",
    ),
)


_GOOGLE_EXAMPLES: Mapping[str, Mapping[str, object]] = {
    "embedContent": {"content": _CONTENT},
    "batchEmbedContents": {"requests": [{"content": _CONTENT}]},
}


def _google(method: str, summary: str, answer: str, reads: tuple[Field, ...], *, version: str) -> Operation:
    return Operation(
        method="POST",
        path=f"/{version}/models/{{model:path}}:{method}",
        tag="Google",
        summary=summary,
        reads=protojson.table(*reads),
        example=_GOOGLE_EXAMPLES.get(method, {"contents": [_CONTENT]}),
        answer=answer,
        streamed=(SSE, "GoogleContent") if method.startswith("stream") else None,
        query=queries.GOOGLE_STREAM if method.startswith("stream") else queries.GOOGLE,
        error="GoogleError",
    )


def _google_calls(version: str) -> tuple[Operation, ...]:
    turn = "The next turn of a conversation"
    streamed = f"{turn}, streamed: as events with `?alt=sse`, else as an array."
    counted = "How many tokens a conversation is."
    return (
        _google("generateContent", f"{turn}.", "GoogleContent", google.PARAMETERS, version=version),
        _google("streamGenerateContent", streamed, "GoogleContents", google.PARAMETERS, version=version),
        _google("countTokens", counted, "GoogleCount", google.COUNTED, version=version),
        _google("embedContent", "A text's vector.", "GoogleEmbedding", google_embed.REQUEST, version=version),
        _google(
            "batchEmbedContents", "A vector for each text.", "GoogleEmbeddings", google_embed.BATCH, version=version
        ),
    )


_GOOGLE: tuple[Operation, ...] = (
    *_google_calls("v1beta"),
    *_google_calls("v1"),
    _get(
        "/v1beta/models",
        "Google",
        "GoogleModelList",
        "The models that are served.",
        query=queries.GOOGLE_LISTING,
        error="GoogleError",
    ),
    _get("/v1beta/models/{id:path}", "Google", "GoogleModel", "One model.", query=queries.GOOGLE, error="GoogleError"),
)
_OLLAMA: tuple[Operation, ...] = (
    Operation(
        method="POST",
        path="/api/chat",
        tag="Ollama",
        summary="The next turn of a conversation, streamed unless `stream` is false. Without messages: load the model.",
        reads=_reads(*ollama_chat.PARAMETERS),
        example={**_MODEL, "messages": [_HELLO], "stream": False},
        answer="OllamaChat",
        streamed=(LINES, "OllamaChat"),
        error="OllamaError",
    ),
    Operation(
        method="POST",
        path="/api/generate",
        tag="Ollama",
        summary="The answer to a prompt, streamed unless `stream` is false. Without a prompt: load the model.",
        reads=_reads(*ollama_generate.PARAMETERS),
        example={**_MODEL, "prompt": "Once upon a time", "stream": False},
        answer="OllamaGenerate",
        streamed=(LINES, "OllamaGenerate"),
        error="OllamaError",
    ),
    Operation(
        method="POST",
        path="/api/embed",
        tag="Ollama",
        summary="A vector for each text.",
        reads=_reads(*ollama_embed.PARAMETERS),
        example=_INPUT_EXAMPLE,
        answer="OllamaEmbeddings",
        error="OllamaError",
    ),
    Operation(
        method="POST",
        path="/api/show",
        tag="Ollama",
        summary="One model: its context, capabilities and defaults.",
        reads=_reads(*ollama_models.SHOW),
        example=_MODEL,
        answer="OllamaShow",
        error="OllamaError",
    ),
    _get("/api/tags", "Ollama", "OllamaTags", "The models that are served.", error="OllamaError"),
    _get("/api/ps", "Ollama", "OllamaRunning", "The models that are in memory.", error="OllamaError"),
    _get("/api/version", "Ollama", "OllamaVersion", "The level of Ollama's interface.", public=True),
)
_LM_STUDIO: tuple[Operation, ...] = (
    _get("/api/v0/models", "LM Studio", "LmStudioModelList", "The models that are served, with their state."),
    _get("/api/v0/models/{id:path}", "LM Studio", "LmStudioModel", "One model."),
    _chat("/api/v0/chat/completions", "LM Studio"),
    _completion("/api/v0/completions", "LM Studio"),
    _embeddings("/api/v0/embeddings", "LM Studio"),
)


def _question(
    path: str,
    summary: str,
    answer: str,
    reads: tuple[Field, ...],
    example: Mapping[str, object],
    tag: str = "llama-server",
) -> Operation:
    return Operation(
        method="POST",
        path=path,
        tag=tag,
        summary=summary,
        answer=answer,
        reads=_reads(*reads),
        example=example,
    )


_LLAMA_SERVER: tuple[Operation, ...] = (
    Operation(
        method="POST",
        path="/completion",
        tag="llama-server",
        summary="The continuation of a prompt.",
        reads=llama_completion.table(llama_completion.PARAMETERS),
        example={"prompt": "Once upon a time", "n_predict": 16},
        answer="LlamaCompletion",
        streamed=(SSE, "LlamaCompletion"),
    ),
    Operation(
        method="POST",
        path="/infill",
        tag="llama-server",
        summary="What belongs into a gap, by the vocabulary's own tokens for that.",
        reads=llama_completion.table(llama_infill.PARAMETERS),
        example={"input_prefix": "def add(a, b):\n", "input_suffix": "\n", "n_predict": 16},
        answer="LlamaCompletion",
        streamed=(SSE, "LlamaCompletion"),
    ),
    _question("/tokenize", "A text as token ids.", "Tokens", llama_tokens.TOKENIZE, {"content": "Hello"}),
    _question("/detokenize", "The text of token ids.", "Detokenized", llama_tokens.DETOKENIZE, {"tokens": [1, 2, 3]}),
    _question(
        "/apply-template",
        "The prompt that the chat template makes of a conversation.",
        "RenderedPrompt",
        llama_tokens.APPLY_TEMPLATE,
        {"messages": [_HELLO]},
    ),
    _get("/props", "llama-server", "Props", "A model's context, template and defaults.", query=(llama_server.MODEL,)),
)
_ADMIN, _AMOUNT = "Administration", {"amount": "10.00"}
_SERVER: tuple[Operation, ...] = (
    _question("/admin/keys/{name}/credit", "Adds to a balance.", "Credit", credit.PARAMETERS, _AMOUNT, _ADMIN),
    _get("/admin/keys/{name}/balance", _ADMIN, "Balance", "A key's balance, and what it spent in this month."),
    _get("/openrouter/models", "OpenRouter", "ProviderFeed", "The provider feed, schema 2."),
    _get("/health", "Server", "Health", "200 while the server lives; who may use it sees figures.", public=True),
    _get("/ready", "Server", "Ready", "200 when a request would be taken, else 503.", public=True),
    _get("/status", "Server", "Status", "Whether it serves, and maintenance.", media_type="text/html", public=True),
    _get("/metrics", "Server", "Metrics", "The server's figures, for Prometheus.", media_type="text/plain"),
    _get("/openapi.json", "Server", "OpenApi", "This reference as an OpenAPI document.", public=True),
    _get("/docs", "Server", "OpenApi", "This reference as a page.", media_type="text/html", public=True),
    _get("/limits", "Server", "OpenApi", "The limits that hold.", media_type="text/html", public=True),
    _get("/pricing", "Server", "Pricing", "The prices, as a page or JSON.", media_type="text/html", public=True),
    _get("/privacy", "Server", "Privacy", "What is kept and who sees it.", media_type="text/html", public=True),
    _get("/policy", "Server", "ContentPolicy", "The content policy.", media_type="text/html", public=True),
    _get("/support", "Server", "Support", "How the operator is reached.", media_type="text/html", public=True),
)
OPERATIONS: tuple[Operation, ...] = (
    *_OPENAI,
    *_RESPONSES,
    *_ANTHROPIC,
    *_GOOGLE,
    *_OLLAMA,
    *_LM_STUDIO,
    *_LLAMA_SERVER,
    *_SERVER,
    *admin.OPERATIONS,
)


# What may stand in a query, by the route's method and path.
QUERIES = {operation.route: _reads(*operation.query) for operation in OPERATIONS}
