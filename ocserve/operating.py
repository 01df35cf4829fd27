"""The settings of whoever runs the server for others: who judges content, what is published, where traces go.

They belong to the tree of `settings`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from ocserve.kinds import Country, Positive, Ratio, Seconds, Section, Text


class Policy(Section, frozen=True):
    """Who judges prompts and answers: nobody, unless a command or an address is named. Times are seconds."""

    command: Annotated[
        tuple[Text, ...],
        Meta(description="program and arguments that judge content: a JSON question on stdin, a verdict on stdout"),
    ] = ()
    url: Annotated[
        Text | None, Meta(description="address that judges content: questions are POSTed there as JSON; https")
    ] = None
    http_hosts: Annotated[
        tuple[Text, ...], Meta(description="hosts beside loopback that policy.url may name with plain http")
    ] = ()
    token: Annotated[Text | None, Meta(description="what is sent to policy.url as a bearer token")] = None
    checks: Annotated[
        tuple[Literal["prompt", "answer"], ...], Meta(description="what is judged: prompt, answer or both")
    ] = ("prompt", "answer")
    timeout_s: Annotated[Seconds, Meta(description="how long a check may take, the wait for its turn included")] = 5.0
    on_failure: Annotated[
        Literal["refuse", "allow"], Meta(description="what happens where no verdict comes: refused (503), or let pass")
    ] = "refuse"
    streams: Annotated[
        Literal["hold", "pass"],
        Meta(
            description="hold: a streamed answer is sent once it has been judged; pass: it is sent as it is generated, "
            "and its end says `content_filter` if it was refused"
        ),
    ] = "hold"
    most_at_once: Annotated[Positive, Meta(description="checks that run at the same time")] = 8
    text: Annotated[Path | None, Meta(description="content policy to publish at /policy: Markdown or plain text")] = (
        None
    )


class Operator(Section, frozen=True):
    """What the operator states of itself; it is published. What is unset is left out."""

    name: Annotated[Text | None, Meta(description="who runs this server")] = None
    email: Annotated[Text | None, Meta(description="address for support, limits, deletion of data and incidents")] = (
        None
    )
    locations: Annotated[
        tuple[Country, ...], Meta(description="countries in which answers are computed, as ISO 3166 codes such as DE")
    ] = ()
    certifications: Annotated[
        tuple[Text, ...], Meta(description="what the operator has been certified for or states to fulfil, such as GDPR")
    ] = ()
    terms_url: Annotated[Text | None, Meta(description="address of the terms of service")] = None
    status_url: Annotated[Text | None, Meta(description="address of the status page")] = None
    privacy_text: Annotated[
        Path | None, Meta(description="the operator's own part of /privacy: Markdown or plain text")
    ] = None
    payment_text: Annotated[
        Path | None, Meta(description="payment, invoices and discounts, published at /pricing: Markdown or plain text")
    ] = None
    sla_text: Annotated[
        Path | None, Meta(description="availability and support times, published at /support: Markdown or plain text")
    ] = None
    incident_text: Annotated[
        Path | None, Meta(description="incidents and maintenance, published at /support: Markdown or plain text")
    ] = None


class Otel(Section, frozen=True):
    """OpenTelemetry traces; none without an endpoint. They hold names, counts and times, never content."""

    endpoint: Annotated[
        Text | None, Meta(description="address that takes traces as OTLP over HTTP, such as http://127.0.0.1:4318")
    ] = None
    service_name: Annotated[Text, Meta(description="what this server is called in traces")] = "ocserve"
    sample_ratio: Annotated[
        Ratio, Meta(description="share of requests that are traced, of those that bring no decision of their own")
    ] = 1.0
