"""The one tree of errors that a client can be shown.

    ApiError
    ├── InvalidRequest            400  the request itself is wrong; `param` names the field
    │   ├── ContextLengthExceeded 400  the prompt does not fit; both counts are in the message
    │   ├── InputTooLong          400  the same of a text that is to be embedded or compared
    │   ├── ContentFiltered       400  the operator's content policy refuses the prompt; `category` says which part
    │   └── RequestQuarantined    400  this request made the engine crash twice
    ├── AuthenticationFailed      401
    │   ├── KeyExpired            401  told to the key's holder only
    │   └── KeyRevoked            401  likewise
    ├── Forbidden                 403  origin, proxy or scope
    ├── NotFound                  404  unknown route
    │   ├── ModelNotFound         404
    │   └── ModelNotPriced        404  the operator serves none that the price list leaves out
    ├── MethodNotAllowed          405
    ├── RequestTimeout            408  the body did not arrive in time
    ├── PayloadTooLarge           413
    ├── Conflict                  409  not in the state that the server is in
    ├── UnsupportedMediaType      415
    ├── MisdirectedRequest        421  the Host header names another machine
    ├── IdempotencyKeyReused      422  the same key with another request
    ├── HeadersTooLarge           431  the request line and headers together
    ├── RateLimited               429  a limit of this key; `retry_after_s` is honest
    ├── InsufficientQuota         429  this key has not the money left; no waiting helps
    ├── Overloaded                429  no room at all; early rather than queued
    ├── InternalError             500  our mistake
    ├── EngineCrashed             500  native code died under this request
    ├── EngineFailed              500  the engine could not go on with this sequence
    ├── EngineUnavailable         503  no engine is ready, and none came in time
    ├── UnderMaintenance          503  announced ahead; `retry_after_s` is its end
    ├── KeysUnavailable           503  the file of keys cannot be read, so nobody is let in
    ├── LedgerUnavailable         503  what is used cannot be recorded, so nothing is taken on
    └── PolicyUnavailable         503  content cannot be judged, so it is neither computed nor told

An error is named by its cause and carries what a renderer needs, none of HTTP's objects. Messages are written by us
from names, limits and counts; text that a client sent never enters one, except for parameter names. What
`ContentFiltered` says is the operator's.
"""

from __future__ import annotations

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as plain data: what crosses the engine's wire and what a dialect renders.

    The two counts are of a prompt that does not fit, for the dialects that word it in their own way. `category` is what
    a content policy refused.
    """

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    prompt_tokens: int | None = None
    context_length: int | None = None
    category: str | None = None


class ApiError(Exception):
    """Base of everything that ends as an error answer. Subclasses fix status, type and code."""

    status = 500
    type = "server_error"
    code = "internal_error"
    prompt_tokens: int | None = None
    context_length: int | None = None
    category: str | None = None
    limit: str | None = None  # the setting whose limit refused, or `capacity`

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s

    @property
    def info(self) -> ErrorInfo:
        """This error as plain data."""
        return ErrorInfo(
            status=self.status,
            type=self.type,
            code=self.code,
            message=self.message,
            param=self.param,
            retry_after_s=self.retry_after_s,
            prompt_tokens=self.prompt_tokens,
            context_length=self.context_length,
            category=self.category,
        )

    @staticmethod
    def from_info(info: ErrorInfo) -> ApiError:
        """An error that came from the engine's wire, ready to be raised."""
        error = ApiError(info.message, param=info.param, code=info.code, retry_after_s=info.retry_after_s)
        error.status = info.status
        error.type = info.type
        error.prompt_tokens, error.context_length = info.prompt_tokens, info.context_length
        error.category = info.category
        return error


