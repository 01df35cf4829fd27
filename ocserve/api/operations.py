"""Every operation of the API, in one list: what it is for, what it reads and what it answers.

Parameters are the tables that requests are checked by. `route` names the line of the server's route list, which may
serve several operations; a test holds the two lists to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ocserve.api import (
    anthropic,
    anthropic_count,
    fields,
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
    rerank,
)
from ocserve.api.fields import Field
from ocserve.api.openai_responses_stored import INPUT_ITEMS, RETRIEVE

SSE = "text/event-stream"
LINES = "application/x-ndjson"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation. `streamed` is the media type and the name of a record's shape, where a stream can be asked for."""

    method: str
    path: str
    tag: str
    summary: str
    answer: str
    reads: Mapping[str, Field] | None = None
    query: Mapping[str, Field] | None = None
    streamed: tuple[str, str] | None = None
    error: str = "Error"
    media_type: str = "application/json"
    public: bool = False
    served_by: str | None = None  # the path of the route, where it is not this operation's

    @property
    def route(self) -> tuple[str, str]:
        """The method and path of the line in the route list."""
        return self.method, self.served_by or self.path


def _reads(*parameters: Field) -> Mapping[str, Field]:
    return fields.table(*parameters)


def _get(
    path: str,
    tag: str,
    answer: str,
    summary: str,
    *,
    query: tuple[Field, ...] = (),
    public: bool = False,
    error: str = "Error",
) -> Operation:
    return Operation(
        method="GET",
        path=path,
        tag=tag,
        summary=summary,
        answer=answer,
        query=_reads(*query),
        public=public,
        error=error,
    )


def _chat(path: str, tag: str) -> Operation:
    return Operation(
        method="POST",
        path=path,
        tag=tag,
        summary="The next turn of a conversation.",
        reads=_reads(*openai_chat.PARAMETERS),
        answer="ChatCompletion",
        streamed=(SSE, "ChatCompletionChunk"),
    )


def _completion(path: str, tag: str) -> Operation:
    return Operation(
        method="POST",
        path=path,
        tag=tag,
        summary="The continuation of a prompt, without a chat template.",
        reads=_reads(*openai_completions.PARAMETERS),
        answer="Completion",
        streamed=(SSE, "Completion"),
    )


def _embeddings(path: str, tag: str) -> Operation:
    return Operation(
        method="POST",
        path=path,
        tag=tag,
        summary="A vector for each text.",
        reads=_reads(*openai_embeddings.PARAMETERS),
        answer="Embeddings",
    )


def _rerank(path: str) -> Operation:
    return Operation(
        method="POST",
        path=path,
        tag="Cohere and Jina",
        summary="How well each document answers the query, best first.",
        reads=_reads(*rerank.PARAMETERS),
        answer="Ranking",
    )


_OPENAI: tuple[Operation, ...] = (
    _chat("/v1/chat/completions", "OpenAI"),
    _completion("/v1/completions", "OpenAI"),
    _embeddings("/v1/embeddings", "OpenAI"),
    _rerank("/v1/rerank"),
    _rerank("/v2/rerank"),
    _get("/v1/models", "OpenAI", "ModelList", "The models that are served, with limits, parameters and prices."),
    _get("/v1/models/{id:path}", "OpenAI", "Model", "One model, by its id or an alias; both may contain slashes."),
)
_RESPONSES: tuple[Operation, ...] = (
    Operation(
        method="POST",
        path="/v1/responses",
        tag="OpenAI responses",
        summary="The next turn of a conversation, as items; kept in memory for a while unless `store` is false.",
        reads=_reads(*openai_responses_parameters.PARAMETERS),
        answer="Response",
        streamed=(SSE, "ResponseEvent"),
    ),
    Operation(
        method="POST",
        path="/v1/responses/input_tokens",
        tag="OpenAI responses",
        summary="How many tokens a response's input is.",
        reads=_reads(*openai_responses_count.PARAMETERS),
        answer="InputTokens",
    ),
    _get("/v1/responses/{id}", "OpenAI responses", "Response", "A response that is kept.", query=RETRIEVE),
    Operation(
        method="DELETE",
        path="/v1/responses/{id}",
        tag="OpenAI responses",
        summary="Forget a response.",
        answer="DeletedResponse",
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
    ),
)
_ANTHROPIC: tuple[Operation, ...] = (
    Operation(
        method="POST",
        path="/v1/messages",
        tag="Anthropic",
        summary="The next turn of a conversation.",
        reads=_reads(*anthropic.PARAMETERS),
        answer="AnthropicMessage",
        streamed=(SSE, "AnthropicEvent"),
        error="AnthropicError",
    ),
    Operation(
        method="POST",
        path="/v1/messages/count_tokens",
        tag="Anthropic",
        summary="How many tokens a conversation is.",
        reads=_reads(*anthropic_count.PARAMETERS),
        answer="AnthropicCount",
        error="AnthropicError",
    ),
)


