"""Names that the shell completes: read from file names, so that Tab answers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def _completing(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completes the last of names separated by commas; paths are left to the shell."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in names() if name.startswith(last)]

    return complete


def _shipped(kind: str) -> Callable[[], Iterable[str]]:
    def names() -> Iterable[str]:
        from parsim.shipped import shipped

        return shipped(kind)

    return names


def _schedules() -> Iterable[str]:
    from parsim.schedule import SCHEDULES

    return SCHEDULES


def _commands() -> Iterable[str]:
    from parsim.cli.settings import COMMANDS

    return COMMANDS


complete_model = _completing(_shipped("models"))
complete_hardware = _completing(_shipped("hardware_profiles"))
complete_stack = _completing(_shipped("hardware_profiles/stacks"))
complete_schedule = _completing(_schedules)
complete_command = _completing(_commands)
