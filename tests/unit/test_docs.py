"""What README and docs/ say is so: commands run, numbers are computed, links lead somewhere."""

from __future__ import annotations

import doctest
import re
import shutil
from pathlib import Path

import pytest
import typer

from parsim.cli.main import app
from tests.doc_examples import PAGES, ROOT, Example, examples, run_script, write_inputs

EXAMPLES = examples()
QUICK = [example for example in EXAMPLES if example.is_run and not example.is_slow]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    shutil.rmtree(folder / ".bin")
    return folder


@pytest.mark.parametrize("example", QUICK, ids=lambda example: example.name)
def test_commands_run(example: Example, inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    done = run_script(example.script, tmp_path)
    assert done.returncode == 0, f"{example.script}{done.stdout[-500:]}{done.stderr[-1500:]}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_commands_have_the_options_that_are_shown(example: Example) -> None:
    """Of every command, also of those that need a cluster or minutes."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, *arguments in example.commands:
        assert name in commands, name
        commands[name].make_context(name, [a for a in arguments if a != "…"])  # raises what users see


def test_most_examples_are_run() -> None:
    assert len(QUICK) >= 6
    assert sum(example.is_run for example in EXAMPLES) >= 20
    assert sum(len(example.commands) for example in EXAMPLES) >= 40
    assert all(re.search(r"not run: \w+", e.comments) for e in EXAMPLES if not e.is_run)


def test_numbers_of_the_model_page() -> None:
    text = (ROOT / "docs/model.md").read_text("utf-8")
    source = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    test = doctest.DocTestParser().get_doctest(source, {}, "docs/model.md", None, None)
    assert len(test.examples) > 50
    report: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(test, out=report.append).failed == 0, "".join(report)


def test_functions_that_the_model_page_names_exist() -> None:
    text = (ROOT / "docs/model.md").read_text("utf-8")
    names = set(re.findall(r"`(parsim(?:\.\w+)+)`", text))
    assert len(names) > 15
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    """As GitHub shows the pages; mkdocs checks those of the site."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text("utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in slugs, target
