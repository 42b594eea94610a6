"""Calibration with real ranks: what comes out is physical, is kept, and no process is left behind."""

from __future__ import annotations

import os
import signal
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from parsim.config import load_cluster, to_toml
from parsim.cost.collective import Group, collective_s
from parsim.cost.gemm import gemm_s
from parsim.errors import ParsimError
from parsim.execute.calibrate import calibration as calibrate_module
from parsim.execute.calibrate.calibration import Calibration, calibrate
from parsim.execute.calibrate.host import measure_host
from parsim.execute.calibrate.points import DTYPES, ESSENTIAL, Point, points
from parsim.execute.calibrate.profile import (
    TimedPoint,
    cluster_of,
    cpu_facts,
    write_profile,
)
from parsim.execute.devices import usable_cores
from parsim.kernels import HOST_MODES

pytest.importorskip("torch", reason="the executor needs torch")
two_cores = pytest.mark.skipif(len(usable_cores()) < 2, reason="two ranks need two cores")

CORE_FLOPS_PER_S = 2.56e11
"""Two 512-bit fused multiply-adds a cycle in fp32 at 4 GHz."""


def workers() -> list[int]:
    """Calibration workers that this process started and that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status = (entry / "status").read_text()
            command = (entry / "cmdline").read_text()
        except OSError:
            continue
        if f"PPid:\t{os.getpid()}\n" in status and "calibrate.worker" in command:
            found.append(int(entry.name))
    return sorted(found)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Calibration]:
    seen: list[tuple[str, float]] = []
    yield calibrate(
        device="cpu", ranks=2, budget_s=2.0, progress=lambda what, share: seen.append((what, share))
    )
    assert seen
    assert all(0 <= share <= 1 for _, share in seen)
    assert workers() == []


@two_cores
def test_a_spent_budget_still_gives_every_essential_point(tiny: Calibration) -> None:
    essential = {p for p in points("cpu", 2, DTYPES["cpu"]) if p.level == ESSENTIAL}
    assert {row.point for row in tiny.timed} >= essential
    assert not tiny.complete
    assert all(row.seconds > 0 and row.repeats > 0 for row in tiny.timed)


@two_cores
def test_rates_are_physical(tiny: Calibration) -> None:
    device = tiny.cluster.device
    assert CORE_FLOPS_PER_S / 50 < device.peak_flops_per_s["fp32"] < 5 * CORE_FLOPS_PER_S
    assert 1e8 < device.memory_bandwidth_bytes_per_s < 1e12
    assert 1e-6 < tiny.cluster.intra_node.latency_s < 1
    large = gemm_s(tiny.cluster, 512, 2048, 512, dtype="fp32")
    small = gemm_s(tiny.cluster, 512, 256, 256, dtype="fp32")
    assert 2 < large / small < 128  # 16 times the work


@two_cores
def test_collectives_take_longer_with_more_bytes(tiny: Calibration) -> None:
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"):
        short, long = (
            collective_s(tiny.cluster, kind, size, Group(2, 2)) for size in (2.0**10, 2.0**24)
        )
        assert 0 < short < long


@two_cores
def test_profile_round_trip(tiny: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    write_profile(tiny.cluster, path)
    assert load_cluster(str(path)) == tiny.cluster
    first = path.read_bytes()
    write_profile(load_cluster(str(path)), path)
    assert path.read_bytes() == first
    for table in tiny.cluster.kernels.measured_gemm:
        assert table.source.startswith("measured by parsim calibrate on ")
        assert f"torch {tiny.torch_version}" in table.source
        assert table.date == tiny.date


@two_cores
def test_a_killed_rank_is_named_and_takes_no_other_with_it() -> None:
    victims: list[int] = []

    def kill_once(what: str, share: float) -> None:
        if not victims:
            victims.append(workers()[-1])
            os.kill(victims[0], signal.SIGKILL)

    with pytest.raises(ParsimError, match="a calibration rank died") as caught:
        calibrate(device="cpu", ranks=2, budget_s=30.0, progress=kill_once)
    assert caught.value.where == "rank 1"
    assert "killed by signal 9" in str(caught.value)
    assert workers() == []


@two_cores
def test_an_early_interrupt_goes_on_and_leaves_no_process() -> None:
    running: list[int] = []

    def interrupt(what: str, share: float) -> None:
        running.extend(workers())
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        calibrate(device="cpu", ranks=2, budget_s=300.0, progress=interrupt)
    assert len(running) == 2
    assert workers() == []
    assert time.monotonic() - start < 300


def test_a_late_interrupt_gives_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = points("cpu", 1, DTYPES["cpu"])
    essential = sum(point.level == ESSENTIAL for point in plan)

    def interrupted(configs: list[dict[str, object]]) -> Iterator[tuple[int, dict[str, object]]]:
        assert len(configs) == 1
        yield 0, {"facts": {}, "torch": "2.13.0"}
        for at in range(essential + 1):
            yield 0, {"point": at, "seconds": 1.23456e-3, "spread": 0.01, "repeats": 5, "disturbed": 0}
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_module, "listen", interrupted)
    found = calibrate(device="cpu", ranks=1)
    assert [row.point for row in found.timed] == list(plan[: essential + 1])
    assert found.timed[0].seconds == 1.235e-3
    assert not found.complete
    assert found.cluster.gpus_per_node == 1
    assert "one rank" in found.cluster.intra_node.source


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"device": "tpu"}, "device"),
        ({"ranks": 0}, "ranks"),
        ({"ranks": 10**6}, "ranks"),
        ({"budget_s": 0.0}, "budget_s"),
    ],
)
def test_impossible_arguments(changed: dict[str, object], where: str) -> None:
    arguments: dict[str, object] = {"device": "cpu", "ranks": 1, "budget_s": 1.0, **changed}
    with pytest.raises(ParsimError) as caught:
        calibrate(**arguments)  # type: ignore[arg-type]
    assert caught.value.where == where


def test_every_group_size_of_a_node_is_timed() -> None:
    sizes = {p.size[1] for p in points("cuda", 8, DTYPES["cuda"]) if p.family == "collective"}
    assert sizes == {2, 4, 8}
    assert not [p for p in points("cpu", 1, DTYPES["cpu"]) if p.family == "collective"]


def test_points_are_listed_once_and_by_need() -> None:
    for device, ranks in (("cpu", 1), ("cpu", 4), ("cuda", 8)):
        plan = points(device, ranks, DTYPES[device])
        assert len({p[1:] for p in plan}) == len(plan)
        assert [p.level for p in plan] == sorted(p.level for p in plan)


def test_toml_values_read_back() -> None:
    table = {"text": 'a "quoted" \\ name', "yes": True, "count": 3, "tiny": 1e-07, "list": (1, 2.5)}
    read = tomllib.loads(to_toml(table))
    assert read == {**table, "list": [1, 2.5]}


@pytest.mark.parametrize(("disturbed", "sizes"), [(0, [2**10, 2**18, 2**24]), (9, [2**10, 2**24])])
def test_only_a_disturbed_point_slower_than_a_larger_one_is_left_out(
    disturbed: int, sizes: list[int]
) -> None:
    def timed(point: Point) -> TimedPoint:
        slow = point.family == "collective" and point.size[0] == 2**18
        return TimedPoint(
            point=point, seconds=9.0 if slow else 1.0, spread=0.0, repeats=5,
            disturbed=disturbed if slow else 0,
        )  # fmt: skip

    plan = [point for point in points("cpu", 2, DTYPES["cpu"]) if point.level == ESSENTIAL]
    cluster = cluster_of(
        "cpu", 2, cpu_facts(2), [timed(point) for point in plan], torch_version="2", date="2026-01-01"
    )
    for table in cluster.kernels.measured_collective:
        assert [size for size, _ in table.points] == sizes


@pytest.mark.slow
def test_host_times_are_found_for_every_mode() -> None:
    """Which mode takes longer is for a quiet machine to say: here, that each was timed at all."""
    host = measure_host(1e-6, "here", "2026-11-21", cluster=load_cluster("local-cpu"))
    assert tuple(mode.mode for mode in host.modes) == HOST_MODES
    for mode in host.modes:
        assert 1e-5 < mode.layer_forward_s < 1
        assert 1e-5 < mode.layer_backward_s < 1
        assert 0 < mode.layer_step_s + mode.step_s < 1
    assert (host.layer_forward_s, host.layer_backward_s) == (
        host.modes[0].layer_forward_s,
        host.modes[0].layer_backward_s,
    )
    assert 0 < host.action_s < 1
    assert 0 <= host.wait_s < 1
