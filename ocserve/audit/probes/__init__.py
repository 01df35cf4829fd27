"""Every probe, in the order of running: what is cheap first, what spends a limit or minutes last."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ocserve.audit.probes import (
    chat,
    completions,
    dialects,
    documents,
    edges,
    errors,
    images,
    limits,
    listing,
    load,
    operation,
    prices,
    sampling,
    statements,
    structured,
    tools,
    usage,
)
from ocserve.audit.subject import Probe

_ALL = (
    *listing.PROBES,
    *chat.PROBES,
    *completions.PROBES,
    *usage.PROBES,
    *sampling.PROBES,
    *structured.PROBES,
    *tools.PROBES,
    *images.PROBES,
    *errors.PROBES,
    *edges.PROBES,
    *dialects.PROBES,
    *documents.PROBES,
    *statements.PROBES,
    *prices.PROBES,
    *operation.PROBES,
    *load.PROBES,
    *limits.PROBES,
    *edges.LONG,
    *operation.LIMITS,
    *load.LIMITS,
    *errors.LAST,
)

PROBES: Mapping[str, Probe] = MappingProxyType({probe.id: probe for probe in _ALL})
assert len(PROBES) == len(_ALL)
