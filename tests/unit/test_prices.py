"""Prices from a CSV file, for `parsim capacity --prices`."""

from __future__ import annotations

from pathlib import Path

import pytest

from parsim.capacity_cases import read_cases, read_prices
from parsim.errors import ParsimError
from parsim.hardware import Price
from parsim.setup import Flags

HEADER = "hardware,usd_per_gpu_hour,source,date\n"


def prices(tmp_path: Path, text: str) -> dict[str, Price]:
    path = tmp_path / "prices.csv"
    path.write_text(text)
    return read_prices(path)


def test_a_listed_price_goes_before_the_profiles_and_a_flag_before_both(tmp_path: Path) -> None:
    listed = prices(tmp_path, HEADER + "h100-sxm-80gb,$2.10,our contract,2026-11-01\n")
    flags, machines = Flags(global_batch=64), ("h100-sxm-80gb", "b200-sxm-180gb")

    def found(usd: float | None) -> list[Price | None]:
        cases = read_cases(["llama-3.1-8b"], machines, flags, [8], "1B", usd, listed)
        return [case.costs.cluster.price for case in cases]

    h100, b200 = found(None)
    assert h100 == Price(usd_per_gpu_hour=2.10, source="our contract", date="2026-11-01")
    assert b200 is not None
    assert b200.source != "our contract"
    assert [p.usd_per_gpu_hour for p in found(1.5) if p is not None] == [1.5, 1.5]


def test_source_and_date_may_be_left_out(tmp_path: Path) -> None:
    (price,) = prices(tmp_path, "usd_per_gpu_hour,hardware\n3,my.toml\n").values()
    assert (price.usd_per_gpu_hour, price.date) == (3.0, "")
    assert price.source.endswith("prices.csv")


@pytest.mark.parametrize(
    "text",
    [
        "", "hardware,price\nx,1\n", HEADER + "x,free\n", HEADER + "x,-1\n", HEADER + "x,0\n",
        HEADER + "x,nan\n", HEADER + "x,1\nx,2\n", HEADER + ",1\n", HEADER + "x\n",
    ],
)  # fmt: skip
def test_what_is_no_price_is_refused_by_its_row(tmp_path: Path, text: str) -> None:
    with pytest.raises(ParsimError) as caught:
        prices(tmp_path, text)
    assert "prices.csv" in str(caught.value.where)
