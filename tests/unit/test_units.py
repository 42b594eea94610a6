"""Units: what people write becomes SI and back, and nothing else is let in."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsim import units
from parsim.errors import ParsimError

PREFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
tenths = st.integers(0, 10**7).map(lambda n: n / 10)


@given(value=tenths, prefix=st.sampled_from(sorted(PREFIXES)), space=st.sampled_from(["", " ", "  "]))
def test_the_same_number_in_every_unit(value: float, prefix: str, space: str) -> None:
    expected = pytest.approx(value * PREFIXES[prefix], rel=1e-15)
    assert units.parse_bytes(f"{value}{space}{prefix}B") == expected
    assert units.parse_bandwidth(f"{value}{space}{prefix}B/s") == expected
    assert units.parse_rate(f"{value}{space}{prefix}FLOP/s") == expected
    assert units.parse_power(f"{value}{space}{prefix}W") == expected


@given(value=tenths, prefix=st.sampled_from(sorted(PREFIXES)))
def test_eight_bits_are_a_byte(value: float, prefix: str) -> None:
    in_bits = units.parse_bandwidth(f"{value} {prefix}b/s")
    assert in_bits * 8 == pytest.approx(units.parse_bandwidth(f"{value} {prefix}B/s"), rel=1e-15)
    for spelling in ("bit/s", "bps"):
        assert units.parse_bandwidth(f"{value} {prefix}{spelling}") == in_bits


@given(value=tenths, prefix=st.sampled_from(sorted(BINARY)))
def test_binary_prefixes(value: float, prefix: str) -> None:
    assert units.parse_bytes(f"{value} {prefix}B") == pytest.approx(value * BINARY[prefix], rel=1e-15)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250 ns", 2.5e-7),
        ("5 us", 5e-6),
        ("5 µs", 5e-6),
        ("1.5 ms", 1.5e-3),
        ("90s", 90.0),
        ("30 min", 1800.0),
        ("1.5 h", 5400.0),
        ("54 days", 54 * 86400.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


def test_a_decimal_is_the_float_nearest_to_it() -> None:
    # 66.9 * 1e12 in floats is 66900000000000.01.
    assert units.parse_rate("66.9 TFLOP/s") == 66.9e12
    assert units.parse_duration("0.9 us") == 0.9e-6


@given(st.integers(0, 10**6), st.sampled_from([("k", 10**3), ("M", 10**6), ("B", 10**9), ("T", 10**12)]))
def test_counts_with_decimals_are_exact(thousandths: int, suffix: tuple[str, int]) -> None:
    # 2.01 * 1000 in floats is 2009.9999999999998, which is no reason to refuse "2.01k".
    text = f"{thousandths // 1000}.{thousandths % 1000:03d}{suffix[0]}"
    assert units.parse_count(text) == thousandths * suffix[1] // 1000


@pytest.mark.parametrize("text", ["1.5", "2.0001k", "half", "", "12 apples", "1e300", "3T GB"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ParsimError):
        units.parse_count(text)


@pytest.mark.parametrize(
    ("parse", "wrong"),
    [
        (
            units.parse_bytes,
            ["80 Gb", "80 GHz", "GB", "80 80 GB", "nan GB", "inf B", "80,5 GB", "1e999 GB"],
        ),
        (units.parse_bandwidth, ["400", "400 G", "400 GB", "Gb/s", "400 Gb/min", "400 gb/s"]),
        (units.parse_rate, ["989", "989 T", "989 TOPS", "989 TB/s", "٣ TFLOP/s"]),
        (units.parse_duration, ["5", "5 years", "5 m", "1e999999999 s"]),
        (units.parse_power, ["700", "700 Wh", "700 J"]),
    ],
)
def test_a_wrong_unit_says_what_would_be_right(parse: Callable[[str], float], wrong: list[str]) -> None:
    for text in wrong:
        with pytest.raises(ParsimError) as error:
            parse(text)
        assert error.value.got == text
        assert error.value.expected


@given(st.text(max_size=30))
def test_any_text_is_a_finite_number_or_an_explained_error(text: str) -> None:
    for parse in (units.parse_bytes, units.parse_bandwidth, units.parse_duration, units.parse_count):
        try:
            number = parse(text)
        except ParsimError:
            continue
        assert math.isfinite(number)


@given(
    st.from_regex(r"[+-]?[0-9]{1,20}(\.[0-9]{0,9})?(e[+-]?[0-9]{1,12})? ?[kMGT]?i?B?", fullmatch=True)
)
def test_long_and_large_numbers_do_no_harm(text: str) -> None:
    for parse in (units.parse_bytes, units.parse_count):
        try:
            number = parse(text)
        except ParsimError:
            continue
        assert math.isfinite(number)


@given(st.floats(1e4, 9e17))
def test_what_is_printed_reads_back_to_the_digits_shown(value: float) -> None:
    assert units.parse_bytes(units.format_bytes(value)) == pytest.approx(value, rel=0.05)
    assert units.parse_bandwidth(units.format_bandwidth(value)) == pytest.approx(value, rel=0.005)
    assert units.parse_rate(units.format_rate(value)) == pytest.approx(value, rel=0.005)
    assert float(units.parse_count(units.format_count(value))) == pytest.approx(value, rel=0.05)


@given(st.floats(1e-9, 1e8))
def test_durations_read_back(seconds: float) -> None:
    shown = units.format_duration(seconds)
    assert "e+" not in shown, "a power of ten is no way to print a time"
    assert units.parse_duration(shown) == pytest.approx(seconds, rel=0.03)


def test_the_key_tells_the_unit() -> None:
    assert units.parse_field("memory_bytes", "80 GB") == 80e9
    assert units.parse_field("bandwidth_bytes_per_s", "400 Gb/s") == 50e9
    assert units.parse_field("peak_flops_per_s", "312 TFLOP/s") == 312e12
    assert units.parse_field("latency_s", "5 us") == 5e-6
    assert units.parse_field("power_w", "0.7 kW") == 700
    assert units.parse_field("source", "5 us") is None
