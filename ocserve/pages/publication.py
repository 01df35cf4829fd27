"""What is published of how the server is run: facts from the settings that it obeys, and what the operator states.

Whatever follows from a setting is said from the setting, so that the page cannot differ from the server.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ocserve import config
from ocserve.config import ConfigError
from ocserve.files import only_regular
from ocserve.pages.frame import LINKS, NO_TEXT, Link, Text

_MOST_BYTES = 256 * 1024  # of a text


@dataclass(frozen=True, slots=True)
class Kept:
    """Something that is kept of requests. `content`: prompts or answers can be read or computed back from it.

    How long is a number of days or of seconds, or only `until` says it.
    """

    what: str
    content: bool
    on_disk: bool
    until: str
    days: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Texts:
    """The operator's texts, empty where there is none."""

    policy: Text = NO_TEXT
    privacy: Text = NO_TEXT
    payment: Text = NO_TEXT
    sla: Text = NO_TEXT
    incident: Text = NO_TEXT


@dataclass(frozen=True, slots=True)
class Publication:
    """What pages say beside prices and limits. `collector`: traces are sent, `fetches`: images are fetched."""

    operator: config.Operator = field(default_factory=config.Operator)
    policy: config.Policy = field(default_factory=config.Policy)
    kept: tuple[Kept, ...] = ()
    texts: Texts = Texts()
    ledger_days: int | None = None
    collector: bool = False
    fetches: bool = False

    @staticmethod
    def of(tree: config.Config) -> Publication:
        """What follows from the settings, texts rendered. Raises `ConfigError` for a text that cannot be read."""
        stated = tree.operator
        return Publication(
            operator=stated,
            policy=tree.policy,
            kept=_kept(tree),
            texts=Texts(
                policy=read_text("policy.text", tree.policy.text),
                privacy=read_text("operator.privacy_text", stated.privacy_text),
                payment=read_text("operator.payment_text", stated.payment_text),
                sla=read_text("operator.sla_text", stated.sla_text),
                incident=read_text("operator.incident_text", stated.incident_text),
            ),
            ledger_days=None if tree.ledger.use == "off" else tree.ledger.retention_days,
            collector=tree.otel.endpoint is not None,
            fetches=tree.images.fetch != "off" or bool(tree.images.fetch_hosts),
        )

    @property
    def judged(self) -> tuple[str, ...]:
        """What is put before a policy hook: `prompt`, `answer`."""
        return self.policy.checks if self.policy.command or self.policy.url else ()

    @property
    def has_policy(self) -> bool:
        """Whether there is a content policy to speak of."""
        return bool(self.texts.policy or self.judged)

    @property
    def has_support(self) -> bool:
        """Whether the operator has said how it is reached or what it promises."""
        stated = self.operator
        return bool(stated.email or stated.status_url or stated.terms_url or self.texts.sla or self.texts.incident)

    @property
    def links(self) -> tuple[Link, ...]:
        """The pages that there are."""
        policy = (("policy", "Content policy"),) if self.has_policy else ()
        return (*LINKS, *policy, *((("support", "Support"),) if self.has_support else ()))


NOTHING_STATED = Publication()


@dataclass(slots=True)
class Published:
    """What is published at present; a reload puts another in its place."""

    now: Publication = NOTHING_STATED


def _kept(tree: config.Config) -> tuple[Kept, ...]:
    server, found = tree.server, []
    if tree.ledger.use != "off":
        what = "the ledger: a row of ids, key, model, counts, prices and times for each request"
        days = tree.ledger.retention_days
        found.append(Kept(what, content=False, on_disk=True, until=f"{days} days", days=days))
    log, where = tree.log, "as long as the operator keeps what the server writes to stderr"
    if log.file is not None:
        where = f"until {log.backups} files of {_size(log.max_bytes)} are full"
    what = "the log: a line of ids, key, model, counts and times for each request"
    found.append(Kept(what, content=False, on_disk=True, until=where))
    if server.stored_responses and server.stored_response_bytes:
        what = "responses that a client has stored with `/v1/responses` and `store`, for their key only"
        found.append(_in_memory(what, server.stored_response_s))
    what = "answers to requests with an `Idempotency-Key`, for repeats with the same key"
    found.append(_in_memory(what, server.idempotent_answer_s))
    if tree.engine.prefix_cache:
        what = "what prompts computed (KV cache), for further requests of the same key"
        found.append(Kept(what, content=True, on_disk=False, until="until its room is needed, or the server stops"))
        if tree.cache.disk_bytes:
            what = "the same in files that only the server's user may read"
            found.append(Kept(what, content=True, on_disk=True, until=f"until {_size(tree.cache.disk_bytes)} are full"))
    return tuple(found)


def _size(count: int) -> str:
    return f"{count / 2**30:g} GiB" if count >= 2**30 else f"{count / 2**20:g} MiB"


def _lasting(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size and seconds % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} seconds"


def _in_memory(what: str, seconds: float) -> Kept:
    until = f"{_lasting(seconds)}, or until the server stops"
    return Kept(what, content=True, on_disk=False, until=until, seconds=seconds)


def read_text(setting: str, file: Path | None) -> Text:
    """A text of the operator's, none without a file. Raises `ConfigError`."""
    if file is None:
        return NO_TEXT
    try:
        with open(file, "rb", opener=only_regular) as source:
            data = source.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ConfigError(f"{setting}: {file} has more than {_MOST_BYTES} bytes")
        return Text.of(data.decode("utf-8").strip())
    except OSError as error:
        raise ConfigError(f"{setting}: cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{setting}: {file} is not UTF-8 text") from None
