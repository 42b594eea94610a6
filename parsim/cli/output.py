"""Printing answers: JSON documents, tables, and progress on stderr."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parsim import __version__
from parsim.cli.settings import with_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from parsim.simulate.prediction import Prediction


COMMAND_LINE: ContextVar[Sequence[str]] = ContextVar("COMMAND_LINE", default=())
"""The words of the command as it was typed, for those who want to repeat its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What an option adds to an answer; nothing where it was not given."""

    item: dict[str, Any] = field(default_factory=dict)
    """Fields of the JSON ITEM."""
    lines: list[str] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    """Files."""


def document(
    command: str, inputs: dict[str, Any], answer: dict[str, Any], *, seed: int = 0
) -> dict[str, Any]:
    """The JSON document of a command's answer."""
    from parsim.cli.input_files import input_files

    head = {"schema_version": 1, "version": __version__, "command": command, "seed": seed}
    if words := COMMAND_LINE.get():
        head["command_line"] = with_settings(words)
    given = {k: v for k, v in inputs.items() if v is not None}
    return head | {"inputs": given, "input_files": input_files(given, answer)} | answer


def print_json(data: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    from parsim.config import dump_json

    sys.stdout.write(dump_json(data))


def say(text: str) -> None:
    """A line for the reader on stderr, where answers do not go."""
    sys.stderr.write(text + "\n")


def print_lines(lines: Sequence[str]) -> None:
    """Lines of an answer on stdout."""
    sys.stdout.write("\n".join(lines) + "\n")


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Progress on stderr: what is done, how far, of how much. A live line on a terminal, else a line
    now and then.
    """
    if not sys.stderr.isatty():
        yield _quiet_progress()
        return
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    with Status("starting", console=Console(stderr=True)) as status:
        # As Text: names from files are in it, and rich would read [/x] in one as markup.
        yield lambda what, done, total: status.update(Text(_progress_text(what, done, total)))


def _progress_text(what: str, done: int, total: int) -> str:
    return f"{what}: {done}" + (f" of {total}" if total else "")


def _quiet_progress(every_s: float = 5.0) -> Callable[[str, int, int], None]:
    last_s = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= every_s:
            last_s = time.monotonic()
            say(_progress_text(what, done, total))

    return show


@contextmanager
def noticing_interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C raises KeyboardInterrupt as ever, and is remembered where a search takes it as its end."""
    hits: list[int] = []

    def handler(number: int, frame: Any) -> None:
        hits.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(hits)
    finally:
        signal.signal(signal.SIGINT, before)


def print_prediction(prediction: Prediction, more: Sequence[str] = ()) -> None:
    """One simulated step, for reading, and what options say `more` of it."""
    from parsim.units import format_bytes, format_duration

    p = prediction
    low, high = (format_duration(s) for s in p.interval_s)
    lines = [
        f"{p.job.model.name} on {p.plan.gpus} × {p.hardware}, {p.plan.short()}",
        f"  step time     {format_duration(p.step_time_s)}   (90% interval {low} to {high})",
        f"  throughput    {p.job.tokens / p.step_time_s / p.plan.gpus:,.0f} tokens/s/GPU, "
        f"{p.model_flops_per_s_per_gpu() / 1e12:.0f} model TFLOP/s/GPU, MFU {p.mfu:.1%}",
        f"  fits          {'yes' if p.fits else 'NO'}: fullest rank {format_bytes(p.memory.peak)} + "
        f"{format_bytes(p.context_bytes)} context of {format_bytes(p.device_memory_bytes)}",
    ]
    lines += [f"  weights       {text}" for text in p.stale_weights()]
    lines.append("  where the step goes (mean over ranks)")
    for key, seconds in p.breakdown_s.items():
        if seconds > 0:
            lines.append(f"    {key:<12}{format_duration(seconds):>10}  {seconds / p.step_time_s:6.1%}")
    lines.append("  memory of the fullest rank")
    for key, num_bytes in p.memory.to_data(p.context_bytes).items():
        if num_bytes > 0 and key != "peak":
            lines.append(f"    {key:<12}{format_bytes(num_bytes):>10}")
    print_lines([*lines, *more])
