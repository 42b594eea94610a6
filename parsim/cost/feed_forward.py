"""Norms, linear layers, tensor-parallel entry and exit, and the dense feed-forward, as operations.

Letters as in the papers: s sequence, b micro-batch, h hidden, a heads, t = tp, c = cp, f = ffn_hidden,
T = b·s/c tokens of a rank, e bytes of an activation. Shapes are those of one tensor-parallel
rank (Shoeybi et al. 2019, arXiv 1909.08053), transfers those of sequence parallelism where it is on
(Korthikanti et al. 2022, arXiv 2205.05198).
"""

from __future__ import annotations

import math

from parsim.cost.cell import Cell
from parsim.cost.operation import Beside, Elementwise, Gemm, Operation, Pass, Transfer
from parsim.hardware import DTYPE_BYTES
from parsim.model import ModelSpec
from parsim.stack import Stack


def norm(name: str, values: int, model: ModelSpec, cell: Cell, stack: Stack) -> Elementwise:
    """A norm of `values` values on this rank."""
    size = values * cell.activation_bytes
    # Forward reads x and writes y; backward reads dy and x and writes dx. PyTorch has a kernel for the
    # layernorm; its rmsnorm was single operations until 2.8, of 16-bit and fp32 tensors: a cast, a
    # square, a mean, a product with its root, a cast, a product with the weights, and all of them back.
    one_kernel = stack.fused_elementwise or model.norm == "layernorm"
    passes = (2, 3) if one_kernel else (18, 36)
    return Elementwise(
        name=name,
        forward_bytes=passes[0] * size,
        backward_bytes=passes[1] * size,
        saved_bytes=size,
    )


def residual(name: str, model: ModelSpec, cell: Cell, stack: Stack) -> Elementwise:
    """x + dropout(y + bias): reads two tensors and writes one; dropout also writes its mask."""
    elements = cell.local_tokens * model.hidden
    size = elements * cell.activation_bytes
    mask = elements if stack.dropout else 0
    separate = 0 if stack.fused_elementwise else 2 * size * (stack.dropout + model.linear_bias)
    return Elementwise(
        name=name,
        forward_bytes=3 * size + mask + separate,
        backward_bytes=(2 if stack.dropout else 1) * size + mask + separate,
        saved_bytes=mask,
    )


def enter_tensor_parallel(
    name: str, model: ModelSpec, cell: Cell, stack: Stack, *, fp8: bool = True
) -> tuple[Operation, ...]:
    """Before a column-parallel GEMM: gather the sequence; its backward scatters the gradient.

    Without sequence parallelism the forward has nothing to do and the backward sums the gradient. What
    a narrow GEMM reads is gathered in its dtype; `fp8`: whether this one is narrow where the job is.
    """
    if cell.tp == 1:
        return ()
    size = cell.tokens * model.hidden * cell.activation_bytes
    sent = size * _narrowed(cell, stack) if fp8 else size
    summed: Beside | None = "next weight_grad" if stack.tp_async_backward else None
    gradient = f"{name} input gradient"
    if not cell.sequence_parallel:
        return (tensor_parallel(gradient, "all_reduce", size, "backward", summed),)
    gathered: Beside | None = "next forward" if cell.tp_overlap else None
    transfers: tuple[Operation, ...] = (
        tensor_parallel(f"{name} input", "all_gather", sent, "forward", gathered),
        tensor_parallel(gradient, "reduce_scatter", size, "backward", summed),
        *_copies(f"{name} input", size, stack),
    )
    if not stack.tp_async_backward:
        return transfers
    again = tensor_parallel(f"{name} input", "all_gather", sent, "backward", "next input_grad")
    return (*transfers, again)


def leave_tensor_parallel(
    name: str, model: ModelSpec, cell: Cell, stack: Stack
) -> tuple[Operation, ...]:
    """After a row-parallel GEMM: the mirror image of enter_tensor_parallel."""
    if cell.tp == 1:
        return ()
    size = cell.tokens * model.hidden * cell.activation_bytes
    if not cell.sequence_parallel:
        return (tensor_parallel(f"{name} output", "all_reduce", size, "forward"),)
    forward: Beside | None = "previous forward" if cell.tp_overlap else None
    backward: Beside | None = "previous input_grad" if cell.tp_overlap else None
    return (
        tensor_parallel(f"{name} output", "reduce_scatter", size, "forward", forward),
        tensor_parallel(
            f"{name} output gradient", "all_gather", size * _narrowed(cell, stack), "backward", backward
        ),
        *_copies(f"{name} output", size, stack),
    )


def _copies(name: str, size: float, stack: Stack) -> tuple[Elementwise, ...]:
    """What a gathered or scattered sequence is copied, each way, where its collectives cannot cut it."""
    if not stack.sequence_copies:
        return ()
    copied = Elementwise(name=f"{name} copied", forward_bytes=2 * size, backward_bytes=2 * size)
    return (copied,)


def tensor_parallel(
    name: str, kind: str, num_bytes: float, when: Pass, beside: Beside | None = None
) -> Transfer:
    return Transfer(name=name, stream="tp", kind=kind, num_bytes=num_bytes, when=when, beside=beside)


def _narrowed(cell: Cell, stack: Stack) -> float:
    """Bytes of a gathered operand over those of an activation; rows are scaled after the gather."""
    if not cell.low_precision or (cell.precision == "fp8" and stack.fp8_scaling == "row"):
        return 1.0
    return DTYPE_BYTES[cell.precision] / cell.activation_bytes


