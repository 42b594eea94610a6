"""What one rank's time in a step went to. Standard library only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from parsim.timeline import COMPUTE, HOST, PP_STREAMS, merged

RECEIVES = ("recv_f", "recv_b")
"""What asking for a message is called, as torch's pipeline runtime records it."""
Spans = Sequence[Sequence[Any]]
"""(stream, name, kind, stage, micro-batch, start, end) of what one rank did in a step."""


def work_of(spans: Spans, step_s: float) -> dict[str, Any]:
    """What a step's time went to, without communication.

    Actions: seconds of each by stage and kind; whole, from its begin to its end, with what the host does
    in communication that nobody answers. action_host: what passed from the first action (or asking for
    its input) to the last outside any span, for each action: torch's pipeline runtime. step_host: the
    rest of the step.
    """
    actions: dict[tuple[int, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    extents: dict[tuple[int, str, int], tuple[float, float]] = {}
    optimizer_s, begin, end = 0.0, step_s, 0.0
    for stream, name, kind, stage, micro_batch, start_s, end_s in spans:
        if name in RECEIVES:  # on CPUs all of a step are asked for before its first action
            begin = min(begin, start_s)
        elif stream == COMPUTE and kind == "optimizer":
            optimizer_s += end_s - start_s
        elif stream == COMPUTE:
            actions[stage, kind][micro_batch] += end_s - start_s
            begin, end = min(begin, start_s), max(end, end_s)
            first_s, last_s = extents.get((stage, kind, micro_batch), (start_s, end_s))
            extents[stage, kind, micro_batch] = min(first_s, start_s), max(last_s, end_s)
    # Handing a message over is the host's work, as is all that torch does between actions.
    hosts = (HOST, *(stream for stream in PP_STREAMS if stream.startswith("pp_send")))
    known = merged((row[5], row[6]) for row in spans if row[0] not in hosts)
    within_s = sum(max(0.0, min(b, end) - max(a, begin)) for a, b in known)
    between_s = max(0.0, end - begin - within_s)
    idle_s = max(0.0, step_s - sum(b - a for a, b in known))
    count = sum(len(found) for found in actions.values())
    return {
        "actions": [
            {
                "stage": stage,
                "kind": kind,
                "seconds": list(found.values()),
                "whole": [b - a for a, b in (extents[stage, kind, i] for i in found)],
            }
            for (stage, kind), found in sorted(actions.items())
        ],
        "optimizer_s": optimizer_s,
        "action_host_s": between_s / max(1, count),
        "step_host_s": max(0.0, idle_s - between_s),
    }
