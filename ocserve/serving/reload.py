"""Which settings a running server takes over, and which only a start does. Every setting is in one of the two."""

from __future__ import annotations

from collections.abc import Mapping

from ocserve import config

LIVE = frozenset(
    {
        *(f"limits.{name}" for name in ("requests_per_minute", "requests_per_day", "tokens_per_minute")),
        *(f"limits.{name}" for name in ("tokens_per_day", "concurrent_requests", "queue", "spare_slots", "models")),
        *(f"billing.{name}" for name in ("prices", "unpriced", "cancelled", "failed")),
        *(f"images.{name}" for name in ("max_count", "max_file_bytes", "max_pixels", "max_total_pixels")),
        *(f"images.{name}" for name in ("fetch", "fetch_hosts", "fetch_timeout_s")),
        *(f"model.{name}" for name in ("aliases", "also", "serve_installed")),
        *(f"model.{name}" for name in ("idle_unload_s", "most_loaded", "room_wait_s")),
        *(f"server.{name}" for name in ("unknown_parameters", "drain_s", "stream_heartbeat_s")),
        "log.level",
    }
)
AT_START = frozenset(
    {
        *(f"server.{name}" for name in ("host", "port", "public_hosts", "trusted_proxies", "cors_origins")),
        *(f"server.{name}" for name in ("max_body_bytes", "max_json_depth", "header_timeout_s", "body_timeout_s")),
        *(f"server.{name}" for name in ("write_timeout_s", "keep_alive_s", "socket_idle_s", "stored_responses")),
        *(f"server.{name}" for name in ("stored_response_bytes", "stored_response_s", "idempotent_answer_s")),
        "server.idempotent_answer_bytes",
        *(f"auth.{name}" for name in ("api_key", "key_file", "keys_file", "anonymous")),
        *(f"engine.{name}" for name in ("context", "parallel", "pool_tokens", "gpu_layers", "require_gpu")),
        *(f"engine.{name}" for name in ("threads_decode", "threads_prefill", "batch_tokens", "kv_type")),
        *(f"engine.{name}" for name in ("flash_attention", "prefill_order", "prefix_cache", "fast_forward")),
        *(f"engine.{name}" for name in ("speculation", "draft_model", "heartbeat_timeout_s", "load_timeout_s")),
        "engine.restart_wait_s",
        *(f"cache.{name}" for name in ("host_bytes", "disk_bytes", "directory")),
        *(f"model.{name}" for name in ("default", "projector")),
        *(f"store.{name}" for name in ("directory", "hub_endpoint", "hub_token", "hub_timeout_s", "reserve_bytes")),
        *(f"ledger.{name}" for name in ("use", "directory", "retention_days")),
        *(f"log.{name}" for name in ("format", "file", "max_bytes", "backups")),
        *(f"policy.{name}" for name in ("command", "url", "http_hosts", "token", "checks", "timeout_s", "on_failure")),
        *(f"policy.{name}" for name in ("streams", "most_at_once", "text")),
        *(f"operator.{name}" for name in ("name", "email", "locations", "certifications", "terms_url", "status_url")),
        *(f"operator.{name}" for name in ("privacy_text", "payment_text", "sla_text", "incident_text")),
        *(f"otel.{name}" for name in ("endpoint", "service_name", "sample_ratio")),
    }
)

Changes = Mapping[str, tuple[object, object]]


def changes(before: config.Settings, after: config.Settings) -> Changes:
    """The settings that differ, by name: their values before and after, as they are."""
    found = {}
    for name in before.origins:
        values = tuple(_value(settings.config, name) for settings in (before, after))
        if values[0] != values[1]:
            found[name] = (values[0], values[1])
    return found


def shown(found: Changes) -> dict[str, tuple[object, object]]:
    """The same as it may be told: of secrets only whether they are set."""
    return {name: (config.masked(name, old), config.masked(name, new)) for name, (old, new) in found.items()}


def differing(settings: config.Settings) -> dict[str, object]:
    """The settings that are not as by default, by name, secrets masked."""
    defaults = config.Config()
    return {name: value for name, value, _ in settings if value != config.masked(name, _value(defaults, name))}


def _value(tree: config.Config, name: str) -> object:
    section, field = name.split(".")
    value: object = getattr(getattr(tree, section), field)
    return value
