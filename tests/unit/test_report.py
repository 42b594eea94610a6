"""Reports: what a page says is what its document and timelines say, and texts stay texts."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import itertools
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from parsim.cli.main import run_command
from parsim.errors import ParsimError
from parsim.plan import ParallelPlan
from parsim.plan_file import PlanFile
from parsim.report.build import Finding, page_of
from parsim.report.document import Node
from parsim.report.item import breakdown_section
from parsim.report.memory import memory_picture
from parsim.report.page import Schedule, Waterfall
from parsim.report.plot import Line, Plot, linear_axis, log_axis
from parsim.report.render import embedded, render
from parsim.report.schedule import MOST_ROWS, TICKS, color_key, schedule_of
from parsim.report.step import Step, timeline_sections
from parsim.report.theme import CONTRAST, DARK_GROUND, contrast, themes
from parsim.timeline import MemorySample, Span, Timeline, busy_s

LayOut = Callable[..., Timeline]
EVIL = '"></script><script>alert(1)</script><img src=x onerror=alert(2)>'
SIMULATE = (
    "simulate --model tiny-llama-8l --hardware h100-sxm-80gb --global-batch 16 "
    "--plan dp=2,tp=2,pp=4,micro_batch=1,schedule=interleaved,vpp=2"
).split()


class Reader(HTMLParser):
    """The elements of a page, its scripts and the text of its cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.words: list[str] = []
        self._script: dict[str, str | None] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = dict(attrs) if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts.append((self._script, data))
            self._script = None
        else:
            self.words.append(data)


def run_json(*words: str, folder: Path) -> str:
    """What a command prints as JSON while it writes its page into a folder."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert run_command([*words, "--json", "--report", str(folder)]) == 0
    return text.getvalue()


class Simulated(NamedTuple):
    """A simulated step: its page and its document."""

    page: str
    document: dict[str, Any]


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    """One step, simulated once."""
    folder = tmp_path_factory.mktemp("step")
    text = run_json(*SIMULATE, folder=folder)
    page = (folder / "simulate.html").read_text(encoding="utf-8")
    return Simulated(page=page, document=json.loads(text))


def again(folder: Path, document: dict[str, Any], *, status: int = 0) -> str:
    """The page that `parsim report` makes of a document; none where it refuses to."""
    (folder / "document.json").write_text(json.dumps(document))
    page = folder / "page.html"
    assert run_command(["report", str(folder / "document.json"), "-o", str(page)]) == status
    assert page.exists() == (status == 0)
    return page.read_text(encoding="utf-8") if status == 0 else ""


def test_a_report_from_the_document_is_the_one_the_command_wrote(
    step: Simulated, tmp_path: Path
) -> None:
    """The timeline that the document does not hold is simulated again, and comes out the same."""
    assert again(tmp_path, step.document) == step.page
    words = " ".join(Reader(step.page).words)
    assert f"{step.document['mfu']:.1%}" in words
    assert step.document["command_line"] in words
    assert "lambda.ai/instances" in words, "the price has its source"


def test_rows_say_for_how_many_devices_they_stand() -> None:
    one = Span(rank=0, stream="compute", name="0F0", start_s=0.0, end_s=1.0, kind="forward")
    spans = tuple(one._replace(rank=rank) for rank in range(2))
    folded, unfolded = Timeline(spans=spans), Timeline(spans=(*spans, one._replace(rank=2)))
    for plan, timeline, said in (
        (ParallelPlan(pp=2, dp=4, tp=8), folded, True),
        (ParallelPlan(pp=2), folded, False),
        (ParallelPlan(pp=1, dp=3), unfolded, False),
    ):
        (section,) = timeline_sections(Step(file=PlanFile(plan=plan), timelines=(timeline,)))
        (chart,) = section.parts
        assert isinstance(chart, Schedule)
        assert ("rank p is pipeline rank p, 32 devices that do the same" in chart.caption) == said


def test_equal_questions_give_equal_bytes(tmp_path: Path) -> None:
    """The time that a search took is in the document and not on the page."""
    plan = "plan --model tiny-llama-8l --hardware h100-sxm-80gb --gpus 8 --global-batch 64".split()
    pages, documents = [], []
    for _ in range(2):
        text = run_json(*plan, "--schedule", "1f1b", "--tp", "1,2", folder=tmp_path)
        pages.append((tmp_path / "plan.html").read_bytes())
        documents.append(json.loads(text))
    assert documents[0]["search_s"] != documents[1]["search_s"]
    assert pages[0] == pages[1]
    (row,) = (held for _, held in Reader(pages[0].decode()).tags if "aria-current" in held)
    assert row["class"] == "marked"


def test_names_from_files_stay_text(step: Simulated, tmp_path: Path) -> None:
    """A model whose name and source are markup puts no element, and no second script, into the page."""
    document = copy.deepcopy(step.document)
    document["model"]["name"] = document["model"]["source"] = EVIL
    document["command_line"] = document["goodput"] = document["inputs"]["model"] = EVIL
    evil, plain = Reader(again(tmp_path, document)), Reader(step.page)
    assert len(evil.scripts) == len(plain.scripts)
    assert not [tag for tag, _ in evil.tags if tag == "img"]
    assert not [name for _, held in evil.tags for name in held if name.startswith("on")]
    assert EVIL in "".join(evil.words)
    for held, script in evil.scripts:
        if held.get("type") == "application/json":
            json.loads(script)


def test_files_are_listed_as_the_command_read_them(tmp_path: Path) -> None:
    """A document names no file that a report would open, and what changed since is not in it."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"plan": {"dp": 2}}))
    words = "simulate --model tiny-llama-8l --hardware local-cpu --global-batch 4 --plan".split()
    document = json.loads(run_json(*words, str(plan), folder=tmp_path))
    listed = {file["name"]: file["sha256"] for file in document["input_files"]}
    then = hashlib.sha256(plan.read_bytes()).hexdigest()
    assert listed[str(plan)] == then
    assert {name for name in listed if name.endswith("(shipped)")} == {
        "models/tiny-llama-8l.toml (shipped)",
        "hardware_profiles/local-cpu.toml (shipped)",
        "stacks/parsim-executor.toml (shipped)",
    }
    plan.write_text("{}")
    secret = tmp_path / "secret"
    secret.write_text("of somebody else")
    document["inputs"] |= {"x": str(secret), "model": f"{secret}.toml", "fabric": str(secret)}
    page = again(tmp_path, document)
    assert then in page
    assert hashlib.sha256(secret.read_bytes()).hexdigest() not in page
    assert str(secret) not in page


