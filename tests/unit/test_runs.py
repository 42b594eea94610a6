"""Tables of measured runs: how rows are read, what is assumed, and what comes out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from parsim.compare.library import Library
from parsim.compare.run_models import shipped_models
from parsim.compare.run_rows import Run, run_of
from parsim.compare.runs import Predictor, read_runs, validate_runs
from parsim.compare.statistics import summarize
from parsim.config import dump_json
from parsim.errors import ParsimError
from tests.builders import write_csv

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "published"

ROW = {
    "id": "bloom",
    "source": "bigscience",
    "framework": "megatron-deepspeed",
    "hardware": "a100-sxm-80gb",
    "gpus": "384",
    "gpus_per_node": "8.0",
    "inter_node_gbit_per_gpu": "50.0",
    "model_name": "BLOOM-176B",
    "layers": "70.0",
    "hidden": "14336.0",
    "heads": "112.0",
    "kv_heads": "112.0",
    "ffn_hidden": "57344.0",
    "gated_mlp": "0.0",
    "vocab": "250880.0",
    "seq_len": "2048.0",
    "experts": "",
    "top_k": "",
    "global_batch": "2048.0",
    "micro_batch": "2.0",
    "tp": "4.0",
    "pp": "12.0",
    "vpp": "1.0",
    "cp": "1.0",
    "ep": "1.0",
    "dp": "8.0",
    "zero_or_fsdp": "zero1",
    "sequence_parallel": "0.0",
    "recompute": "full",
    "precision": "bf16",
    "schedule": "1f1b (DeepSpeed)",
    "iter_time_s": "104.698",
    "compile": "",
    "tp_overlap": "",
    "peak_memory_gib": "",
    "strict": "1",
}
"""BLOOM's training run, from its log."""

LLAMA = ROW | {
    "id": "llama",
    "framework": "torchtitan",
    "hardware": "h100-sxm-80gb",
    "model_name": "Llama 3.1 8B",
    "gpus": "128",
    "gpus_per_node": "8",
    "inter_node_gbit_per_gpu": "400",
    "layers": "32",
    "hidden": "4096",
    "heads": "32",
    "kv_heads": "8",
    "ffn_hidden": "14336",
    "gated_mlp": "1",
    "vocab": "128256",
    "seq_len": "8192",
    "global_batch": "256",
    "tp": "1",
    "pp": "1",
    "dp": "128",
    "zero_or_fsdp": "fsdp2(zero3)",
    "recompute": "selective",
    "schedule": "none",
    "iter_time_s": "2.5",
}
DEEPSEEK = LLAMA | {
    "framework": "nemo",
    "layers": "61",
    "hidden": "7168",
    "heads": "128",
    "kv_heads": "",
    "ffn_hidden": "2048",
    "vocab": "129280",
    "experts": "256",
    "top_k": "8",
    "gpus": "512",
    "tp": "2",
    "pp": "8",
    "dp": "32",
    "ep": "64",
    "seq_len": "4096",
    "global_batch": "4096",
    "micro_batch": "1",
    "zero_or_fsdp": "zero1 (distributed optimizer, NeMo default)",
    "sequence_parallel": "1",
    "recompute": "",
    "schedule": "1f1b",
    "iter_time_s": "48.9",
}


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(models=shipped_models())


def read(library: Library, base: dict[str, str] = ROW, **cells: str) -> Run:
    return run_of(base | cells, library)


# What a row means


def test_a_row_states_job_plan_and_cluster(library: Library) -> None:
    run = read(library)
    assert (
        run.plan.short()
        == "dp=8,tp=4,pp=12,micro_batch=2,schedule=1f1b,zero=1,sequence_parallel=false,recompute=full"
    )
    assert run.job.tokens == 2048 * 2048
    assert run.job.model.position == "alibi"
    assert run.cluster.inter_node.bandwidth_bytes_per_s == 50e9 / 8
    assert run.stack.name == "megatron-deepspeed"


@pytest.mark.parametrize(
    ("text", "zero", "group"),
    [
        ("zero1 (distributed optimizer, recipe default)", 1, 0),
        ("zero1 within 8 GPUs", 1, 8),
        ("zero1 within 4 dp ranks", 1, 4),
        ("megatron-fsdp(zero3) group 64", 3, 64),
        ("fsdp-shard_grad_op(zero2)", 2, 0),
        ("fsdp(zero3)", 3, 0),
        ("hsdp", 3, 8),
        ("fsdp hybrid", 3, 8),
        ("fsdp", 3, 0),
        ("none", 0, 0),
        ("zero1 within 128 GPUs", 1, 0),
    ],
)
def test_zero_texts(library: Library, text: str, zero: int, group: int) -> None:
    plan = read(library, LLAMA, zero_or_fsdp=text).plan
    assert (plan.zero, plan.zero_group) == (zero, group)


