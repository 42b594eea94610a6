"""Flows that share links: rates by max-min fairness, and transfers over them in simulated time.

A flow crosses some links, each perhaps several times: a class of n alike flows over one link is a flow
that crosses it n times, at n times its rate. Rates are bytes per second.
Source: D. Bertsekas and R. Gallager, "Data Networks", 2nd ed., 1992, section 6.5.2 (max-min fair flow
control and the algorithm of progressive filling).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any

import simpy

from parsim.errors import ParsimError

_SAME = 1e-12
"""Relative difference under which two instants, or a link's load and its capacity, are the same."""
_LATE = 2
"""SimPy priority behind everything else that happens at an instant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a flow asks of the network."""

    crossings: Mapping[Any, float]
    """Links that it crosses, and how often."""
    cap_bytes_per_s: float = math.inf
    """What its ends can send and receive."""


def fair_rates(demands: Sequence[Demand], capacities: Mapping[Any, float]) -> list[float]:
    """Max-min fair rates, by progressive filling, in the order of `demands`.

    All rates rise alike until a link is full or a flow reaches its cap; those flows keep their rate, the
    others rise on. So every flow is at its cap or crosses a full link on which no rate is greater.
    """
    left = {link: capacities[link] for demand in demands for link in demand.crossings}
    links = list(left)
    place = {link: i for i, link in enumerate(links)}
    weight = [0.0] * len(links)
    flows: list[list[int]] = [[] for _ in links]
    for flow, demand in enumerate(demands):
        for link, times in demand.crossings.items():
            weight[place[link]] += times
            flows[place[link]].append(flow)
    rates = [math.nan] * len(demands)
    free = [left[link] for link in links]
    # When each link fills, were no flow at its end before. It fills later, never sooner, once some are:
    # a link is looked at again when its turn comes. Caps stand behind the links, by -1 - flow.
    queue = [(free[i] / weight[i], i) for i in range(len(links))]
    queue += [(demand.cap_bytes_per_s, -1 - flow) for flow, demand in enumerate(demands)]
    heapify(queue)
    unsettled = [len(crossing) for crossing in flows]
    while queue:
        rate, at = heappop(queue)
        if at < 0:
            settled = [-1 - at] if math.isnan(rates[-1 - at]) else []
        elif not unsettled[at]:
            continue
        elif free[at] / weight[at] > rate:
            heappush(queue, (free[at] / weight[at], at))
            continue
        else:
            settled = [flow for flow in flows[at] if math.isnan(rates[flow])]
        for flow in settled:
            rates[flow] = rate
            for link, times in demands[flow].crossings.items():
                i = place[link]
                free[i] -= times * rate
                weight[i] -= times
                unsettled[i] -= 1
    return rates


@dataclass(slots=True, eq=False)
class _Flow:
    """A transfer under way."""

    demand: Demand
    """Its cap is also what its links leave to it alone."""
    left_bytes: float
    """At `since_s`."""
    done: simpy.Event
    since_s: float = 0.0
    rate: float = 0.0
    end_s: float = math.inf


