"""`parsim config`: the settings that hold here."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from parsim.cli.completion import complete_command
from parsim.cli.options import JsonOption
from parsim.cli.output import document, print_json, say
from parsim.cli.settings import (
    COMMANDS,
    KEYS,
    Setting,
    Sources,
    find_settings,
    keys_of,
    misspelt_variables,
    user_file,
)
from parsim.cli.tables import print_table

HELP = """Show settings: options that need not be typed each time.

A flag wins over the environment (PARSIM_MODEL, PARSIM_GLOBAL_BATCH, …), this over ./parsim.toml or
[tool.parsim] of ./pyproject.toml, this over the user's parsim.toml, this over the default.
"""
config = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)


@config.command("show")
def show(
    context: typer.Context,
    command: Annotated[
        str | None,
        typer.Argument(
            metavar="[COMMAND]",
            help=f"Only what this takes, with its defaults: {', '.join(COMMANDS)}.",
            autocompletion=complete_command,
        ),
    ] = None,
    origin: Annotated[bool, typer.Option("--origin", help="Say where each comes from.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the settings that hold here.

    \b
    Examples:
      parsim config show --origin
      parsim config show plan
    """
    sources = context.obj or Sources()
    found = find_settings(sources, os.environ)
    shown = {key: found.get(key) or Setting("", "not set") for key in KEYS}
    if command is not None:
        shown = _of_command(context, command, found)
    for text in misspelt_variables(os.environ):
        say(f"note: {text}")
    if as_json:
        rows = [{"key": key, "value": s.value or None, "origin": s.origin} for key, s in shown.items()]
        answer = {"settings": rows, "user_file": str(user_file())}
        print_json(document("config", {"command": command}, answer))
        return
    headers = ["setting", "value", *(["origin"] if origin else [])]
    print_table(headers, [[key, *setting[: 2 if origin else 1]] for key, setting in shown.items()])


def _of_command(context: typer.Context, name: str, found: dict[str, Setting]) -> dict[str, Setting]:
    """What a command would run with where it is given no flag."""
    from parsim.errors import ParsimError, did_you_mean

    commands: dict[str, Any] = context.find_root().command.commands  # type: ignore[attr-defined]
    if name not in COMMANDS:
        what = "takes no settings" if name in commands else "is no command"
        raise ParsimError(
            f"{name!r} {what}",
            where="COMMAND",
            expected=", ".join(COMMANDS),
            hint=did_you_mean(name, COMMANDS),
        )
    defaults = {parameter.name: parameter.default for parameter in commands[name].params}
    return {
        key: found.get(key) or Setting("" if defaults[key] is None else str(defaults[key]), "default")
        for key in keys_of(commands[name], name)
    }
