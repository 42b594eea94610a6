"""Starting the ranks of a calibration, listening to them, and leaving none behind.

Each rank is its own process (a fresh interpreter: nothing is inherited but the environment). Standard
library only.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from parsim.errors import ParsimError

SILENCE_S = 120.0
"""A rank that says nothing for so long hangs: importing torch and the longest point take far less."""
GRACE_S = 2.0


Line = tuple[int, dict[str, Any] | None]
"""Rank, and what it reported; None when it has closed its output."""


def listen(configs: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run one worker a config (its rank) and give what they report, as it comes.

    Ends when all have ended well. Raises ParsimError when one dies or falls silent. However it is left,
    no worker outlives it.
    """
    with _running(configs) as (workers, errors):
        lines: queue.Queue[Line] = queue.Queue()
        for rank, worker in enumerate(workers):
            threading.Thread(target=_read, args=(rank, worker, lines), daemon=True).start()
        running = set(range(len(workers)))
        while running:
            try:
                rank, line = lines.get(timeout=SILENCE_S)
            except queue.Empty:
                raise ParsimError(
                    "a calibration rank hangs",
                    where=f"rank {', '.join(map(str, sorted(running)))}",
                    got=f"nothing for {SILENCE_S:.0f} s",
                ) from None
            if line is not None:
                yield rank, line
                continue
            running.remove(rank)
            if workers[rank].wait() != 0:
                raise _death(rank, workers, errors)


@contextmanager
def _running(
    configs: list[dict[str, Any]],
) -> Iterator[tuple[list[subprocess.Popen[str]], list[IO[str]]]]:
    """The started workers and the files that hold their standard error."""
    address = _free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with ExitStack() as stack:
        errors: list[IO[str]] = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in configs]
        workers: list[subprocess.Popen[str]] = []
        stack.callback(_end, workers)
        for rank, (config, error) in enumerate(zip(configs, errors, strict=True)):
            text = json.dumps({**config, "rank": rank, "ranks": len(configs), "port": address})
            workers.append(
                subprocess.Popen(  # noqa: S603
                    [sys.executable, "-m", "parsim.execute.calibrate.worker", text],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=error,
                    env=environment,
                    text=True,
                    start_new_session=True,  # Ctrl-C reaches the parent alone, which ends them in order
                )
            )
        yield workers, errors


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _read(rank: int, worker: subprocess.Popen[str], lines: queue.Queue[Line]) -> None:
    assert worker.stdout is not None
    with worker.stdout as reports:
        for text in reports:
            if text.endswith("\n"):  # a rank that was killed may leave half a line
                lines.put((rank, json.loads(text)))
    lines.put((rank, None))


def _death(noticed: int, workers: list[subprocess.Popen[str]], errors: list[IO[str]]) -> ParsimError:
    """The error for a rank that ended badly; a killed one is named before the peers it took along."""
    killed = [rank for rank, worker in enumerate(workers) if (worker.poll() or 0) < 0]
    rank = killed[0] if killed else noticed
    status = workers[rank].returncode
    errors[rank].seek(0)
    said = errors[rank].read().strip().splitlines()
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return ParsimError(
        "a calibration rank died",
        where=f"rank {rank}",
        got=how + (f": {said[-1]}" if said else ""),
        hint="its peers were ended; run it again, or with fewer ranks",
    )


def _end(workers: list[subprocess.Popen[str]]) -> None:
    """End the workers that still run, and reap all."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    for worker in workers:
        try:
            worker.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        assert worker.stdin is not None
        worker.stdin.close()
