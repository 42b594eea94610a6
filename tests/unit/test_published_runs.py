"""The published runs that ship with parsim."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from parsim.cli.main import run_command
from parsim.compare.library import Library
from parsim.compare.ranking import MIN_ROWS
from parsim.compare.run_models import shipped_models
from parsim.compare.run_rows import run_of
from parsim.compare.runs import PUBLISHED, Predictor, group_of, read_runs
from parsim.shipped import shipped

SHARED = Path(__file__).parents[2].parent / "shared" / "published"
ROWS = read_runs(PUBLISHED)


def test_each_row_has_a_source_and_a_name_of_its_own() -> None:
    assert all(row["source"] for row in ROWS)
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    assert PUBLISHED.stat().st_size < 150_000


def test_every_stack_for_gpus_and_most_hardware_has_rows() -> None:
    library = Library(models=shipped_models())
    stacks = set(shipped("hardware_profiles/stacks")) - {"parsim-executor"}
    assert stacks == {run_of(row, library).stack.name for row in ROWS}
    assert len({row["hardware"] for row in ROWS}) >= 9
    assert {row["precision"][:4] for row in ROWS} >= {"bf16", "fp16", "fp8", "mxfp", "nvfp"}


def test_whole_ranking_groups_ship() -> None:
    sizes: dict[str, int] = {}
    for row in ROWS:
        sizes[group_of(row)] = sizes.get(group_of(row), 0) + 1
    assert sum(size >= MIN_ROWS for size in sizes.values()) >= 8


def test_the_years_rows_keep_their_stack() -> None:
    """BLOOM's trials of 2022 ran older kernels than vTrain's of 2024 under the same name, of which those
    on one node are put together from parts that were timed alone."""
    predictor = Predictor()

    def stack_of(source: str) -> str:
        return predictor.result(next(row for row in ROWS if source in row["source"])).stack

    assert stack_of("bigscience") == "megatron-deepspeed-2022"
    assert stack_of("ground_truth_multi") == "megatron-deepspeed"
    assert stack_of("ground_truth_single") == "vtrain-harness"


def test_rows_are_those_of_the_tables() -> None:
    """What a shipped row leaves out changes nothing about its run."""
    if not SHARED.is_dir():
        pytest.skip("the tables of published runs are not beside this checkout")
    library = Library(models=shipped_models())
    known = {row["id"]: row for path in sorted(SHARED.glob("*.csv")) for row in read_runs(path)}
    for row in ROWS:
        whole = known[row["id"]]
        for key in ("source", "iter_time_s"):
            assert row[key] == whole[key].removesuffix(".0")
        ours, theirs = (replace(run_of(cells, library), assumed=()) for cells in (row, whole))
        assert ours == theirs, row["id"]


def test_published_and_a_table_are_two_things(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["validate", "--published", "--runs", "mine.csv"]) == 2
    assert "compares one thing" in capsys.readouterr().err


@pytest.mark.slow
def test_a_user_reproduces_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["validate", "--published", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["summary"]["rows"] == answer["summary"]["ok"] == len(ROWS)
    assert len(answer["ranking"]) >= 8
    for group in answer["ranking"]:
        # By the figures that the search orders plans by before it replays any.
        assert group["search_regret"] <= group["regret"] + 0.02
    taus = [group["search_kendall_tau"] for group in answer["ranking"] if group["search_kendall_tau"]]
    assert sum(taus) / len(taus) > 0.75


def test_the_search_scores_a_row_as_a_replay_does() -> None:
    """Shards within a node or among all, whatever was scored before."""
    predictor = Predictor()
    rows = [predictor.result(row) for row in ROWS if row["framework"] in ("internevo", "llm-foundry")]
    assert len(rows) >= 15
    for row in rows:
        assert row.score_s is not None
        assert row.predicted_s is not None
        assert 0.9 * row.predicted_s < row.score_s <= row.predicted_s * (1 + 1e-9)
