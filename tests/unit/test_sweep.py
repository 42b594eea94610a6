"""Sweeps: scenarios from flags and files, the file of rows, answers as rows, the chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import parsim.search.sweep
from parsim.charts.sweep import draw_sweep, sweep_figure
from parsim.cli.sweep_inputs import grid_of, read_grids, read_settings, scenarios
from parsim.errors import ParsimError
from parsim.search.parallel import Pool, as_done
from parsim.search.search import search
from parsim.search.sweep import Point, Question, answer, key_of
from parsim.search.sweep_file import appending, read_recorded, rows_at

SEARCH = {"top": 1, "budget_s": 60.0}
TINY = {
    "model": "tiny-llama-8l",
    "hardware": "h100-sxm-80gb",
    "gpus": "2",
    "global_batch": "8",
    "schedule": "1f1b",
}


def settings_of(given: dict[str, Any], path: Path | None = None) -> list[dict[str, Any]]:
    return read_settings(read_grids(path, given), SEARCH)


# Scenarios


def test_all_combinations_in_the_order_of_the_flags_each_once() -> None:
    found = settings_of(TINY | {"gpus": "4-8,4", "global_batch": "16,8", "tp": "1,2"})
    assert [(each["gpus"], each["global_batch"]) for each in found] == [(4, 16), (4, 8), (8, 16), (8, 8)]
    assert {each["tp"] for each in found} == {"1,2"}
    assert len({key_of(each) for each in found}) == 4


def test_a_toml_file_gives_grids_and_the_flags_what_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "scenarios.toml"
    path.write_text(
        '[[sweep]]\nhardware = ["h100-sxm-80gb", "a100-sxm-80gb"]\ngpus = [2, "4-8"]\nzero = [0, 1]\n'
        "sequence_parallel = false\n[[sweep]]\ngpus = 2\nmax_tp = 4\n"
    )
    found = settings_of({key: TINY[key] for key in ("model", "hardware", "global_batch")}, path)
    assert [(each["hardware"][:4], each["gpus"]) for each in found] == [
        *((name, gpus) for name in ("h100", "a100") for gpus in (2, 4, 8)),
        ("h100", 2),
    ]
    assert (found[0]["zero"], found[0]["sequence_parallel"], found[-1]["max_tp"]) == ("0,1", "false", 4)
    questions = [scenario.question for scenario in scenarios(found)]
    assert all(isinstance(question, Question) for question in questions)
    assert questions[0].constraints.zero == (0, 1)  # type: ignore[union-attr]
    assert questions[-1].constraints.max_sizes == {"tp": 4}  # type: ignore[union-attr]


def test_a_csv_file_gives_a_scenario_a_row(tmp_path: Path) -> None:
    path = tmp_path / "scenarios.csv"
    path.write_text("model,gpus,global_batch,seq_len\n\ntiny-llama-8l,2,8,\n\ntiny-gpt-8l,4,16,64\n\n")
    found = settings_of({"hardware": "h100-sxm-80gb"}, path)
    assert [each | {} for each in found] == [
        {"model": "tiny-llama-8l", "hardware": "h100-sxm-80gb", "gpus": 2, "global_batch": 8, **SEARCH},
        {
            "model": "tiny-gpt-8l", "hardware": "h100-sxm-80gb", "gpus": 4, "global_batch": 16,
            "seq_len": 64, **SEARCH,
        },
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": ""}, "names nothing"),
        ({"gpus": None}, "numbers or texts"),
        ({"model": "tiny-lama"}, "unknown model"),
        ({"hardware": "none.toml"}, "no such hardware file"),
        ({"global_batch": "0"}, "must be positive"),
        ({"plan": ["dp=2"]}, "nothing to search"),
        ({"gpu": "8"}, "unknown key"),
        ({"gpus": "1-1000000", "global_batch": ",".join(map(str, range(1, 9000)))}, "too many"),
    ],
)
def test_what_no_scenario_could_use_is_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParsimError, match=message):
        settings_of(TINY | changes)


def test_what_is_missing_is_named() -> None:
    for key in ("model", "hardware", "gpus", "global_batch"):
        with pytest.raises(ParsimError, match=f"{key} is missing"):
            settings_of({name: value for name, value in TINY.items() if name != key})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "[[sweeps]]\ngpus = 1\n", "nothing else"),
        ("a.toml", "", "no scenario"),
        ("a.toml", "[[sweep]]\nmodel = 1.5\n", "numbers or texts"),
        ("a.csv", "model,gpus\na,1,2\n", "more cells than columns"),
    ],
)
def test_files_that_are_no_scenarios(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ParsimError, match=message):
        settings_of(TINY, tmp_path / name)


# Answers


def test_a_row_is_what_the_search_finds() -> None:
    (scenario,) = scenarios(settings_of(TINY | {"recompute": "full", "max_tp": 1}))
    row = answer(scenario)
    question = scenario.question
    assert isinstance(question, Question)
    costs = parsim.search.sweep.CostModel(question.job.model, question.cluster, question.stack)
    best = search(question.job, 2, costs, constraints=question.constraints, top=1).plans[0]
    assert row["plans"] == [best.to_item() | question.origin]
    assert (row["status"], row["optimal"]) == ("ok", True)
    plan = row["plans"][0]["plan"]
    assert (plan["recompute"], plan["tp"]) == ("full", 1)


def test_what_goes_wrong_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings_of(TINY | {"gpus": "19", "precision": "bf16,fp7"})
    illegal, unknown = (answer(scenario) for scenario in scenarios(asked))
    assert illegal["status"] == "no_plan"
    assert "no plan is legal" in illegal["reason"]
    assert illegal["space"]["fits"] == 0
    assert unknown["status"] == "refused"
    assert "fp7" in unknown["reason"]

    def broken(*given: object, **more: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(parsim.search.sweep, "search", broken)
    (row,) = map(answer, scenarios(settings_of(TINY)))
    assert (row["status"], row["plans"]) == ("failed", [])
    assert "ZeroDivisionError: a defect" in row["reason"]


def test_a_given_plan_is_simulated() -> None:
    given = {"model": "llama-3.1-8b", "hardware": "h100-sxm-80gb"}
    rows = [*map(answer, scenarios(settings_of(given | {"plan": ["dp=1", "tp=4,pp=2", "dp=3,tp=5"]})))]
    assert [row["status"] for row in rows] == ["does_not_fit", "ok", "refused"]
    assert rows[0]["plans"][0]["fits"] is False
    assert rows[1]["plans"][0]["gpus"] == 8


# The file of rows

ROWS = [
    {"scenario": {"gpus": i}, "made_of": {"version": "1"}, "status": "ok", "plans": [{"µ": "x" * i}]}
    for i in range(1, 6)
]


def written(path: Path, rows: list[dict[str, Any]]) -> None:
    recorded = read_recorded(path)
    missing = [row for row in rows if key_of(row["scenario"]) not in recorded.lines]
    with appending(path, recorded.end_bytes) as append:
        for row in missing:
            append(row)


@settings(max_examples=40)
@given(st.data())
def test_a_file_cut_anywhere_is_completed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("sweep") / "rows.jsonl"
    written(path, ROWS)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    assert read_recorded(path).torn == (cut > 0 and whole[cut - 1 : cut] != b"\n")
    written(path, ROWS)
    assert path.read_bytes() == whole


def test_rows_are_read_in_any_order_and_the_last_of_a_scenario_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    again = ROWS[0] | {"status": "no_plan"}
    with appending(path, 0) as append:
        for row in (*ROWS, again):
            append(row)
    lines = read_recorded(path).lines
    keys = [key_of(row["scenario"]) for row in reversed(ROWS)]
    found = list(rows_at(path, [lines[key].offset_bytes for key in keys]))
    assert found == [*reversed(ROWS[1:]), again]


@pytest.mark.parametrize("line", ["{", "[]", '{"scenario": {}}', '{"scenario": {}, "status": NaN}'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(ParsimError) as caught:
        read_recorded(path)
    assert "line 1" in (caught.value.where or "")
    assert path.read_text() == f"{line}\n"


def test_two_sweeps_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with appending(path, 0) as append:
        append(ROWS[0])
        with pytest.raises(ParsimError, match="another sweep"), appending(path, 0):
            pass
    assert len(read_recorded(path).lines) == 1


# Workers


def test_tasks_are_taken_as_there_is_room() -> None:
    taken = []

    def tasks() -> Any:
        for i in range(100):
            taken.append(i)
            yield -i

    results = as_done(abs, tasks(), Pool())
    assert next(results) == 0
    assert len(taken) < 10
    results.close()
    assert len(taken) < 10


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"address": "tcp://host:1"}, "that of a cluster"),
        ({"jobs": 0}, "has to work"),
        ({"backend": "ray"}, "not installed"),
    ],
)
def test_workers_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, pool: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("parsim.search.parallel.find_spec", lambda name: None)
    with pytest.raises(ParsimError, match=message):
        Pool(**pool)


# The chart


def points(*figures: tuple[str, str, int, float]) -> list[Point]:
    return [
        Point(model=model, series=series, gpus=gpus, tokens_per_s_per_gpu=speed, mfu=speed / 1000)
        for model, series, gpus, speed in figures
    ]


def title(found: list[Point]) -> str:
    return " ".join(text.get_text() for text in sweep_figure(found).texts)


def test_the_chart_draws_the_best_of_each_size_and_names_the_worst_curve(tmp_path: Path) -> None:
    found = points(
        ("a", "x", 16, 400.0), ("a", "x", 8, 500.0), ("a", "x", 8, 300.0), ("a", "y", 8, 200.0),
        ("b", "x", 8, 100.0), ("b", "x", 16, 50.0),
    )  # fmt: skip
    first, second = sweep_figure(found).axes
    x, y = first.lines
    assert list(map(float, x.get_xdata())) == [8, 16]  # type: ignore[arg-type]
    assert list(map(float, x.get_ydata())) == [500, 400]  # type: ignore[arg-type]
    assert list(map(float, y.get_ydata())) == [200]  # type: ignore[arg-type]
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("a", "b")
    assert "b on x: 16 GPUs keep 50% of the tokens/s/GPU of 8" in title(found)
    draw_sweep(found, tmp_path / "sweep.svg")
    assert (tmp_path / "sweep.svg").stat().st_size > 1000


def test_labels_of_curves_that_coincide_stand_one_above_the_other() -> None:
    found = points(*(("a", name, gpus, 100.0) for name in "xyz" for gpus in (8, 16)))
    figure = sweep_figure(found)
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_title_of_one_size_compares_hardware() -> None:
    found = points(("a", "x", 8, 500.0), ("a", "y", 8, 200.0), ("b", "x", 8, 10.0), ("b", "y", 8, 9.0))
    assert "a: a GPU of x trains 2.5 × what one of y does" in title(found)
    assert "a on 8 × x: MFU 50%" in title(found[:1])


def test_keys_of_flags_are_known() -> None:
    assert grid_of({"tp": [1, 2], "sequence_parallel": True}, "here") == {
        "tp": ("1,2",),
        "sequence_parallel": ("true",),
    }
    assert json.loads(key_of({"b": 1, "a": "é"})) == {"a": "é", "b": 1}
