"""`parsim sweep`: many models, clusters, sizes and batches in one go, on all cores or a cluster."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.capacity_cases import read_prices
from parsim.cli.constraints import Allowed, with_constraints
from parsim.cli.options import JsonOption
from parsim.cli.output import document, noticing_interrupts, progress, say
from parsim.cli.output_paths import to_file, to_picture
from parsim.cli.sweep_inputs import read_grids, read_settings, scenarios
from parsim.cli.sweep_report import (
    Rows,
    points_of,
    print_document,
    print_report,
    read_rows,
    write_csv,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from parsim.hardware import Price
    from parsim.search.parallel import Pool
    from parsim.search.sweep_file import Recorded


def _list(flag: str, what: str) -> Any:
    return typer.Option(f"--{flag}", help=f"{what}, separated by commas.")


@with_constraints
def sweep(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Scenarios: .toml with tables [[sweep]], or .csv."),
    ] = None,
    model: Annotated[str | None, _list("model", "Shipped names or files")] = None,
    hardware: Annotated[str | None, _list("hardware", "Shipped profiles or files")] = None,
    gpus: Annotated[
        str | None, typer.Option("--gpus", help="Numbers of GPUs: 512,768 or 256-4096, doubling.")
    ] = None,
    global_batch: Annotated[str | None, _list("global-batch", "Sequences in a step")] = None,
    seq_len: Annotated[
        str | None, _list("seq-len", "Tokens in a sequence [default: the model's own]")
    ] = None,
    stack: Annotated[
        str | None, _list("stack", "Training software [default: the hardware's own]")
    ] = None,
    precision: Annotated[str | None, _list("precision", "dtypes of the GEMMs")] = None,
    inter_node: Annotated[str | None, _list("inter-node", 'Bandwidths between nodes, "400Gb/s"')] = None,
    intra_node: Annotated[str | None, _list("intra-node", 'Bandwidths inside a node, "450GB/s"')] = None,
    memory: Annotated[str | None, _list("memory", 'Memory of one device, "80GB"')] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option("--plan", help="Simulate this plan instead of searching; may be repeated."),
    ] = None,
    *,
    allowed: Allowed,
    top: Annotated[int, typer.Option("--top", min=1, help="Plans of each scenario.")] = 1,
    budget_s: Annotated[
        float, typer.Option("--budget-s", min=0, help="Stop proving a plan after so many seconds.")
    ] = 60.0,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes [default: one a core].")
    ] = None,
    backend: Annotated[
        str, typer.Option("--backend", help="Who works: processes, or a dask or ray cluster.")
    ] = "processes",
    address: Annotated[
        str | None, typer.Option("--address", help="Of the cluster [default: one on this machine].")
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Rows are appended here as they come (JSON lines).", callback=to_file
        ),
    ] = Path("sweep.jsonl"),
    prices: Annotated[
        Path | None,
        typer.Option(
            "--prices", help="CSV of hardware,usd_per_gpu_hour: dollars for a million tokens, too."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what the output file holds already.")
    ] = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write all rows as a table.", callback=to_file)
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option(
            "--chart", help="Draw tokens/s/GPU over GPUs: .png, .svg or .pdf.", callback=to_picture
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Plan many scenarios: all combinations of models, hardware, sizes, batches and more.

    Each is a search as of `parsim plan`, or with --plan a replay as of `parsim simulate`. One that has
    no plan is a row with the reason. Exit status 1 where none has a plan that fits.

    \b
    Examples:
      parsim sweep --model llama-3.1-8b,llama-3.1-70b --hardware h100-sxm-80gb,b200-sxm-180gb \\
          --gpus 64-1024 --global-batch 512 --csv sweep.csv --chart sweep.png
      parsim sweep scenarios.toml -o scenarios.jsonl --resume
    """
    pool = _pool(backend, jobs, address)
    listed = read_prices(prices)
    axes = {
        "model": model, "hardware": hardware, "plan": plan, "gpus": gpus, "global_batch": global_batch,
        "seq_len": seq_len, "stack": stack, "precision": precision, "inter_node": inter_node,
        "intra_node": intra_node, "memory": memory,
    }  # fmt: skip
    given = {key: value for key, value in axes.items() if value} | allowed.given()
    wanted = read_settings(read_grids(file, given), {"top": top, "budget_s": budget_s})
    partial = _run(wanted, _todo(wanted, output, resume), output, pool)
    rows = read_rows(output, wanted)
    if as_json:
        inputs = given | {"file": file and str(file), "top": top, "budget_s": budget_s}
        inputs["prices"] = str(prices) if prices else None
        whole = document("sweep", inputs, {"partial": partial, "counts": rows.counts})
        print_document(whole, rows, listed)
    elif rows.settings:
        print_report(rows, listed)
    for path in _written(rows, csv, chart, listed):
        say(f"wrote {path}")
    if partial:
        done = f"{len(rows.settings):,} of {len(wanted):,} scenarios are done"
        say(f"interrupted: {done}; the same command with --resume goes on")
        raise typer.Exit(130)
    if "ok" not in rows.counts:
        raise typer.Exit(1)


