"""The arithmetic of gradient compression, in one process."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from parsim.execute.training.compress import (  # noqa: E402
    INT8_BLOCK,
    GradientBucket,
    dequantised,
    largest,
    padded,
    quantised,
)
from parsim.execute.training.compress_check import ByHand  # noqa: E402
from parsim.plan import parse_compression  # noqa: E402


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bucket_of(flat: torch.Tensor, *shapes: tuple[int, ...]) -> GradientBucket:
    return GradientBucket(0, flat, [torch.Size(shape) for shape in shapes], last=True)


def test_a_bucket_shows_its_gradients_in_their_shapes_and_leaves_padding_out() -> None:
    flat = torch.arange(12.0)
    matrix, vector = bucket_of(flat, (2, 3), (4,)).gradients()
    assert matrix.tolist() == [[0, 1, 2], [3, 4, 5]]
    vector += 1
    assert flat.tolist()[6:] == [7, 8, 9, 10, 10, 11]


def test_int8_is_off_by_half_a_unit_of_its_block_at_most() -> None:
    flat = drawn(8 * INT8_BLOCK).to(torch.float32)
    flat[INT8_BLOCK : 2 * INT8_BLOCK] = 0  # a block of zeros has no scale of its own
    values, scales = quantised(flat)
    found = dequantised(values, scales)
    half = scales.repeat_interleave(INT8_BLOCK) / 2
    assert ((found - flat).abs() <= half * (1 + 1e-6)).all()
    assert values.abs().max() == 127
    assert padded(flat[:100], INT8_BLOCK).numel() == INT8_BLOCK


def test_the_largest_are_chosen_without_their_sign() -> None:
    flat = torch.tensor([0.1, -5.0, 3.0, 0.0, -0.2])
    assert sorted(largest(flat, 40).tolist()) == [1, 2]
    assert len(largest(flat, 1)) == 1


@pytest.mark.parametrize("text", ["topk-5", "powersgd-1", "powersgd-3"])
def test_what_a_step_leaves_out_comes_later(text: str) -> None:
    """Error feedback: all that went in has come out, but for one residual, whatever the compression."""
    by_hand = ByHand(parse_compression(text))
    flat = torch.zeros(64 * 48, dtype=torch.float64)
    bucket, sent, total = bucket_of(flat, (64, 48)), torch.zeros_like(flat), torch.zeros_like(flat)
    errors = []
    for step in range(60):
        gradients = drawn(2, flat.numel(), seed=step) + 3 * drawn(flat.numel(), seed=99)
        total += gradients.mean(0)
        sent += by_hand.mean(gradients, bucket)[0]
        errors.append(((sent - total).norm() / total.norm()).item())
    assert errors[-1] < 0.5 * errors[2]
    assert errors[0] > 0.2


def test_low_rank_descent_reaches_the_minimum_of_least_squares() -> None:
    """min ½‖A W − Y‖² by gradients of rank one, with two replicas that have half of the rows each."""
    a, w = torch.linalg.qr(drawn(64, 24)).Q, drawn(24, 16, seed=1)
    y, x = a @ w, torch.zeros(24, 16, dtype=torch.float64)
    by_hand = ByHand(parse_compression("powersgd-1"))
    bucket = bucket_of(torch.zeros(24 * 16, dtype=torch.float64), (24, 16))
    parts = list(zip(a.chunk(2), y.chunk(2), strict=True))
    for _ in range(600):
        halves = [(rows.T @ (rows @ x - want)).flatten() for rows, want in parts]
        x = x - 0.06 * by_hand.mean(torch.stack(halves), bucket)[0].view(24, 16)
    assert (x - w).abs().max() < 1e-3


def test_a_matrix_that_would_not_become_half_as_large_is_summed_whole() -> None:
    """torch's min_compression_rate of 2: (8 + 8)·3·2 numbers are more than 64."""
    gradients = drawn(2, 64)
    bucket = bucket_of(torch.zeros(64, dtype=torch.float64), (8, 8))
    found, _ = ByHand(parse_compression("powersgd-3")).mean(gradients, bucket)
    assert torch.equal(found, gradients.mean(0))
    low, _ = ByHand(parse_compression("powersgd-1")).mean(gradients, bucket)
    assert torch.linalg.matrix_rank(low.view(8, 8)) == 1
