"""Fitting a stack's constants: known constants come back, few rows fit few, left-out rows are unseen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from parsim.cli.main import run_command
from parsim.compare.held_out import halves, held_out
from parsim.compare.intervals import half_width
from parsim.compare.measured_steps import QuickSteps, measured_steps
from parsim.compare.runs import Predictor
from parsim.compare.stack_constants import BOUNDS, TYPICAL, afresh, bounds_of, told_by
from parsim.compare.stack_fit import fit_stack
from parsim.compare.stack_profile import fitted_source, stack_toml
from parsim.config import load_stack
from parsim.errors import ParsimError
from parsim.stack import Stack
from tests.builders import write_csv

STACK = load_stack("llm-foundry")
SHAPES = {"1b": (24, 2048, 16, 8192), "7b": (32, 4096, 32, 16384), "13b": (40, 5120, 40, 20480)}
"""layers, hidden, heads, ffn_hidden of MosaicML's MPT models."""


def row(model: str, gpus: int, seq_len: int, micro_batch: int) -> dict[str, str]:
    layers, hidden, heads, ffn_hidden = SHAPES[model]
    return {
        "id": f"{model}-{gpus}-{seq_len}-{micro_batch}",
        "framework": "llm-foundry",
        "hardware": "a100-sxm-80gb",
        "gpus": str(gpus),
        "layers": str(layers),
        "hidden": str(hidden),
        "heads": str(heads),
        "ffn_hidden": str(ffn_hidden),
        "gated_mlp": "0",
        "vocab": "50368",
        "seq_len": str(seq_len),
        "global_batch": str(2 * gpus * micro_batch),
        "micro_batch": str(micro_batch),
        "tp": "1",
        "pp": "1",
        "zero_or_fsdp": "fsdp(zero3)",
        "recompute": "full",
        "precision": "bf16",
        "iter_time_s": "1",
    }


