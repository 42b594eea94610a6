"""`parsim collective`: one collective by every algorithm, message by message over a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.options import (
    HardwareOption,
    InterNodeOption,
    IntraNodeOption,
    JsonOption,
)
from parsim.cli.output import document, print_json, print_lines
from parsim.cli.tables import print_table
from parsim.setup import Flags, load_machine

if TYPE_CHECKING:
    from parsim.simulate.collectives import Collective
    from parsim.simulate.fabric import Fabric


def collective(
    num_bytes: Annotated[str, typer.Option("--bytes", help='The full buffer, "256MB".')],
    ranks: Annotated[int, typer.Option("--ranks", help="Devices in a group.")],
    hardware: HardwareOption = None,
    kind: Annotated[
        str,
        typer.Option("--kind", help="all_reduce, all_gather, reduce_scatter, all_to_all, broadcast."),
    ] = "all_reduce",
    stride: Annotated[int, typer.Option("--stride", help="How far apart the devices lie.")] = 1,
    groups: Annotated[
        int, typer.Option("--groups", help="Groups that run at once, each one device further on.")
    ] = 1,
    chunks: Annotated[
        int, typer.Option("--chunks", help="Pieces that a tree, a chain and switches pass on.")
    ] = 64,
    fabric: Annotated[
        str,
        typer.Option("--fabric", help="As of `parsim simulate`, such as fat-tree,oversubscription=4."),
    ] = "switch",
    inter_node: InterNodeOption = None,
    intra_node: IntraNodeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time one collective by every algorithm that it has, over a network whose links it may share.

    \b
    Examples:
      parsim collective --bytes 1GB --ranks 16 --stride 8 --hardware h100-sxm-80gb
      parsim collective --bytes 64MB --ranks 16 --stride 8 --groups 8 --hardware h100-sxm-80gb \\
        --fabric fat-tree,leaf=16,oversubscription=4
    """
    from parsim.simulate.fabric import fabric_of
    from parsim.units import parse_bytes

    flags = Flags(hardware=hardware, inter_node=inter_node, intra_node=intra_node)
    cluster, _ = load_machine(flags)
    size = parse_bytes(num_bytes)
    cases = _cases(kind, size, ranks, stride, groups, chunks)
    network = fabric_of(fabric, cluster, ranks * stride)
    rows = [_row(alike, network) for alike in cases]
    if as_json:
        inputs = flags.given() | {"kind": kind, "bytes": size, "ranks": ranks, "stride": stride}
        inputs |= {"groups": groups, "chunks": chunks, "fabric": fabric}
        print_json(document("collective", inputs, {"algorithms": rows}))
    else:
        _print(rows, f"{kind} of {num_bytes} among {ranks} × {cluster.name} on {fabric}")
    if all(row["status"] != "ok" for row in rows):
        raise typer.Exit(1)


_WHY_NOT_ALIKE = (
    "The cost model has one figure for all algorithms: what the library would choose, with the data of\n"
    "a group cut up among the interfaces of all its ranks in a domain. Messages here go from rank to\n"
    "rank as the algorithm says."
)


def _cases(
    kind: str, num_bytes: float, ranks: int, stride: int, groups: int, chunks: int
) -> list[list[Collective]]:
    """For every algorithm of this kind of collective, one in each of the groups."""
    from parsim.errors import ParsimError, did_you_mean
    from parsim.simulate.collectives import ALGORITHMS_OF, Collective

    if kind not in ALGORITHMS_OF:
        raise ParsimError(
            "unknown collective",
            where="--kind",
            got=kind,
            expected=", ".join(ALGORITHMS_OF),
            hint=did_you_mean(kind, ALGORITHMS_OF),
        )
    if min(ranks, stride, groups) < 1 or groups > stride:
        raise ParsimError(
            "groups lie between each other's ranks",
            where="--groups",
            got=f"{groups} groups, stride {stride}",
            expected="1 to stride",
        )
    return [
        [
            Collective(
                kind=kind,
                algorithm=algorithm,
                num_bytes=num_bytes,
                gpus=tuple(range(first, ranks * stride, stride)),
                chunks=chunks,
            )
            for first in range(groups)
        ]
        for algorithm in ALGORITHMS_OF[kind]
    ]


def _row(alike: list[Collective], network: Fabric) -> dict[str, Any]:
    """One algorithm: alone by its closed form, and with all groups at once."""
    from parsim.cost.collective import collective_s, group_of, wire_factor
    from parsim.errors import ParsimError
    from parsim.simulate.collectives import closed_form_s, simulated_s

    one = alike[0]
    row: dict[str, Any] = {"algorithm": one.algorithm}
    try:
        seconds = max(simulated_s(alike, network))
        alone_s = seconds if len(alike) == 1 else simulated_s(alike[:1], network)[0]
        form_s = closed_form_s(one, network)
    except ParsimError as error:
        if len(one.gpus) < 2:
            raise
        return row | {"status": "unsupported", "reason": error.what}
    stride = one.gpus[1] - one.gpus[0]
    # These groups alone: seven devices from the first on lie in one node of eight.
    gpus = len(one.gpus) * stride
    group = group_of(network.cluster, size=len(one.gpus), stride=stride, gpus=gpus)
    sent = wire_factor(one.kind, group.size) * one.num_bytes
    return row | {
        "status": "ok",
        "closed_form_s": form_s,
        "alone_s": alone_s,
        "seconds": seconds,
        "bus_bytes_per_s": sent / seconds,
        "cost_model_s": collective_s(network.cluster, one.kind, one.num_bytes, group),
    }


def _print(rows: list[dict[str, Any]], title: str) -> None:
    from parsim.units import format_bandwidth, format_duration

    cells = []
    for row in rows:
        if row["status"] != "ok":
            cells.append([row["algorithm"], "–", "–", "–", "–", row["reason"]])
            continue
        form_s = row["closed_form_s"]
        cells.append([
            row["algorithm"],
            "–" if form_s is None else format_duration(form_s),
            format_duration(row["alone_s"]),
            format_duration(row["seconds"]),
            format_bandwidth(row["bus_bytes_per_s"]),
            format_duration(row["cost_model_s"]),
        ])  # fmt: skip
    headers = ["algorithm", "closed form", "alone", "all groups", "bus bandwidth", "cost model"]
    print_table(headers, cells, title=title)
    timed = [row for row in rows if row["status"] == "ok"]
    if any(abs(row["alone_s"] / row["cost_model_s"] - 1) > 0.1 for row in timed):
        print_lines([_WHY_NOT_ALIKE])