def test_hybrid_sharding_stays_inside_the_node_beside_tensor_parallelism(library: Library) -> None:
    plan = read(library, LLAMA, zero_or_fsdp="hsdp", tp="4", dp="32", sequence_parallel="1").plan
    assert plan.zero_group == 2  # 8 GPUs of a node are 2 dp ranks of 4


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("fp8-tensorwise (fp8 all-gather)", "fp8"),
        ("fp8-cs", "fp8"),
        ("bf16", "bf16"),
        ("fp16", "fp16"),
    ],
)
def test_precision_goes_by_its_prefix(library: Library, text: str, precision: str) -> None:
    assert read(library, LLAMA, precision=text).job.precision == precision


@pytest.mark.parametrize(
    ("text", "precision"), [("fp8-mx", "mxfp8"), ("mxfp8_cublas_rceil", "mxfp8"), ("nvfp4", "nvfp4")]
)
def test_blackwell_precisions(library: Library, text: str, precision: str) -> None:
    run = read(library, LLAMA, precision=text, hardware="gb200-nvl72", gpus_per_node="4")
    assert run.job.precision == precision


@pytest.mark.parametrize(
    ("text", "scaling"),
    [("fp8-rowwise_with_gw_hp", "row"), ("fp8-tensorwise (fp8 all-gather)", "tensor")],
)
def test_precision_may_state_how_fp8_is_scaled(library: Library, text: str, scaling: str) -> None:
    run = run_of(ROW | {"precision": text, "hardware": "h100-sxm-80gb"}, library)
    assert (run.job.precision, run.stack.fp8_scaling) == ("fp8", scaling)


def test_memory_tells_of_recomputation_that_is_not_stated(library: Library) -> None:
    """96 layers of GPT-3 175B keep 34·s·b·h bytes each without: 158 GB for two sequences of 2048."""
    gpt3 = {
        "framework": "paxml", "hardware": "h100-sxm-80gb", "gpus": "128", "dp": "128", "tp": "1",
        "pp": "1",
        "layers": "96", "hidden": "12288", "heads": "96", "kv_heads": "96", "ffn_hidden": "49152",
        "vocab": "51200", "global_batch": "256", "zero_or_fsdp": "fsdp(zero3)", "schedule": "none",
        "recompute": "",
    }  # fmt: skip
    large = run_of(ROW | gpt3, library)
    assert large.plan.recompute == "full"
    assert any("full, as" in text for text in large.assumed)
    small = run_of(ROW | gpt3 | {"layers": "24", "heads": "24", "kv_heads": "24"}, library)
    assert small.plan.recompute == "none"


def test_interleaved_schedule(library: Library) -> None:
    run = read(library, vpp="3", schedule="interleaved-1f1b", layers="72", global_batch="1920")
    assert (run.plan.schedule, run.plan.vpp) == ("interleaved", 3)


def test_sequence_parallel_needs_a_tensor_parallel_group(library: Library) -> None:
    run = read(library, LLAMA, sequence_parallel="1")
    assert not run.plan.sequence_parallel


# Models


def test_latent_attention_and_dense_layers_come_from_the_shipped_model(library: Library) -> None:
    model = read(library, DEEPSEEK).job.model
    assert model.mla is not None
    assert model.moe is not None
    assert (model.moe.dense_layers, model.ffn_hidden) == (3, 18432)


def test_multi_token_prediction_unless_the_row_goes_without(library: Library) -> None:
    assert read(library, DEEPSEEK, model_name="DeepSeekV3").job.model.mtp_layers == 1
    run = read(library, DEEPSEEK, model_name="DeepSeekV3 (w/o MTP)")
    assert run.job.model.mtp_layers == 0
    assert "architecture of deepseek-v3 with no multi-token prediction" in run.assumed


def test_a_shortened_model_keeps_its_family(library: Library) -> None:
    grok = {"hidden": "6144", "heads": "48", "kv_heads": "8", "ffn_hidden": "32768", "vocab": "131072"}
    moe = {"experts": "8", "top_k": "2", "ep": "8", "layers": "4", "sequence_parallel": "1"}
    run = read(library, DEEPSEEK | {"pp": "1", "dp": "256"}, **grok, **moe)
    assert run.job.model.layers == 4
    assert run.job.model.norms_per_layer == 4
    assert "architecture of grok-1-314b with 4 layers" in run.assumed


def test_a_new_shape_takes_its_family_from_the_vocabulary(library: Library) -> None:
    model = read(library, hidden="14336", heads="64", kv_heads="64", layers="72").job.model
    assert (model.position, model.embedding_norm, model.tied_embeddings) == ("alibi", True, True)
    assert model.layers == 72