def measured_on(stack: Stack, rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with the times that a stack gives them."""
    predictor = Predictor({stack.name: stack})
    return [cells | {"iter_time_s": repr(predictor.result(cells).predicted_s)} for cells in rows]


ROWS = [
    row(model, gpus, seq_len, micro_batch)
    for model in SHAPES
    for gpus in (8, 64)
    for seq_len, micro_batch in ((2048, 4), (8192, 1))
]


def test_a_fit_finds_the_constants_that_made_the_times() -> None:
    true = replace(STACK, gemm_slowdown=1.25, attention_slowdown=2.0)
    found = fit_stack(measured_on(true, ROWS), STACK, bounds_of(["gemm_slowdown", "attention_slowdown"]))
    assert found.stack.gemm_slowdown == pytest.approx(1.25, rel=0.01)
    assert found.stack.attention_slowdown == pytest.approx(2.0, rel=0.03)
    assert found.complete
    assert found.held_out is not None
    assert found.held_out.mape is not None
    assert found.held_out.mape < 0.01
    assert found.larger is not None
    assert not any(constant.on_bound for constant in found.constants)


def test_a_constant_beyond_its_bounds_is_said_to_sit_on_one() -> None:
    true = replace(STACK, gemm_slowdown=2.5)
    found = fit_stack(
        measured_on(true, ROWS[:4]), STACK, {"gemm_slowdown": (0.95, 1.6)}, cross_validate=False
    )
    assert [constant.on_bound for constant in found.constants] == [True]


def test_a_congested_row_does_not_pull_the_constants() -> None:
    rows = measured_on(replace(STACK, gemm_slowdown=1.2), ROWS)
    rows[0] = rows[0] | {"iter_time_s": str(3 * float(rows[0]["iter_time_s"]))}
    found = fit_stack(rows, STACK, bounds_of(["gemm_slowdown"]), cross_validate=False)
    assert found.stack.gemm_slowdown == pytest.approx(1.2, rel=0.05)


def test_a_quarter_of_congested_rows_says_nothing_of_the_constants() -> None:
    """As vTrain's runs on many nodes: up to twice as long as their neighbours, never shorter."""
    rows = measured_on(replace(STACK, gemm_slowdown=1.2), ROWS)
    for i, factor in ((1, 1.4), (5, 1.7), (9, 2.0)):
        rows[i] = rows[i] | {"iter_time_s": str(factor * float(rows[i]["iter_time_s"]))}
    found = fit_stack(rows, STACK, bounds_of(["gemm_slowdown"]), cross_validate=False)
    assert found.stack.gemm_slowdown == pytest.approx(1.2, rel=0.02)


def test_few_rows_fit_few_constants() -> None:
    """A constant for three rows, and never two that move all rows alike."""
    quick = QuickSteps()
    alike, _ = measured_steps([ROWS[0] | {"id": str(i)} for i in range(9)], STACK)
    assert len(told_by(alike, STACK, quick)) == 1
    different, _ = measured_steps(ROWS[:6], STACK)
    assert len(told_by(different, STACK, quick)) == 2


def test_constants_without_effect_are_left_alone() -> None:
    steps, _ = measured_steps(ROWS, STACK)
    told = told_by(steps, STACK, QuickSteps())
    assert not {"overlap_cost", "collective_overhead_s", "ep_slowdown", "action_host_s"} & set(told)


def test_three_rows_are_refused_with_what_the_others_run_on() -> None:
    rows = [*ROWS[:3], ROWS[4] | {"framework": "my-trainer"}, ROWS[5] | {"framework": "nemo"}]
    with pytest.raises(ParsimError, match="too few runs") as error:
        fit_stack(rows, STACK)
    assert "my-trainer: framework is unknown" in str(error.value)
    assert "nemo: runs on nemo" in str(error.value)


def test_whole_models_are_left_out() -> None:
    steps, _ = measured_steps(ROWS, STACK)
    folds = held_out(steps)
    assert folds is not None
    assert folds.groups == 3
    for fold in folds.folds:
        inside = {steps[i].model for i in fold}
        assert inside.isdisjoint(steps[i].model for i in range(len(steps)) if i not in fold)
    assert sorted(i for fold in folds.folds for i in fold) == list(range(len(steps)))


def test_one_model_is_left_out_by_configuration() -> None:
    steps, _ = measured_steps(ROWS[:4], STACK)
    folds = held_out(steps)
    assert folds is not None
    assert folds.groups == 2  # 8 and 64 GPUs
    assert held_out(steps[:2]) is None


def test_halves_go_by_parameters() -> None:
    steps, _ = measured_steps(ROWS, STACK)
    small, large = halves(steps)
    assert {step.id.split("-")[0] for step in small} == {"1b"}
    assert {step.id.split("-")[0] for step in large} == {"7b", "13b"}


def test_the_interval_has_the_correction_for_few_rows() -> None:
    """Of 9 rows the (9 + 1) · 0.9 = 9th size is the largest; of 19 the 18th."""
    assert half_width([0.01 * i for i in range(1, 10)]) == 0.086  # log 1.09
    assert half_width([0.01 * i for i in range(1, 20)]) == 0.17  # log 1.18


def test_afresh_forgets_what_was_fitted_and_leaves_what_is_off() -> None:
    stack = afresh(replace(STACK, gemm_slowdown=1.5, zero_broadcast_s=0.0))
    assert stack.gemm_slowdown == TYPICAL["gemm_slowdown"]
    assert stack.zero_broadcast_s == 0.0
    assert all(low <= TYPICAL[name] <= high for name, (low, high) in BOUNDS.items())


def test_the_profile_says_what_was_fitted_and_reads_back(tmp_path: Path) -> None:
    found = fit_stack(measured_on(STACK, ROWS), STACK, bounds_of(["gemm_slowdown"]))
    stack = fitted_source(found, "runs.csv")
    assert "fitted: gemm_slowdown to 12 runs of runs.csv" in stack.source
    assert "3 groups" in stack.source
    again = fitted_source(replace(found, stack=stack), "runs.csv")
    assert again.source == stack.source
    path = tmp_path / "mine.toml"
    path.write_text(stack_toml(stack), encoding="utf-8")
    assert load_stack(str(path)) == stack


def test_a_user_fits_a_stack_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten rows that name a stack and a hardware profile of the user's own."""
    mine = replace(STACK, name="mine", gemm_slowdown=1.3)
    profile = Path(__file__).parents[2] / "hardware_profiles" / "a100-sxm-80gb.toml"
    (tmp_path / "cluster.toml").write_bytes(profile.read_bytes())
    own = {"framework": "mine", "hardware": str(tmp_path / "cluster.toml")}
    runs = write_csv(tmp_path / "runs.csv", measured_on(mine, [cells | own for cells in ROWS[:10]]))
    start, out = tmp_path / "mine.toml", tmp_path / "fitted.toml"
    start.write_text(stack_toml(replace(STACK, name="mine")), encoding="utf-8")
    command = ["calibrate", "--runs", str(runs), "--stack", str(start), "-o", str(out), "--json"]
    assert run_command(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fitted"]["mape"] < 0.03
    assert len(answer["rows"]) == 10
    assert 1 <= len(answer["constants"]) <= 3
    assert load_stack(str(out)).gemm_slowdown > STACK.gemm_slowdown


def test_rows_of_an_unknown_framework_are_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = write_csv(tmp_path / "runs.csv", [cells | {"framework": "my-trainer"} for cells in ROWS])
    assert run_command(["calibrate", "--runs", str(runs), "--stack", "llm-foundry"]) == 2
    assert "my-trainer: framework is unknown" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--runs", "x.csv"], ["--stack", "nemo"]])
def test_runs_and_stack_go_together(arguments: list[str]) -> None:
    assert run_command(["calibrate", *arguments]) == 2


def test_the_longest_path_predicts_other_constants_without_lowering() -> None:
    """Exact at the stack itself; under small moves as a new lowering finds it."""
    steps, _ = measured_steps(ROWS, STACK)
    quick = QuickSteps()
    paths = quick.paths(steps, STACK)
    assert list(map(float, paths)) == pytest.approx(quick.predicted_s(steps, STACK))
    moved = replace(STACK, gemm_slowdown=1.01, attention_slowdown=1.21, step_overhead_s=0.031)
    assert quick.along(steps, paths, moved) == pytest.approx(quick.predicted_s(steps, moved), rel=1e-6)


def test_a_constant_that_something_hides_at_the_start_is_found() -> None:
    """A host of half a millisecond a layer is hidden by the device; one of 30 ms is not."""
    true = replace(STACK, layer_host_s=0.03)
    start = replace(STACK, layer_host_s=0.0005)
    rows = measured_on(true, ROWS[:4])
    found = fit_stack(rows, start, {"layer_host_s": (0.0, 0.05)}, cross_validate=False)
    assert found.stack.layer_host_s == pytest.approx(0.03, rel=0.02)


def test_runs_that_no_interval_holds_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the times are in another unit."""
    rows = measured_on(STACK, ROWS)
    slipped = [
        cells | {"iter_time_s": repr(60 * float(cells["iter_time_s"]))} if i % 2 else cells
        for i, cells in enumerate(rows)
    ]
    path = write_csv(tmp_path / "runs.csv", slipped)
    command = ["calibrate", "--runs", str(path), "--stack", STACK.name, "--constant", "dp_slowdown"]
    assert run_command([*command, "-o", str(tmp_path / "fitted.toml")]) == 2
    said = capsys.readouterr().err
    assert "too far from the fitted stack" in said
    named = [cells["id"] in said for cells in slipped]
    assert named == [bool(i % 2) for i in range(len(rows))]
    assert not (tmp_path / "fitted.toml").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("dp_bucket_parameters", 10.0), ("relative_error", 2.5), ("default_zero", 4)]
)
def test_a_constant_out_of_range_is_named_alone(key: str, value: float) -> None:
    with pytest.raises(ParsimError, match="out of range") as caught:
        replace(STACK, **{key: value})
    assert (caught.value.where, caught.value.got) == (key, value)
