"""Reads so many mutants of one kind in a process of little memory, and says what came of it.

    python -m tests.fuzz.worker readers|commands KIND,KIND… COUNT SEED FOLDER

An answer or a ParsimError is right; anything else, more than a second of processor time (and another
for each megabyte), or more than a gigabyte, is a failure, whose file is kept in FOLDER.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from parsim.errors import ParsimError
from tests.fuzz.kinds import KINDS, Kind
from tests.fuzz.mutate import mutated, nudged

MOST_S_PER_BYTE = 1e-6
MOST_BYTES = 2**30


class TooLongError(BaseException):
    """A reader took more processor time than any file may."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLongError


def run(
    kinds: Mapping[str, Kind], kind_name: str, count: int, seed: int, folder: Path
) -> dict[str, Any]:
    """Counts of what happened, and one example of each kind of failure."""
    kind, rng = kinds[kind_name], random.Random(f"{kind_name} {seed}")
    seeds = kind.seeds()
    path = folder / f"{kind_name}{kind.suffix}"
    for data in seeds:  # imports, and proof that the seeds are valid
        path.write_bytes(data if not kind.format.endswith(".gz") else _packed(data))
        kind.read(path)
    signal.signal(signal.SIGPROF, _too_long)
    _limit_memory()
    counts = {"answered": 0, "refused": 0}
    failures: dict[str, dict[str, Any]] = {}
    slowest_s = 0.0
    for number in range(count):
        data = (nudged if kind.nudged else mutated)(kind.format, seeds, rng)
        path.write_bytes(data)
        began_s = _used_s()
        failure = None
        try:
            signal.setitimer(signal.ITIMER_PROF, kind.most_s + MOST_S_PER_BYTE * len(data))
            kind.read(path)
            counts["answered"] += 1
        except ParsimError as error:
            counts["refused"] += 1
            failure = _unclear(error)
        except (Exception, TooLongError) as error:
            failure = f"{type(error).__name__} {_place(error)}: {str(error)[:200]!r}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest_s = max(slowest_s, _used_s() - began_s)
        if failure is not None:
            key = failure.split(":")[0]
            if key not in failures:
                kept = folder / f"failed-{kind_name}-{seed}-{number}{kind.suffix}"
                kept.write_bytes(data)
                failures[key] = {"what": failure, "times": 0, "file": str(kept)}
            failures[key]["times"] += 1
    path.unlink()
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"kind": kind_name, "mutations": count, **counts, "failures": list(failures.values()),
            "slowest_s": round(slowest_s, 3), "peak_bytes": peak_bytes}  # fmt: skip


def _unclear(error: ParsimError) -> str | None:
    """What is wrong with a message, if anything: it must be short, and fit to be printed."""
    text = str(error)
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"message cannot be printed, {error.what[:60]}"
    if len(text) > 20_000:
        return f"message of {len(text)} characters, {error.what[:60]}"
    if any(not (c.isprintable() or c == "\n") for c in text):
        return f"message with control characters, {error.what[:60]!r}"
    return None


def _packed(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data)


def _used_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _limit_memory() -> None:
    """So much more than the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _place(error: BaseException) -> str:
    """The innermost line of parsim's own that an exception passed."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if "/parsim/" in f.filename]
    return f"{Path(own[-1].filename).name} line {own[-1].lineno}" if own else "outside parsim"


if __name__ == "__main__":
    what, names, count, seed, folder = sys.argv[1:]
    if what == "commands":
        from tests.fuzz.commands import COMMANDS as KINDS
    for name in names.split(","):
        found = run(KINDS, name, int(count), int(seed), Path(folder))
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
