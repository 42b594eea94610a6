"""What `parsim sweep` is asked: scenarios from lists in flags, and from files of scenarios."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from parsim.capacity_cases import read_gpu_counts
from parsim.cli.constraints import CHOICES, MOST, Allowed
from parsim.errors import ParsimError, did_you_mean
from parsim.setup import Flags, Setup, load_plan, load_setup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from parsim.search.sweep import Question, Scenario

AXES = (
    "model", "hardware", "plan", "gpus", "global_batch", "seq_len", "stack", "precision", "inter_node",
    "intra_node", "memory",
)  # fmt: skip
"""What may have several values, the one that changes last first."""
LIMITS = (*CHOICES, *(f"max_{key}" for key in MOST))
"""What narrows the search of a scenario, as the flags of `parsim plan`."""
KEYS = (*AXES, *LIMITS)
MOST_SCENARIOS = 100_000
FLAGS = tuple(field.name for field in fields(Flags))

Grid = dict[str, tuple[Any, ...]]
"""All combinations of these values, by key."""


def grid_of(table: Mapping[str, Any], where: str) -> Grid:
    """The values of one table, or of the flags.

    Raises ParsimError for keys that are not among KEYS and values that cannot be.
    """
    grid = {}
    for key, value in table.items():
        place = f"{where}: {key}"
        if key not in KEYS:
            raise ParsimError("unknown key", where=place, hint=did_you_mean(str(key), KEYS))
        parts = value if isinstance(value, list | tuple) else [value]
        if not parts or not all(isinstance(p, str | int) and not isinstance(p, bool) for p in parts):
            if key not in LIMITS or not all(isinstance(p, bool) for p in parts):
                raise ParsimError("these are numbers or texts", where=place, got=value)
            parts = [str(part).lower() for part in parts]
        grid[key] = _values(key, [str(part).strip() for part in parts], place)
    return grid


def _values(key: str, parts: Sequence[str], where: str) -> tuple[Any, ...]:
    if key == "plan":  # a short form has commas of its own
        values: Sequence[Any] = parts
    elif key in LIMITS:
        text = ",".join(parts)
        values = [_whole(text, where)] if key.startswith("max_") else [text]
    else:
        words = [word.strip() for part in parts for word in part.split(",") if word.strip()]
        if key == "gpus":
            values = read_gpu_counts(",".join(words))
        else:
            values = [_whole(w, where) for w in words] if key in ("global_batch", "seq_len") else words
    if not values or "" in values:
        raise ParsimError("this names nothing", where=where, got=",".join(parts))
    return tuple(dict.fromkeys(values))


def _whole(text: str, where: str) -> int:
    from parsim.units import parse_count

    try:
        number = parse_count(text)
    except ParsimError as error:
        raise error.at(where) from None
    if number < 1:
        raise ParsimError("a size must be positive", where=where, got=text)
    return number


def read_grids(path: Path | None, given: Mapping[str, Any]) -> list[Grid]:
    """The grids of a file of scenarios, with the flags for what it leaves out; or that of the flags.

    A TOML file has a table [[sweep]] for each grid, a CSV file a row.
    """
    flags = grid_of(given, "the flags")
    if path is None:
        return [_checked(flags, "the flags")]
    tables = _toml_tables(path) if path.suffix == ".toml" else _csv_rows(path)
    if not tables:
        raise ParsimError("this file holds no scenario", where=str(path))
    return [_checked(flags | grid_of(table, where), where) for where, table in tables]


def _toml_tables(path: Path) -> list[tuple[str, dict[str, Any]]]:
    from parsim.config import read_toml

    data = read_toml(path)
    tables = data.pop("sweep", [])
    listed = isinstance(tables, list) and all(isinstance(table, dict) for table in tables)
    if data or not listed:
        raise ParsimError(
            "a file of scenarios holds tables [[sweep]] and nothing else",
            where=str(path),
            got=next(iter(data), "sweep"),
        )
    return [(f"{path}: sweep[{i}]", table) for i, table in enumerate(tables)]


def _csv_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    from parsim.config import csv_rows, read_text

    lines = csv_rows(read_text(path), where=str(path))
    header = next((cells for _, cells in lines if cells), [])
    rows = []
    for number, cells in lines:
        if not cells:  # an empty line is no scenario
            continue
        where = f"{path}: line {number}"
        if len(cells) > len(header):
            raise ParsimError("more cells than columns", where=where, got=cells[len(header) :])
        named = zip(header, cells, strict=False)
        rows.append((where, {key.strip(): cell for key, cell in named if cell.strip()}))
    return rows


def _checked(grid: Grid, where: str) -> Grid:
    """The grid, if something can be asked with it."""
    if "plan" in grid:
        for key in ("gpus", *LIMITS):
            if key in grid:
                raise ParsimError(
                    "a plan is simulated, and leaves nothing to search",
                    where=where,
                    got=f"plan and {key}",
                    hint="leave out one of them, or give plans in a file of their own",
                )
        return grid
    for key in ("model", "hardware", "gpus", "global_batch"):
        if key not in grid:
            raise ParsimError(
                f"{key} is missing", where=where, hint=f"--{key.replace('_', '-')}, or in the file"
            )
    return grid


def read_settings(grids: Sequence[Grid], search: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings of every scenario, each once, in the order of the grids.

    `search` holds what all searches share. Raises ParsimError for a file that no scenario could read.
    """
    from parsim.config import load_cluster, load_model, load_stack
    from parsim.plan_file import read_plan
    from parsim.search.sweep import key_of

    count = sum(prod(map(len, grid.values())) for grid in grids)
    if count > MOST_SCENARIOS:
        raise ParsimError(
            "these are too many scenarios", got=count, expected=f"at most {MOST_SCENARIOS}"
        )
    readers: dict[str, Callable[[str], Any]] = {
        "model": load_model, "hardware": load_cluster, "stack": load_stack, "plan": read_plan
    }  # fmt: skip
    for key, read in readers.items():
        for name in dict.fromkeys(name for grid in grids for name in grid.get(key, ())):
            read(name)
    unique: dict[str, dict[str, Any]] = {}
    for grid in grids:
        keys = [key for key in KEYS if key in grid]
        for values in product(*(grid[key] for key in keys)):
            settings = dict(zip(keys, values, strict=True))
            settings |= {} if "plan" in grid else search
            unique.setdefault(key_of(settings), settings)
    return list(unique.values())


