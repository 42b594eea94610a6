"""What `parsim capacity` is asked: limits from flags."""

from __future__ import annotations


def deadline_s(text: str | None) -> float | None:
    from parsim.errors import ParsimError
    from parsim.units import parse_duration

    if text is None:
        return None
    try:
        seconds = parse_duration(text)
    except ParsimError as error:
        raise error.at("--deadline") from None
    if seconds <= 0:
        raise ParsimError("a deadline is some time away", where="--deadline", got=text)
    return seconds


def budget_usd(text: str | None) -> float | None:
    from parsim.errors import ParsimError
    from parsim.units import parse_usd

    if text is None:
        return None
    try:
        usd = parse_usd(text)
    except ParsimError as error:
        raise error.at("--budget") from None
    if usd <= 0:
        raise ParsimError("a budget is some money", where="--budget", got=text)
    return usd
