"""What to do next after a slip of the command line: options, commands and words that there are not."""

from __future__ import annotations

import re
from typing import Any

from parsim.errors import did_you_mean


def hint_of(error: Any) -> str | None:
    """A hint for one of click's usage errors, or None where its message says all.

    click's own suggestions by first letters make room for it.
    """
    context = getattr(error, "ctx", None)
    if context is None:
        return None
    if hasattr(error, "possibilities") and hasattr(error, "option_name"):
        error.possibilities = None
        return _of_option(error.option_name, context)
    if "unexpected extra argument" in error.message:
        return _of_extra(error.message, context)
    typed, listed, words = error.message.rpartition(" is not one of ")
    if listed and (word := re.search(r"'([^']*)'$", typed)):
        return did_you_mean(word[1], re.findall(r"'([^']*)'", words))
    parameter = getattr(error, "param", None)
    if error.message == "" and parameter is not None:  # click writes "Missing option" by itself
        words = getattr(parameter, "help", None)
        return f"{parameter.opts[0]}: {words}" if words else None
    return None


def _options(command: Any) -> list[str]:
    return [name for parameter in command.params for name in parameter.opts if name.startswith("--")]


def _of_option(name: str, context: Any) -> str | None:
    root = context.find_root()
    if name in _options(root.command):
        return f"this goes before the command: parsim {name} {context.info_name} …"
    near = did_you_mean(name, _options(context.command)) if len(name) > 2 else None
    commands = getattr(root.command, "commands", {})
    having = [other for other, command in commands.items() if name in _options(command)]
    if having and context.command is not root.command:
        return f"{name} is an option of parsim {', '.join(having)}" + (f"; {near}" if near else "")
    return near


def _of_extra(message: str, context: Any) -> str | None:
    typed = re.search(r"\(([^()]*)\)$", message)
    options = _options(context.command)
    if typed and "=" in typed[1] and "--plan" in options:
        return f"a plan is given as --plan {typed[1]}"
    listed = ", ".join(name for name in ("--model", "--hardware", "--plan") if name in options)
    return f"values are given with their option, such as {listed}" if listed else None