def test_embedded_data_cannot_end_its_element() -> None:
    data = {"name": EVIL, "line": "\u2028", "and": "&lt;"}
    text = str(embedded(data))
    assert not set("<>&") & set(text)
    assert json.loads(text) == data


def test_a_page_names_nothing_outside_itself(step: Simulated) -> None:
    for tag, held in Reader(step.page).tags:
        for key in ("src", "href", "action", "data", "srcset"):
            assert (held.get(key) or "#").startswith(("#", "data:")), (tag, held)
    assert "default-src 'none'" in step.page


@pytest.mark.parametrize(
    "change",
    [
        {"command": "plam"},
        {"step_time_s": None},
        {"step_time_s": "soon"},
        {"interval_s": [1.0, None]},
        {"breakdown_s": [1, 2]},
        {"memory_bytes": {"peak": True}},
        {"plan": {"dp": "two"}},
        {"fits": "yes"},
        {"tokens_per_s_per_gpu": 0},
    ],
)
def test_a_damaged_document_is_refused_and_nothing_written(
    capsys: pytest.CaptureFixture[str], step: Simulated, tmp_path: Path, change: dict[str, Any]
) -> None:
    again(tmp_path, step.document | change, status=2)
    message = capsys.readouterr().err
    assert next(iter(change)) in message
    assert "defect" not in message


def test_a_plan_that_its_job_cannot_have_is_refused(
    capsys: pytest.CaptureFixture[str], step: Simulated, tmp_path: Path
) -> None:
    again(tmp_path, step.document | {"plan": step.document["plan"] | {"dp": 64}}, status=2)
    message = capsys.readouterr().err
    assert "global_batch" in message
    assert "defect" not in message


def test_a_step_that_cannot_be_simulated_again_says_so(tmp_path: Path) -> None:
    text = run_json(*SIMULATE, "--straggler", "rank=3,slow=1.5", folder=tmp_path)
    assert "<canvas" in (tmp_path / "simulate.html").read_text(encoding="utf-8")
    page = again(tmp_path, json.loads(text))
    assert "<canvas" not in page
    assert "such as a straggler" in page


