"""A search that several processes share against the same search in one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from joblib.externals.loky import get_reusable_executor

from parsim.cost.stage import CostModel
from parsim.errors import NothingFits
from parsim.plan import Job
from parsim.search import search as search_module
from parsim.search.examine import Examiner
from parsim.search.search import SearchResult, search
from parsim.search.space import Constraints
from tests.builders import plain_stack, round_cluster, small_model

MODEL = small_model()
JOB = Job(model=MODEL, seq_len=256, global_batch=16)
EVERY_CP = Constraints(max_sizes={"cp": 8, "vpp": 4}, tp_overlap=(False, True))


@pytest.fixture(autouse=True)
def _every_space_is_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(search_module, "LARGE_SPACE", 0)
    yield
    get_reusable_executor().shutdown(wait=True)


def costs_of(memory_bytes: float) -> CostModel:
    cluster = round_cluster()
    cluster = replace(cluster, device=replace(cluster.device, memory_bytes=memory_bytes))
    # Reductions beside compute make the bounds loose: there is more to walk and to replay than the best.
    stack = plain_stack(dp_overlap=True, dp_bucket_parameters=1e6, layer_host_s=1e-4)
    return CostModel(MODEL, cluster, stack)


def outcome(result: SearchResult) -> tuple[object, ...]:
    """All of an answer but how long it took."""
    return result.space, result.plans, result.optimal, result.replayed


def test_two_processes_find_to_the_last_digit_what_one_finds() -> None:
    one, two = (
        search(JOB, 8, costs_of(150e6), constraints=EVERY_CP, top=20, processes=n) for n in (1, 2)
    )
    assert outcome(two) == outcome(one)
    assert repr(two.plans) == repr(one.plans)
    assert one.optimal
    assert len(one.space.rejected) > 3
    with pytest.raises(NothingFits) as alone:
        search(JOB, 8, costs_of(1e6), constraints=EVERY_CP, processes=1)
    with pytest.raises(NothingFits) as shared:
        search(JOB, 8, costs_of(1e6), constraints=EVERY_CP, processes=2)
    assert str(shared.value) == str(alone.value)


def test_an_interrupted_search_of_two_processes_gives_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def not_here(*args: object) -> None:
        raise AssertionError("the other processes examine, not this one")

    monkeypatch.setattr(Examiner, "examine", not_here)
    examined: list[tuple[int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "examining plans":
            examined.append((done, total))
        if (what, done) == ("replaying", 3):
            raise KeyboardInterrupt

    result = search(
        JOB, 8, costs_of(150e6), constraints=EVERY_CP, top=20, progress=progress, processes=2
    )
    assert not result.optimal
    assert [p.step_time_s for p in result.plans] == sorted(p.step_time_s for p in result.plans)
    assert len(result.plans) == result.replayed == 3
    done, total = zip(*examined, strict=True)
    assert set(total) == {done[-1]}  # with those that turn out to be the same as others
    assert done[-1] >= result.space.enumerated
    assert list(done) == sorted(set(done))
