"""What is not a number is never called equal, wherever it comes up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsim.errors import NothingFits
from parsim.execute.launch.cases import verification_case
from parsim.execute.launch.heartbeat import Heartbeats
from parsim.execute.measurement import TOLERANCE, Verification, verification_of, worst
from parsim.model import ModelSpec
from parsim.plan import Job, ParallelPlan
from parsim.schedule import make_schedule

torch = pytest.importorskip("torch")

NAN = math.nan
SMALL = ModelSpec(
    name="small", layers=2, hidden=8, heads=2, kv_heads=2, ffn_hidden=8, gated_mlp=True, vocab=16,
    max_seq_len=8,
)  # fmt: skip


@given(st.lists(st.floats(min_value=0), max_size=5), st.lists(st.floats(min_value=0), max_size=5))
def test_the_worst_error_is_the_one_that_is_no_number(before: list[float], after: list[float]) -> None:
    named = [(error, str(i)) for i, error in enumerate([*before, NAN, *after])]
    error, name = worst(named)
    assert math.isnan(error)
    assert name == str(len(before))
    numbers = [found for found in named if found[1] != name]
    if numbers:
        assert worst(numbers)[0] == max(before + after)


@pytest.mark.parametrize("gradient", [0.0, NAN])
@pytest.mark.parametrize("loss", [0.0, NAN])
def test_equal_means_two_numbers_within_the_tolerance(gradient: float, loss: float) -> None:
    found = Verification(
        max_gradient_error=gradient, parameter="w", max_loss_error=loss, steps=1, against="one process"
    )
    assert found.equal == (gradient == loss == 0.0)


def left(gradient: float, loss: float) -> dict[str, Any]:
    """What a rank leaves."""
    return {
        "max_gradient_error": gradient, "parameter": f"w{gradient}", "max_loss_error": loss, "steps": 3,
        "against": "one process",
    }  # fmt: skip


def test_one_rank_of_many_suffices() -> None:
    fine = left(1e-16, 0.0)
    assert verification_of([fine, left(1e-15, 1e-14), fine]).parameter == "w1e-15"
    for bad in (left(NAN, 0.0), left(1e-16, NAN), left(math.inf, 0.0)):
        with pytest.raises(NothingFits, match="no longer finite"):
            verification_of([fine, bad, fine])


@pytest.fixture
def control() -> Iterator[Any]:
    """The group of one rank that is all there is."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_gradient_amid_the_others_in_the_last_step(control: Any, tmp_path: Path) -> None:
    """One element of one parameter, neither the first nor the last to be compared."""
    from parsim.execute.training.checking import verify_case
    from parsim.execute.training.recorder import Recorder
    from parsim.execute.training.trainer import Trainer

    plan = ParallelPlan()
    job = Job(model=SMALL, seq_len=8, global_batch=2)
    case = verification_case(job, plan, make_schedule(plan, 2), steps=3)
    heartbeats = Heartbeats(tmp_path / "heartbeats", 1)
    errors = []
    for spoilt in (False, True):
        trainer = Trainer(
            case, torch.device("cpu"), Recorder(0, heartbeats, torch.device("cpu")), control
        )
        true, calls = trainer.data_parallel.gradients, []

        def gradients(true: Any = true, calls: Any = calls, spoilt: bool = spoilt) -> Iterator[Any]:
            calls.append(1)
            for name, gradient in true():
                if spoilt and len(calls) == case.steps and name == "layers.1.attention.key.weight":
                    gradient[0, 0] = NAN
                yield name, gradient

        trainer.data_parallel.gradients = gradients  # type: ignore[method-assign]
        errors.append(verify_case(case, trainer))
    heartbeats.close()
    assert errors[0]["max_gradient_error"] <= TOLERANCE
    assert math.isnan(errors[1]["max_gradient_error"])
    assert errors[1]["parameter"] == "layers.1.attention.key.weight"