def linear(
    name: str,
    m: int,
    n: int,
    k: int,
    cell: Cell,
    stack: Stack,
    *,
    saved_bytes: float,
    columns: tuple[int, ...] = (),
    after_norm: bool = False,
    before_residual: bool = False,
) -> tuple[Operation, ...]:
    """A linear layer: its GEMM, and where that is narrow the casts of its operands.

    `after_norm`: X is a norm's output; `before_residual`: dY is that of a residual. Under sequence
    parallelism both have the rows of this rank alone, and are gathered narrow.
    """
    if not cell.low_precision:
        return (Gemm(name=name, m=m, n=n, k=k, columns=columns, saved_bytes=saved_bytes),)
    if cell.precision == "fp8" and stack.fp8_keeps_wide:
        again = _dynamic_cast(name, m, n, k, stack)
        wide = Gemm(
            name=name, m=m, n=n, k=k, columns=columns, low_precision=True, saved_bytes=saved_bytes
        )
        return again, wide
    cast = Elementwise(
        name=f"{name} cast",
        forward_bytes=m * k * _cast_bytes(cell, stack, local=after_norm, normed=after_norm),
        backward_bytes=m * n * _cast_bytes(cell, stack, local=before_residual),
    )
    kept = saved_bytes * DTYPE_BYTES[cell.precision] / cell.activation_bytes
    gemm = Gemm(name=name, m=m, n=n, k=k, columns=columns, low_precision=True, saved_bytes=kept)
    return cast, gemm


def _cast_bytes(cell: Cell, stack: Stack, *, local: bool, normed: bool = False) -> float:
    """Memory traffic of casting one value to the narrow dtype, over the rows that the GEMM reads.

    A cast reads a value and writes it narrow, once as it is and once transposed for the weight gradient.
    What is `local` to a rank and gathered in fp8 is transposed after; scales of blocks (mxfp8, nvfp4)
    need both copies made before. A scale of the tensor's own values takes one more pass to find, as does
    nvfp4's, whose transposed copy is rotated in a pass of its own (NVIDIA, "Pretraining Large Language
    Models with NVFP4", arXiv 2509.25149); with a scale from earlier passes a norm writes fp8 itself.
    Source of the rest: Transformer Engine's recipes.
    """
    narrow, wide = DTYPE_BYTES[cell.precision], cell.activation_bytes
    share = 1 / cell.tp if local and cell.sequence_parallel else 1.0
    if cell.precision != "fp8":
        passes = 3 if cell.precision == "nvfp4" else 1
        return share * (passes * wide + 2 * narrow)
    if normed and stack.fp8_scaling == "delayed":
        return 2 * narrow
    read = wide if stack.fp8_scaling == "delayed" else 2 * wide
    return share * (read + narrow) + 2 * narrow if share < 1 else read + 2 * narrow


def _dynamic_cast(name: str, m: int, n: int, k: int, stack: Stack) -> Elementwise:
    """Casts to fp8 by maxima found just before, where X is kept in 16 bits (torchao's Float8Linear).

    A cast reads a value for its maximum, reads it again and writes it: 5 bytes. The forward casts X; the
    backward casts X again and dY. By tensor it also transposes both, 2 bytes a value, as fp8 products
    want k innermost; by row dY is cast along rows for dX and along columns for dW.
    """
    cast, transpose = 5.0, 2.0
    if stack.fp8_scaling == "row":
        backward_bytes = m * k * cast + m * n * 2 * cast
    else:
        backward_bytes = (m * k + m * n) * (cast + transpose)
    return Elementwise(name=f"{name} cast", forward_bytes=m * k * cast, backward_bytes=backward_bytes)


def mlp_operations(model: ModelSpec, ffn_hidden: int, cell: Cell, stack: Stack) -> tuple[Operation, ...]:
    """A dense feed-forward, sharded over tp by columns then rows."""
    h, e, T = model.hidden, cell.activation_bytes, cell.tokens
    f = math.ceil(ffn_hidden / cell.tp)
    columns = (f, f) if model.gated_mlp else (f,)
    x = cell.local_tokens * h * e
    return (
        *enter_tensor_parallel("feed-forward", model, cell, stack),
        *linear("fc1", T, sum(columns), h, cell, stack, saved_bytes=x, columns=columns, after_norm=True),
        activation(T, f, model, cell, stack),
        *linear("fc2", T, h, f, cell, stack, saved_bytes=T * f * e, before_residual=True),
        *leave_tensor_parallel("feed-forward", model, cell, stack),
    )


def activation(tokens: int, f: int, model: ModelSpec, cell: Cell, stack: Stack) -> Elementwise:
    """GELU(x + bias) or SiLU(x)·y: fused, each tensor is read or written once; GELU(x) is one kernel."""
    size = tokens * f * cell.activation_bytes
    inputs = 2 if model.gated_mlp else 1
    forward, backward = inputs + 1, 2 * inputs + 1
    extra = 0 if stack.fused_elementwise or not (model.gated_mlp or model.linear_bias) else 2
    unfused_saved = size if model.gated_mlp and not stack.fused_elementwise else 0
    return Elementwise(
        name="activation",
        forward_bytes=(forward + extra) * size,
        backward_bytes=(backward + extra) * size,
        saved_bytes=inputs * size + unfused_saved,
    )
