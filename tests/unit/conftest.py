"""Pipeline steps laid out by hand, so that charts and traces are tested without the simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from parsim.timeline import MemorySample, Span, Timeline

KIND = {"F": "forward", "B": "backward", "I": "input_grad", "W": "weight_grad"}


class Step(NamedTuple):
    stage: int
    letter: str
    micro_batch: int


def gpipe(pp: int, m: int) -> list[list[Step]]:
    """All forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965)."""
    return [[Step(r, k, i) for k in "FB" for i in range(m)] for r in range(pp)]


def one_f_one_b(pp: int, m: int) -> list[list[Step]]:
    """A warm-up of pp − 1 − rank forwards, then one forward and one backward in turn."""
    orders = []
    for r in range(pp):
        warm = min(pp - 1 - r, m)
        order = [Step(r, "F", i) for i in range(warm)]
        for i in range(m - warm):
            order += [Step(r, "F", warm + i), Step(r, "B", i)]
        orders.append(order + [Step(r, "B", i) for i in range(m - warm, m)])
    return orders


def interleaved(pp: int, m: int, chunks: int = 2) -> list[list[Step]]:
    """Several model chunks a rank (Narayanan et al. 2021, arXiv 2104.04473, section 2.2)."""
    orders = []
    for r in range(pp):
        total = m * chunks

        def at(k: int, *, backward: bool, r: int = r) -> Step:
            group, place = divmod(k, pp * chunks)
            chunk = place // pp
            chunk = chunks - 1 - chunk if backward else chunk
            return Step(chunk * pp + r, "B" if backward else "F", group * pp + place % pp)

        warm = min((pp - r - 1) * 2 + (chunks - 1) * pp, total)
        order = [at(k, backward=False) for k in range(warm)]
        for k in range(total - warm):
            order += [at(warm + k, backward=False), at(k, backward=True)]
        orders.append(order + [at(k, backward=True) for k in range(total - warm, total)])
    return orders


SCHEDULES: dict[str, Callable[[int, int], list[list[Step]]]] = {
    "GPipe": gpipe,
    "1F1B": one_f_one_b,
    "Interleaved 1F1B": interleaved,
}


def lay_out(
    name: str,
    pp: int,
    m: int,
    *,
    forward_s: float = 0.01,
    transfer_s: float = 0.0,
    tp_s: float = 0.0,
    dp_s: float = 0.0,
    optimizer_s: float = 0.0,
    source: str = "simulated",
) -> Timeline:
    """A schedule with every action as early as it can be; a backward takes two forwards.

    With transfer_s > 0 stages on different ranks exchange tensors; with tp_s > 0 each action ends
    with a collective of that length beside it; dp_s and optimizer_s follow the last action.
    """
    orders = SCHEDULES[name](pp, m)
    last = max(step.stage for order in orders for step in order)
    ready: dict[Step, float] = {Step(0, "F", i): 0.0 for i in range(m)}
    spans: list[Span] = []
    clock = [0.0] * pp
    cursor = [0] * pp
    while any(cursor[r] < len(orders[r]) for r in range(pp)):
        progress = False
        for r in range(pp):
            while cursor[r] < len(orders[r]) and orders[r][cursor[r]] in ready:
                step = orders[r][cursor[r]]
                start_s = max(clock[r], ready[step])
                length_s = forward_s * (1 if step.letter == "F" else 2) * pp / (last + 1)
                end_s = start_s + length_s
                stage, letter, i = step
                text = f"{stage}{letter}{i}"
                spans.append(Span(r, "compute", text, start_s, end_s, KIND[letter], stage, i))
                if tp_s:
                    spans.append(
                        Span(r, "tp", f"{text} all-reduce", end_s - tp_s, end_s, "tp", stage, i)
                    )
                clock[r] = end_s
                cursor[r] += 1
                progress = True
                after = Step(stage + 1, "F", i) if letter == "F" else Step(stage - 1, "B", i)
                if step == Step(last, "F", i):
                    ready[Step(last, "B", i)] = end_s
                elif after.stage >= 0:
                    ready[after] = end_s + transfer_s
                    if transfer_s:
                        spans += transfer(r, after.stage % pp, text, letter, end_s, transfer_s, stage, i)
        assert progress, "the schedule waits for itself"
    for r in range(pp):
        end_s = clock[r]
        if dp_s:
            spans.append(Span(r, "dp", "gradients", end_s, end_s + dp_s, "dp"))
        if optimizer_s:
            start_s = end_s + dp_s
            spans.append(Span(r, "compute", "adamw", start_s, start_s + optimizer_s, "optimizer"))
    return Timeline(spans=tuple(sorted(spans)), memory=tuple(memory(spans)), source=source, title=name)


def transfer(
    sender: int, receiver: int, text: str, letter: str, at_s: float, length_s: float, stage: int, i: int
) -> list[Span]:
    """The two ends of one pipeline transfer, both named after the action whose result it carries."""
    to, origin = ("next", "prev") if letter == "F" else ("prev", "next")
    sent = Span(sender, f"pp_send_{to}", text, at_s, at_s + length_s, "pp", stage, i)
    return [sent, sent._replace(rank=receiver, stream=f"pp_recv_{origin}")]


def memory(spans: list[Span]) -> list[MemorySample]:
    """10 GiB of weights, and 1.5 GiB from each forward's start until its backward's end."""
    changes = []
    for span in spans:
        if span.kind == "forward":
            changes.append((span.rank, span.start_s, 1.5 * 2**30))
        elif span.kind == "backward":
            changes.append((span.rank, span.end_s, -1.5 * 2**30))
    samples: dict[tuple[int, float], float] = {}
    held: dict[int, float] = {}
    for rank, time_s, change in sorted(changes):
        held[rank] = held.get(rank, 10 * 2**30) + change
        samples[rank, time_s] = held[rank]
    return [MemorySample(rank, time_s, size) for (rank, time_s), size in samples.items()]


@pytest.fixture(name="lay_out")
def _lay_out() -> Callable[..., Timeline]:
    """The function that lays out GPipe, 1F1B and interleaved steps."""
    return lay_out