class InvalidRequest(ApiError):
    """A field is missing, malformed, out of range or not supported; `param` is its exact path."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    """The prompt alone reaches the context length. Nothing is ever truncated to make it fit."""

    code = "context_length_exceeded"

    def __init__(self, *, limit: int, prompt_tokens: int, param: str, at_least: bool = False) -> None:
        # Clients search for "maximum context length is N tokens", so the wording of the counts is fixed.
        counted = f"{'at least ' if at_least else ''}{prompt_tokens} tokens"
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, your {param} resulted in "
            f"{counted}, which leaves no room for an answer. Please reduce the length of the {param}.",
            param=param,
        )
        self.prompt_tokens, self.context_length = prompt_tokens, limit


class InputTooLong(InvalidRequest):
    """An input of an embedding or reranking model is longer than its context. Nothing is ever cut off."""

    code = "context_length_exceeded"

    def __init__(self, *, limit: int, tokens: int, param: str) -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, your {param} has {tokens} tokens. "
            "Please split it.",
            param=param,
        )


class ContentFiltered(InvalidRequest):
    """The operator's content policy refuses the prompt. Message and category are those of whoever judged it."""

    code = "content_filter"


class RequestQuarantined(InvalidRequest):
    """The same request made the engine crash twice; it is not tried a third time."""

    code = "request_quarantined"


class AuthenticationFailed(ApiError):
    """No key, or one that is not valid."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class KeyExpired(AuthenticationFailed):
    """A key that was valid once, presented whole."""

    code = "api_key_expired"


class KeyRevoked(AuthenticationFailed):
    """A key that was taken back or replaced, presented whole."""

    code = "api_key_revoked"


class Forbidden(ApiError):
    """The caller may not do this, or not from here (scope, browser origin, proxy without a key)."""

    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class NotFound(ApiError):
    """No such route."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """`model` names nothing that is served here."""

    code = "model_not_found"


class ModelNotPriced(NotFound):
    """The model is here, the operator charges for models, and this one has no price yet."""

    code = "model_not_priced"


class MethodNotAllowed(ApiError):
    """The route exists, the method does not."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(ApiError):
    """The request's body did not arrive within its deadline."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class Conflict(ApiError):
    """What an administrator asks for cannot be done in the state that the server is in; `code` says which."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class PayloadTooLarge(ApiError):
    """The body exceeds `server.max_body_bytes`, or with its images what an engine can be told."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMediaType(ApiError):
    """Not `application/json`, or a compressed body."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class MisdirectedRequest(ApiError):
    """The Host header names a machine that this server is not: the mark of DNS rebinding."""

    status = 421
    type = "invalid_request_error"
    code = "misdirected_request"


class IdempotencyKeyReused(ApiError):
    """An `Idempotency-Key` that this caller has used for another request."""

    status = 422
    type = "invalid_request_error"
    code = "idempotency_key_reused"


class HeadersTooLarge(ApiError):
    """The request line and headers exceed what is read of them."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class RateLimited(ApiError):
    """A limit of this key is reached; after `retry_after_s` seconds the same request passes."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"


class InsufficientQuota(ApiError):
    """What the request can cost at most is more than the key may spend; trying again is of no use."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"


class Overloaded(ApiError):
    """The server has more accepted work than it may queue."""

    status = 429
    type = "rate_limit_error"
    code = "server_is_overloaded"
    limit = "capacity"


class InternalError(ApiError):
    """A mistake of ours. The message never carries details; the log names the exception's type and place."""


class EngineCrashed(ApiError):
    """The engine process died or hung while this request was in flight."""

    code = "engine_crashed"


class EngineFailed(ApiError):
    """The engine could not continue this sequence (invalid logits, decode failure); others go on."""

    code = "engine_failed"


class KeysUnavailable(ApiError):
    """Who may call is not known; to let anybody in would let in whoever was shut out."""

    status = 503
    type = "service_unavailable_error"
    code = "keys_unavailable"


class EngineUnavailable(ApiError):
    """No engine is ready: it is loading, restarting or stopping."""

    status = 503
    type = "service_unavailable_error"
    code = "engine_unavailable"


class UnderMaintenance(ApiError):
    """The maintenance that was announced is under way; nothing is taken on before its end."""

    status = 503
    type = "service_unavailable_error"
    code = "maintenance"


class LedgerUnavailable(ApiError):
    """The ledger cannot be written. Nothing is served unrecorded; what was admitted before finishes."""

    status = 503
    type = "service_unavailable_error"
    code = "ledger_unavailable"


class PolicyUnavailable(ApiError):
    """No verdict on the content came, and the settings let nothing pass without one."""

    status = 503
    type = "service_unavailable_error"
    code = "policy_unavailable"
