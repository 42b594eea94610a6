"""Plans and predictions from Python: `import parsim; parsim.plan(...)`, with the command line's nouns.

Names and paths are those of the command line's flags; everything else is a noun or a number. Errors are
ParsimError, with the same texts.
"""

from __future__ import annotations

from typing import Any

from parsim.config import dump_json, load_cluster, load_model, load_stack
from parsim.cost.stage import CostModel
from parsim.export.timeline_json import timeline_to_data
from parsim.hardware import Cluster, default_precision, peak_flops_per_s
from parsim.model import ModelSpec
from parsim.plan import Job, ParallelPlan, parse_plan
from parsim.schedule.check import check_plan
from parsim.search.search import SearchResult, search
from parsim.search.space import Constraints
from parsim.simulate.prediction import Prediction, predict
from parsim.timeline import Timeline

__all__ = ["load_cluster", "load_model", "plan", "simulate", "to_data", "to_json"]


def plan(
    *,
    model: str | ModelSpec,
    hardware: str | Cluster,
    gpus: int,
    global_batch: int,
    seq_len: int | None = None,
    stack: str | None = None,
    precision: str | None = None,
    constraints: Constraints | None = None,
    top: int = 10,
    budget_s: float = 60.0,
    processes: int | None = 1,
) -> SearchResult:
    """The `top` fastest plans that fit, fastest first, as `parsim plan` finds them.

    `global_batch` is in sequences of `seq_len` tokens (default: the model's own), `budget_s` the seconds
    after which nothing more is proven; `processes` None takes one a core, in a script that is guarded by
    `if __name__ == "__main__"`.

    Raises ParsimError for bad input, and its subclass NothingFits where no plan fits.
    """
    job, costs = _setup(model, hardware, global_batch, seq_len, stack, precision)
    return search(
        job, gpus, costs, constraints=constraints, top=top, budget_s=budget_s, processes=processes
    )


def simulate(
    plan: str | ParallelPlan,
    *,
    model: str | ModelSpec,
    hardware: str | Cluster,
    global_batch: int | None = None,
    seq_len: int | None = None,
    stack: str | None = None,
    precision: str | None = None,
) -> tuple[Prediction, Timeline]:
    """One step of a plan, a noun or the short form "dp=8,tp=4", as `parsim simulate` replays it.

    `global_batch` is in sequences; without one each pipeline runs 2·pp micro-batches. A short form that
    does not name tp_overlap has the stack's usual one.

    Raises ParsimError for bad input and for a plan that is not legal; one that does not fit in memory is
    simulated all the same (`Prediction.fits`).
    """
    from dataclasses import replace

    noun = parse_plan(plan) if isinstance(plan, str) else plan
    batch = 2 * noun.pp * noun.dp * noun.micro_batch if global_batch is None else global_batch
    job, costs = _setup(model, hardware, batch, seq_len, stack, precision)
    if isinstance(plan, str) and "tp_overlap" not in plan:
        noun = replace(noun, tp_overlap=noun.tp > 1 and costs.stack.default_tp_overlap)
    check_plan(job, noun, costs.cluster)
    return predict(job, noun, costs)


def _setup(
    model: str | ModelSpec,
    hardware: str | Cluster,
    global_batch: int,
    seq_len: int | None,
    stack: str | None,
    precision: str | None,
) -> tuple[Job, CostModel]:
    """The job, and the cost model of its model on a cluster with the software on it."""
    spec = load_model(model) if isinstance(model, str) else model
    cluster = load_cluster(hardware) if isinstance(hardware, str) else hardware
    dtype = precision or default_precision(cluster.device)
    peak_flops_per_s(cluster.device, dtype)
    job = Job(
        model=spec,
        seq_len=spec.max_seq_len if seq_len is None else seq_len,
        global_batch=global_batch,
        precision=dtype,
    )
    return job, CostModel(spec, cluster, load_stack(stack or cluster.default_stack))


def to_data(noun: SearchResult | Prediction | Timeline) -> dict[str, Any]:
    """A noun as plain data: of a prediction a plan file's ITEM, of a search its `space` and `plans`."""
    if isinstance(noun, Prediction):
        return noun.to_item()
    if isinstance(noun, Timeline):
        return timeline_to_data(noun)
    from dataclasses import asdict

    return {
        "space": asdict(noun.space),
        "optimal": noun.optimal,
        "search_s": noun.search_s,
        "plans": [each.to_item() for each in noun.plans],
    }


def to_json(noun: SearchResult | Prediction | Timeline) -> str:
    """The JSON text of `to_data`."""
    return dump_json(to_data(noun))
