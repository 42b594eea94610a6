"""The regression bench: what is worse is told, what is counted is what happened."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import regression
from benchmarks.regression import Figure, Space, searched
from parsim.config import read_json
from parsim.search import candidates


@pytest.mark.parametrize(
    ("worse", "tolerance", "value", "verdict"),
    [
        ("more", 0.0, 100, "same"),
        ("more", 0.0, 101, "WORSE"),
        ("more", 0.0, 99, "better"),
        ("more", 0.1, 109, "same"),
        ("more", 0.1, 112, "WORSE"),
        ("less", 0.1, 91, "same"),
        ("less", 0.1, 89, "WORSE"),
        ("less", 0.1, 130, "better"),
        ("other", 0.0, 99, "CHANGED"),
        ("other", 0.0, 101, "CHANGED"),
    ],
)
def test_verdicts(worse: str, tolerance: float, value: float, verdict: str) -> None:
    figure = Figure(name="x", value=value, worse=worse, tolerance=tolerance)  # type: ignore[arg-type]
    assert figure.verdict(100) == verdict
    assert figure.verdict(None) == "new"


def test_the_status_says_whether_anything_is_worse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(regression, "BASELINE", tmp_path / "baseline.json")

    def status(*arguments: str, **values: float) -> int:
        found = [Figure(name=name, value=value, worse="more") for name, value in values.items()]
        monkeypatch.setattr(regression, "figures", lambda *, timed: iter(found))
        monkeypatch.setattr(sys, "argv", ["regression.py", *arguments])
        return regression.main()

    assert status(a=1, b=2) == 0
    assert status("--update", a=1, b=2) == 0
    assert status(a=1, b=2) == 0
    assert status(a=1, b=1) == 0
    assert status(a=1, b=3) == 1
    assert "WORSE" in capsys.readouterr().out
    assert status(a=1) == 1
    assert "GONE" in capsys.readouterr().out
    assert status("--quick", a=1) == 0
    assert status("--quick", "--update", a=0.5) == 0
    assert status(a=1, b=2) == 1
    assert read_json(tmp_path / "baseline.json")["figures"] == {"a": 0.5, "b": 2}
    assert status("--update", a=1) == 0
    assert read_json(tmp_path / "baseline.json")["figures"] == {"a": 1}


def test_a_search_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space(model="tiny-llama-8l", hardware="h100-sxm-80gb", gpus=4, global_batch=8)
    usual = {figure.name.split(": ")[1]: figure.value for figure in searched(space)}
    assert usual["plans"] > usual["plans that fit"] > usual["walked"] >= usual["replayed"] >= 10
    assert usual["proven"] == 1
    # A search that walks twice as many plans at once is told.
    monkeypatch.setattr(candidates, "PLANS", 256)
    more = {figure.name.split(": ")[1]: figure.value for figure in searched(space)}
    assert more["walked"] > usual["walked"]
    assert more["plans"] == usual["plans"]


def test_the_baseline_names_what_is_counted() -> None:
    names = set(read_json(regression.BASELINE)["figures"])
    for space in regression.SPACES:
        assert sum(name.startswith(f"search {space.model} {space.gpus}: ") for name in names) == 5
    assert len(names) >= 30
