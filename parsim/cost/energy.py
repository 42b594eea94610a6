"""Energy of training: what the GPUs draw, and the building around them.

A GPU that computes draws its board power limit: peaks of training iterations reach it (Patel et al.,
"Characterizing Power Management Opportunities for LLMs in the Cloud", ASPLOS 2024). While it
communicates or waits it draws less, and how much less nobody has published for plans in general; so
energy comes as two bounds, waiting for nothing and waiting at the limit, and the mean of both.
"""

from __future__ import annotations

from typing import NamedTuple

SERVER_OVER_GPUS = 1.5
"""Power of a whole server over its GPUs' limits: 8.4 kW at most, training Llama 2 13B on 8 H100s of
700 W (Latif et al., "Empirical Measurements of AI Training Power Demand on a GPU-Accelerated Node",
2024)."""
JOULES_PER_KWH = 3.6e6


class Energy(NamedTuple):
    """Kilowatt-hours of the GPUs alone."""

    low_kwh: float
    """Where a GPU that does not compute draws nothing."""
    high_kwh: float
    """Where it draws the board power limit all the time."""

    @property
    def kwh(self) -> float:
        """The mean of both bounds: waiting at half the limit."""
        return (self.low_kwh + self.high_kwh) / 2

    def facility_kwh(self, pue: float) -> float:
        """What a building of that power usage effectiveness draws for it, servers and all."""
        return self.kwh * SERVER_OVER_GPUS * pue


def training_energy(*, power_w: float, gpus: int, seconds: float, busy_share: float) -> Energy:
    """Energy of `gpus` devices over `seconds`, computing for `busy_share` of them.

    E = P·n·t·u, with utilisation u between busy_share and 1.

    >>> training_energy(power_w=700.0, gpus=1000, seconds=3600.0, busy_share=0.8)
    Energy(low_kwh=560.0, high_kwh=700.0)
    """
    high_kwh = power_w * gpus * seconds / JOULES_PER_KWH
    return Energy(low_kwh=busy_share * high_kwh, high_kwh=high_kwh)
