"""The kinds of file that parsim reads from outside: valid seeds, and what reads them."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from parsim.model import ModelSpec, num_parameters
from parsim.plan import Job, ParallelPlan

ROOT = Path(__file__).parents[2]
SMALL = ModelSpec(
    name="m", layers=2, hidden=8, heads=2, kv_heads=2, ffn_hidden=8, gated_mlp=True, vocab=16,
    max_seq_len=8,
)  # fmt: skip
PLAN = ParallelPlan(dp=2, pp=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of file."""

    format: str
    """How parsim.fuzz.mutate may take it apart."""
    suffix: str
    seeds: Callable[[], Sequence[bytes]]
    read: Callable[[Path], object]
    """What any command does first with such a file."""
    nudged: bool = False
    """Whether mutants are to be such as a reader may accept."""
    most_s: float = 1.0
    """Processor time that it may take, and another second for each megabyte."""


def files(*names: str) -> Callable[[], Sequence[bytes]]:
    return lambda: [(ROOT / name).read_bytes() for name in names]


def _model(path: Path) -> object:
    from parsim.config import load_model

    return num_parameters(load_model(str(path)))


def _hardware(path: Path) -> object:
    from parsim.config import load_cluster
    from parsim.hardware import describe

    return describe(load_cluster(str(path)))


def _stack(path: Path) -> object:
    from parsim.config import load_stack

    return load_stack(str(path))


def _plan(path: Path) -> object:
    from parsim.plan_file import read_plan

    return read_plan(str(path))


def _step(path: Path) -> object:
    """A prediction or a measurement, compared with itself."""
    from parsim.compare.steps import compare_documents
    from parsim.config import read_json
    from parsim.export.timeline_json import timeline_from_data

    data = read_json(path)
    if isinstance(data, dict) and "timeline" in data:
        timeline_from_data(data["timeline"], where=str(path))
    return compare_documents(data, data, where=(str(path), str(path)))


def _runs(path: Path) -> object:
    from parsim.compare.library import Library
    from parsim.compare.run_models import shipped_models
    from parsim.compare.run_rows import run_of
    from parsim.compare.runs import read_runs
    from parsim.errors import ParsimError

    if not _LIBRARY:
        _LIBRARY.append(Library(models=shipped_models()))
    for row in read_runs(path)[:2]:
        with contextlib.suppress(ParsimError):
            run_of(row, _LIBRARY[0])
    return None


_LIBRARY: list[Any] = []


def _kernels(path: Path) -> object:
    from parsim.compare.kernel_rows import read_kernel_rows

    return read_kernel_rows(path)


def _schedule(path: Path) -> object:
    from parsim.cli.simulated_step import read_schedule

    plan = ParallelPlan(pp=2, schedule="gpipe")
    return read_schedule(path, plan, Job(model=SMALL, seq_len=8, global_batch=2))


def _prices(path: Path) -> object:
    from parsim.capacity_cases import read_prices

    return read_prices(path)


def _settings(path: Path) -> object:
    from parsim.cli.settings import Sources, find_settings

    return find_settings(Sources(config_file=path), {})


def _sweep(path: Path) -> object:
    from parsim.cli.sweep_inputs import read_grids, read_settings

    return read_settings(read_grids(path, {}), {"top": 1, "budget_s": 1.0})


def _recorded(path: Path) -> object:
    from parsim.search.sweep_file import read_recorded, rows_at

    found = read_recorded(path)
    return list(rows_at(path, [line.offset_bytes for line in found.lines.values()]))


def _tokens(path: Path) -> object:
    from parsim.execute.token_file import open_tokens

    dtype = "uint16" if path.suffix == ".bin" else None
    return open_tokens(path, dtype, Job(model=SMALL, seq_len=8, global_batch=2), 3)


def _trace(path: Path) -> object:
    from parsim.traces.traced_run import read_traces

    return read_traces([path])


def _checkpoint(path: Path) -> object:
    """A checkpoint's own description, found in a folder and held against a case."""
    from parsim.execute.launch.checkpoint_folder import check_fits, newest
    from parsim.execute.request import Case
    from parsim.schedule import make_schedule

    folder = path.parent / "checkpoints"
    step = folder / "step-00000001"
    step.mkdir(parents=True, exist_ok=True)
    (step / "parsim.json").write_bytes(path.read_bytes())
    (step / "__0_0.distcp").write_bytes(bytes(9))
    saved = newest(folder)
    if saved is not None:
        plan = ParallelPlan(dp=2)
        job = Job(model=SMALL, seq_len=8, global_batch=4)
        check_fits(saved, Case(job=job, plan=plan, schedule=make_schedule(plan, 2), steps=4))
    return saved


