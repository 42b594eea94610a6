"""`parsim doctor`: what this machine can do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import typer

from parsim.cli.options import JsonOption
from parsim.cli.output import document, print_json, print_lines

NEEDED = ("matplotlib", "networkx", "numpy", "pydantic", "rich", "scipy", "simpy", "typer")


def doctor(as_json: JsonOption = False) -> None:
    """Say what parsim can do on this machine, and what is missing for the rest.

    Exit status 1 where a part that planning needs is missing.

    \b
    Examples:
      parsim doctor
      parsim doctor --json
    """
    checks = _checks()
    if as_json:
        print_json(document("doctor", {}, {"checks": checks}))
    else:
        print_lines(
            [
                f"{'ok     ' if check['ok'] else 'missing'}  {check['what']:<22}{check['found']}"
                + (f"\n         {'':<22}{check['hint']}" if check["hint"] else "")
                for check in checks
            ]
        )
    if not all(check["ok"] for check in checks if check["needed"]):
        raise typer.Exit(1)


def _checks() -> list[dict[str, Any]]:
    checks = [
        _check("Python", True, platform.python_version(), needed=True),
        _check("cores", True, f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"),
    ]
    checks += [_package(name, needed=True) for name in NEEDED]
    checks.append(_shipped_data())
    torch_hint = "parsim run, calibrate and quickstart need it: pip install 'parsim[torch]'"
    checks.append(_package("torch", hint=torch_hint))
    if checks[-1]["ok"]:
        checks += _torch_devices()
    return checks


def _check(what: str, ok: bool, found: str, *, needed: bool = False, hint: str = "") -> dict[str, Any]:
    return {"what": what, "ok": ok, "found": found, "needed": needed, "hint": hint}


def _package(name: str, *, needed: bool = False, hint: str = "") -> dict[str, Any]:
    try:
        return _check(name, True, importlib.metadata.version(name), needed=needed)
    except importlib.metadata.PackageNotFoundError:
        return _check(name, False, "not installed", needed=needed, hint=hint or f"pip install {name}")


def _shipped_data() -> dict[str, Any]:
    from parsim.shipped import shipped

    counts = {kind: len(shipped(kind)) for kind in ("models", "hardware_profiles")}
    found = f"{counts['models']} models, {counts['hardware_profiles']} hardware profiles"
    return _check("shipped data", all(counts.values()), found, needed=True)


def _torch_devices() -> list[dict[str, Any]]:
    import subprocess

    # In a process of its own: importing torch takes seconds, and a broken install may abort.
    code = (
        "import torch, torch.distributed as d; c = torch.cuda; "
        "print(d.is_available() and d.is_gloo_available(), d.is_available() and d.is_nccl_available(), "
        "*[c.get_device_name(i) for i in range(c.device_count())], sep='\\n')"
    )
    done = subprocess.run(  # noqa: S603 - our own interpreter and our own constant
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [_check("torch.distributed", False, reason, hint="reinstall PyTorch")]
    gloo, nccl, *gpus = done.stdout.split("\n")[:-1]
    return [
        _check("gloo (CPU ranks)", gloo == "True", "available" if gloo == "True" else "not built in"),
        _check(
            "NVIDIA GPUs",
            bool(gpus),
            ", ".join(gpus) or "none",
            hint="" if gpus else "plans run on CPU ranks; simulation needs no GPU",
        ),
        _check("NCCL (GPU ranks)", nccl == "True", "available" if nccl == "True" else "not built in"),
    ]