_ALT = Field("alt", "effective", fields.word("sse", "json"))


def _google(method: str, summary: str, answer: str, reads: tuple[Field, ...], *, version: str) -> Operation:
    return Operation(
        method="POST",
        path=f"/{version}/models/{{model}}:{method}",
        tag="Google",
        summary=summary,
        reads=protojson.table(*reads),
        answer=answer,
        streamed=(SSE, "GoogleContent") if method.startswith("stream") else None,
        query=_reads(_ALT) if method.startswith("stream") else None,
        error="GoogleError",
        served_by=f"/{version}/models/{{call:path}}",
    )


def _google_calls(version: str) -> tuple[Operation, ...]:
    turn = "The next turn of a conversation"
    streamed = f"{turn}, streamed: as events with `?alt=sse`, else as an array."
    counted = "How many tokens a conversation is."
    return (
        _google("generateContent", f"{turn}.", "GoogleContent", google.PARAMETERS, version=version),
        _google("streamGenerateContent", streamed, "GoogleContent", google.PARAMETERS, version=version),
        _google("countTokens", counted, "GoogleCount", google.COUNTED, version=version),
        _google("embedContent", "A text's vector.", "GoogleEmbedding", google_embed.REQUEST, version=version),
        _google(
            "batchEmbedContents", "A vector for each text.", "GoogleEmbeddings", google_embed.BATCH, version=version
        ),
    )


_GOOGLE: tuple[Operation, ...] = (
    *_google_calls("v1beta"),
    *_google_calls("v1"),
    _get("/v1beta/models", "Google", "GoogleModelList", "The models that are served.", error="GoogleError"),
    _get("/v1beta/models/{id:path}", "Google", "GoogleModel", "One model.", error="GoogleError"),
)
_OLLAMA: tuple[Operation, ...] = (
    Operation(
        method="POST",
        path="/api/chat",
        tag="Ollama",
        summary="The next turn of a conversation, streamed unless `stream` is false. Without messages: load the model.",
        reads=_reads(*ollama_chat.PARAMETERS),
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
        answer="OllamaEmbeddings",
        error="OllamaError",
    ),
    Operation(
        method="POST",
        path="/api/show",
        tag="Ollama",
        summary="One model: its context, capabilities and defaults.",
        reads=_reads(*ollama_models.SHOW),
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


def _question(path: str, summary: str, answer: str, reads: tuple[Field, ...]) -> Operation:
    return Operation(method="POST", path=path, tag="llama-server", summary=summary, answer=answer, reads=_reads(*reads))


_LLAMA_SERVER: tuple[Operation, ...] = (
    Operation(
        method="POST",
        path="/completion",
        tag="llama-server",
        summary="The continuation of a prompt.",
        reads=llama_completion.table(llama_completion.PARAMETERS),
        answer="LlamaCompletion",
        streamed=(SSE, "LlamaCompletion"),
    ),
    Operation(
        method="POST",
        path="/infill",
        tag="llama-server",
        summary="What belongs into a gap, by the vocabulary's own tokens for that.",
        reads=llama_completion.table(llama_infill.PARAMETERS),
        answer="LlamaCompletion",
        streamed=(SSE, "LlamaCompletion"),
    ),
    _question("/tokenize", "A text as token ids.", "Tokens", llama_tokens.TOKENIZE),
    _question("/detokenize", "The text of token ids.", "Detokenized", llama_tokens.DETOKENIZE),
    Operation(
        method="POST",
        path="/apply-template",
        tag="llama-server",
        summary="The prompt that the chat template makes of a conversation.",
        reads=_reads(*llama_tokens.APPLY_TEMPLATE),
        answer="RenderedPrompt",
    ),
    _get("/props", "llama-server", "Props", "A model's context, template and defaults.", query=(llama_server.MODEL,)),
)
_SERVER: tuple[Operation, ...] = (
    _get("/openrouter/models", "OpenRouter", "ProviderFeed", "The provider feed, schema 2."),
    _get("/health", "Server", "Health", "200 while the server lives; who may use it sees figures.", public=True),
    _get("/ready", "Server", "Ready", "200 when a request would be taken, else 503.", public=True),
    _get("/openapi.json", "Server", "OpenApi", "This reference as an OpenAPI document.", public=True),
    Operation(
        method="GET",
        path="/docs",
        tag="Server",
        summary="This reference as a page.",
        answer="OpenApi",
        media_type="text/html",
        public=True,
    ),
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
)
