"""The `parsim` command: its subcommands, and what happens to errors.

Answers go to stdout, everything else to stderr. Exit status: 0 fine, 1 answered with "no", 2 bad
input or a defect, 130 interrupted. Modules behind a command are imported when it
runs, so that --help is quick.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from parsim import __version__
from parsim.cli import (
    calibrate,
    capacity,
    collective,
    compare_schedules,
    config,
    doctor,
    export,
    hardware,
    models,
    plan,
    quickstart,
    report,
    run,
    simulate,
    sweep,
    trace,
    validate,
)
from parsim.cli.mistakes import hint_of
from parsim.cli.output import COMMAND_LINE
from parsim.cli.settings import TAKEN, Command, Sources, apply_settings
from parsim.errors import ParsimError

HELP = """Choose, simulate and run parallel plans for training large language models.

\b
Examples:
  parsim plan --model llama-3.1-70b --hardware h100-sxm-80gb --gpus 64 --global-batch 512
  parsim simulate --model gpt3-175b --hardware a100-sxm-80gb --plan dp=8,tp=8,pp=8 --chart step.png
  parsim quickstart
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan.plan,
    "simulate": simulate.simulate,
    "capacity": capacity.capacity,
    "sweep": sweep.sweep,
    "collective": collective.collective,
    "compare-schedules": compare_schedules.compare_schedules,
    "calibrate": calibrate.calibrate,
    "run": run.run,
    "validate": validate.validate,
    "trace": trace.trace,
    "export": export.export,
    "report": report.report,
    "models": models.models,
    "hardware": hardware.hardware,
    "doctor": doctor.doctor,
    "quickstart": quickstart.quickstart,
}
for name, function in COMMANDS.items():
    app.command(name, cls=Command)(function)
app.add_typer(config.config, name="config")

# typer carries a copy of click in some releases and depends on it in others: BadParameter, UsageError,
# ClickException is the line of bases in both.
CLICK_ERROR: Any = typer.BadParameter.__bases__[0].__bases__[0]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"parsim {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    config_file: Annotated[
        Path | None,
        typer.Option("--config-file", help="Settings, instead of the project's and the user's."),
    ] = None,
    no_config: Annotated[
        bool, typer.Option("--no-config", help="Take no settings from anywhere.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options of every command; --debug, anywhere, shows the traceback of an error."""
    apply_settings(context, Sources(config_file, no_config))


def main() -> None:
    """Run the command line and exit with its status."""
    _keep_stdout_for_the_answer()
    signal.signal(signal.SIGTERM, _end)
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    sys.exit(run_command([a for a in arguments if a != "--debug"], debug=debug))


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM, by which `timeout` and job schedulers end a program, ends it as Ctrl-C does: in order,
    with its processes and temporary files.
    """
    raise SystemExit(128 + number)


def _keep_stdout_for_the_answer() -> None:
    """Whatever compiled code prints goes to stderr: HiGHS prints a line of its own now and then,
    whatever its options say (jump-dev/HiGHS.jl issue 312), into the middle of a JSON document.
    """
    if sys.stdout is None or sys.stderr is None:  # closed by whoever started us
        sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for good
        return
    sys.stdout.flush()
    answer = os.dup(1)
    os.dup2(2, 1)
    buffering = 1 if os.isatty(answer) else -1
    # UTF-8 whatever the locale says: figures bear ×, µ and →, and JSON is UTF-8 by its definition.
    sys.stdout = os.fdopen(answer, "w", buffering, encoding="utf-8", errors="surrogateescape")


def run_command(arguments: list[str], *, debug: bool = False) -> int:
    """Run one command and return its exit status; explains errors on stderr."""
    COMMAND_LINE.set(("parsim", *arguments))
    TAKEN.set({})
    try:
        status = app(arguments, prog_name="parsim", standalone_mode=False)
        sys.stdout.flush()
    except ParsimError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"error: {error}", err=True)
        _say_settings()
        return error.exit_code
    except CLICK_ERROR as error:
        hint = hint_of(error)
        error.show()
        if hint:
            typer.echo(f"  hint:     {hint}", err=True)
        _say_settings()
        return 2
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`parsim models | head`); say nothing more to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        typer.echo(
            f"error: a defect in parsim, not in your input: {type(error).__name__}: {error}\n"
            "  hint:     run again with --debug and report the traceback",
            err=True,
        )
        return 2
    return status if isinstance(status, int) else 0


def _say_settings() -> None:
    """What a message may be about although nobody typed it."""
    taken = [f"{key} = {setting.value} ({setting.origin})" for key, setting in TAKEN.get().items()]
    if taken:
        typer.echo(f"  settings: {', '.join(taken)}; --no-config leaves them out", err=True)
