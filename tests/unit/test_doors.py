"""Names from files stay names: no path, shell word, markup or formula is made of them."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from parsim.charts.gantt import draw_gantt
from parsim.cli.main import run_command
from parsim.cli.tables import print_table
from parsim.config import load_model, to_data, to_toml
from parsim.errors import ParsimError
from parsim.execute.launch.torchrun import Nodes
from parsim.importers.huggingface import model_from_config
from parsim.timeline import Span, Timeline

ROOT = Path(__file__).parents[2]
NAMES = (
    '"><script>alert(1)</script>[bold]{{7*7}}{% x %}',
    "../../x [/x] $\\frac{1}{$ `touch harm` $(touch harm) 'q' \"d\" ; & | \\",
)
H100 = ("--hardware", "h100-sxm-80gb", "--global-batch", "8")
PLAN = "dp=2,pp=2,micro_batch=1"


def model_named(name: str, folder: Path) -> str:
    """A small model's file with another name and source."""
    table = tomllib.loads((ROOT / "models/tiny-llama-8l.toml").read_text())
    path = folder / "model.toml"
    path.write_text(to_toml(table | {"name": name, "source": name}))
    return str(path)


class Page(HTMLParser):
    """What a browser makes of a page: its elements, and their texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_in_every_output(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET_TOKEN", "swordfish")
    model = model_named(name, tmp_path)
    asked = ("simulate", "--model", model, *H100, "--plan", PLAN)
    drawn = ("--chart", "a.svg", "--memory-chart", "b.png", "--trace", "t.json", "--report", "r")
    assert run_command([*asked, *drawn]) == 0
    assert name in capsys.readouterr().out
    assert run_command([*asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"]["name"] == name
    (tmp_path / "p.json").write_text(json.dumps(document))

    page = Page((tmp_path / "r/simulate.html").read_text())
    plain = Page(_report_of_plain_model(tmp_path))
    assert page.tags.count("script") == plain.tags.count("script")
    assert name in page.text
    json.loads((tmp_path / "t.json").read_text())
    assert "<script" not in (tmp_path / "a.svg").read_text()
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {
        "model.toml",
        "a.svg",
        "b.png",
        "t.json",
        "p.json",
        "r/simulate.html",
        "plain.html",
    }
    for path in written:
        assert b"swordfish" not in (tmp_path / path).read_bytes()


def _report_of_plain_model(folder: Path) -> str:
    document = json.loads((folder / "p.json").read_text())
    document["model"] |= {"name": "plain", "source": "plain"}
    document |= {"command_line": "parsim"}
    (folder / "plain.json").write_text(json.dumps(document))
    assert run_command(["report", str(folder / "plain.json"), "-o", str(folder / "plain.html")]) == 0
    (folder / "plain.json").unlink()
    return (folder / "plain.html").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_exports_hold_a_name_as_one_word(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_named(name, tmp_path)
    plan = ["dp=2,zero=1,micro_batch=1", "--model", model, *H100]
    assert run_command(["export", *plan, "--to", "megatron", "-o", "m.sh"]) == 0
    assert run_command(["export", *plan, "--to", "slurm", "-o", "s.sh"]) == 0
    assert run_command(["export", "dp=2,zero=3", *plan[1:], "--to", "torchtitan", "-o", "t.py"]) == 0
    assert run_command(["export", *plan, "--to", "deepspeed", "-o", "d.json"]) == 0
    for script in ("m.sh", "s.sh"):
        subprocess.run(["bash", "-n", script], check=True, timeout=20)
        # Comments may hold it; commands do not run it.
        code = [line for line in Path(script).read_text().splitlines() if not line.startswith("#")]
        assert not re.search(r"(?<!')[`]touch|[$]\(touch", "\n".join(code).replace(f"'{model}'", ""))
    ast.parse(Path("t.py").read_text())
    json.loads(Path("d.json").read_text())
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "", "x" * 201, "a\u202eb", "a\0b", "a\tb"])
def test_a_name_is_one_printable_line(name: str, tmp_path: Path) -> None:
    table = tomllib.loads((ROOT / "models/tiny-llama-8l.toml").read_text())
    path = tmp_path / "m.toml"
    path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in (table | {"name": name}).items()))
    with pytest.raises(ParsimError, match="name: ") as caught:
        load_model(str(path))
    assert str(caught.value).replace("\n", "").isprintable()


def test_a_model_is_called_by_the_printable_part_of_its_folder() -> None:
    config = next(iter(json.loads((ROOT / "tests/unit/huggingface_configs.json").read_text()).values()))
    config = config.get("config", config)
    assert model_from_config(config, where="a\x1b[31m\nb/config.json").name == "a[31mb"


def test_messages_cannot_move_the_cursor() -> None:
    error = ParsimError("no \x1b[2J such", where="a\rb", got="\u202ex", expected="\x07", hint="\ud800")
    assert str(error).replace("\n", "").isprintable()
    str(error).encode()


def test_a_table_shows_markup_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["[bold]name", "n"], [["[/x] [red]a", "1"]], title="[link=http://x]t")
    out = capsys.readouterr().out
    assert "[/x] [red]a" in out
    assert "[bold]name" in out
    assert "[link=http://x]t" in out


def test_progress_on_a_terminal_shows_markup_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    from parsim.cli.output import progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress() as show:
        show("reading [/x] of [bold]", 1, 2)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_chart_takes_dollars_for_dollars(tmp_path: Path, suffix: str) -> None:
    spans = (Span(0, "compute", "$\\frac{1}{$", 0.0, 1.0, "forward", 0, 0),)
    path = tmp_path / f"c.{suffix}"
    draw_gantt(Timeline(spans=spans, source="simulated", title="$\\frac{1}{$ and $x_1$"), path)
    assert path.stat().st_size > 1000
    if suffix == "svg":
        assert "$x_1$" in path.read_text()


def test_ranks_meet_on_the_loopback_address_unless_told_otherwise() -> None:
    assert Nodes().on_loopback
    assert Nodes().host == "127.0.0.1"


def test_a_model_of_ours_survives_its_own_toml(tmp_path: Path) -> None:
    model = load_model("tiny-llama-8l")
    for name in NAMES:
        path = tmp_path / "m.toml"
        path.write_text(to_toml(to_data(model) | {"name": name}))
        assert load_model(str(path)).name == name
