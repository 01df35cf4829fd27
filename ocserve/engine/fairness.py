"""In which order waiting prompts are computed: fair between tenants, and nobody waits for a much longer prompt.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) over the seconds of prefill that each tenant has been
given: a tenant's prompts are stamped with the service after which they would be complete if the tenant were served
alone from now on, and the smallest stamp goes first. A thousand prompts of one tenant thus delay another's single
prompt by no more than its own length.

Within a tenant, prompts go by arrival plus the time they take: a prompt is passed only by shorter ones, and only by
those that arrive within the time that it takes itself. Nobody starves, and equal prompts keep their order of arrival,
so the first of many simultaneous prompts does not wait for the last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

from ocserve.engine.slots import Sequence


class FairOrder:
    """Stamps and sorts sequences; `charge` tells it what was served."""

    def __init__(self, row_s: Callable[[], float]) -> None:
        """`row_s` predicts the seconds that a prompt token takes."""
        self._row_s = row_s
        self._served: dict[bytes, float] = {}  # seconds of prefill, of tenants with prompts
        self._now = 0.0  # virtual time: what the least served of them has been given

    def activate(self, tenants: Collection[bytes]) -> None:
        """These are all the tenants that have prompts, once a step.

        Who comes back after a pause has no credit for it; who has no prompts is forgotten.
        """
        known = [self._served[tenant] for tenant in tenants if tenant in self._served]
        self._now = max(self._now, min(known, default=max(self._served.values(), default=0.0)))
        self._served = {tenant: max(self._served.get(tenant, 0.0), self._now) for tenant in tenants}

    def sort(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """The sequences, of active tenants, in the order in which their prompts are to be computed."""
        tenants: defaultdict[bytes, list[Sequence]] = defaultdict(list)
        for sequence in sequences:
            tenants[sequence.tenant].append(sequence)
        if not tenants:
            return []
        row_s = self._row_s()
        stamped: list[tuple[float, int, Sequence]] = []
        for tenant, own in tenants.items():
            own.sort(key=lambda sequence: sequence.arrived + len(sequence.prompt) * row_s)
            stamp = self._served[tenant]
            for sequence in own:
                stamp += sequence.remaining * row_s
                stamped.append((stamp, len(stamped), sequence))
        stamped.sort(key=lambda entry: entry[:2])
        return [sequence for _, _, sequence in stamped]

    def charge(self, tenant: bytes, tokens: int) -> None:
        """So many prompt tokens of `tenant` were computed."""
        self._served[tenant] += tokens * self._row_s()