@dataclass(slots=True)
class FlowNetwork:
    """Links with capacities, and the transfers over them.

    Rates are shared anew at each instant at which transfers start or end, once for all of them, and only
    among the flows that those reach over links which all their flows together could overfill.
    """

    env: simpy.Environment
    capacities: Mapping[Any, float]
    """Bytes per second of each link."""
    record: bool = False
    """Whether `loads` is kept."""
    loads: dict[Hashable, list[tuple[float, float]]] = field(default_factory=dict)
    """(time_s, bytes per second from then on) of each link, whenever it changes."""
    _flows: dict[Hashable, dict[_Flow, float]] = field(default_factory=dict)
    """Flows on each link, and how often they cross it."""
    _crowded: set[Hashable] = field(default_factory=set)
    """Links that their flows could overfill."""
    _changed: dict[Hashable, None] = field(default_factory=dict)
    """Links on which flows started or ended since rates were last shared."""
    _started: list[_Flow] = field(default_factory=list)
    _ends: list[tuple[float, int, _Flow]] = field(default_factory=list)
    """A heap of when flows end; one whose flow has another end by now counts no more."""
    _serial: int = 0
    _settling: bool = False
    _alarm: simpy.Event | None = None
    _alarm_s: float = math.inf

    def transfer(
        self,
        links: Iterable[Hashable] | Mapping[Any, float],
        num_bytes: float,
        latency_s: float = 0.0,
        cap_bytes_per_s: float = math.inf,
    ) -> simpy.Event:
        """An event that fires when `num_bytes` are through, `latency_s` after which they start to flow.

        `links` are crossed once each time they are named, or as often as a mapping says.
        `cap_bytes_per_s` is the greatest rate of this transfer.

        Raises ParsimError for a link that the network has not, a negative size or latency, and a
        transfer that nothing limits.
        """
        crossings = {link: times for link, times in Counter(links).items() if times}
        own = cap_bytes_per_s
        for link, times in crossings.items():
            if link not in self.capacities:
                raise ParsimError("the network has no such link", got=link)
            own = min(own, self.capacities[link] / times)
        if num_bytes < 0 or latency_s < 0 or not own > 0 or (math.isinf(own) and num_bytes):
            raise ParsimError(
                "a transfer has a size, a latency and something that limits its rate",
                got=f"{num_bytes} bytes after {latency_s} s at {own} bytes/s",
            )
        done = self.env.event()
        flow = _Flow(Demand(crossings=crossings, cap_bytes_per_s=own), num_bytes, done)
        if latency_s > 0:
            _at(self.env, latency_s, lambda _: self._start(flow))
        else:
            self._start(flow)
        return done

    def _start(self, flow: _Flow) -> None:
        if flow.left_bytes == 0:
            flow.done.succeed()
            return
        flow.since_s = self.env.now
        for link, times in flow.demand.crossings.items():
            self._flows.setdefault(link, {})[flow] = times
            self._changed[link] = None
        self._started.append(flow)
        self._settle_later()

    def _settle_later(self) -> None:
        if not self._settling:
            self._settling = True
            _at(self.env, 0.0, self._settle, priority=_LATE)

    def _settle(self, _: simpy.Event) -> None:
        """Share the rates of what the changes since the last time reach."""
        self._settling = False
        reached = self._reached()
        crowded = {link: self.capacities[link] for flow in reached for link in flow.demand.crossings
                   if link in self._crowded}  # fmt: skip
        demands = [
            Demand(
                crossings={k: n for k, n in flow.demand.crossings.items() if k in crowded},
                cap_bytes_per_s=flow.demand.cap_bytes_per_s,
            )
            for flow in reached
        ]
        now = self.env.now
        for flow, rate in zip(reached, fair_rates(demands, crowded), strict=True):
            if rate != flow.rate:
                flow.left_bytes = max(0.0, flow.left_bytes - flow.rate * (now - flow.since_s))
                flow.since_s, flow.rate = now, rate
                flow.end_s = now + flow.left_bytes / rate
                self._serial += 1
                heappush(self._ends, (flow.end_s, self._serial, flow))
                if self.record:
                    self._changed.update(dict.fromkeys(flow.demand.crossings))
        if self.record:
            self._record()
        self._changed.clear()
        self._started.clear()
        self._set_alarm()

    def _reached(self) -> list[_Flow]:
        """Flows whose rate the changes may change, in order of discovery."""
        reached = dict.fromkeys(self._started)
        waiting: list[Hashable] = []
        for link in self._changed:
            load = sum(n * flow.demand.cap_bytes_per_s for flow, n in self._flows[link].items())
            was = link in self._crowded
            if load > self.capacities[link] * (1 + _SAME):
                self._crowded.add(link)
            else:
                self._crowded.discard(link)
            if was or link in self._crowded:
                waiting.append(link)
        seen = set(waiting)
        for link in waiting:  # grows as it is walked
            for flow in self._flows[link]:
                reached[flow] = None
                for other in flow.demand.crossings:
                    if other in self._crowded and other not in seen:
                        seen.add(other)
                        waiting.append(other)
        return list(reached)

    def _record(self) -> None:
        for link in self._changed:
            load = sum(n * flow.rate for flow, n in self._flows[link].items())
            self.loads.setdefault(link, []).append((self.env.now, load))

    def _set_alarm(self) -> None:
        """Wake up when the next flow ends."""
        while self._ends and self._ends[0][2].end_s != self._ends[0][0]:
            heappop(self._ends)
        if self._ends and self._ends[0][0] < self._alarm_s:
            self._alarm_s = self._ends[0][0]
            wait_s = max(0.0, self._alarm_s - self.env.now)
            self._alarm = _at(self.env, wait_s, self._end_flows)

    def _end_flows(self, alarm: simpy.Event) -> None:
        """End what is through by now; SimPy cannot take an alarm back that an earlier one replaced."""
        if alarm is not self._alarm:
            return
        now = self.env.now
        while self._ends and self._ends[0][0] <= now * (1 + _SAME):
            end_s, _serial, flow = heappop(self._ends)
            if end_s != flow.end_s:
                continue
            flow.end_s = math.inf
            for link in flow.demand.crossings:
                del self._flows[link][flow]
                self._changed[link] = None
            flow.done.succeed()
            self._settle_later()
        self._alarm_s = math.inf
        self._set_alarm()


def _at(
    env: simpy.Environment, delay_s: float, action: Callable[[simpy.Event], None], priority: int = 1
) -> simpy.Event:
    """An event that fires after `delay_s` and calls `action` with itself."""
    event = simpy.Event(env)
    event._ok, event._value = True, None
    event.callbacks.append(action)
    env.schedule(event, priority, delay_s)
    return event