def _index(path: Path) -> object:
    from parsim.execute.training.checkpoint import IndexReader

    folder = path.parent / "index"
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_bytes(path.read_bytes())
    return IndexReader(folder).read_metadata()


def _gpus(path: Path) -> object:
    from parsim.config import read_text
    from parsim.importers.nvidia_smi import parse_gpus

    return parse_gpus(read_text(path))


def _topology(path: Path) -> object:
    from parsim.config import read_text
    from parsim.importers.nvidia_smi import nvlinks_of, parse_topology

    return [nvlinks_of(row, 18) for row in parse_topology(read_text(path)).nvlinks]


def _flags(path: Path) -> object:
    """Texts of flags, `name: text` a line."""
    from parsim.capacity_cases import read_gpu_counts
    from parsim.cli.capacity_inputs import budget_usd, deadline_s
    from parsim.plan_file import read_plan
    from parsim.simulate.fabric import fabric_of

    name, _, text = path.read_bytes().decode("utf-8", "replace").partition(":")
    text = text.strip()
    readers: Mapping[str, Callable[[str], object]] = {
        "plan": read_plan,
        "gpus": read_gpu_counts,
        "deadline": deadline_s,
        "budget": budget_usd,
        "fabric": lambda text: fabric_of(text, _h100(), 16),
    }
    return readers.get(name, read_plan)(text)


def _h100() -> Any:
    from parsim.config import load_cluster

    if not _CLUSTERS:
        _CLUSTERS.append(load_cluster("h100-sxm-80gb"))
    return _CLUSTERS[0]


_CLUSTERS: list[Any] = []

FLAG_SEEDS = (
    "plan:dp=8,tp=8,pp=8,micro_batch=1,schedule=1f1b",
    "plan:dp=2,tp=2,pp=4,stage_split=8-9-9-6,recompute=full,recompute_layers=auto,placement=tp-pp-cp-dp",
    "plan:dp=2,pp=4,vpp=2,schedule=interleaved,zero=1,compression=topk-1,aggregation=layer",
    "gpus:64,128-4096,16k",
    "deadline:90 days",
    "budget:$5M",
    "fabric:fat-tree,oversubscription=4,leaf=32,routing=hash,algorithm=in-switch",
    "fabric:torus,dims=1x2",
)


def _json(data: object) -> bytes:
    return json.dumps(data).encode()


def plan_item(layers: int = 2) -> dict[str, Any]:
    """An ITEM of `parsim plan`, by hand."""
    model = {k: v for k, v in asdict(SMALL).items() if v not in (None, "", ())} | {"layers": layers}
    plan = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(PLAN).items()}
    return {
        "plan": plan,
        "model": model,
        "job": {"seq_len": 8, "global_batch": 4, "precision": "bf16", "optimizer": "adamw"},
        "hardware": "h100-sxm-80gb",
        "hardware_overrides": {"inter_node": "400 Gb/s", "memory": "80 GB"},
        "stack": "megatron-core-2025",
        "rank_hardware": [],
        "step_time_s": 0.5,
        "breakdown_s": {"compute": 0.4, "bubble": 0.1},
    }


def _plans() -> Sequence[bytes]:
    item = plan_item()
    return [_json(item), _json({"plans": [item]}), _json({"plan": {"dp": 2, "pp": 2}})]


def _steps() -> Sequence[bytes]:
    timeline = {
        "source": "measured",
        "title": "t",
        "spans": {
            "rank": [0, 1],
            "stream": {"values": ["compute"], "index": [0, 0]},
            "name": {"values": ["0F0", "1F0"], "index": [0, 1]},
            "start_s": [0.0, 1.0],
            "end_s": [1.0, 2.0],
            "kind": {"values": ["forward"], "index": [0, 0]},
            "stage": [0, 1],
            "micro_batch": [0, 0],
        },
        "memory": {"rank": [0], "time_s": [0.5], "num_bytes": [1e9]},
    }
    return [_json(plan_item()), _json(plan_item() | {"world_size": 4, "timeline": timeline})]