def decoded(schedule: Schedule) -> list[tuple[str, str, str, str, float, float]]:
    """Every span in the data of a chart, as the page's script reads it."""
    data, found = schedule.data, []
    for row in data["rows"]:
        for lane in row["lanes"]:
            at = 0
            for gap, length, what, mb in zip(
                *(lane[k] for k in ("gap", "length", "what", "mb")), strict=True
            ):
                pattern, kind, _ = data["whats"][what]
                ends = ((at + gap) / TICKS, (at + gap + length) / TICKS)
                name = pattern.replace("{m}", str(mb))
                found.append((row["label"], lane["stream"], name, data["kinds"][kind], *ends))
                at += gap + length
    return found


def test_a_chart_carries_every_span(lay_out: LayOut) -> None:
    timeline = lay_out(
        "Interleaved 1F1B", 4, 8, transfer_s=0.001, tp_s=0.002, dp_s=0.01, optimizer_s=0.1
    )
    schedule = schedule_of([timeline], caption="")
    found = sorted(decoded(schedule))
    lanes = {"pp_send_next": "pp_send", "pp_send_prev": "pp_send"}
    lanes |= {"pp_recv_next": "pp_recv", "pp_recv_prev": "pp_recv"}
    wanted = sorted(
        (f"rank {s.rank}", lanes.get(s.stream, s.stream), s.name, color_key(s), s.start_s, s.end_s)
        for s in timeline.spans
    )
    assert [each[:4] for each in found] == [each[:4] for each in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine[4:] == pytest.approx([t / timeline.end_s for t in theirs[4:]], abs=1e-6)


def test_many_ranks_share_rows_that_hold_their_mean() -> None:
    """1,024 ranks of which every second one computes half of the time."""
    spans = tuple(
        Span(rank, "compute", "0F0", 0.0, 1.0 if rank % 2 else 2.0, "forward", 0, 0)
        for rank in range(1024)
    )
    schedule = schedule_of([Timeline(spans=spans)], caption="")
    rows = schedule.data["rows"]
    assert len(rows) == schedule.rows == MOST_ROWS
    assert rows[0]["label"] == "ranks 0–15"
    levels = rows[5]["lanes"][0]["bins"][1::2]
    half = len(levels) // 2
    assert set(levels[: half - 1]) == {"9"}
    assert set(levels[half + 1 :]) == {"5"}, "half of the ranks, in ninths, rounded up"
    assert len(json.dumps(schedule.data)) < 500_000


def test_lanes_of_too_many_spans_are_cut_into_bins(lay_out: LayOut) -> None:
    timeline = lay_out("1F1B", 4, 64, tp_s=0.004)
    compute = sum(span.stream == "compute" for span in timeline.spans)
    schedule = schedule_of([timeline], caption="", most_spans=compute)
    lanes = {lane["stream"]: lane for lane in schedule.data["rows"][0]["lanes"]}
    assert len(lanes["compute"]["gap"]) == compute // 4
    share = sum(map(int, lanes["tp"]["bins"][1::2])) / 9 / (len(lanes["tp"]["bins"]) / 2)
    busy = busy_s(s for s in timeline.spans if (s.rank, s.stream) == (0, "tp")) / timeline.end_s
    assert busy <= share < 1.3 * busy + 0.05
    assert "tp in" in schedule.note


@pytest.mark.parametrize("most_spans", [0, 1000])
def test_kinds_that_no_palette_has_are_one_and_style_nothing(most_spans: int) -> None:
    """Kinds are free text in files: more of them than letters, and one with a style of its own."""
    kinds = ["forward", "red);background:url(//x)", *(f"kind{i}" for i in range(30))]
    spans = tuple(
        Span(0, "compute", f"{i}F0", float(i), i + 1.0, kind, i) for i, kind in enumerate(kinds)
    )
    schedule = schedule_of([Timeline(spans=spans)], caption="", most_spans=most_spans)
    assert schedule.data["kinds"] == ["forward", "other"]
    assert [key for key, _ in schedule.legend] == ["forward", "other"]
    assert "url" not in json.dumps([schedule.data["kinds"], schedule.legend])
    (lane,) = schedule.data["rows"][0]["lanes"]
    if most_spans:
        assert len(lane["gap"]) == len(kinds)
    else:
        assert set(lane["bins"][::2]) == {"a", "b"}


def test_two_timelines_stand_rank_by_rank(lay_out: LayOut) -> None:
    both = [lay_out("1F1B", 2, 4), lay_out("1F1B", 2, 4, forward_s=0.02, source="measured")]
    labels = [row["label"] for row in schedule_of(both, caption="").data["rows"]]
    assert labels == ["rank 0 simulated", "rank 0 measured", "rank 1 simulated", "rank 1 measured"]


def test_a_page_of_64_ranks_is_below_two_megabytes(step: Simulated, lay_out: LayOut) -> None:
    timeline = lay_out("1F1B", 64, 128, transfer_s=0.001, tp_s=0.001, dp_s=0.01)
    assert len(timeline.spans) > 60_000
    finding = Finding(document=step.document, where="test", timelines=(timeline,))
    page = render(page_of([finding]))
    assert len(page.encode()) < 2_000_000


def test_a_waterfall_adds_up_to_the_step(step: Simulated) -> None:
    document = step.document
    (waterfall,) = breakdown_section(Node(data=document, where="test")).parts
    assert isinstance(waterfall, Waterfall)
    *parts, total = waterfall.bars
    assert parts[0].end == pytest.approx(document["mfu_causal"], abs=1e-4)
    for before, after in itertools.pairwise(parts):
        assert after.start == pytest.approx(before.end, abs=2e-5)
    assert parts[-1].end == pytest.approx(total.end, abs=1e-3)
    compute = document["breakdown_s"]["compute"] / document["step_time_s"]
    assert parts[1].end == pytest.approx(compute, abs=1e-4)


def test_memory_keeps_its_highest_points() -> None:
    """Of more samples than a line has points the peak survives, at its time."""
    samples = [MemorySample(0, i / 10_000, 1e9 + (5e9 if i == 7_003 else i)) for i in range(10_000)]
    samples.append(MemorySample(1, 0.0, 2e9))
    timeline = Timeline(spans=(Span(0, "compute", "x", 0.0, 1.0, "forward"),), memory=tuple(samples))
    picture = memory_picture(timeline, capacity_bytes=4e9)
    assert picture is not None
    strong = next(line for line in picture.plot.lines if line.strong)
    assert len(strong.points) < 700
    time_s, held = max(strong.points, key=lambda point: point[1])
    assert held == 6e9
    assert time_s == pytest.approx(0.7003, abs=0.002)
    assert strong.points[-1] == (1.0, 1e9 + 9_999)
    assert picture.plot.rules[0].value == 4e9
    assert memory_picture(Timeline(spans=timeline.spans), capacity_bytes=None) is None


def test_axes_hold_their_values_and_have_round_ticks() -> None:
    axis = linear_axis("", (0.31, 6.5), str)
    assert (axis.low, axis.high) == (0.0, 8.0)
    assert [text for _, text in axis.ticks] == ["0.0", "2.0", "4.0", "6.0", "8.0"]
    exact = linear_axis("", (6.5,), str, exact=True)
    assert exact.high == 6.5
    assert max(share for share, _ in exact.ticks) == pytest.approx(6 / 6.5)
    logs = log_axis("", (2.0, 3000.0), str)
    assert logs.share(2.0) > 0
    assert logs.share(3000.0) < 1
    assert all(0 <= share <= 1 for share, _ in logs.ticks)
    plot = Plot(alt="", x=axis, y=logs, lines=(Line(points=((0.0, 2.0), (7.0, 3000.0)), color="s0"),))
    assert plot.at_x(0.0) < plot.at_x(3.5) < plot.at_x(7.0)
    assert plot.at_y(2.0) > plot.at_y(100.0) > plot.at_y(3000.0)


def test_colours_stand_out_on_dark_ground_and_keep_their_keys() -> None:
    light, dark = themes()["light"], themes()["dark"]
    assert set(light) == set(dark)
    assert all(contrast(color, DARK_GROUND) >= CONTRAST for key, color in dark.items() if key != "idle")


def test_texts_have_contrast_in_both_themes() -> None:
    """4.5 to 1 for text on its ground (WCAG 2.2, 1.4.3)."""
    css = (Path(__file__).parents[2] / "parsim/report/assets/page.css").read_text(encoding="utf-8")
    blocks = [block for block in css.split("}") if "--ground:" in block]
    assert len(blocks) == 4
    for block in blocks:
        colors = dict(
            pair.strip()[2:].split(": ") for pair in block.split("{")[-1].split(";") if "--" in pair
        )
        for text in ("text", "muted", "accent", "warn"):
            for ground in ("ground", "surface"):
                assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground, block)


def test_documents_without_a_report_are_refused() -> None:
    with pytest.raises(ParsimError, match="no report") as caught:
        page_of([Finding(document={"command": "validat"}, where="a.json")])
    assert caught.value.hint == "did you mean 'validate'?"
