"""Fitting parsim.cost.collective to nccl-tests inside one scale-up domain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

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
_SHORT_BYTES = 2.6e5
_SHORT_WEIGHT = 0.25
"""Weight of shorter messages, which are all latency."""
_LOG_SCALE = 0.04
_ALIKE = 0.15
"""Kinds fitted together differ in log latency and log bandwidth by about this."""


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


def _fit_all(link: Link, rows: Sequence[CollectiveRow]) -> list[CollectiveFit]:
    fits: list[CollectiveFit] = []
    for kinds in FITTED_TOGETHER:
        for gpus in sorted({row.gpus for row in rows if row.kind in kinds}):
            present = [kind for kind in kinds if any((r.kind, r.gpus) == (kind, gpus) for r in rows)]
            some = [row for row in rows if row.kind in present and row.gpus == gpus]
            fits += _fit_curve(link, present, gpus, some)
    return fits


def _fit_curve(
    link: Link, kinds: list[str], gpus: int, rows: Sequence[CollectiveRow]
) -> Iterable[CollectiveFit]:
    """The switch between protocols that fits best, of those that never make a longer message faster."""
    curve = _curve(link, kinds, rows)
    sizes = np.unique(curve.num_bytes)
    best: tuple[float, float, _Branch | None, _Branch] = (math.inf, 0.0, None, _descend(curve))
    borders = [
        math.sqrt(a * b) for a, b in itertools.pairwise(sizes) if _SWITCH_BYTES[0] < b < _SWITCH_BYTES[1]
    ]
    for border in (0.0, *borders):
        below = curve.num_bytes < border
        if border and (below.sum() < 4 or (~below).sum() < 3):
            continue
        long = _descend(curve.only(~below))
        short = _descend(curve.only(below)) if border else None
        at_border = _Curve(
            *(np.array([v]) for v in (border * curve.wire_s[0] / curve.num_bytes[0], border, 1.0, 0.0))
        )
        if short is not None and short.seconds(at_border)[0] > 1.03 * long.seconds(at_border)[0]:
            continue
        cost = long.cost + (short.cost + 5e-4 if short else 0.0)
        best = min(best, (cost, border, short, long), key=lambda found: found[0])
    _, border, short, long = best
    for place, kind in enumerate(kinds):
        yield CollectiveFit(
            kind=kind,
            gpus=gpus,
            switch_bytes=float(round(border)),
            short=short.protocol(place == 1) if short else None,
            long=long.protocol(place == 1),
            source=SOURCE,
            date=DATE,
            fitted_to="",
        )


def _curve(link: Link, kinds: list[str], rows: Sequence[CollectiveRow]) -> _Curve:
    num_bytes = np.array([row.num_bytes for row in rows], dtype=np.float64)
    wire = np.array([wire_factor(row.kind, row.gpus) for row in rows])
    return _Curve(
        wire_s=wire * num_bytes / link.bandwidth_bytes_per_s,
        num_bytes=num_bytes,
        seconds=np.array([row.measured_s for row in rows]),
        second_kind=np.array([float(kinds.index(row.kind)) for row in rows]),
    )


def _descend(curve: _Curve) -> _Branch:
    """One protocol's constants; what two kinds differ in is pulled towards nothing."""
    from scipy.optimize import least_squares

    def residuals(x: Vector) -> Vector:
        misfit = weight * np.log(_Branch(x, 0.0).seconds(curve) / curve.seconds)
        return np.concatenate([misfit, [0.03 * x[2], _ALIKE * x[3], _ALIKE * x[4]]])

    weight = np.where(curve.num_bytes < _SHORT_BYTES, _SHORT_WEIGHT, 1.0)
    longest = curve.wire_s.argmax()
    slowest = max(float(curve.seconds[longest] / curve.wire_s[longest]), 1e-6)
    found = [
        least_squares(
            residuals,
            np.array([math.log(0.9 * curve.seconds.min()), math.log(slowest), math.log(p), 0.0, 0.0]),
            loss="soft_l1",
            f_scale=_LOG_SCALE,
            bounds=([-30, -2.2, math.log(0.5), -1, -1], [0, 30, math.log(3), 1, 1]),
            max_nfev=60,
        )
        for p in (0.7, 1.5)
    ]
    best = min(found, key=lambda result: result.cost)
    return _Branch(best.x, float(best.cost))


def _four(value: float) -> float:
    return float(f"{value:.4g}")
