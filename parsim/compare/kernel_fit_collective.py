"""Fitting parsim.cost.collective to nccl-tests inside one scale-up domain.

Every curve (kinds over one group size) has a few points, so curves inform each other twice. Where a
library leaves its low-latency protocol follows from its own model of both, up to one rate that all
curves of a device share; and a protocol's exponent and bandwidth are pulled towards those of the other
curves and group sizes. Both are weak: a curve that shows something else has its way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parsim.compare.kernel_fit_common import DATE, FOLDS, SOURCE, Vector, held_out_text
from parsim.compare.kernel_rows import CollectiveRow
from parsim.compare.kernels import LONG_MESSAGE_BYTES
from parsim.cost.collective import KINDS, fitted_s, wire_factor
from parsim.hardware import Link
from parsim.kernels import CollectiveFit, Protocol

FITTED_TOGETHER = (("all_gather", "reduce_scatter"), ("all_reduce",), ("all_to_all",), ("broadcast",))
"""Kinds that move the same bytes by the same protocols, switched at the same size."""

_SWITCH_BYTES = (2e5, 2.6e7)
"""Libraries change protocol somewhere in between."""
_TINY_BYTES = 1.85e5
"""Shorter exchanges go by a protocol of their own: send and receive leave LL at a size, not by a model
of both protocols; 128 KiB and 256 KiB lie on its two sides on every device measured."""
_SHORT_BYTES = 2.6e5
_SHORT_WEIGHT = 0.1
"""Weight of shorter messages, which are all latency."""
_LOG_SCALE = 0.04
_ALIKE = 0.15
"""Kinds fitted together differ in log latency and log bandwidth by about this."""
_LARGEST_EXPONENT = 5.0

_SPLIT_COST = 5e-4
"""What a second protocol must gain, in the units of a branch's cost."""
_OFF_COST = 1e-3
"""What a switch far off the library's model costs; half of it at twice or half the size."""
_RATES = tuple(float(f"{10 ** (exponent / 20):.4g}") for exponent in range(-20, 41))
"""Scale of a device's switches over _modelled_switch_bytes, searched from 0.1 to 100."""


class _Pull(NamedTuple):
    """Where a branch's log 1 / bus efficiency and log exponent are pulled to, and how hard."""

    wire: float = 0.0
    exponent: float = 0.0
    wire_weight: float = 0.0
    exponent_weight: float = 0.03


_NO_PULL = _Pull()
_OTHERS_WIRE_WEIGHT, _OTHERS_EXPONENT_WEIGHT = 0.03, 0.1
"""Pull towards the other curves, against misfits of _LOG_SCALE and more."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """Measured times of one or two kinds over one group size."""

    wire_s: Vector
    """Bytes on the wire over the link's bandwidth."""
    num_bytes: Vector
    seconds: Vector
    second_kind: Vector
    """1 for rows of the second kind, else 0."""

    def only(self, mask: NDArray[np.bool_]) -> _Curve:
        return _Curve(
            self.wire_s[mask], self.num_bytes[mask], self.seconds[mask], self.second_kind[mask]
        )


@dataclass(frozen=True, slots=True)
class _Branch:
    """Logs of latency, 1 / bus efficiency and exponent; what the second kind adds to the first two."""

    x: Vector
    cost: float

    def seconds(self, curve: _Curve) -> Vector:
        latency = np.exp(self.x[0] + self.x[3] * curve.second_kind)
        wire = np.exp(self.x[1] + self.x[4] * curve.second_kind) * curve.wire_s
        p = np.exp(self.x[2])
        found: Vector = (latency**p + wire**p) ** (1 / p)
        return found

    def protocol(self, second: bool) -> Protocol:
        latency, wire = self.x[0] + self.x[3] * second, self.x[1] + self.x[4] * second
        return Protocol(
            latency_s=_four(math.exp(latency)),
            bus_efficiency=_four(min(10.0, math.exp(-wire))),
            exponent=_four(math.exp(self.x[2])),
        )


def fit_collectives(link: Link, rows: Sequence[CollectiveRow]) -> tuple[CollectiveFit, ...]:
    """The constants of every kind and group size that was measured, and the error on rows not used."""
    known = [row for row in rows if row.kind in KINDS]

    def predict(fits: dict[tuple[str, int], CollectiveFit], row: CollectiveRow) -> float:
        fit = fits[row.kind, row.gpus]
        return fitted_s(fit, link, row.num_bytes, wire_factor(row.kind, row.gpus) * row.num_bytes)

    def make(some: Sequence[CollectiveRow]) -> dict[tuple[str, int], CollectiveFit]:
        return {(fit.kind, fit.gpus): fit for fit in _fit_all(link, some)}

    unseen = held_out_text(
        known,
        make,
        predict,
        group=lambda r: r,
        name="random fifths of the rows",
        counts=lambda r: r.num_bytes >= LONG_MESSAGE_BYTES,
        folds=FOLDS,
    )
    text = (
        "nccl-tests, out of place. Median / 90th percentile of the error of messages over 1 MB that a "
        f"fit has not seen, over all {len(known)} rows of this device: {unseen}"
    )
    return tuple(replace(fit, fitted_to=text) for fit in _fit_all(link, known))


