"""Settings: options that need not be typed each time, from the environment and from files.

A flag wins over PARSIM_*, this over ./parsim.toml (or [tool.parsim] of ./pyproject.toml), this over the
user's own file, this over an option's default. A plan file's own model, hardware and job win over
settings too. click merges: settings are the `default_map` of the command that is invoked.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand

KEYS: dict[str, type[str] | type[int] | type[float]] = {
    "model": str,
    "hardware": str,
    "stack": str,
    "gpus": str,
    "global_batch": int,
    "seq_len": int,
    "precision": str,
    "inter_node": str,
    "intra_node": str,
    "memory": str,
    "top": int,
    "budget_s": float,
    "processes": int,
    "usd_per_gpu_hour": float,
    "pue": float,
}
"""All that may be set, and how it is read: what to work on and how hard, never a file to write."""
COMMANDS = ("plan", "simulate", "compare-schedules", "capacity", "export")
"""The commands that settings are for. Others are about this machine, or say all in their own files."""
NOT_FOR = {"export": ("stack",)}
"""What a command would rather choose itself: the stack depends on the tool that it writes for."""
LEAST = {int: 1, float: 0}
FILE, PROJECT, TABLE = "parsim.toml", "pyproject.toml", "parsim"


class Setting(NamedTuple):
    """A value as one would type it after the flag, and where it comes from."""

    value: str
    origin: str


class Sources(NamedTuple):
    """Where to look for settings."""

    config_file: Path | None = None
    """Instead of the project's and the user's file."""
    no_config: bool = False


TAKEN: ContextVar[Mapping[str, Setting]] = ContextVar("TAKEN")
"""Settings that took effect in the command that runs, by key."""


def flag_of(key: str) -> str:
    """The option that a setting stands for.

    >>> flag_of("global_batch")
    '--global-batch'
    """
    return f"--{key.replace('_', '-')}"


def user_file() -> Path:
    """The settings of this user."""
    return Path(typer.get_app_dir("parsim")) / FILE


def find_settings(sources: Sources, environment: Mapping[str, str]) -> dict[str, Setting]:
    """All settings by key, each from the source that wins.

    Raises ParsimError for an unreadable file, an unknown key and a value of the wrong type.
    """
    if sources.no_config:
        return {}
    if sources.config_file is not None:
        found = _of_file(sources.config_file)
    else:
        user = user_file()
        found = (_of_file(user) if user.is_file() else {}) | _of_project(Path())
    for key in KEYS:
        name = variable(key)
        if environment.get(name):
            found[key] = Setting(_read(key, environment[name], name, typed=True), name)
    return found


def variable(key: str) -> str:
    """The environment variable of a setting.

    >>> variable("global_batch")
    'PARSIM_GLOBAL_BATCH'
    """
    return f"PARSIM_{key.upper()}"


def misspelt_variables(environment: Mapping[str, str]) -> list[str]:
    """What to say of variables that look like settings and are none; never their values."""
    from parsim.errors import did_you_mean

    known = [variable(key) for key in KEYS]
    strange = sorted(n for n in environment if n.startswith("PARSIM_") and n not in known)
    hints = {name: did_you_mean(name, known) for name in strange}
    return [f"{name} is no setting; {hint}" for name, hint in hints.items() if hint]


def _of_project(folder: Path) -> dict[str, Setting]:
    """The settings of a project: of parsim.toml, or else of [tool.parsim]."""
    from parsim.config import read_toml
    from parsim.errors import ParsimError

    if (folder / FILE).is_file():
        return _of_file(folder / FILE)
    path = folder / PROJECT
    if not path.is_file():
        return {}
    tools = read_toml(path).get("tool", {})
    table = tools.get(TABLE, {}) if isinstance(tools, Mapping) else {}
    where = f"{path} [tool.{TABLE}]"
    if not isinstance(table, Mapping):
        raise ParsimError("this is a table", where=where, got=table)
    return _of_table(table, where)


def _of_file(path: Path) -> dict[str, Setting]:
    from parsim.config import read_toml

    return _of_table(read_toml(path), str(path))


def _of_table(table: Mapping[str, Any], where: str) -> dict[str, Setting]:
    from parsim.errors import ParsimError, did_you_mean

    found: dict[str, Setting] = {}
    for name, value in table.items():
        key = name.replace("-", "_")
        if key not in KEYS:
            raise ParsimError(
                f"there is no setting {name!r}",
                where=where,
                expected=", ".join(KEYS),
                hint=did_you_mean(key, KEYS),
            )
        if key in found:
            raise ParsimError("a setting is given twice", where=f"{where}: {name}")
        found[key] = Setting(_read(key, value, f"{where}: {name}", typed=False), where)
    return found


def _read(key: str, value: object, where: str, *, typed: bool) -> str:
    """A value as text, of the setting's type; `typed` where it came as text anyway."""
    from parsim.errors import ParsimError

    kind = KEYS[key]
    # A count may stand in a file without quotes where the flag also takes a range: gpus = 64
    fits = isinstance(value, (str, int) if kind is str else (int, kind)) and not isinstance(value, bool)
    try:
        if not (typed or fits):
            raise ValueError
        read = kind(str(value))
        if not isinstance(read, str) and not LEAST[type(read)] <= read < float("inf"):
            raise ValueError
    except ValueError:
        least = {str: "a text", int: "a whole number, 1 or more", float: "a number, 0 or more"}[kind]
        raise ParsimError(
            "a setting has the wrong type", where=where, got=value, expected=least
        ) from None
    return str(read)