def _run_rows() -> Sequence[bytes]:
    lines = (ROOT / "published_runs/runs.csv").read_bytes().splitlines(keepends=True)
    return [lines[0] + lines[i] + lines[i + 1] for i in (1, len(lines) // 2, len(lines) - 2)]


def _kernel_tables() -> Sequence[bytes]:
    return [
        b"dtype,m,n,k,time_ms\nbf16,128,256,512,0.01\nfp8,4096,4096,4096,0.3\n",
        b"batch,seq_len,heads,kv_heads,head_dim,time_ms\n1,4096,32,8,128,0.5\n",
        b"collective,gpus,bytes,time_ms\nall_reduce,8,1048576,0.05\nalltoall,8,1024,0.02\n",
    ]


def _recorded_rows() -> Sequence[bytes]:
    row = {"scenario": {"gpus": 8}, "made_of": {"model": "a"}, "status": "ok", "plans": [plan_item()]}
    return [_json(row) + b"\n" + _json(row | {"scenario": {"gpus": 16}}) + b"\n"]


def _npy() -> Sequence[bytes]:
    import numpy as np

    found = []
    for dtype in ("uint16", "int32"):
        out = io.BytesIO()
        np.save(out, np.arange(40, dtype=dtype) % 16)
        found.append(out.getvalue())
    return found


def _traces() -> Sequence[bytes]:
    def event(category: str, name: str, ts: float, dur: float, **args: object) -> dict[str, object]:
        return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": 1, "ts": ts, "dur": dur,
                "args": args}  # fmt: skip

    events = [
        event("user_annotation", "ProfilerStep#1", 0, 100),
        event("cpu_op", "aten::mm", 5, 20, **{"External id": 1}),
        event("cuda_runtime", "cudaLaunchKernel", 10, 2, correlation=7),
        event("kernel", "gemm", 20, 30, correlation=7, stream=7),
        event("kernel", "ncclDevKernel_AllReduce", 60, 10, correlation=8,
              **{"Process Group Name": "1", "Process Group Ranks": "[0, 1]"}),
    ]  # fmt: skip
    info = {
        "rank": 0,
        "world_size": 2,
        "pg_config": [{"pg_name": "1", "pg_desc": "dp", "ranks": [0, 1]}],
    }
    whole = {"schemaVersion": 1, "distributedInfo": info, "host_name": "a", "baseTimeNanoseconds": 5,
             "traceEvents": events}  # fmt: skip
    return [_json(whole), _json([e for e in events if e["cat"] != "kernel"])]


def _manifests() -> Sequence[bytes]:
    manifest = {
        "schema_version": 1, "step": 1, "plan": "dp=2", "plan_since": 0,
        "identity": {"model.layers": 2, "seq_len": 8},
        "steps": [{"seconds": 1.0, "loss": 2.0, "waited_s": 0.0}],
        "files": {"__0_0.distcp": 9},
    }  # fmt: skip
    return [_json(manifest)]


def _indices() -> Sequence[bytes]:
    import tempfile

    import torch
    import torch.distributed.checkpoint as dcp

    with tempfile.TemporaryDirectory() as folder:
        dcp.save({"w": torch.zeros(2, 3), "b": torch.zeros(3)}, checkpoint_id=folder, no_dist=True)
        return [(Path(folder) / ".metadata").read_bytes()]


def _configs() -> Sequence[bytes]:
    configs = json.loads((ROOT / "tests/unit/huggingface_configs.json").read_text())
    return [_json(config.get("config", config)) for config in configs.values()]


def _topologies() -> Sequence[bytes]:
    from tests.unit.test_nvidia_smi import matrix

    return [matrix(4, "NV18", 2).encode(), matrix(2, "SYS").encode()]


def _machine() -> Sequence[bytes]:
    """A hardware profile with every table that one can have, small enough to be read quickly."""
    tables = """
[kernels.measured_memory_bound]
points = [[1e3, 1e-6], [1e6, 1e-5]]
[[kernels.measured_gemm]]
dtype = "bf16"
points = [[16, 16, 16, 1e-6], [512, 512, 512, 1e-5]]
[[kernels.measured_collective]]
kind = "all_reduce"
gpus = 2
points = [[1024, 1e-5], [1048576, 1e-4]]
[price]
usd_per_gpu_hour = 2.5
source = "a list"
date = "2026-01-01"
"""
    text = (ROOT / "hardware_profiles/h100-sxm-80gb.toml").read_text()
    facts = text[: text.index("[kernels")]
    fitted = (ROOT / "hardware_profiles/a100-pcie-80gb.toml").read_bytes()
    return [(facts + tables).encode() if "[price]" not in facts else facts.encode(), fitted]


SWEEP = b"""[[sweep]]
model = ["tiny-llama-8l"]
hardware = "h100-sxm-80gb"
gpus = "8-64"
global_batch = [32, 64]
max_tp = 8
[[sweep]]
model = "tiny-llama-8l"
hardware = "h100-sxm-80gb"
plan = ["dp=2,tp=2", "dp=4"]
"""

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "model": Kind(format="toml", suffix=".toml", read=_model,
                      seeds=files("models/tiny-llama-8l.toml", "models/deepseek-v3.toml",
                                   "models/gpt-oss-120b.toml")),
        "hardware": Kind(format="toml", suffix=".toml", read=_hardware, seeds=_machine),
        "stack": Kind(format="toml", suffix=".toml", read=_stack,
                      seeds=files("hardware_profiles/stacks/megatron-core-2025.toml",
                                   "hardware_profiles/stacks/torchtitan.toml")),
        "config": Kind(format="json", suffix=".json", read=_model, seeds=_configs),
        "plan": Kind(format="json", suffix=".json", read=_plan, seeds=_plans),
        "step": Kind(format="json", suffix=".json", read=_step, seeds=_steps),
        "runs": Kind(format="csv", suffix=".csv", read=_runs, seeds=_run_rows),
        "kernels": Kind(format="csv", suffix=".csv", read=_kernels, seeds=_kernel_tables),
        "kernels-gz": Kind(format="csv.gz", suffix=".csv.gz", read=_kernels, seeds=_kernel_tables),
        "schedule": Kind(format="csv", suffix=".csv", read=_schedule,
                         seeds=lambda: [b"0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n",
                                        b"0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
                                        b"1RECV_F0,1F0,1RECV_F1,1F1,1B0,1SEND_B0,1B1,1SEND_B1\n"]),
        "prices": Kind(format="csv", suffix=".csv", read=_prices,
                       seeds=lambda: [b"hardware,usd_per_gpu_hour,source,date\n"
                                      b"h100-sxm-80gb,2.5,a list,2026-01-01\nmi300x,$3,,\n"]),
        "settings": Kind(format="toml", suffix=".toml", read=_settings,
                         seeds=lambda: [b'model = "llama-3.1-8b"\nhardware = "h100-sxm-80gb"\n'
                                        b'gpus = 64\nglobal-batch = 512\nbudget_s = 1.5\n']),
        "sweep": Kind(format="toml", suffix=".toml", read=_sweep, seeds=lambda: [SWEEP]),
        "sweep-csv": Kind(format="csv", suffix=".csv", read=_sweep,
                          seeds=lambda: [b"model,hardware,gpus,global_batch\n"
                                         b"tiny-llama-8l,h100-sxm-80gb,8,32\n"]),
        "recorded": Kind(format="json", suffix=".jsonl", read=_recorded, seeds=_recorded_rows),
        "tokens": Kind(format="binary", suffix=".npy", read=_tokens, seeds=_npy),
        "tokens-bin": Kind(format="binary", suffix=".bin", read=_tokens,
                           seeds=lambda: [bytes(i % 16 if i % 2 == 0 else 0 for i in range(80))]),
        "trace": Kind(format="json", suffix=".json", read=_trace, seeds=_traces),
        "trace-gz": Kind(format="json.gz", suffix=".json.gz", read=_trace, seeds=_traces),
        "checkpoint": Kind(format="json", suffix=".json", read=_checkpoint, seeds=_manifests),
        "index": Kind(format="binary", suffix=".metadata", read=_index, seeds=_indices),
        "gpus": Kind(format="text", suffix=".txt", read=_gpus,
                     seeds=lambda: [b"NVIDIA H100 80GB HBM3, 81559 MiB\n" * 2]),
        "topology": Kind(format="text", suffix=".txt", read=_topology, seeds=_topologies),
        "flags": Kind(format="text", suffix=".txt", read=_flags,
                      seeds=lambda: [seed.encode() for seed in FLAG_SEEDS]),
    }
)  # fmt: skip
