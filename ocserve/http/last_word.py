"""What is said of a request that raised: the one place that turns whatever went wrong into an error to answer with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ocserve.errors import ApiError, ErrorInfo, InternalError
from ocserve.http.exchange import ClientGone
from ocserve.telemetry import logs
from ocserve.trace import Trace

CLIENT_GONE = 499  # nginx's word for the status of what nobody waited for; no client ever sees it


async def last_word(work: Awaitable[None], refuse: Callable[[ErrorInfo], Awaitable[None]], trace: Trace) -> None:
    """Await `work`; hand to `refuse` what it raised, as an error that says nothing that its client may not know."""

    async def say(error: ApiError) -> None:
        trace.error_code, trace.limit = error.code, error.limit
        await refuse(error.info)

    try:
        await work
    except ApiError as error:
        await say(error)
    except ClientGone:
        pass
    except Exception as error:  # noqa: BLE001 - the last place that can answer; it is logged, without its message
        logs.failure("internal_error", error, request_id=trace.request_id)
        await say(InternalError("The server made a mistake. The log has the details."))
