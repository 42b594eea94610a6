"""Loss scaling: what is left out, when the scale changes, and that all ranks agree."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from parsim.execute.training import loss_scale  # noqa: E402
from parsim.execute.training.loss_scale import GROWTH_INTERVAL, LossScale, take_step  # noqa: E402


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the other ranks add to a sum: whether one of them has overflown."""
    said = [0.0]
    monkeypatch.setattr(loss_scale.dist, "all_reduce", lambda tensor: tensor.add_(said[0]))
    return said


def made(gradient: float) -> tuple[LossScale, torch.optim.Optimizer, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([1.0, gradient, 2.0])
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    return LossScale(8.0, torch.device("cpu")), optimizer, parameter


def test_gradients_are_divided_by_the_scale(others: list[float]) -> None:
    scale, optimizer, parameter = made(16.0)
    take_step(optimizer, scale)
    assert parameter.tolist() == [1 - 0.5 / 8, 1 - 0.5 * 2, 1 - 0.5 / 4]
    assert (scale.value, scale.skipped_steps) == (8.0, 0)


@pytest.mark.parametrize("gradient", [math.inf, -math.inf, math.nan])
def test_a_step_with_a_gradient_that_is_not_finite_is_left_out(
    others: list[float], gradient: float
) -> None:
    scale, optimizer, parameter = made(gradient)
    take_step(optimizer, scale)
    assert parameter.tolist() == [1.0] * 3
    assert (scale.value, scale.skipped_steps) == (4.0, 1)


def test_a_rank_leaves_out_what_another_must(others: list[float]) -> None:
    others[0] = 1.0
    scale, optimizer, parameter = made(1.0)
    take_step(optimizer, scale)
    assert parameter.tolist() == [1.0] * 3
    assert scale.value == 4.0


def test_the_scale_doubles_after_many_steps_in_a_row_and_survives_a_checkpoint(
    others: list[float],
) -> None:
    scale, optimizer, _ = made(0.0)
    for _ in range(GROWTH_INTERVAL - 1):
        take_step(optimizer, scale)
    assert scale.value == 8.0
    again = LossScale(1.0, torch.device("cpu"))
    again.load(scale.states())
    for each in (scale, again):
        take_step(optimizer, each)
        assert each.value == 16.0


def test_without_a_scale_nothing_is_checked() -> None:
    _, optimizer, parameter = made(math.inf)
    take_step(optimizer, None)
    assert math.isinf(parameter[1].item())
