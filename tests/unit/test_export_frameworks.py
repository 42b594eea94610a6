"""Exports to training frameworks: what is refused, what is listed, and names that stay names.

What the frameworks themselves make of the texts is in tests/integration/test_export_frameworks.py.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parsim.config import load_model, load_stack
from parsim.errors import ParsimError
from parsim.export.deepspeed import deepspeed_config
from parsim.export.megatron import megatron_script
from parsim.export.target import Exported
from parsim.export.torchtitan import torchtitan_module
from parsim.model import ModelSpec
from parsim.plan import Job, ParallelPlan, parse_plan

Write = Callable[..., Exported]
NASTY = (
    "../../x",
    '"; rm -rf . #',
    "it's $(touch harm) `touch harm` \\ & | >",
    '"""\nimport os; os.system("touch harm")\n"""',
    "name\nharm() {\0\x1b[31m}",
    "{heads} %s {0}",
)


def exported(
    write: Write, plan: str, *, model: str | ModelSpec = "llama-3.1-8b", stack: str = "torchtitan",
    precision: str = "bf16", seq_len: int = 4096, global_batch: int = 64,
) -> Exported:  # fmt: skip
    spec = load_model(model) if isinstance(model, str) else model
    job = Job(model=spec, seq_len=seq_len, global_batch=global_batch, precision=precision)
    return write(job, parse_plan(plan), load_stack(stack), devices_per_node=8)


@pytest.mark.parametrize(
    ("write", "plan", "where"),
    [
        (torchtitan_module, "dp=8,zero=1", "zero"),
        (torchtitan_module, "dp=4,cp=2", "zero"),
        (torchtitan_module, "dp=2,pp=2,schedule=zbv,zero=3", "zero"),
        (torchtitan_module, "pp=2,schedule=dualpipe", "schedule"),
        (torchtitan_module, "dp=2,tp=2,pp=2,placement=tp-cp-pp-dp", "placement"),
        (torchtitan_module, "dp=2,recompute=full,recompute_layers=3", "recompute_layers"),
        (torchtitan_module, "dp=2,compression=fp16", "compression"),
        (torchtitan_module, "dp=2,aggregation=layer", "aggregation"),
        (megatron_script, "dp=2,pp=2,zero=3", "zero"),
        (megatron_script, "pp=2,schedule=zb-h1", "schedule"),
        (megatron_script, "pp=2,schedule=gpipe", "schedule"),
        (megatron_script, "dp=2,tp=2,placement=dp-tp-cp-pp", "placement"),
        (megatron_script, "pp=2,recompute=full,recompute_layers=3-1", "recompute_layers"),
        (megatron_script, "dp=2,recompute=selective,recompute_layers=3", "recompute_layers"),
        (megatron_script, "dp=2,tp=2,tp_overlap=true,sequence_parallel=false", "sequence_parallel"),
        (megatron_script, "dp=2,weighted=true", "weighted"),
        (megatron_script, "dp=2,compression=topk-1", "compression"),
        (deepspeed_config, "dp=2,cp=2,zero=3", "cp"),
        (deepspeed_config, "dp=2,tp=2", "sequence_parallel"),
        (deepspeed_config, "dp=4,zero=3,zero_group=2", "zero_group"),
        (deepspeed_config, "pp=2,schedule=gpipe", "schedule"),
        (deepspeed_config, "dp=2,pp=2,zero=2", "zero"),
        (deepspeed_config, "dp=2,pp=2,stage_split=15-17", "stage_split"),
        (deepspeed_config, "dp=2,compression=int8", "compression"),
    ],
)
def test_what_would_run_as_something_else_is_refused(write: Write, plan: str, where: str) -> None:
    with pytest.raises(ParsimError) as caught:
        exported(write, plan)
    assert caught.value.where == where
    assert caught.value.expected


@pytest.mark.parametrize(
    ("write", "name", "where"),
    [
        (torchtitan_module, "gpt3-175b", "model.norm"),
        (torchtitan_module, "deepseek-v3", "model.mtp_layers"),
        (torchtitan_module, "gpt-oss-120b", "model.linear_bias"),
        (megatron_script, "bloom-176b", "model.embedding_norm"),
        (megatron_script, "mpt-7b", "model.position"),
    ],
)
def test_a_shape_that_the_framework_lacks_is_refused(write: Write, name: str, where: str) -> None:
    with pytest.raises(ParsimError) as caught:
        exported(write, "dp=8", model=name, seq_len=2048)
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("write", "precision"),
    [(torchtitan_module, "fp16"), (megatron_script, "fp64"), (deepspeed_config, "fp8")],
)
def test_a_precision_that_the_framework_lacks_is_refused(write: Write, precision: str) -> None:
    with pytest.raises(ParsimError) as caught:
        exported(write, "dp=8", precision=precision)
    assert caught.value.where == "precision"


def test_what_is_done_in_another_way_is_listed() -> None:
    said = exported(torchtitan_module, "dp=4,cp=2,zero=3", stack="megatron-core-2025").not_expressed
    assert any("gathers keys and values" in line for line in said)
    assert any("--stack torchtitan" in line for line in said)
    padded = exported(megatron_script, "dp=1,tp=8", stack="megatron-core-2025").not_expressed
    # 128,256 rows on 8 ranks of a multiple of 128 each
    assert any("128256 rows to 129024" in line for line in padded)
    pipeline = exported(deepspeed_config, "dp=2,pp=4", stack="megatron-deepspeed").not_expressed
    assert any("PipelineModule(num_stages=4" in line for line in pipeline)
    again = exported(deepspeed_config, "dp=2,recompute=full", stack="megatron-deepspeed").not_expressed
    assert any(line.startswith("recompute=full") for line in again)


def test_a_window_that_no_sequence_reaches_is_none() -> None:
    spec = dataclasses.replace(load_model("llama-3.1-8b"), window=4096)
    exported(torchtitan_module, "dp=8", model=spec, seq_len=4096)
    with pytest.raises(ParsimError, match="sliding-window"):
        exported(torchtitan_module, "dp=8", model=spec, seq_len=8192)


def run_script(script: str, folder: Path, *more: str) -> dict[str, Any]:
    """What torchrun is called with by an exported script, and in which environment."""
    stand_in = folder / "bin" / "torchrun"
    stand_in.parent.mkdir()
    stand_in.write_text(
        "#!/bin/bash\n"
        'python3 -c "import json, os, sys; print(json.dumps({\\"argv\\": sys.argv[1:], '
        '\\"queues\\": os.environ.get(\\"CUDA_DEVICE_MAX_CONNECTIONS\\")}))" "$@"\n'
    )
    stand_in.chmod(stat.S_IRWXU)
    (folder / "train.sh").write_text(script)
    done = subprocess.run(
        ["bash", "train.sh", *more], cwd=folder, capture_output=True, text=True, timeout=20, check=True,
        env={**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}", "NODE_RANK": "1",
             "MASTER_ADDR": "node-a"},
    )  # fmt: skip
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_megatron_script_starts_a_rank_on_every_gpu_of_a_node(tmp_path: Path) -> None:
    text = exported(megatron_script, "dp=4,tp=8,zero=1", stack="megatron-core-2025").text
    called = run_script(text, tmp_path, "--lr", "3e-4")
    words = called["argv"]
    launch = words[: words.index("pretrain_gpt.py")]
    assert launch == [
        "--nnodes", "4", "--nproc-per-node", "8", "--node-rank", "1", "--master-addr", "node-a",
        "--master-port", "29500",
    ]  # fmt: skip
    assert words[words.index("--tensor-model-parallel-size") + 1] == "8"
    assert words[-2:] == ["--lr", "3e-4"]
    assert called["queues"] == "1"


def test_megatrons_fsdp_is_started_with_many_queues(tmp_path: Path) -> None:
    text = exported(megatron_script, "dp=8,zero=3", stack="megatron-core-2025").text
    assert run_script(text, tmp_path)["queues"] is None


@pytest.mark.parametrize("name", NASTY)
def test_names_stay_names(name: str, tmp_path: Path) -> None:
    spec = dataclasses.replace(load_model("llama-3.1-8b"), name=name)
    plain = exported(megatron_script, "dp=8").text
    script = exported(megatron_script, "dp=8", model=spec).text
    changed = [
        line for line, usual in zip(script.split("\n"), plain.split("\n"), strict=True) if line != usual
    ]
    assert len(changed) == 1
    assert changed[0].startswith("# ")
    assert changed[0].isprintable()
    run_script(script, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "train.sh"]
    module = ast.parse(exported(torchtitan_module, "dp=8", model=spec).text)
    usual = ast.parse(exported(torchtitan_module, "dp=8").text)
    texts = [node.value for node in ast.walk(module) if isinstance(node, ast.Constant)]
    assert sum(isinstance(text, str) and "llama-3.1-8b" in text for text in texts) == 0
    assert len(list(ast.walk(module))) == len(list(ast.walk(usual)))
    json.loads(exported(deepspeed_config, "dp=8", model=spec, stack="megatron-deepspeed").text)


def test_a_schedule_without_a_class_comes_as_a_file_beside_the_module() -> None:
    by_name = exported(torchtitan_module, "dp=2,pp=4")
    assert by_name.schedule_csv is None
    # With fewer micro-batches than stages torch's class refuses 1F1B; written down, it runs.
    short = exported(torchtitan_module, "dp=2,pp=4", global_batch=4)
    assert short.schedule_csv is not None
    assert short.schedule_csv.count("\n") == 4
    assert '.with_suffix(".csv")' in short.text


@pytest.mark.parametrize("plan", ["dp=8", "dp=2,tp=2,pp=2,schedule=zb-h1"])
def test_the_torchtitan_module_imports_what_it_uses_and_nothing_else(plan: str) -> None:
    tree = ast.parse(exported(torchtitan_module, plan).text)
    imported = {
        alias.asname or alias.name.rpartition(".")[2]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert imported - {"nn"} <= used
    assert "nn" in used


def test_plans_at_their_defaults_go_to_every_framework() -> None:
    for write in (torchtitan_module, megatron_script, deepspeed_config):
        assert exported(write, ParallelPlan().short()).text


@pytest.mark.parametrize("write", [torchtitan_module, megatron_script, deepspeed_config])
def test_no_more_ranks_are_started_than_the_plan_has(write: Write) -> None:
    # Twelve ranks on nodes of eight would start as sixteen: another dp, another batch.
    with pytest.raises(ParsimError, match="same number of ranks"):
        exported(write, "dp=12", stack="megatron-deepspeed", global_batch=24)
    export = exported(write, "dp=16", stack="megatron-deepspeed", global_batch=32)
    said = export.text + "\n".join(export.not_expressed)
    assert re.search(r"--(?:nnodes|num_nodes) 2 --(?:nproc-per-node|num_gpus) 8\b", said)
