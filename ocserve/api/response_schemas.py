"""The shapes of answers, each written once. Clients may find more keys than these; none of these is ever missing."""

from __future__ import annotations

from ocserve.api.fields import Schema

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
ANY_OBJECT: Schema = {"type": "object"}


def ref(name: str) -> Schema:
    """A shape by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def some(schema: Schema) -> Schema:
    """An array of these."""
    return {"type": "array", "items": schema}


def shape(optional: dict[str, Schema] | None = None, /, **required: Schema) -> Schema:
    """An object that has all of `required`, and may have `optional`."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def word(*words: str) -> Schema:
    """One of these strings."""
    return {"type": "string", "enum": list(words)}


def or_null(schema: Schema) -> Schema:
    """Such a value or null."""
    return {"anyOf": [schema, {"type": "null"}]}


_USAGE = shape(
    {"cost": NUMBER},
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
    prompt_tokens_details=shape(cached_tokens=COUNT),
    completion_tokens_details=shape(
        reasoning_tokens=COUNT, accepted_prediction_tokens=COUNT, rejected_prediction_tokens=COUNT
    ),
)
_CALL = shape({"index": COUNT}, id=STRING, type=word("function"), function=shape(name=STRING, arguments=STRING))
_REASON = or_null(word("stop", "length", "tool_calls", "content_filter"))
_HEAD = {"id": STRING, "created": INTEGER, "model": STRING}
_ANSWERED = shape(
    {"tool_calls": some(_CALL), "reasoning": or_null(STRING), "reasoning_content": or_null(STRING)},
    role=word("assistant"),
    content=or_null(STRING),
    refusal=or_null(STRING),
)
_DETAILS = shape(
    parent_model=STRING,
    format=word("gguf"),
    family=STRING,
    families=some(STRING),
    parameter_size=STRING,
    quantization_level=STRING,
)
_PRICING: Schema = {"type": "object", "additionalProperties": STRING}
_LM_STUDIO_MODEL = shape(
    {"loaded_context_length": COUNT},
    id=STRING,
    object=word("model"),
    type=word("llm", "vlm", "embeddings"),
    publisher=STRING,
    arch=STRING,
    compatibility_type=word("gguf"),
    quantization=STRING,
    state=word("loaded", "not-loaded"),
    max_context_length=COUNT,
    capabilities=some(STRING),
)

_MAINTENANCE = shape(starts=STRING, ends=STRING, message=STRING)

