"""Plan files: an ITEM of `parsim plan --json` (or of `simulate --json`) read back into nouns.

A plan file holds model, hardware, stack, job and plan, so that it can be simulated and run elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from parsim.config import is_file, read_json, validate
from parsim.errors import ParsimError
from parsim.model import ModelSpec
from parsim.plan import STAGE_LISTS, Job, ParallelPlan, parse_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFile:
    """What a plan file or a short form says; None where it leaves something to the command's flags."""

    plan: ParallelPlan
    job: Job | None = None
    hardware: str | None = None
    hardware_overrides: Mapping[str, str] = field(default_factory=dict)
    """What the user knew better than the profile, by flag: inter_node, intra_node, memory."""
    stack: str | None = None
    rank_hardware: tuple[str, ...] = ()
    """Other devices of some pipeline ranks, such as "4-7=a100-sxm-80gb"."""
    auto: tuple[str, ...] = ()
    """Fields of the plan with a number a stage that are to be chosen: those given as "auto"."""


def read_plan(text: str) -> PlanFile:
    """A plan from a JSON file, or from the short form "dp=2,tp=4,pp=2", where stage_split=auto and
    recompute_layers=auto leave the choice to parsim.

    Raises ParsimError for a missing or truncated file, unknown keys and values of the wrong type.
    """
    path = Path(text)
    if "=" in text and not is_file(path):
        return _short_form(text)
    if not is_file(path):
        raise ParsimError(
            "no such plan file",
            where=text,
            hint="a plan is a JSON file, or key=value pairs such as dp=2,tp=4,pp=2,micro_batch=1",
        )
    return plan_from_data(read_json(path), where=text)


def _short_form(text: str) -> PlanFile:
    """A short form, in which stage_split and recompute_layers may be "auto"."""
    parts = [part.strip() for part in text.split(",")]
    asked = {part: key for key in STAGE_LISTS for part in parts if _is_auto(part, key)}
    plan = parse_plan(",".join(part for part in parts if part not in asked))
    for key in asked.values():
        if parts.count(f"{key}=auto") > 1 or getattr(plan, key):
            raise ParsimError(f"field {key!r} is given twice", where=text)
    auto = tuple(dict.fromkeys(asked.values()))
    if "recompute_layers" in auto and plan.recompute == "none":
        raise ParsimError(
            "recompute_layers=auto needs a way to recompute them",
            where=text,
            expected="recompute=full or recompute=selective beside it",
        )
    return PlanFile(plan=plan, auto=auto)


def _is_auto(part: str, key: str) -> bool:
    name, _, value = part.partition("=")
    return name.strip() == key and value.strip().lower() == "auto"


def plan_from_data(data: Any, *, where: str) -> PlanFile:
    """A plan from the parsed JSON of an ITEM; of a whole `plan --json` document, its best plan."""
    if isinstance(data, Mapping) and isinstance(data.get("plans"), list):
        if not data["plans"]:
            raise ParsimError("this document holds no plan", where=f"{where}: plans")
        data, where = data["plans"][0], f"{where}: plans[0]"
    if not isinstance(data, Mapping) or not isinstance(data.get("plan"), Mapping):
        raise ParsimError(
            "this is no plan file",
            where=where,
            expected='an object with a "plan", as `parsim plan --json` writes',
            hint=_of_another_command(data),
        )
    plan = validate(ParallelPlan, data["plan"], where=f"{where}: plan")
    job = None
    if "job" in data or "model" in data:
        job = _job(data, where)
    for key in ("hardware", "stack"):
        if not isinstance(data.get(key), str | None):
            raise ParsimError(f"{key} is a name or a path", where=f"{where}: {key}", got=data[key])
    return PlanFile(
        plan=plan,
        job=job,
        hardware=data.get("hardware"),
        hardware_overrides=_overrides(data, where),
        stack=data.get("stack"),
        rank_hardware=_rank_hardware(data, where),
    )


def _of_another_command(data: Any) -> str | None:
    """What to do with the document of a command that answers with no plan, or with many."""
    command = data.get("command") if isinstance(data, Mapping) else None
    if not isinstance(command, str):
        return None
    rows = data.get("rows")
    if isinstance(rows, list) and any(isinstance(row, Mapping) and "plan" in row for row in rows):
        return f"this is what `parsim {command}` wrote; each of its rows is a plan file: `jq .rows[0]`"
    return f"this is what `parsim {command}` wrote; `plan --json` and `simulate --json` hold plans"


def _overrides(data: Mapping[str, Any], where: str) -> Mapping[str, str]:
    overrides = data.get("hardware_overrides", {})
    known = ("inter_node", "intra_node", "memory")
    if not isinstance(overrides, Mapping):
        raise ParsimError("this is a table", where=f"{where}: hardware_overrides", got=overrides)
    for key, value in overrides.items():
        if key not in known or not isinstance(value, str):
            raise ParsimError(
                "unknown override of the hardware",
                where=f"{where}: hardware_overrides.{key}",
                got=value,
                expected=f"{', '.join(known)}, as text with a unit",
            )
    return dict(overrides)


def _rank_hardware(data: Mapping[str, Any], where: str) -> tuple[str, ...]:
    texts = data.get("rank_hardware", [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ParsimError(
            "these are texts",
            where=f"{where}: rank_hardware",
            got=texts,
            expected='a list such as ["4-7=a100-sxm-80gb"]',
        )
    return tuple(texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _JobTable:
    """The `job` table of a plan file; the model stands beside it."""

    seq_len: int
    global_batch: int
    precision: str = "bf16"
    optimizer: Literal["adamw", "sgd"] = "adamw"


def _job(data: Mapping[str, Any], where: str) -> Job:
    for key in ("job", "model"):
        if not isinstance(data.get(key), Mapping):
            raise ParsimError(f"the plan file lacks its {key}", where=f"{where}: {key}")
    model = validate(ModelSpec, data["model"], where=f"{where}: model")
    table = validate(_JobTable, data["job"], where=f"{where}: job")
    return Job(model=model, **asdict(table))