@dataclass(frozen=True, slots=True)
class _Split:
    """One way to part a curve between two protocols; without `short` it is all one."""

    below: _Curve | None
    above: _Curve
    short: _Branch | None
    long: _Branch
    at_bytes: float = 0.0
    """Where the library switches; 0 until it is chosen."""

    @property
    def cost(self) -> float:
        return self.long.cost + (self.short.cost + _SPLIT_COST if self.short else 0.0)

    def switched(self, expected: float) -> tuple[float, _Split]:
        """(cost, split) with the switch as near to the expected size as the measured sizes let it."""
        if self.below is None or self.short is None:
            return self.cost, self
        low, high = 1.2 * self.below.num_bytes.max(), self.above.num_bytes.min() / 1.2
        split = replace(self, at_bytes=min(max(expected, float(low)), float(high)))
        if not split.rises:
            return math.inf, split
        off = math.log2(split.at_bytes / expected) ** 2
        return self.cost + _OFF_COST * off / (1 + off), split

    @property
    def rises(self) -> bool:
        """Whether the longer message is not the faster one at the switch."""
        if self.short is None:
            return True
        wire_s = self.at_bytes * self.above.wire_s[0] / self.above.num_bytes[0]
        at = _Curve(*(np.array([v]) for v in (wire_s, self.at_bytes, 1.0, 0.0)))
        return bool(self.short.seconds(at)[0] <= 1.03 * self.long.seconds(at)[0])


class _Group(NamedTuple):
    """The rows of kinds that are fitted together over one group size."""

    kinds: tuple[str, ...]
    gpus: int
    tiny: _Branch | None
    splits: tuple[_Split, ...]