def _pool(backend: str, jobs: int | None, address: str | None) -> Pool:
    from parsim.errors import ParsimError, did_you_mean
    from parsim.search.parallel import BACKENDS, Pool
    from parsim.search.workers import cores

    for known in BACKENDS:
        if backend == known:
            return Pool(backend=known, jobs=jobs or cores(most=1024), address=address)
    raise ParsimError(
        "unknown backend",
        where="--backend",
        got=backend,
        expected=", ".join(BACKENDS),
        hint=did_you_mean(backend, BACKENDS),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Todo:
    """What is left to do of a sweep, and where the rows of the file end."""

    settings: Sequence[Mapping[str, Any]]
    end_bytes: int


def _todo(wanted: Sequence[Mapping[str, Any]], path: Path, resume: bool) -> _Todo:
    """Scenarios without a row, and those whose row no longer holds; says on stderr what is found.

    Raises ParsimError where the file exists and nobody said to resume.
    """
    from parsim.errors import ParsimError
    from parsim.search.sweep_file import read_recorded

    if path.exists() and not resume:
        raise ParsimError(
            "there is a sweep in this file already",
            where=str(path),
            hint="--resume goes on with it; -o takes another file",
        )
    recorded = read_recorded(path)
    if recorded.torn:
        say(f"the last line of {path} is torn: its scenario runs again")
    left, changed = [], Counter[str]()
    for scenario in scenarios(wanted) if recorded.lines else ():
        line = recorded.lines.get(scenario.key)
        made_of = scenario.made_of()
        if line is None or line.status == "failed":
            left.append(scenario.settings)
        elif line.made_of != made_of:
            left.append(scenario.settings)
            keys = sorted({*made_of, *line.made_of})
            changed.update(key for key in keys if made_of.get(key) != line.made_of.get(key))
    _say_recorded(recorded, wanted, len(left), changed, path)
    return _Todo(settings=left if recorded.lines else wanted, end_bytes=recorded.end_bytes)


def _say_recorded(
    recorded: Recorded,
    wanted: Sequence[Mapping[str, Any]],
    left: int,
    changed: Mapping[str, int],
    path: Path,
) -> None:
    from parsim.search.sweep import key_of

    if not recorded.lines:
        return
    say(f"{len(wanted) - left:,} of {len(wanted):,} scenarios are done already in {path}")
    for key, count in changed.items():
        say(f"{count:,} run again: another {key} than when they were done")
    others = len(recorded.lines.keys() - {key_of(settings) for settings in wanted})
    if others:
        say(f"{others:,} rows of other scenarios stay in the file, and out of the answer")


def _run(wanted: Sequence[Mapping[str, Any]], todo: _Todo, path: Path, pool: Pool) -> bool:
    """Append the rows of what is left; returns whether the user interrupted."""
    from parsim import __version__
    from parsim.errors import ParsimError
    from parsim.search.parallel import as_done
    from parsim.search.sweep import answer
    from parsim.search.sweep_file import appending

    done = len(wanted) - len(todo.settings)
    with (
        appending(path, todo.end_bytes) as append,
        noticing_interrupts() as interrupted,
        progress() as report,
    ):
        try:
            report("scenarios", done, len(wanted))
            with closing(as_done(answer, scenarios(todo.settings), pool)) as rows:
                for row in rows:
                    if interrupted():  # a search takes it as its end: this row is a part
                        raise KeyboardInterrupt
                    if row["made_of"]["version"] != __version__:
                        raise ParsimError(
                            "the workers run another version of parsim",
                            where="--address",
                            got=row["made_of"]["version"],
                            expected=__version__,
                        )
                    append(row)
                    done += 1
                    report("scenarios", done, len(wanted))
        except KeyboardInterrupt:
            return True
    return False


def _written(
    rows: Rows, csv: Path | None, chart: Path | None, prices: Mapping[str, Price]
) -> list[Path]:
    """The files that were asked for."""
    written = []
    if csv is not None:
        write_csv(rows, csv, prices)
        written.append(csv)
    if chart is not None:
        points = points_of(rows)
        if points:
            from parsim.charts.sweep import draw_sweep

            draw_sweep(points, chart)
            written.append(chart)
        else:
            say(f"nothing to draw in {chart}")
    return written