def scenarios(all_settings: Sequence[Mapping[str, Any]]) -> Iterator[Scenario]:
    """Settings as nouns, one after the other; what cannot be asked is a scenario with its reason."""
    from parsim.search.sweep import Scenario

    # Files are read once for each machine and model, not for each of thousands of scenarios.
    setup_of = lru_cache(maxsize=64)(_setup_and_digests)
    for settings in all_settings:
        try:
            question = _question(settings, setup_of)
        except ParsimError as error:
            yield Scenario(settings=settings, question=error)
        else:
            yield Scenario(settings=settings, question=question)


def _setup_and_digests(flags: Flags) -> tuple[Setup, dict[str, str]]:
    setup = load_setup(flags)
    return setup, _digests(setup)


def _digests(setup: Setup) -> dict[str, str]:
    from parsim.search.sweep import digest

    nouns = {"model": setup.job.model, "hardware": setup.cluster, "stack": setup.stack}
    return {key: digest(noun) for key, noun in nouns.items()}


def _question(
    settings: Mapping[str, Any], setup_of: Callable[[Flags], tuple[Setup, dict[str, str]]]
) -> Question:
    from parsim.search.sweep import Question, digest

    flags = Flags(**{key: value for key, value in settings.items() if key in FLAGS})
    if "plan" in settings:
        setup, plan = load_plan(settings["plan"], flags)
        if setup.rank_hardware:
            raise ParsimError(
                "devices of several kinds are not swept over: `parsim simulate` takes them",
                got=", ".join(setup.rank_hardware),
            )
        return Question(
            job=setup.job,
            cluster=setup.cluster,
            stack=setup.stack,
            origin=setup.origin,
            plan=plan,
            digests=_digests(setup) | {"plan": digest(plan)},
        )
    sizes = {key: settings[key] for key in ("global_batch", "seq_len") if key in settings}
    setup, digests = setup_of(replace(flags, global_batch=1, seq_len=None))
    values = {key: settings[key] for key in CHOICES if key in settings}
    most = {key: settings[f"max_{key}"] for key in MOST if f"max_{key}" in settings}
    return Question(
        job=replace(setup.job, **sizes),
        cluster=setup.cluster,
        stack=setup.stack,
        origin=setup.origin,
        gpus=settings["gpus"],
        constraints=Allowed(values=values, most=most).constraints(),
        top=settings["top"],
        budget_s=settings["budget_s"],
        digests=digests,
    )
