"""The flags that fix or bound the plans of a search: one set for every command that searches."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.completion import complete_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from parsim.search.space import Constraints

CHOICES = {
    "dp": "Allow only these data-parallel sizes, separated by commas.",
    "tp": "Allow only these tensor-parallel sizes, separated by commas.",
    "pp": "Allow only these pipeline sizes, separated by commas.",
    "cp": "Also cut sequences among so many ranks, e.g. 1,2 [default: 1].",
    "ep": "Allow only these expert-parallel sizes, separated by commas.",
    "vpp": "Allow only these numbers of chunks a rank, separated by commas.",
    "micro_batch": "Allow only these micro-batch sizes, separated by commas.",
    "zero": "Allow only these ZeRO stages (0 to 3), separated by commas.",
    "recompute": "Allow only these: none, selective, full, partial (as few layers in full as fit).",
    "stage_split": "auto: stages that suit the plan; even: as even as can be [default: auto].",
    "schedule": "Allow only these schedules [default: all that end a step with a flush].",
    "sequence_parallel": "true, false, or both as true,false [default: true,false].",
    "tp_overlap": "true, false, or both as true,false [default: as the stack does].",
    "placement": "Orders of mesh dimensions, the fastest first, such as tp-pp-cp-dp, or any "
    "[default: tp-cp-dp-pp].",
}
"""What the help says of the values of a dimension."""
MOST = {
    "dp": "Largest data-parallel size.",
    "tp": "Largest tensor-parallel size.",
    "pp": "Largest pipeline size.",
    "cp": "Largest context-parallel size; allows all up to it.",
    "ep": "Largest expert-parallel size.",
    "vpp": "Largest number of chunks a rank.",
    "micro_batch": "Largest micro-batch.",
}
"""What the help says of the largest value of a dimension."""
_COMPLETED = {"schedule": complete_schedule}
_FEW_WORDS = {"placement": "any, or orders such as tp-cp-dp-pp and tp-pp-cp-dp"}
"""For what there is too much of to list."""
SWITCH = {"true": True, "false": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """What the user allows, as typed."""

    values: dict[str, str]
    """Lists separated by commas, of some of CHOICES."""
    most: dict[str, int]
    """Of some of MOST."""

    def given(self) -> dict[str, Any]:
        """For the `inputs` of a JSON document."""
        return self.values | {f"max_{key}": size for key, size in self.most.items()}

    def constraints(self) -> Constraints:
        """Raises ParsimError for a value that cannot be, and for flags that contradict each other."""
        from parsim.search.space import Constraints

        values = {key: _values(key, text) for key, text in self.values.items()}
        for key, most in self.most.items():
            if key in values and min(values[key]) > most:
                raise _contradiction(
                    f"{flag_of(key)} {self.values[key]}", f"--max-{key.replace('_', '-')} {most}"
                )
        largest_tp = min(max(values.get("tp", (2,))), self.most.get("tp", 2))
        for key in ("sequence_parallel", "tp_overlap"):
            if values.get(key) == (True,) and largest_tp == 1:
                tp = f"--tp {self.values['tp']}" if "tp" in values else "--max-tp 1"
                raise _contradiction(f"{flag_of(key)} true", tp, expected="tp of 2 or more")
        return Constraints(**values, max_sizes=self.most)


def with_constraints(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a flag for each of CHOICES and MOST; it gets them as `allowed`, an Allowed."""
    signature = inspect.signature(command, eval_str=True)
    flags = [
        _parameter(
            key, str, "", typer.Option(flag_of(key), help=text, autocompletion=_COMPLETED.get(key))
        )
        for key, text in CHOICES.items()
    ]
    flags += [
        _parameter(f"max_{key}", int | None, None, typer.Option(flag_of(f"max_{key}"), min=1, help=text))
        for key, text in MOST.items()
    ]

    @wraps(command)
    def run(**given: Any) -> None:
        values = {key: text for key in CHOICES if (text := given.pop(key))}
        most = {key: size for key in MOST if (size := given.pop(f"max_{key}")) is not None}
        command(allowed=Allowed(values=values, most=most), **given)

    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += flags if parameter.name == "allowed" else [parameter]
    ordered = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in ordered}
    return run


def _parameter(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def flag_of(key: str) -> str:
    """A dimension as a flag.

    >>> flag_of("micro_batch")
    '--micro-batch'
    """
    return f"--{key.replace('_', '-')}"


def _values(key: str, text: str) -> tuple[Any, ...]:
    """The values of one dimension; raises ParsimError for one that it has not."""
    from parsim.errors import ParsimError, did_you_mean
    from parsim.schedule import SCHEDULES
    from parsim.search.placements import ANY_PLACEMENT, orders
    from parsim.search.space import RECOMPUTE_CHOICES, SPLIT_CHOICES

    words: dict[str, Collection[str]] = {
        "placement": (ANY_PLACEMENT, *orders((ANY_PLACEMENT,))),
        "recompute": RECOMPUTE_CHOICES,
        "stage_split": SPLIT_CHOICES,
        "schedule": SCHEDULES,
        "sequence_parallel": SWITCH,
        "tp_overlap": SWITCH,
    }
    parts = list(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    if key in words:
        for part in parts:
            if part not in words[key]:
                raise ParsimError(
                    f"unknown {key} {part!r}",
                    where=flag_of(key),
                    expected=_FEW_WORDS.get(key, ", ".join(words[key])),
                    hint=did_you_mean(part, words[key]),
                )
        return tuple(SWITCH.get(part, part) for part in parts)
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise ParsimError(
            "this is a list of whole numbers", where=flag_of(key), got=text, expected="4,8"
        )
    least, largest = (0, 3) if key == "zero" else (1, 10**9)
    numbers = tuple(dict.fromkeys(map(int, parts)))
    if not all(least <= number <= largest for number in numbers):
        raise ParsimError("out of range", where=flag_of(key), got=text, expected=f"{least} to {largest}")
    return numbers


def _contradiction(first: str, second: str, *, expected: str | None = None) -> Exception:
    from parsim.errors import ParsimError

    flags = [text.split()[0] for text in (first, second)]
    return ParsimError(
        f"{flags[0]} and {flags[1]} contradict each other",
        where=", ".join(flags),
        got=f"{first}, {second}",
        expected=expected,
        hint=f"leave out {flags[0]} or {flags[1]}",
    )
