"""What makes a prediction's interval wider."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from parsim.config import load_cluster, load_model, load_stack
from parsim.cost.interval import WIDTHS, interval_s, leans_on, log_half_width
from parsim.kernels import Kernels
from parsim.plan import Job

STACK = replace(load_stack("nemo"), relative_error=0.1, fitted_parameters=200e9)
H100 = load_cluster("h100-sxm-80gb")


def job(model: str = "llama-3.1-8b", precision: str = "bf16") -> Job:
    return Job(model=load_model(model), seq_len=4096, global_batch=8, precision=precision)


def test_a_dense_model_in_16_bits_has_the_stacks_own_width() -> None:
    assert leans_on(job(), H100, STACK) == ()
    assert log_half_width(job(), H100, STACK) == STACK.relative_error
    assert interval_s(2.0, job(), H100, STACK) == pytest.approx(
        (2.0 * math.exp(-0.1), 2.0 * math.exp(0.1))
    )


def test_a_profile_of_data_sheets_alone_is_not_measured() -> None:
    bare = replace(H100, kernels=Kernels())
    assert leans_on(job(), bare, STACK) == ("device without kernel measurements",)


@pytest.mark.parametrize(
    ("changed", "hardware", "name"),
    [
        (job("mixtral-8x7b"), "h100-sxm-80gb", "experts"),
        (job(precision="fp8"), "h100-sxm-80gb", "narrow precision"),
        (job(), "gb300-nvl72", "device without kernel measurements"),
        (job("llama-3.1-405b"), "h100-sxm-80gb", "larger model than any fitted"),
    ],
)
def test_each_thing_unfitted_has_a_name_and_a_width(changed: Job, hardware: str, name: str) -> None:
    cluster = load_cluster(hardware)
    assert leans_on(changed, cluster, STACK) == (name,)
    assert log_half_width(changed, cluster, STACK) == pytest.approx(math.hypot(0.1, WIDTHS[name]))


def test_widths_add_in_quadrature() -> None:
    """Independent errors of a log: their squares add."""
    both = log_half_width(job("mixtral-8x7b", "fp8"), H100, STACK)
    assert both**2 == pytest.approx(0.1**2 + WIDTHS["experts"] ** 2 + WIDTHS["narrow precision"] ** 2)


def test_a_stack_that_nothing_was_fitted_for_knows_no_larger_model() -> None:
    stack = replace(STACK, fitted_parameters=0.0)
    assert leans_on(job("llama-3.1-405b"), H100, stack) == ()