def _fit_all(link: Link, rows: Sequence[CollectiveRow]) -> list[CollectiveFit]:
    groups = []
    for kinds in FITTED_TOGETHER:
        for gpus in sorted({row.gpus for row in rows if row.kind in kinds}):
            present = tuple(
                kind for kind in kinds if any((r.kind, r.gpus) == (kind, gpus) for r in rows)
            )
            some = [row for row in rows if row.kind in present and row.gpus == gpus]
            groups.append(_group(present, gpus, _curve(link, present, some)))
    fits: list[CollectiveFit] = []
    for exchanges in (False, True):
        family = [group for group in groups if ("all_to_all" in group.kinds) == exchanges]
        if family:
            found = [_choose(family, rate) for rate in _RATES]
            least = min(cost for cost, _ in found)
            equal = [chosen for cost, chosen in found if cost <= least + 1e-9]
            chosen = equal[len(equal) // 2]
            for group, split in zip(family, _alike(family, chosen), strict=True):
                fits += _to_fits(group, split)
    return fits


def _group(kinds: tuple[str, ...], gpus: int, curve: _Curve) -> _Group:
    """All ways to part the curve, each protocol fitted by itself."""
    tiny = None
    few = curve.num_bytes < _TINY_BYTES
    if kinds == ("all_to_all",) and few.sum() >= 3 and (~few).sum() >= 3:
        tiny, curve = _descend(curve.only(few)), curve.only(~few)
    splits = [_Split(None, curve, None, _descend(curve))]
    for size in np.unique(curve.num_bytes):
        is_below = curve.num_bytes < size
        if _SWITCH_BYTES[0] < size < _SWITCH_BYTES[1] and is_below.sum() >= 3 and (~is_below).sum() >= 3:
            below, above = curve.only(is_below), curve.only(~is_below)
            splits.append(_Split(below, above, _descend(below), _descend(above)))
    return _Group(kinds, gpus, tiny, tuple(splits))


def _choose(family: Sequence[_Group], rate: float) -> tuple[float, list[_Split]]:
    """(cost, the best split of every group) where switches lie at `rate` times the library's model."""
    best = [
        min(
            (split.switched(rate * _modelled_switch_bytes(g.kinds[0], g.gpus)) for split in g.splits),
            key=lambda pair: pair[0],
        )
        for g in family
    ]
    return sum(cost for cost, _ in best), [split for _, split in best]


def _modelled_switch_bytes(kind: str, gpus: int) -> float:
    """Bytes, up to a device's rate, at which NCCL expects Simple to overtake LL on a ring.

    It takes launch + steps · hop + wire bytes / bandwidth for the time of each: launches of 6.6 and
    8.4 us, hops over NVLink of 0.6 and 3.4 us. Source: NVIDIA/nccl, src/graph/tuning.cc, ring's
    baseLatencies and hwLatencies. Exchanges are not modelled there; they switch at one size of the
    buffer.
    """
    if kind == "all_to_all":
        return 1e6
    wire = wire_factor(kind, gpus)
    return 1e5 * (8.4 - 6.6 + (3.4 - 0.6) * wire * gpus) / wire


def _alike(family: Sequence[_Group], chosen: Sequence[_Split]) -> list[_Split]:
    """The splits fitted once more, each protocol pulled towards the median of the other curves.

    Exponents are alike over all curves of a family, bandwidths over the group sizes of the same kinds: a
    switch adds up for an all_reduce only.
    """
    found = []
    for group, split in zip(family, chosen, strict=True):
        two = [(g.kinds == group.kinds, s) for g, s in zip(family, chosen, strict=True) if s.short]
        if split.below is None or split.short is None or len(two) < 2:
            found.append(split)
            continue
        short = _descend(split.below, _pull([(same, s.short.x) for same, s in two if s.short]))
        long = _descend(split.above, _pull([(same, s.long.x) for same, s in two]))
        pulled = replace(split, short=short, long=long)
        found.append(pulled if pulled.rises else split)
    return found


def _pull(branches: Sequence[tuple[bool, Vector]]) -> _Pull:
    """Towards the medians of (same kinds, coordinates): the bandwidth's over the same kinds only."""
    return _Pull(
        float(np.median([x[1] for same, x in branches if same])),
        float(np.median([x[2] for _, x in branches])),
        _OTHERS_WIRE_WEIGHT,
        _OTHERS_EXPONENT_WEIGHT,
    )


def _to_fits(group: _Group, split: _Split) -> Iterable[CollectiveFit]:
    for place, kind in enumerate(group.kinds):
        second = place == 1
        yield CollectiveFit(
            kind=kind,
            gpus=group.gpus,
            tiny_bytes=_TINY_BYTES if group.tiny else 0.0,
            tiny=group.tiny.protocol(second) if group.tiny else None,
            switch_bytes=float(f"{split.at_bytes:.3g}"),
            short=split.short.protocol(second) if split.short else None,
            long=split.long.protocol(second),
            source=SOURCE,
            date=DATE,
            fitted_to="",
        )


def _curve(link: Link, kinds: Sequence[str], rows: Sequence[CollectiveRow]) -> _Curve:
    num_bytes = np.array([row.num_bytes for row in rows], dtype=np.float64)
    wire = np.array([wire_factor(row.kind, row.gpus) for row in rows])
    return _Curve(
        wire_s=wire * num_bytes / link.bandwidth_bytes_per_s,
        num_bytes=num_bytes,
        seconds=np.array([row.measured_s for row in rows]),
        second_kind=np.array([float(kinds.index(row.kind)) for row in rows]),
    )


def _descend(curve: _Curve, pull: _Pull = _NO_PULL) -> _Branch:
    """One protocol's constants; what two kinds differ in is pulled towards nothing."""
    from scipy.optimize import least_squares

    def residuals(x: Vector) -> Vector:
        misfit = weight * np.log(_Branch(x, 0.0).seconds(curve) / curve.seconds)
        pulled = (
            pull.wire_weight * (x[1] - pull.wire),
            pull.exponent_weight * (x[2] - pull.exponent),
            _ALIKE * x[3],
            _ALIKE * x[4],
        )
        return np.concatenate([misfit, pulled])

    weight = np.where(curve.num_bytes < _SHORT_BYTES, _SHORT_WEIGHT, 1.0)
    longest = curve.wire_s.argmax()
    slowest = max(float(curve.seconds[longest] / curve.wire_s[longest]), 1e-6)
    highest = math.log(_LARGEST_EXPONENT)
    found = [
        least_squares(
            residuals,
            np.array([math.log(0.9 * curve.seconds.min()), math.log(slowest), math.log(p), 0.0, 0.0]),
            loss="soft_l1",
            f_scale=_LOG_SCALE,
            bounds=([-30, -2.2, math.log(0.5), -1, -1], [0, 30, highest, 1, 1]),
            max_nfev=60,
        )
        for p in (0.7, 1.5)
    ]
    best = min(found, key=lambda result: result.cost)
    return _Branch(best.x, float(best.cost))


def _four(value: float) -> float:
    return float(f"{value:.4g}")
