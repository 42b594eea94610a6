"""Units: parsing what people write, printing what people read.

Inside parsim every quantity is in SI base units and its name says so (`_s`, `_bytes`, `_flops`,
`_bytes_per_s`, `_flops_per_s`, `_w`). "80 GiB", "400 Gb/s" and "989 TFLOP/s" exist only in files and
flags; this module is the only place that knows them.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

from parsim.errors import ParsimError, shorten

# Decimal, so that "66.9 TFLOP/s" is the float nearest to 66.9e12 and "2.01k" is exactly 2010.
_DECIMAL = {"": 0, "k": 3, "K": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_DECIMAL_SCALE = {prefix: Decimal(10) ** power for prefix, power in _DECIMAL.items()}
_BINARY_SCALE = {p: Decimal(2**power) for p, power in (("Ki", 10), ("Mi", 20), ("Gi", 30), ("Ti", 40))}
_SECONDS = {"ns": Decimal("1e-9"), "us": Decimal("1e-6"), "µs": Decimal("1e-6"), "ms": Decimal("1e-3")}
_SECONDS |= {"s": Decimal(1), "min": Decimal(60), "h": Decimal(3600)}
_SECONDS |= dict.fromkeys(("d", "day", "days"), Decimal(86400))
_SECONDS |= dict.fromkeys(("week", "weeks"), Decimal(7 * 86400))
_QUANTITY = re.compile(
    r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*([A-Za-zµ/]*)\s*", re.ASCII
)


def _split(text: str, expected: str) -> tuple[Decimal, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ParsimError("cannot read this quantity", got=text, expected=expected)
    return Decimal(match[1]), match[2]


def _to_float(value: Decimal, text: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ParsimError("this number is too large", got=text, expected="a finite quantity")
    return number


def _scale(unit: str, base: str) -> Decimal | None:
    """The factor of `unit` = prefix + base, or None when it is some other unit."""
    if not unit.endswith(base):
        return None
    prefix = unit[: len(unit) - len(base)]
    return _DECIMAL_SCALE.get(prefix, _BINARY_SCALE.get(prefix))


def parse_bytes(text: str) -> float:
    """Bytes from text such as "80 GiB", "80GB" or "512".

    >>> parse_bytes("80 GiB") == 80 * 2**30
    True
    """
    value, unit = _split(text, 'a size such as "80 GiB" or "80 GB"')
    scale = Decimal(1) if unit == "" else _scale(unit, "B")
    if scale is None:
        raise ParsimError(
            "unknown unit of size",
            got=text,
            expected="B, kB, MB, GB, KiB, GiB …",
            hint=f"{value}GB is {value}·10⁹ bytes, {value}GiB is {value}·2³⁰",
        )
    return _to_float(value * scale, text)


def parse_bandwidth(text: str) -> float:
    """Bytes per second from text; a small b is bits, a capital B is bytes.

    >>> parse_bandwidth("400 Gb/s")
    50000000000.0
    >>> parse_bandwidth("3.35 TB/s")
    3350000000000.0
    """
    value, unit = _split(text, 'a bandwidth such as "400 Gb/s" or "900 GB/s"')
    unit = re.sub(r"bit/s$|bps$", "b/s", unit)
    for base, per_byte in (("b/s", 8), ("B/s", 1)):
        scale = _scale(unit, base)
        if scale is not None:
            return _to_float(value * scale / per_byte, text)
    raise ParsimError(
        "unknown unit of bandwidth", got=text, expected='bits "Gb/s" or bytes "GB/s" per second'
    )


def parse_rate(text: str) -> float:
    """FLOPs per second from text such as "989 TFLOP/s" or "989 TFLOPS".

    >>> parse_rate("989.4 TFLOP/s")
    989400000000000.0
    """
    value, unit = _split(text, 'a rate such as "989 TFLOP/s"')
    for base in ("FLOP/s", "FLOPS", "FLOPs", "FLOPs/s", "flop/s"):
        scale = _scale(unit, base)
        if scale is not None:
            return _to_float(value * scale, text)
    raise ParsimError("unknown unit of compute rate", got=text, expected="TFLOP/s, PFLOP/s …")


def parse_duration(text: str) -> float:
    """Seconds from text such as "2.5 us", "90 s", "3 h" or "54 days".

    >>> parse_duration("1.5 ms")
    0.0015
    """
    value, unit = _split(text, 'a duration such as "2 us" or "30 min"')
    if unit not in _SECONDS:
        raise ParsimError("unknown unit of time", got=text, expected=", ".join(_SECONDS))
    return _to_float(value * _SECONDS[unit], text)


def parse_power(text: str) -> float:
    """Watts from text such as "700 W".

    >>> parse_power("0.7 kW")
    700.0
    """
    value, unit = _split(text, 'a power such as "700 W"')
    scale = _scale(unit, "W")
    if scale is None:
        raise ParsimError("unknown unit of power", got=text, expected="W, kW, MW")
    return _to_float(value * scale, text)


def parse_count(text: str) -> int:
    """A whole number, with an optional decimal suffix: "16384", "16k", "15T".

    >>> parse_count("15.6T")
    15600000000000
    """
    value, suffix = _split(text.replace("_", "").replace(",", ""), 'a count such as "4096" or "2M"')
    scale = _DECIMAL_SCALE.get({"B": "G", "b": "G", "m": "M", "t": "T"}.get(suffix, suffix))
    if scale is None or value * scale != (value * scale).to_integral_value():
        raise ParsimError("this is no whole number", got=text, expected='such as "4096" or "2M"')
    if abs(value * scale) >= 2**63:
        raise ParsimError("this number is too large", got=text, expected="a count below 2**63")
    return int(value * scale)


def parse_usd(text: str) -> float:
    """US dollars from text such as "5M", "$250k" or "99.5".

    >>> parse_usd("$2.5M")
    2500000.0
    """
    plain = text.strip().removesuffix("USD").strip().removeprefix("$").replace(",", "").replace("_", "")
    value, suffix = _split(plain, 'dollars such as "5M" or "250000"')
    scale = _DECIMAL_SCALE.get({"B": "G", "b": "G", "m": "M"}.get(suffix, suffix))
    if scale is None:
        raise ParsimError("unknown unit of money", got=text, expected='dollars such as "5M" or "250k"')
    return _to_float(value * scale, text)


# The suffix of a field's name tells its unit, so one table serves every file parsim reads.
SUFFIX_PARSERS = (
    ("_bytes_per_s", parse_bandwidth),
    ("_flops_per_s", parse_rate),
    ("_bytes", parse_bytes),
    ("_w", parse_power),
    ("_s", parse_duration),
)


def parse_field(key: str, text: str) -> float | None:
    """The SI value of `text` by the unit in the name `key`, or None where the name has no unit.

    >>> parse_field("memory_bytes", "1 KiB")
    1024.0
    """
    for suffix, parse in SUFFIX_PARSERS:
        if key.endswith(suffix):
            return parse(text)
    return None


_RANGES = {"_bytes_per_s": (1.0, 1e18), "_flops_per_s": (1.0, 1e24), "_bytes": (1e-6, 1e21)}
_RANGES |= {"_w": (1e-3, 1e9), "_s": (1e-15, 1e10), "": (1e-18, 1e18)}
"""By the suffix of a name, what a size other than zero lies between. Far beyond any machine: products of
a few of these are finite, and none takes forever to count to."""


def out_of_range(key: str, number: float) -> str | None:
    """What is wrong with a number that no machine has, or None.

    >>> out_of_range("latency_s", 1e300), out_of_range("latency_s", 2e-6), out_of_range("gpus", 0)
    ('this number is out of range, got 1e+300, expected 1e-15 to 1e+10', None, None)
    """
    low, high = next(limits for suffix, limits in _RANGES.items() if key.endswith(suffix))
    if number == 0 or low <= abs(number) <= high:
        return None
    shown = f"{number:g}" if isinstance(number, float) else shorten(number, 30)
    return f"this number is out of range, got {shown}, expected {low:g} to {high:g}"


def require_range(noun: object, low: int, high: int, *keys: str) -> None:
    """Refuse sizes outside low … high; `noun` is a dataclass that holds the named integers.

    Raises ParsimError naming the key.
    """
    for key in keys:
        value = getattr(noun, key)
        if not low <= value <= high:
            raise ParsimError(
                "this size is out of range",
                where=key,
                got=value,
                expected=f"{low} to {high}",
            )


def format_bytes(num_bytes: float) -> str:
    """Bytes for reading, in binary units as memory is sold.

    >>> format_bytes(80 * 2**30)
    '80.0 GiB'
    """
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def format_bandwidth(bytes_per_s: float) -> str:
    """Bytes per second for reading, in decimal units as links are sold.

    >>> format_bandwidth(50e9)
    '50.0 GB/s'
    """
    return f"{_engineering(bytes_per_s)}B/s"


def format_rate(flops_per_s: float) -> str:
    """FLOPs per second for reading.

    >>> format_rate(989.4e12), format_rate(2.25e15)
    ('989.4 TFLOP/s', '2.25 PFLOP/s')
    """
    return f"{_engineering(flops_per_s)}FLOP/s"


def format_duration(seconds: float) -> str:
    """Seconds for reading, in the unit that suits them.

    >>> format_duration(0.00125), format_duration(93.5), format_duration(1800), format_duration(7200)
    ('1.25 ms', '93.5 s', '30.0 min', '2.0 h')
    >>> format_duration(14.0), format_duration(184e-6)
    ('14.0 s', '184 µs')
    """
    if not math.isfinite(seconds):
        return str(seconds)
    magnitude = abs(seconds)
    if magnitude >= 2 * 86400:
        return f"{seconds / 86400:.1f} days"
    if magnitude >= 3600:
        return f"{seconds / 3600:.1f} h"
    if magnitude >= 600:
        return f"{seconds / 60:.1f} min"
    seconds = float(f"{seconds:.3g}")  # first, so that 999.9 ms becomes 1 s
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= size:
            return f"{seconds / size:#.3g} {unit}".replace(". ", " ")
    return f"{seconds * 1e9:.3g} ns" if seconds else "0 s"


def format_count(count: float) -> str:
    """A count for reading, as parameters and tokens are counted.

    >>> format_count(405_853_388_800), format_count(32.50417)
    ('405.9B', '32.5')
    """
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.1f}{suffix}"
    return f"{count:.4g}"


def percent(share: float) -> str:
    """A share for reading, with one decimal below ten per cent.

    >>> percent(3 / 11), percent(0.034)
    ('27%', '3.4%')
    """
    digits = 0 if abs(share) >= 0.0995 or share == 0 else 1
    return f"{100 * share:.{digits}f}%"


def format_usd(usd: float) -> str:
    """US dollars for reading.

    >>> format_usd(123_456_789.0), format_usd(45_600.0), format_usd(812.5)
    ('$123.5M', '$45.6k', '$812')
    """
    for suffix, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(usd) >= size:
            return f"${usd / size:.1f}{suffix}"
    return f"${usd:.0f}"


def _engineering(value: float) -> str:
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            digits = 2 if abs(value) < 10 * size else 1
            return f"{value / size:.{digits}f} {prefix}"
    return f"{value:.1f} "