# Settings that the row does not state


def test_experts_are_cut_as_the_notes_say_or_as_the_stack_does(library: Library) -> None:
    grok = {"hidden": "6144", "heads": "48", "kv_heads": "8", "ffn_hidden": "32768", "vocab": "131072"}
    grok |= {"experts": "8", "top_k": "2", "ep": "8", "layers": "4", "pp": "1", "tp": "4", "dp": "64"}
    row = DEEPSEEK | grok | {"gpus": "256", "framework": "nemo"}
    assert read(library, row).plan.expert_tp == 4
    assert read(library, row, notes="MoE 8 experts; ETP=1").plan.expert_tp == 1
    assert read(library, row, framework="megatron-core-2025").plan.expert_tp == 1
    # Two ranks cannot hold 8 experts in 32 parts.
    assert read(library, row, gpus="8", dp="2", global_batch="8").plan.expert_tp == 1


@pytest.mark.parametrize(
    ("container", "precision", "fused"),
    [("26.06", "mxfp8", True), ("26.08", "mxfp8", True), ("26.06", "bf16", False),
     ("26.04", "mxfp8", False)],
)  # fmt: skip
def test_experts_are_fused_from_a_release_on(
    library: Library, container: str, precision: str, fused: bool
) -> None:
    source = f"performance-summary.md; container {container}; Pre-Training"
    changes = {"source": source, "precision": precision, "hardware": "b200-sxm-180gb"}
    assert read(library, DEEPSEEK, **changes).stack.fused_experts is fused


@pytest.mark.parametrize(("tp", "columns"), [("1", 50257), ("2", 25128), ("8", 6282)])
def test_vtrains_composed_rows_are_what_its_harness_timed(
    library: Library, tp: str, columns: int
) -> None:
    """GPT-2's vocabulary, cut by tp as it is: odd rows at tp = 1, multiples of 8 at tp = 2."""
    source = "vTrain (MICRO 2024), VIA-Research/vTrain:data/ground_truth_single.csv"
    run = read(library, source=source, gpus="8", tp=tp, pp="1", dp="", global_batch="64")
    assert run.stack.name == "vtrain-harness"
    assert run.job.model.vocab // run.plan.tp == columns
    assert run.plan.recompute == "none"
    assert {"stack vtrain-harness", "recompute"} <= {text.split(":")[0] for text in run.assumed}


def test_a_framework_that_nothing_is_known_of_is_said_in_the_report(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "runs.csv", [ROW, ROW | {"id": "typo", "framework": "torchtitann"}])
    lines = validate_runs(table).to_lines()
    assert "1 rows on a stack torchtitann: nearest is megatron-core-2025" in lines


def test_bloom_before_its_numa_fix_had_less_of_the_network(library: Library) -> None:
    omni_path = {"interconnect": "4 x 100 Gb/s Omni-Path a node", "inter_node_gbit_per_gpu": "50"}
    before = read(library, **omni_path, notes="before the 02-25 PCIe/NUMA fix (1-5% slower)")
    after = read(library, **omni_path, notes="date 02-25")
    rates = [run.cluster.inter_node.bandwidth_bytes_per_s for run in (before, after)]
    assert rates[0] < rates[1] < 50e9 / 8


def test_what_is_not_stated_is_assumed_aloud(library: Library) -> None:
    run = read(library, DEEPSEEK, framework="some-framework", inter_node_gbit_per_gpu="", tp_overlap="")
    text = "\n".join(run.assumed)
    for word in ("stack some-framework: nearest is", "recompute not stated", "tp_overlap not stated"):
        assert word in text
    assert "inter_node_gbit_per_gpu not stated: 400" in text


def test_a_fully_stated_dense_row_assumes_only_its_architecture(library: Library) -> None:
    assert read(library, tp_overlap="0").assumed == ("architecture of bloom-176b",)


def test_micro_batches_that_do_not_come_out_even(library: Library) -> None:
    """BLOOM's trials: DeepSpeed rounds the micro-batches of a step down."""
    run = read(library, dp="16", pp="6", micro_batch="6")
    assert run.plan.num_micro_batches(run.job) == 2048 // 96
    assert any("no multiple" in text for text in run.assumed)