def keys_of(command: Any, name: str) -> list[str]:
    """The settings that a command takes, in the order of KEYS."""
    if name not in COMMANDS:
        return []
    options = {parameter.name for parameter in command.params}
    return [key for key in KEYS if key in options and key not in NOT_FOR.get(name, ())]


def apply_settings(context: typer.Context, sources: Sources) -> None:
    """Let settings be the defaults of the command that is about to run."""
    TAKEN.set({})
    context.obj = sources
    name = context.invoked_subcommand
    if name not in COMMANDS or context.resilient_parsing:
        return
    command = context.command.commands[name]  # type: ignore[attr-defined]
    keys, found = keys_of(command, name), find_settings(sources, os.environ)
    taken = {key: found[key] for key in keys if key in found}
    TAKEN.set(taken)
    context.default_map = {name: {key: setting.value for key, setting in taken.items()}}


class Command(TyperCommand):
    """A command that keeps in TAKEN which settings took effect."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command with the settings that neither a flag nor a plan file overrules."""
        taken = {
            key: setting
            for key, setting in TAKEN.get({}).items()
            if ctx.get_parameter_source(key).name == "DEFAULT_MAP"
        }
        overruled = _said_by_plan(ctx.params.get("plan")) if taken else ()
        for parameter in self.params:
            if parameter.name in taken and parameter.name in overruled:
                ctx.params[parameter.name] = parameter.default  # get_default would ask the settings
                del taken[parameter.name]
        TAKEN.set(taken)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer's newer releases would end without a word
            raise typer.Abort from None


def _said_by_plan(plan: object) -> Collection[str]:
    """What a plan file says itself; nothing where `plan` is a short form."""
    from parsim.plan_file import read_plan

    if not isinstance(plan, str):
        return ()
    file = read_plan(plan)
    said: list[str] = []
    if file.job is not None:
        said += ["model", "global_batch", "seq_len", "precision"]
    if file.hardware is not None:
        said += ["hardware", "inter_node", "intra_node", "memory"]
    if file.stack is not None:
        said.append("stack")
    return said


def with_settings(words: Sequence[str]) -> str:
    """A command line that repeats its answer elsewhere: settings that took effect are flags in it."""
    taken = TAKEN.get({})
    if not taken:
        return shlex.join(words)
    at = next(i for i, word in enumerate(words) if word in COMMANDS and words[i - 1] != "--config-file")
    flags = [text for key, setting in taken.items() for text in (flag_of(key), setting.value)]
    return shlex.join([words[0], "--no-config", words[at], *flags, *words[at + 1 :]])
