"""What a capacity question is about: cases, prices and failures from names and texts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from parsim.setup import Flags, load_setup, model_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from parsim.cost.checkpoint import Checkpointing, Failures
    from parsim.hardware import Cluster, Price
    from parsim.model import ModelSpec
    from parsim.search.capacity import Case, Limits, LongRunOf, Option
    from parsim.simulate.prediction import Prediction
    from parsim.stack import Stack

GPU_MTBF = "50677h"
"""Mean time between failures of a GPU with its share of node and network: 419 unexpected interruptions
in 54 days of 16,384 H100s (Llama team 2024, arXiv 2407.21783, table 5)."""


def read_cases(
    models: Sequence[str | ModelSpec],
    machines: Sequence[str | Cluster],
    flags: Flags,
    counts: Sequence[int],
    tokens: int | str,
    usd_per_gpu_hour: float | None,
    prices: Mapping[str, Price],
) -> Iterator[Case]:
    """Cases of all models, machines and numbers of GPUs; `prices` by hardware go before a profile's own,
    and usd_per_gpu_hour before both. `tokens` to train on is a number, or a text such as "15T" or "20x".
    """
    from parsim.cost.stage import CostModel
    from parsim.errors import ParsimError
    from parsim.hardware import with_overrides
    from parsim.plan import MAX_GPUS
    from parsim.search.capacity import Case, usual_batch

    for model in models:
        spec = model_of(replace(flags, model=model))
        budget = _token_budget(tokens, spec)
        seq_len = spec.max_seq_len if flags.seq_len is None else flags.seq_len
        batch = flags.global_batch or usual_batch(budget, max(1, seq_len))
        for machine in machines:
            setup = load_setup(replace(flags, model=spec, hardware=machine, global_batch=batch))
            hardware = setup.origin["hardware"]
            cluster = replace(setup.cluster, price=prices.get(hardware, setup.cluster.price))
            cluster = with_overrides(cluster, usd_per_gpu_hour=usd_per_gpu_hour)
            costs = CostModel(setup.job.model, cluster, setup.stack)
            for gpus in counts:
                if not 1 <= gpus <= MAX_GPUS:
                    raise ParsimError("the number of GPUs is out of range", where="gpus", got=gpus,
                                      expected=f"1 to {MAX_GPUS}")  # fmt: skip
                yield Case(
                    job=setup.job, tokens=budget, costs=costs, hardware=hardware, gpus=int(gpus),
                    origin=setup.origin,
                )  # fmt: skip


def read_names(text: str, flag: str) -> list[str]:
    """Names separated by commas, each once; raises ParsimError where there are none."""
    from parsim.errors import ParsimError

    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise ParsimError("this names nothing", where=flag, got=text)
    return names


def read_gpu_counts(text: str) -> list[int]:
    """Numbers of GPUs, ascending, from a list of numbers and ranges that double."""
    from parsim.errors import ParsimError
    from parsim.plan import MAX_GPUS
    from parsim.units import parse_count

    counts: set[int] = set()
    for part in read_names(text, "--gpus"):
        low_text, dash, high_text = part.partition("-")
        try:
            low = parse_count(low_text)
            high = parse_count(high_text) if dash else low
        except ParsimError as error:
            raise error.at("--gpus") from None
        if not 1 <= low <= high <= MAX_GPUS:
            raise ParsimError(
                "the number of GPUs is out of range",
                where="--gpus",
                got=part,
                expected=f"1 to {MAX_GPUS}, or a range such as 256-4096",
            )
        while low <= high:
            counts.add(low)
            low *= 2
    return sorted(counts)


def _token_budget(tokens: int | str, spec: ModelSpec) -> int:
    from parsim.errors import ParsimError
    from parsim.search.capacity import chinchilla_tokens
    from parsim.units import parse_count

    text = str(tokens).strip()
    factor = text.removesuffix("x")
    try:
        per_parameter = factor != text
        budget = chinchilla_tokens(spec, float(factor)) if per_parameter else parse_count(text)
    except ParsimError as error:
        raise error.at("--tokens") from None
    except (ValueError, OverflowError):
        budget = 0
    if not 0 < budget < 2**63:
        raise ParsimError(
            "a training has some tokens", where="--tokens", got=text, expected="15.6T, or 20x"
        )
    return budget


def check_numbers(pue: float | None, usd_per_gpu_hour: float | None) -> None:
    from parsim.errors import ParsimError

    if pue is not None and not 1 <= pue <= 10:
        raise ParsimError(
            "a facility draws at least what its servers do", where="--pue", got=pue, expected="1 to 10"
        )
    if usd_per_gpu_hour is not None and not 0 < usd_per_gpu_hour < 1e6:
        raise ParsimError("a price is some dollars", where="--usd-per-gpu-hour", got=usd_per_gpu_hour)


def check_prices(limits: Limits, cases: Sequence[Case]) -> None:
    """A budget says nothing of hardware without a price."""
    from parsim.errors import ParsimError

    unknown = [case.hardware for case in cases if case.costs.cluster.price is None]
    if limits.budget_usd is not None and unknown:
        raise ParsimError(
            "a budget needs prices, and this profile has none",
            where="--budget",
            got=unknown[0],
            hint="--usd-per-gpu-hour, --prices FILE, or a [price] in the profile",
        )


def read_prices(path: Path | None) -> dict[str, Price]:
    """What a GPU-hour costs by hardware, from a CSV file: hardware, usd_per_gpu_hour, source, date.

    Raises ParsimError for a price that is none, or a hardware that is priced twice.
    """
    from parsim.compare.csv_table import read_csv
    from parsim.errors import ParsimError
    from parsim.hardware import Price
    from parsim.units import parse_usd

    prices: dict[str, Price] = {}
    if path is None:
        return prices
    rows = read_csv(path, required=("hardware", "usd_per_gpu_hour"), optional=("source", "date"))
    for number, row in enumerate(rows, 2):
        name, where = row.get("hardware", "").strip(), f"{path}, row {number}"
        if not name or name in prices:
            what = "a hardware is priced twice" if name else "a price without a hardware"
            raise ParsimError(what, where=where, got=name or row.get("usd_per_gpu_hour"))
        source = row.get("source", "").strip() or str(path)
        try:
            usd = parse_usd(row.get("usd_per_gpu_hour", ""))
            check_numbers(None, usd)
            price = Price(usd_per_gpu_hour=usd, source=source, date=row.get("date", "").strip())
        except ParsimError as error:
            raise error.at(where) from None
        prices[name] = price
    return prices


def read_long_runs(text: str) -> tuple[LongRunOf, Callable[[Option], tuple[str, ...]]]:
    """Checkpoints and failures for a step, by the closed form; and what they assume, in words."""
    from parsim.errors import ParsimError
    from parsim.simulate.long_run import read_long_run

    first, *settings = (part.strip() for part in text.split(","))
    if "/" in first:
        raise ParsimError(
            "the failures of a job depend on its size, and here are jobs of many sizes",
            where="--mtbf",
            got=first,
            expected="the mean time between failures of a GPU, such as 50000h",
        )
    for setting in settings:
        if setting.split("=")[0].strip() in ("runs", "duration"):
            raise ParsimError(
                "goodput is a closed form here, nothing is simulated",
                where="--mtbf",
                got=setting,
                hint="`parsim simulate --mtbf` simulates one plan",
            )

    def long_run(prediction: Prediction, stack: Stack) -> tuple[Checkpointing, Failures]:
        request = read_long_run(text, prediction, stack, 0)
        return request.checkpointing, request.failures

    def assumed(option: Option) -> tuple[str, ...]:
        request = read_long_run(text, option.prediction, option.case.costs.stack, 0)
        return tuple(words for words in request.assumed if not words.startswith("a run of"))

    return long_run, assumed
