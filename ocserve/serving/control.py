"""What a running server does for its administrator beyond serving: further models, other settings, its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from msgspec.structs import replace

from ocserve import config
from ocserve.accounts import pricing
from ocserve.accounts.billing import Billing
from ocserve.catalog.errors import CatalogError, DoesNotFit, NotInstalled
from ocserve.catalog.progress import Progress
from ocserve.catalog.pull import describe_file, pull
from ocserve.catalog.references import FileReference, parse
from ocserve.catalog.store import Installed, Store
from ocserve.engine.desk import Describe
from ocserve.errors import ApiError, Conflict, InvalidRequest, ModelNotFound
from ocserve.http.admin import Changed
from ocserve.http.edge.current import Edge
from ocserve.http.fetch import ImageFetcher
from ocserve.http.server import Stop
from ocserve.pages.publication import Publication, Published
from ocserve.service import Service
from ocserve.serving.lineup import Lineup
from ocserve.serving.reload import LIVE, changes, differing, shown
from ocserve.telemetry import logs

_MOST_LISTED = 100  # prices that a reload's answer lists, and that are said to do nothing; the rest is counted
_IN_TREE = ("unknown_parameters", "drain_s", "stream_heartbeat_s")  # of the edge, and live


class Control:
    """Of one server. `reread` reads the settings again as they were read at the start."""

    def __init__(
        self,
        settings: config.Settings,
        reread: Callable[[], config.Settings],
        lineup: Lineup,
        service: Service,
        edge: Edge,
        fetcher: ImageFetcher,
        published: Published,
        stop: Stop,
    ) -> None:
        self._settings = settings
        self._reread = reread
        self._lineup = lineup
        self._service = service
        self._edge = edge
        self._fetcher = fetcher
        self._published = published
        self._stop = stop
        self._one_at_a_time = asyncio.Semaphore()

    @property
    def settings(self) -> Mapping[str, object]:
        """The settings that are not as by default, secrets masked."""
        return differing(self._settings)

    @property
    def drain_s(self) -> float:
        """How long a drain takes at most where nobody says."""
        return self._edge.now.drain_s

    def stop(self, deadline_s: float | None) -> None:
        """End the server, once the answer to whoever asked for it is out."""
        self._stop.deadline_s = deadline_s
        if not self._stop.wanted.is_set():
            self._stop.ask()

    async def include(self, reference: str, *, may_pull: bool) -> str:
        """Serve one more model, by its name, reference or path; its id. Raises `ApiError`."""
        try:
            model = await asyncio.to_thread(self._bring if may_pull else self._find, reference)
            await self._lineup.include(model)
        except NotInstalled as error:
            raise ModelNotFound(_told(error), param="model", code="model_not_installed") from None
        except DoesNotFit as error:
            raise Conflict(_told(error), param="model", code="model_does_not_fit") from None
        except config.ConfigError as error:
            raise Conflict(_told(error), param="model", code="model_not_servable") from None
        except CatalogError as error:
            raise InvalidRequest(_told(error), param="model", code="model_not_servable") from None
        return model.name

    def may_forget(self, name: str) -> bool:
        """Whether a model was added by its path since the start."""
        return self._lineup.may_forget(name)

    def forget(self, name: str) -> None:
        """Serve such a model no more."""
        self._lineup.forget(name)

    def _find(self, reference: str) -> Installed:
        """A model that is here. Raises `CatalogError`."""
        parsed = parse(reference)
        if isinstance(parsed, FileReference):
            return describe_file(parsed.path)
        found = Store(self._settings.config.store).find(reference)
        if found is None:
            raise NotInstalled(
                f"{reference} is not installed.",
                hint="pull it first, or ask with `pull`, as `ocserve load --pull` does",
            )
        return found

    def _bring(self, reference: str) -> Installed:
        return pull(reference, self._settings.config.store, self._go_on)

    def _go_on(self, _: Progress) -> None:
        if self._service.doors.stopping:
            raise CatalogError("The server is shutting down; a later pull goes on with what has come.")

    async def reload(self) -> Changed:
        """Read the settings anew and apply the whole, or nothing and raise why."""
        async with self._one_at_a_time:
            try:
                found = await self._reload()
            except (config.ConfigError, CatalogError) as error:
                raise InvalidRequest(_told(error), code="settings_invalid") from None
        # A price list of the same name may say something else now.
        names = dict.fromkeys((*found.settings, *(("billing.prices",) if found.prices else ())))
        logs.event("settings_reloaded", count=len(names), detail=", ".join(names))
        return found

    async def reload_at_hangup(self) -> None:
        """The same for nobody who could be answered: the log says why it was not done."""
        try:
            await self.reload()
        except ApiError as error:
            logs.event("reload_refused", level="error", code=error.code, detail=error.message)

    async def _reload(self) -> Changed:
        before = self._settings
        after = await asyncio.to_thread(self._reread)
        found = changes(before, after)
        if late := [name for name in found if name not in LIVE]:
            raise Conflict(
                f"A running server cannot change {', '.join(late)}; nothing was applied. Restart it.",
                code="restart_needed",
            )
        tree = after.config
        tariff = await asyncio.to_thread(pricing.load, tree.billing.prices)  # its content may be another one
        self._service.billing.check_tariff(tariff)
        prices = await asyncio.to_thread(self._service.billing.changes, tariff, _MOST_LISTED)
        publication = await asyncio.to_thread(Publication.of, tree)  # as its texts
        also = None
        if "model.also" in found:
            also = await asyncio.to_thread(lambda: [self._find(name) for name in tree.model.also])
        serve = await self._lineup.changed(tree, also)
        # From here on nothing fails and nothing waits.
        if "log.level" in found:
            logs.configure(tree.log)
        self._settings = after
        self._service.billing.reset(tree.billing, tariff)
        serve()
        self._service.limit(tree.limits)
        self._fetcher.obey(tree.images)
        self._published.now = publication
        self._edge.now = replace(self._edge.now, **{name: getattr(tree.server, name) for name in _IN_TREE})
        notices = (
            *unserved(tree.limits, self._service.billing, self._lineup.described),
            *unpriced(self._service.billing, self._lineup.described),
        )
        say(notices)
        return Changed(settings=shown(found), prices=prices.schedules, more_prices=prices.more, notices=notices)


def unserved(limits: config.Limits, billing: Billing, served: Mapping[str, Describe]) -> list[str]:
    """Limits and prices of a model that is not served do nothing until it is: its name may be mistyped."""
    found = [
        f"limits.models has limits for {each.model}, {_why_not(each.model, served)}"
        for each in limits.models
        if each.model not in served
    ]
    names = billing.unserved(served)
    for name in names[:_MOST_LISTED]:
        found.append(f"billing.prices has prices for {name}, {_why_not(name, served)}")
    if (more := len(names) - _MOST_LISTED) > 0:
        found.append(f"billing.prices has prices for {more} more names that no model has which is served at present")
    return found


def _why_not(name: str, served: Mapping[str, Describe]) -> str:
    for own, describe in served.items():
        if describe(None).answers_to(name):
            return f"which is another name of {own}: only under that one they hold"
    return "which is not served at present"


def unpriced(billing: Billing, models: Iterable[str]) -> list[str]:
    """Models without a price where others have one: either name may be mistyped."""
    then = "refused" if billing.refuses_unpriced else "free"
    return [
        f"billing.prices has no price for {name} today: requests for it are {then}" for name in billing.unpriced(models)
    ]


def say(notices: Iterable[str]) -> None:
    """Have the operator know."""
    for detail in notices:
        logs.event("notice", level="warning", detail=detail)


def _told(error: CatalogError | config.ConfigError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message
