"""Collectives as messages: which rank (or switch) sends how much to which, and after what.

One file of pure functions. Messages stand in an order in which they can be sent; `after` are indices of
messages that must have arrived. `num_bytes` of a collective is that of its full buffer, as nccl-tests
counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from parsim.cost.algorithms import tree_width
from parsim.simulate.fabric import Node
from parsim.simulate.trees import double_tree

Ready: TypeAlias = Mapping[Node, tuple[int, ...]]
"""Messages that a device waits for before it sends its first."""


class Message(NamedTuple):
    """Bytes from a device or a switch to another."""

    source: Node
    target: Node
    num_bytes: float
    after: tuple[int, ...]
    width: int = 1
    """The message has one of so many equal parts of its links, even where others are idle."""


def rounds(
    ranks: Sequence[Node],
    num_bytes: float,
    count: int,
    step: Callable[[int], int],
    ready: Ready | None = None,
    start: int = 0,
) -> list[Message]:
    """`count` rounds in which every rank sends 1/p of the buffer `step(round)` ranks on.

    It sends again once it has sent and received in the round before. `ready` says what each rank waits
    for at first, `start` is the index of the first message.
    """
    p, messages = len(ranks), []
    for number in range(count):
        for i, rank in enumerate(ranks):
            after = (ready or {}).get(rank, ())
            if number:
                sender = (i - step(number - 1)) % p
                last = start + (number - 1) * p
                after = (last + i, last + sender)
            target = ranks[(i + step(number)) % p]
            messages.append(Message(rank, target, num_bytes / p, after))
    return messages


def rings(domains: Sequence[Sequence[Node]], num_bytes: float, *, twice: bool) -> list[Message]:
    """Rings: once round for an all-gather or a reduce-scatter, twice for an all-reduce.

    As many as each domain has ranks, with equal parts of the bytes: the j-th enters every other domain
    at its j-th rank and leaves it at the one before, and the domains between the other way round, so
    that each crosses the network between ranks of the same place (as NCCL's rings stay on their rails).
    Source: Patarasuk and Yuan 2009, section 3.
    """
    messages: list[Message] = []
    local = len(domains[0])
    for first in range(local):
        order = []
        for number, ranks in enumerate(domains):
            turned = [*ranks[first:], *ranks[:first]]
            order += turned[::-1] if number % 2 else turned
        count = (2 if twice else 1) * (len(order) - 1)
        messages += rounds(order, num_bytes / local, count, lambda _: 1, start=len(messages))
    return messages


def exchange(ranks: Sequence[Node], num_bytes: float) -> list[Message]:
    """An all-to-all in p − 1 rounds, in the r-th of which each rank sends to the one r places on.

    Source: Thakur et al. 2005, section 4.4.
    """
    return rounds(ranks, num_bytes, len(ranks) - 1, lambda number: number + 1)


def chain(ranks: Sequence[Node], num_bytes: float, chunks: int) -> list[Message]:
    """A broadcast from the first rank, in chunks from each rank to the next."""
    hops = len(ranks) - 1
    messages = []
    for chunk in range(chunks):
        for hop in range(hops):
            at = chunk * hops + hop
            after = ((at - 1,) if hop else ()) + ((at - hops,) if chunk else ())
            messages.append(Message(ranks[hop], ranks[hop + 1], num_bytes / chunks, after))
    return messages


def tree(
    parents: Mapping[Node, Node],
    num_bytes: float,
    chunks: int,
    ready: Ready | None = None,
    *,
    width: int = 1,
    start: int = 0,
) -> list[Message]:
    """A sum up a tree and the result down again, in chunks one behind the other.

    A place sends a chunk up when all its children's have come; the root sends it down then. Switches as
    inner places make it an in-switch reduction: Graham et al. 2016, section III.
    """
    root = next(place for place in parents.values() if place not in parents)
    children: dict[Node, list[Node]] = {}
    for child, parent in parents.items():
        children.setdefault(parent, []).append(child)
    downward = [root]
    for place in downward:  # grows as it is walked
        downward.extend(children.get(place, ()))
    messages: list[Message] = []
    up: dict[Node, int] = {}
    down: dict[Node, int] = {}

    def send(source: Node, target: Node, after: tuple[int, ...]) -> int:
        messages.append(Message(source, target, num_bytes / chunks, after, width))
        return start + len(messages) - 1

    for chunk in range(chunks):
        own = (ready or {}) if chunk == 0 else {}
        before_up, before_down = dict(up), dict(down)
        for place in reversed(downward[1:]):
            after = tuple(up[child] for child in children.get(place, ())) + own.get(place, ())
            after += (before_up[place],) if place in before_up else ()
            up[place] = send(place, parents[place], after)
        for place in downward[1:]:
            parent = parents[place]
            after = tuple(up[child] for child in children[root]) if parent == root else (down[parent],)
            after += own.get(root, ()) if parent == root else ()
            after += (before_down[place],) if place in before_down else ()
            down[place] = send(parent, place, after)
    return messages


def double_binary_tree(
    ranks: Sequence[Node], num_bytes: float, chunks: int, ready: Ready | None = None, start: int = 0
) -> list[Message]:
    """An all-reduce over two trees with half of the bytes each: Sanders, Speck and Träff 2009."""
    messages: list[Message] = []
    for parents in double_tree(len(ranks)):
        of = {ranks[i]: ranks[parent] for i, parent in enumerate(parents) if parent >= 0}
        at, width = start + len(messages), tree_width(len(ranks))
        messages += tree(of, num_bytes / 2, chunks, ready, width=width, start=at)
    return messages


Between: TypeAlias = Callable[[Sequence[Node], float, Ready, int], list[Message]]
"""An all-reduce among ranks of several domains: of so many bytes, after what, from which index."""


def ring_between(ranks: Sequence[Node], num_bytes: float, ready: Ready, start: int) -> list[Message]:
    """A ring all-reduce."""
    return rounds(ranks, num_bytes, 2 * (len(ranks) - 1), lambda _: 1, ready, start)


def two_levels(domains: Sequence[Sequence[Node]], num_bytes: float, between: Between) -> list[Message]:
    """An all-reduce in three parts: a reduce-scatter in each domain, an all-reduce of every shard among
    the ranks that hold it, an all-gather in each domain. All domains have as many ranks.
    """
    messages: list[Message] = []
    local = len(domains[0])
    ready: dict[Node, tuple[int, ...]] = {}
    devices = {place for ranks in domains for place in ranks}

    def add(part: list[Message]) -> None:
        start = len(messages)
        messages.extend(part)
        latest: dict[Node, dict[Node, int]] = {}
        for index, message in enumerate(part, start):
            if message.target not in devices:  # a switch sums for each rail apart
                continue
            latest.setdefault(message.target, {})[message.source] = index
        ready.update({place: tuple(found.values()) for place, found in latest.items()})

    def inside() -> None:
        for ranks in domains:
            add(rounds(ranks, num_bytes, local - 1, lambda _: 1, ready, len(messages)))

    inside()
    if len(domains) > 1:
        for rail in zip(*domains, strict=True):
            add(between(rail, num_bytes / local, ready, len(messages)))
    inside()
    return messages
