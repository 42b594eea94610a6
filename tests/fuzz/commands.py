"""Files that a reader accepts go on into the commands: what passed as a number may not blow up later."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from parsim.cli.main import CLICK_ERROR, app
from parsim.errors import ParsimError
from tests.fuzz.kinds import KINDS, Kind, files

SHORT = "dp=2,tp=2,pp=2,micro_batch=1"
JOB = ("--global-batch", "16")
MODEL = ("--model", "tiny-llama-8l", *JOB)


class WrongAnswerError(Exception):
    """A document that is none, or a number in it that is none."""


def answer(*arguments: str) -> str:
    """What a command prints; refusals of click's are ParsimErrors here, everything else comes out."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            app(["--no-config", *arguments], prog_name="parsim", standalone_mode=False)
    except CLICK_ERROR as error:
        raise ParsimError(str(error)) from None
    text = out.getvalue()
    text.encode()
    if "--json" in arguments and text:
        json.loads(text, parse_constant=_refuse)
    return text


def _refuse(name: str) -> float:
    raise WrongAnswerError(name)


def _each(*commands: Callable[[str], Sequence[str]]) -> Callable[[Path], object]:
    """Runs the commands one after the other; the first refusal ends it."""
    return lambda path: [answer(*command(str(path))) for command in commands]


def _simulate(*flags: str) -> tuple[str, ...]:
    return ("simulate", "--plan", SHORT, *flags)


def _plan(*flags: str) -> tuple[str, ...]:
    return ("plan", "--gpus", "8", "--top", "2", "--budget-s", "0.2", *flags)


H100 = ("--hardware", "h100-sxm-80gb")


def _of(name: str, read: Callable[[Path], object]) -> Kind:
    kind = KINDS[name]
    return Kind(
        format=kind.format, suffix=kind.suffix, seeds=kind.seeds, read=read, nudged=True, most_s=20.0
    )


def _real_plan() -> Sequence[bytes]:
    """ITEMs that fit, of a model with experts and without."""
    found = []
    for model in ("tiny-llama-8l", "mini-mixtral-8l"):
        text = answer(*_simulate("--model", model, *JOB, *H100, "--json"))
        found.append(text.encode())
    return found


def _export(target: str) -> Callable[[str], tuple[str, ...]]:
    return lambda path: ("export", path, "--to", target, "-o", f"{path}.out")


COMMANDS: Mapping[str, Kind] = MappingProxyType(
    {
        "model": Kind(
            format="toml",
            suffix=".toml",
            seeds=files(
                "models/tiny-llama-8l.toml", "models/mini-mixtral-8l.toml", "models/tiny-gpt-8l.toml"
            ),
            nudged=True,
            most_s=20.0,
            read=_each(
                lambda path: _simulate("--model", path, *JOB, *H100, "--json"),
                lambda path: _plan("--model", path, *JOB, *H100),
            ),
        ),
        "config": _of(
            "config",
            # Not every seed has heads that tp divides.
            _each(lambda path: ("simulate", "--plan", "dp=2", "--model", path, *JOB, *H100, "--json")),
        ),
        "hardware": _of(
            "hardware",
            _each(
                lambda path: ("hardware", path),
                lambda path: _simulate(*MODEL, "--hardware", path, "--json"),
                lambda path: _plan(*MODEL, "--hardware", path, "--json"),
            ),
        ),
        "stack": _of(
            "stack",
            _each(
                lambda path: _simulate(*MODEL, *H100, "--stack", path, "--json"),
                lambda path: _plan(*MODEL, *H100, "--stack", path, "--json"),
            ),
        ),
        "plan": Kind(
            format="json",
            suffix=".json",
            seeds=_real_plan,
            nudged=True,
            most_s=20.0,
            read=_each(
                lambda path: ("simulate", "--plan", path, "--json"),
                _export("schedule-csv"),
                _export("megatron"),
            ),
        ),
        "report": Kind(
            format="json",
            suffix=".json",
            seeds=_real_plan,
            nudged=True,
            most_s=20.0,
            read=_each(lambda path: ("report", path, "-o", f"{path}.html")),
        ),
        "step": _of("step", _each(lambda path: ("validate", path, path, "--json"))),
        "runs": _of("runs", _each(lambda path: ("validate", "--runs", path, "--json"))),
        "kernels": _of("kernels", _each(lambda path: ("validate", "--kernels", path, *H100, "--json"))),
        "sweep": _of(
            "sweep",
            _each(lambda path: ("sweep", path, "--budget-s", "1", "--resume", "-o", f"{path}.out")),
        ),
        "trace": _of("trace", _each(lambda path: ("trace", path, "--json"))),
    }
)