SCHEMAS: dict[str, Schema] = {
    "Error": shape(
        error=shape({"category": STRING}, message=STRING, type=STRING, param=or_null(STRING), code=or_null(STRING))
    ),
    "AnthropicError": shape(type=word("error"), error=shape(type=STRING, message=STRING)),
    "GoogleError": shape(error=shape(code=INTEGER, message=STRING, status=STRING)),
    "OllamaError": shape(error=STRING, param=or_null(STRING), code=or_null(STRING)),
    "Usage": _USAGE,
    "ChatCompletion": shape(
        object=word("chat.completion"),
        choices=some(shape(index=COUNT, message=_ANSWERED, logprobs=or_null(ANY_OBJECT), finish_reason=_REASON)),
        usage=ref("Usage"),
        **_HEAD,
    ),
    "ChatCompletionChunk": shape(
        {"usage": or_null(ref("Usage"))},
        object=word("chat.completion.chunk"),
        choices=some(shape({"logprobs": or_null(ANY_OBJECT)}, index=COUNT, delta=ANY_OBJECT, finish_reason=_REASON)),
        **_HEAD,
    ),
    "Completion": shape(
        {"usage": or_null(ref("Usage"))},
        object=word("text_completion"),
        choices=some(shape(index=COUNT, text=STRING, logprobs=or_null(ANY_OBJECT), finish_reason=_REASON)),
        **_HEAD,
    ),
    "Response": shape(id=STRING, object=word("response"), status=STRING, model=STRING, output=some(ANY_OBJECT)),
    "ResponseEvent": shape(type=STRING, sequence_number=COUNT),
    "InputTokens": shape(object=word("response.input_tokens"), input_tokens=COUNT),
    "DeletedResponse": shape(id=STRING, object=STRING, deleted=BOOLEAN),
    "InputItems": shape(object=word("list"), data=some(ANY_OBJECT), has_more=BOOLEAN),
    "Embeddings": shape(
        object=word("list"),
        data=some(shape(object=word("embedding"), index=COUNT, embedding={"anyOf": [some(NUMBER), STRING]})),
        model=STRING,
        usage=shape({"cost": NUMBER}, prompt_tokens=COUNT, total_tokens=COUNT),
    ),
    "Credit": shape(
        id=STRING,
        object=word("credit"),
        key=STRING,
        amount=STRING,
        note=STRING,
        correction=BOOLEAN,
        created=INTEGER,
        balance=STRING,
    ),
    "Balance": shape(
        object=word("balance"),
        key=STRING,
        prepaid=BOOLEAN,
        balance=or_null(STRING),
        held=STRING,
        available=or_null(STRING),
        credited=STRING,
        charged=STRING,
        spend_cap=or_null(STRING),
        month=shape(month=STRING, ends=STRING, charged=STRING, held=STRING),
    ),
    "Ranking": shape(model=STRING, results=some(shape(index=COUNT, relevance_score=NUMBER))),
    "Model": shape(
        {
            "description": STRING,
            "quantization": or_null(STRING),
            "license": STRING,
            "pricing": _PRICING,
            "pricing_tiers": some(shape(above=COUNT, pricing=_PRICING)),
        },
        id=STRING,
        object=word("model"),
        created=INTEGER,
        owned_by=STRING,
        name=STRING,
        strengths=STRING,
        limitations=STRING,
        intended_use=STRING,
        family=STRING,
        aliases=some(STRING),
        context_length=COUNT,
        max_output_tokens=COUNT,
        input_modalities=some(STRING),
        output_modalities=some(STRING),
        capabilities=some(STRING),
        supported_parameters=some(STRING),
        supported_features=some(STRING),
    ),
    "ModelList": shape(object=word("list"), data=some(ref("Model"))),
    "ProviderFeed": shape(data=some(shape(schema_version=STRING, id=STRING, name=STRING))),
    "AnthropicMessage": shape(
        id=STRING,
        type=word("message"),
        role=word("assistant"),
        model=STRING,
        content=some(shape(type=STRING)),
        stop_reason=or_null(STRING),
        stop_sequence=or_null(STRING),
        usage=shape(input_tokens=COUNT, output_tokens=COUNT, cache_read_input_tokens=COUNT),
    ),
    "AnthropicEvent": shape(type=STRING),
    "AnthropicCount": shape(input_tokens=COUNT),
    "GoogleContent": shape({"candidates": some(ANY_OBJECT), "usageMetadata": ANY_OBJECT}, modelVersion=STRING),
    "GoogleContents": some(ref("GoogleContent")),
    "GoogleCount": shape(totalTokens=COUNT),
    "GoogleEmbedding": shape(embedding=shape(values=some(NUMBER)), usageMetadata=ANY_OBJECT),
    "GoogleEmbeddings": shape(embeddings=some(shape(values=some(NUMBER))), usageMetadata=ANY_OBJECT),
    "GoogleModel": shape(name=STRING, displayName=STRING, inputTokenLimit=COUNT, outputTokenLimit=COUNT),
    "GoogleModelList": shape(models=some(ref("GoogleModel"))),
    "OllamaChat": shape(
        {"done_reason": STRING, "prompt_eval_count": COUNT, "eval_count": COUNT, "total_duration": COUNT},
        model=STRING,
        created_at=STRING,
        message=shape({"thinking": STRING, "tool_calls": some(ANY_OBJECT)}, role=word("assistant"), content=STRING),
        done=BOOLEAN,
    ),
    "OllamaGenerate": shape(
        {"thinking": STRING, "done_reason": STRING, "prompt_eval_count": COUNT, "eval_count": COUNT},
        model=STRING,
        created_at=STRING,
        response=STRING,
        done=BOOLEAN,
    ),
    "OllamaEmbeddings": shape(model=STRING, embeddings=some(some(NUMBER)), prompt_eval_count=COUNT),
    "OllamaTags": shape(
        models=some(shape(name=STRING, model=STRING, modified_at=STRING, size=COUNT, digest=STRING, details=_DETAILS))
    ),
    "OllamaRunning": shape(models=some(shape(name=STRING, model=STRING, expires_at=STRING, size_vram=COUNT))),
    "OllamaShow": shape(
        license=STRING,
        modelfile=STRING,
        parameters=STRING,
        template=STRING,
        details=_DETAILS,
        model_info=shape(
            **{"general.architecture": STRING, "general.basename": STRING, "general.parameter_count": COUNT}
        ),
        capabilities=some(STRING),
        modified_at=STRING,
    ),
    "OllamaVersion": shape(version=STRING),
    "LmStudioModel": _LM_STUDIO_MODEL,
    "LmStudioModelList": shape(object=word("list"), data=some(ref("LmStudioModel"))),
    "LlamaCompletion": shape(
        {"stop_type": word("eos", "limit", "word", "content_filter"), "stopping_word": STRING, "timings": ANY_OBJECT},
        index=COUNT,
        content=STRING,
        stop=BOOLEAN,
    ),
    "Tokens": shape(tokens=some({"anyOf": [COUNT, shape(id=COUNT, piece={"anyOf": [STRING, some(COUNT)]})]})),
    "Detokenized": shape(content=STRING),
    "RenderedPrompt": shape(prompt=STRING),
    "Props": shape(
        default_generation_settings=shape(n_ctx=COUNT, params=ANY_OBJECT),
        total_slots=COUNT,
        model_alias=STRING,
        model_path=STRING,
        modalities=shape(vision=BOOLEAN, audio=BOOLEAN),
        chat_template=STRING,
        bos_token=STRING,
        eos_token=STRING,
        build_info=STRING,
    ),
    "Health": shape(
        {"ready": BOOLEAN, "active": COUNT, "models": ANY_OBJECT, "maintenance": _MAINTENANCE}, status=word("ok")
    ),
    "Status": shape(
        {"models": some(STRING)},
        ready=BOOLEAN,
        uptime_s=NUMBER,
        availability=or_null(NUMBER),
        maintenance=or_null(_MAINTENANCE),
    ),
    "Maintenance": _MAINTENANCE,
    "AdminState": shape(
        version=STRING,
        started=STRING,
        uptime_s=NUMBER,
        ready=BOOLEAN,
        draining=BOOLEAN,
        stopping=BOOLEAN,
        active=COUNT,
        ledger=word("off", "ok", "failing"),
        maintenance=or_null(_MAINTENANCE),
        settings=ANY_OBJECT,
        models={"type": "object", "additionalProperties": ref("AdminModel")},
    ),
    "AdminModel": shape(
        default=BOOLEAN,
        state=word("cold", "loading", "ready", "unloading"),
        leases=COUNT,
        owed=COUNT,
        restarts=COUNT,
        need_bytes=some(COUNT),
        resident_bytes=or_null(COUNT),
        context=COUNT,
        parallel=COUNT,
        last_used=or_null(STRING),
        unload_at=or_null(STRING),
    ),
    "AdminMoved": shape(model=STRING, state=word("cold", "loading", "ready", "unloading")),
    "AdminDoors": shape(draining=BOOLEAN, stopping=BOOLEAN, active=COUNT),
    "AdminReloaded": shape(changed=ANY_OBJECT, prices=ANY_OBJECT, more_prices=COUNT, notices=some(STRING)),
    "Ready": shape(status=word("ready")),
    "Metrics": STRING,
    "Pricing": shape(
        currency=word("USD"),
        unit=STRING,
        models=some(shape(id=STRING, prices=ANY_OBJECT, tiers=some(shape(above=COUNT, prices=ANY_OBJECT)))),
        policy=shape(cancelled=word("used", "free"), failed=word("used", "free"), text=STRING),
    ),
    "Privacy": shape(
        training_on_prompts=BOOLEAN,
        training_on_completions=BOOLEAN,
        retention=some(shape({"days": COUNT, "seconds": NUMBER}, what=STRING, content=BOOLEAN, until=STRING)),
        deletion=STRING,
        operator=ANY_OBJECT,
    ),
    "ContentPolicy": shape(text=or_null(STRING), checks=some(STRING), finish_reason=word("content_filter")),
    "Support": shape(name=or_null(STRING), email=or_null(STRING), status_url=or_null(STRING)),
    "OpenApi": shape(openapi=STRING, info=ANY_OBJECT, paths=ANY_OBJECT),
}
