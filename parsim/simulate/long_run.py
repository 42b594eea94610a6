"""A long run in words: how often something fails, how it checkpoints and restarts.

"50000h,checkpoint=30min,write=30s,spares=8" is read into Checkpointing and Failures; what nobody gave is
assumed, and said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from parsim.cost.checkpoint import Checkpointing, Failures, best_interval_s, checkpoint_bytes
from parsim.errors import ParsimError
from parsim.settings_text import parse_settings, positive
from parsim.simulate.prediction import Prediction
from parsim.stack import Stack
from parsim.units import parse_bandwidth, parse_count, parse_duration

STORAGE_BYTES_PER_S_PER_GPU = 2e12 / 24_576
"""Meta's cluster for Llama 3: 2 TB/s sustained for 24 thousand GPUs (arXiv 2407.21783, section 3.1)."""
DETECT_S = 600.0
"""Ten minutes to find and diagnose a failure: ByteDance's mean on over 10,000 GPUs is less (MegaScale,
arXiv 2402.15627)."""
REPAIR_S = 86_400.0
DURATION_S = 30 * 86_400.0
LONGEST_MTBF_S = 1e14
RUNS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRunRequest:
    """A long run, with the defaults filled in."""

    checkpointing: Checkpointing
    failures: Failures
    gpu_mtbf_s: float
    checkpoint_bytes: float
    write_s: float
    duration_s: float
    runs: int
    seed: int
    assumed: tuple[str, ...]
    """What stands for settings that nobody gave, in words."""


def read_long_run(text: str, prediction: Prediction, stack: Stack, seed: int) -> LongRunRequest:
    """The long run that `text` describes, for a predicted step.

    Raises ParsimError for settings that are unknown, cannot be read, or contradict each other.
    """
    name, given = _settings(text)
    gpus = prediction.plan.gpus
    mtbf_s = _job_mtbf_s(name, gpus)
    num_bytes = checkpoint_bytes(prediction.job, prediction.plan, stack)
    transfer_s = num_bytes / given.get("storage", STORAGE_BYTES_PER_S_PER_GPU * gpus)
    write_s = given.get("write", transfer_s)
    blocking_s = given.get("blocking", 1.0) * write_s
    least_s = max(prediction.step_time_s, write_s - blocking_s)
    best_s = max(best_interval_s(blocking_s, mtbf_s), least_s)
    detect_s, start_s = given.get("detect", DETECT_S), given.get("restart", 0.0)
    return LongRunRequest(
        checkpointing=Checkpointing(
            interval_s=given.get("checkpoint", best_s),
            blocking_s=blocking_s,
            background_s=write_s - blocking_s,
        ),
        failures=Failures(
            mtbf_s=mtbf_s,
            restart_s=detect_s + start_s + given.get("load", transfer_s),
            spares=given.get("spares"),
            repair_s=given.get("repair", REPAIR_S),
        ),
        gpu_mtbf_s=mtbf_s * gpus,
        checkpoint_bytes=num_bytes,
        write_s=write_s,
        duration_s=given.get("duration", DURATION_S),
        runs=given.get("runs", RUNS),
        seed=seed,
        assumed=_assumed(given),
    )


def _assumed(given: dict[str, Any]) -> tuple[str, ...]:
    """In words, what stands for the settings that nobody gave."""
    words = {
        "detect": "10 min to detect and diagnose a failure",
        "spares": "always a spare node",
        "checkpoint": "checkpoints at the best interval",
        "duration": "a run of 30 days",
    }
    missing = [text for key, text in words.items() if key not in given]
    if "storage" not in given and not {"write", "load"} <= given.keys():
        missing.append("storage as fast, by GPUs, as of Llama 3's cluster")
    if "spares" in given and "repair" not in given:
        missing.append("a day to repair a node")
    return tuple(missing)


def _settings(text: str) -> tuple[str, dict[str, Any]]:
    durations = ("write", "detect", "restart", "load", "repair")
    readers = {key: positive(parse_duration, or_zero=True) for key in durations} | {
        "checkpoint": positive(parse_duration),
        "duration": positive(parse_duration),
        "storage": positive(parse_bandwidth),
        "blocking": _share,
        "spares": positive(parse_count, or_zero=True),
        "runs": positive(parse_count),
    }
    name, given = parse_settings(text, readers, where="--mtbf", named=True)
    if "repair" in given and "spares" not in given:
        raise ParsimError(
            "a repair only matters where spares are counted", where="--mtbf", hint="add spares=N"
        )
    if "storage" in given and "write" in given and "load" in given:
        raise ParsimError("write and load leave nothing for storage to say", where="--mtbf: storage")
    return name, given


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise ParsimError("this is a share of the write", got=text, expected="0 to 1")
    return share


def _job_mtbf_s(text: str, gpus: int) -> float:
    """Mean time between failures of the job: "50000h" of a GPU, or "419/54days" of the job itself."""
    count, slash, time = text.rpartition("/")
    try:
        seconds = parse_duration(time) / (parse_count(count) if slash else gpus)
    except ParsimError as error:
        raise error.at("--mtbf") from None
    except ZeroDivisionError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_MTBF_S:
        raise ParsimError(
            "failures come after some time, but not after millions of years",
            where="--mtbf",
            got=text,
            expected="50000h or 419/54days",
        )
    return seconds
