"""The README's headline table is the accuracy report's."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_states_the_reports_figures() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    report = (ROOT / "reports" / "accuracy.md").read_text(encoding="utf-8")
    table = readme.split("<!-- accuracy -->\n")[1].split("<!-- /accuracy -->")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) > 15
    assert {line.replace("(docs/", "(../docs/") for line in lines} <= set(report.splitlines())


def test_the_reports_charts_are_there() -> None:
    report = (ROOT / "reports" / "accuracy.md").read_text(encoding="utf-8")
    names = [part.split(")")[0] for part in report.split("](")[1:]]
    for name in names:
        if name.endswith(".png"):
            assert (ROOT / "reports" / name).is_file(), name
