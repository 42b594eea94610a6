"""One rank: `python -m parsim.execute.launch.worker FOLDER`, started by torchrun.

It reads request.json in the folder, runs every case in it and leaves rank-N.json there, or error-N.json.
Torch, the standard library and parsim's stdlib-only modules are all it imports.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from parsim.errors import ParsimError
from parsim.execute.launch.heartbeat import Heartbeats, die_with_parent


def main() -> None:
    die_with_parent()
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    heartbeats = Heartbeats(folder / "heartbeats", int(os.environ["WORLD_SIZE"]))
    heartbeats.write(rank, -1, "importing torch")
    try:
        from parsim.execute.launch.rank import run_rank

        request = json.loads((folder / "request.json").read_text())
        with (folder / "progress.jsonl").open("a") as progress:
            results = run_rank(request, folder, heartbeats, progress)
    except BaseException as error:  # whatever it is, the parent reports it
        _leave(folder / f"error-{rank}.json", _described(error, heartbeats.read(rank).doing))
        sys.stderr.flush()
        os._exit(1)  # without waiting for communication that will never end
    for each, found in results.items():
        _leave(folder / f"rank-{each}.json", {"results": found})
    heartbeats.write(rank, -1, "done")


def _described(error: BaseException, doing: str) -> dict[str, Any]:
    described: dict[str, Any] = {
        "type": type(error).__name__,
        "message": str(error),
        "doing": doing,
        "time_ns": time.perf_counter_ns(),
        "traceback": traceback.format_exc(),
    }
    if isinstance(error, ParsimError):
        described["parsim"] = {
            "what": error.what,
            "where": error.where,
            "got": None if error.got is None else str(error.got),
            "expected": error.expected,
            "hint": error.hint,
        }
    return described


def _leave(path: Path, document: dict[str, Any]) -> None:
    """Write a whole file or nothing."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(document))
    unfinished.replace(path)


if __name__ == "__main__":
    main()