# Rows that cannot be predicted


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"gpus": "385"}, "gpus is not dp·tp·pp·cp"),
        ({"layers": "many"}, "no number (layers)"),
        ({"layers": "48.5"}, "no whole number from 1 (layers)"),
        ({"layers": "nan"}, "no number (layers)"),
        ({"hidden": "1e300"}, "no whole number from 1 (hidden)"),
        ({"heads": ""}, "empty (heads)"),
        ({"iter_time_s": "0"}, "greater than zero (iter_time_s)"),
        ({"iter_time_s": ""}, "greater than zero (iter_time_s)"),
        ({"hardware": "abacus"}, "unknown hardware 'abacus'"),
        ({"precision": "int3"}, "unknown precision"),
        ({"schedule": "mystery"}, "unknown schedule 'mystery'"),
        ({"recompute": "some"}, "unknown recompute mode"),
        ({"zero_or_fsdp": "sharded"}, "ZeRO stage"),
        ({"global_batch": "4"}, "smaller than dp·micro_batch"),
        ({"pp": "96", "gpus": "3072"}, "more stages than layers"),
        ({"precision": "fp8"}, "fp8"),
        ({"global_batch": "2000000000"}, "too long to simulate"),
    ],
)
def test_an_unsupported_row_says_why(cells: dict[str, str], reason: str) -> None:
    result = Predictor().result(ROW | cells)
    assert result.status == "unsupported"
    assert reason in result.reason
    assert result.predicted_s is None
    assert result.error is None


def test_memory_never_refuses_a_measured_run() -> None:
    result = Predictor().result(ROW | {"hardware": "a100-sxm-40gb", "micro_batch": "8"})
    assert result.status == "ok"
    assert "predicted to need" in result.memory_warning


# Files


def test_rows_stay_in_order_and_none_is_dropped(tmp_path: Path) -> None:
    rows = [ROW | {"id": f"r{i}", "gpus": "384" if i % 2 else "7"} for i in range(4)]
    report = validate_runs(write_csv(tmp_path / "runs.csv", rows))
    assert [row.id for row in report.rows] == ["r0", "r1", "r2", "r3"]
    assert [row.status for row in report.rows] == ["unsupported", "ok", "unsupported", "ok"]
    assert (report.summary.rows, report.summary.ok) == (4, 2)
    data = json.loads(dump_json(report.to_data()))
    assert data["summary"]["mape"] == pytest.approx(abs(data["rows"][1]["error"]))
    assert data["rows"][1]["error"] == pytest.approx(
        data["rows"][1]["predicted_s"] / data["rows"][1]["measured_s"] - 1
    )
    assert any(line.startswith("unsupported, 2 rows") for line in report.to_lines())


def test_a_missing_column_is_named_with_the_nearest_header(tmp_path: Path) -> None:
    renamed = {("global_bach" if key == "global_batch" else key): value for key, value in ROW.items()}
    with pytest.raises(ParsimError, match="'global_batch' is missing, and 'global_bach' is near it"):
        validate_runs(write_csv(tmp_path / "runs.csv", [renamed]))


def test_a_misspelt_optional_column_is_not_lost(tmp_path: Path) -> None:
    renamed = {("zero_or_fdsp" if key == "zero_or_fsdp" else key): value for key, value in ROW.items()}
    with pytest.raises(ParsimError, match="zero_or_fdsp"):
        read_runs(write_csv(tmp_path / "runs.csv", [renamed]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"id,id\n1,2\n", "twice"),
        (b'id\n"' + b"x" * 200_000 + b'"\n', "no valid CSV"),
    ],
)
def test_a_file_that_is_no_table(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    with pytest.raises(ParsimError, match=message):
        validate_runs(path)


def test_a_byte_order_mark_and_a_short_row(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "runs.csv", [ROW])
    lines = path.read_text(encoding="utf-8").splitlines()
    short = ",".join(lines[1].split(",")[:8])
    path.write_text("\ufeff" + "\n".join([*lines, short]) + "\n", encoding="utf-8")
    report = validate_runs(path)
    assert [row.status for row in report.rows] == ["ok", "unsupported"]


def test_a_header_without_rows_has_no_error_to_state(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(",".join(ROW) + "\n", encoding="utf-8")
    report = validate_runs(path)
    assert report.summary.rows == 0
    assert report.summary.mape is None
    dump_json(report.to_data())


# Statistics


def test_summary_of_known_errors() -> None:
    summary = summarize([0.10, -0.20, 0.30, None])
    assert (summary.rows, summary.ok) == (4, 3)
    assert summary.mape == pytest.approx(0.20)
    assert summary.median_ape == pytest.approx(0.20)
    assert summary.p90_ape == pytest.approx(0.28)
    assert summary.bias == pytest.approx(0.2 / 3)


# Published tables


def published(name: str) -> Path:
    path = PUBLISHED / name
    if not path.is_file():
        pytest.skip(f"the table of published runs {name} is not beside this checkout")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vtrain_single.csv", "vtrain_multi.csv", "public_runs.csv"])
def test_every_published_run_is_predicted(name: str) -> None:
    report = validate_runs(published(name))
    assert [row.reason for row in report.rows if row.status != "ok"] == []
    assert all(row.predicted_s is not None and math.isfinite(row.predicted_s) for row in report.rows)
