from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import Collection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.path import Path as PlotPath
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from parsim.charts.comparison import comparison_figure, draw_comparison
from parsim.charts.errors import draw_predicted_measured, predicted_measured_figure
from parsim.charts.gantt import draw_gantt, gantt_figure
from parsim.charts.memory import draw_memory, memory_figure
from parsim.charts.palette import COLORS, IDLE_COLOR
from parsim.charts.schedules import Panel, draw_schedules, schedules_figure
from parsim.charts.style import lighter
from parsim.errors import ParsimError
from parsim.export.timeline_json import timeline_to_data
from parsim.timeline import Span, Timeline
from parsim.units import format_bytes, format_duration

LayOut = Callable[..., Timeline]
RUNS = [("A100", 2.0, 2.1), ("A100", 4.0, 3.6), ("A100", 8.0, 8.0), ("H100", 1.0, 1.3)]


def collection(figure: Figure, gid: str, panel: int = 0) -> Collection:
    (found,) = [c for c in figure.axes[panel].collections if c.get_gid() == gid]
    return found


def boxes(figure: Figure, panel: int = 0) -> np.ndarray:
    """(left, right, top, bottom) of every box, in data units."""
    corners = np.array([points(p)[:4] for p in collection(figure, "spans", panel).get_paths()])
    x, y = corners[:, :, 0], corners[:, :, 1]
    return np.stack([x.min(1), x.max(1), y.min(1), y.max(1)], axis=1)


def points(path: PlotPath) -> np.ndarray:
    return np.asarray(path.vertices, dtype=float)


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(Text) if t.get_text() and t.get_visible()]


def every_chart(lay_out: LayOut, title: str = "") -> dict[str, Figure]:
    def named(schedule: str, pp: int, m: int, source: str = "simulated") -> Timeline:
        t = lay_out(
            schedule,
            pp,
            m,
            transfer_s=0.001,
            tp_s=0.001,
            dp_s=0.02,
            optimizer_s=0.01,
            source=source,
        )
        return Timeline(spans=t.spans, memory=t.memory, source=t.source, title=title or t.title)

    few, many = named("Interleaved 1F1B", 4, 8), named("1F1B", 64, 8)
    groups = [(f"group {i}, of a certain length", 1.0 + i, 1.1 + i) for i in range(18)]
    return {
        "gantt of 4": gantt_figure(few),
        "gantt of 64": gantt_figure(many),
        "memory of 4": memory_figure(few, capacity_bytes=20 * 2**30),
        "memory of 64": memory_figure(many, capacity_bytes=15 * 2**30),
        "comparison of 4": comparison_figure(few, named("1F1B", 4, 8, "measured")),
        "comparison of 64": comparison_figure(many, named("GPipe", 64, 8, "measured")),
        "schedules": schedules_figure(
            [Panel("few", few, 1e9), *(Panel(n, named(n, 4, 8), 2e9) for n in ("GPipe", "1F1B"))]
        ),
        "errors": predicted_measured_figure(groups, title=title or "Errors"),
    }


@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 8), (8, 64)])
def test_the_title_states_the_bubble_of_1f1b(lay_out: LayOut, p: int, m: int) -> None:
    """(p − 1) / (m + p − 1), Narayanan et al. 2021, arXiv 2104.04473, section 2.2."""
    share = (p - 1) / (m + p - 1)
    expected = f"{100 * share:.0f}%" if share >= 0.0995 else f"{100 * share:.1f}%"
    title = f"1F1B, {m} micro-batches: {expected} of the step is bubble"
    assert title in texts(gantt_figure(lay_out("1F1B", p, m)))


def test_a_box_for_every_span_at_its_time_on_its_rank(lay_out: LayOut) -> None:
    timeline = lay_out("1F1B", 4, 8, transfer_s=0.002, tp_s=0.002, dp_s=0.01, optimizer_s=0.005)
    found = boxes(gantt_figure(timeline))
    assert len(found) == len(timeline.spans)
    drawn = sorted((int(top), left, right) for left, right, top, _ in found.round(6).tolist())
    ms = sorted((s.rank, round(1e3 * s.start_s, 6), round(1e3 * s.end_s, 6)) for s in timeline.spans)
    assert drawn == ms


def test_lanes_of_a_row_lie_below_each_other_and_rows_apart(lay_out: LayOut) -> None:
    timeline = lay_out("1F1B", 2, 4, transfer_s=0.002, tp_s=0.002, dp_s=0.01)
    found = boxes(gantt_figure(timeline))
    lanes = sorted({(round(top, 9), round(bottom, 9)) for _, _, top, bottom in found})
    assert len(lanes) == 2 * 5  # compute, tp, dp, sends and receives of two ranks
    assert all(bottom <= top + 1e-9 for (_, bottom), (top, _) in itertools.pairwise(lanes))
    assert lanes[4][1] < 1.0 < lanes[5][0]


def test_the_svg_holds_a_shape_for_every_span(lay_out: LayOut, tmp_path: Path) -> None:
    timeline = lay_out("GPipe", 4, 6, transfer_s=0.002)
    draw_gantt(timeline, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    group = text[text.index('<g id="spans">') :]
    group = group[: group.index("</g>")]
    assert len(re.findall(r"<(?:use|path) ", re.sub(r"<defs>.*?</defs>", "", group, flags=re.S))) == len(
        timeline.spans
    )


@pytest.mark.parametrize(
    ("forward_s", "unit"), [(0.5, "(s)"), (0.01, "(ms)"), (1e-5, "(µs)"), (1e-9, "(ns)")]
)
def test_the_time_axis_names_a_sensible_unit(lay_out: LayOut, forward_s: float, unit: str) -> None:
    figure = gantt_figure(lay_out("1F1B", 4, 8, forward_s=forward_s))
    (axes,) = figure.axes
    assert axes.get_xlabel().endswith(unit)
    assert 1 < axes.get_xlim()[1] < 1000


def test_micro_batch_numbers_fit_into_their_boxes(lay_out: LayOut) -> None:
    figure = gantt_figure(lay_out("Interleaved 1F1B", 4, 12, transfer_s=0.001))
    (axes,) = figure.axes
    numbers = [t for t in axes.texts if t.get_text().isdigit()]
    assert {t.get_text() for t in numbers} == {str(i) for i in range(12)}
    rectangles = [c.get_extents(axes.transData) for c in collection(figure, "spans").get_paths()]
    for number in numbers:
        inner = number.get_window_extent()
        assert any(
            r.x0 <= inner.x0 and inner.x1 <= r.x1 and r.y0 <= inner.y0 and inner.y1 <= r.y1
            for r in rectangles
        ), f"{number.get_text()} sticks out of its box"


def test_numbers_are_left_out_where_they_could_not_be_read(lay_out: LayOut) -> None:
    figure = gantt_figure(lay_out("1F1B", 64, 256))
    assert not [t for t in figure.axes[0].texts if t.get_text().isdigit()]


def test_chunks_of_a_rank_are_shades_of_one_colour(lay_out: LayOut) -> None:
    figure = gantt_figure(lay_out("Interleaved 1F1B", 4, 8))
    colors = {tuple(c[:3]) for c in collection(figure, "spans").get_facecolor()}
    shades = {lighter(COLORS[k], share) for k in ("forward", "backward") for share in (0.0, 0.55)}
    assert np.array(sorted(colors)) == pytest.approx(np.array(sorted(shades)))


def test_the_legend_names_what_occurs_and_nothing_else(lay_out: LayOut) -> None:
    timeline = lay_out("1F1B", 2, 2, transfer_s=0.001)
    (legend,) = gantt_figure(timeline).legends
    words = [t.get_text() for t in legend.get_texts()]
    assert words == ["forward", "backward", "pipeline send", "pipeline receive", "compute idle"]
    odd = Span(0, "compute", "x", 0.0, 1.0, "checkpointing")
    (legend,) = gantt_figure(Timeline(spans=(odd,))).legends
    assert [t.get_text() for t in legend.get_texts()] == ["checkpointing", "compute idle"]


def test_lanes_of_tiny_spans_keep_their_busy_share() -> None:
    """10,000 spans in two colours, each a tenth of a pixel: 45% forward, 45% backward, 10% idle."""
    spans = []
    for i in range(5000):
        spans.append(Span(0, "compute", "f", 2e-3 * i, 2e-3 * i + 0.9e-3, "forward"))
        spans.append(Span(0, "compute", "b", 2e-3 * i + 1e-3, 2e-3 * i + 1.9e-3, "backward"))
    figure = gantt_figure(Timeline(spans=tuple(spans)))
    found = boxes(figure)
    colors = collection(figure, "spans").get_facecolor()
    assert len(found) < 2000
    widths = found[:, 1] - found[:, 0]
    mean = (widths[:, None] * colors).sum(axis=0) / 10.0  # over a step of 10 s
    both = (np.array(to_rgb(COLORS["forward"])) + to_rgb(COLORS["backward"])) / 2
    assert mean[3] == pytest.approx(0.9, abs=0.01)
    assert mean[:3] == pytest.approx(both, abs=0.02)


def test_a_hundred_thousand_spans_stay_a_small_picture(lay_out: LayOut, tmp_path: Path) -> None:
    timeline = lay_out("1F1B", 64, 256, transfer_s=0.001, tp_s=0.001)
    assert len(timeline.spans) > 100_000
    draw_gantt(timeline, tmp_path / "big.svg")
    assert (tmp_path / "big.svg").stat().st_size < 2e6


def test_nothing_is_clipped_and_no_words_overlap(lay_out: LayOut) -> None:
    long = "llama-3.1-405b, dp=64,tp=8,pp=16,vpp=2,micro_batch=1,schedule=interleaved,zero=1 " * 2
    for title in ("", long):
        for name, figure in every_chart(lay_out, title).items():
            figure.canvas.draw()
            extents = [(t.get_text(), t.get_window_extent()) for t in words_outside(figure)]
            assert len(extents) > 5
            for words, box in extents:
                inside = box.x0 >= 0 and box.y0 >= 0
                inside &= box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
                assert inside, f"{name}: {words!r} is clipped"
            for (a, box_a), (b, box_b) in itertools.combinations(extents, 2):
                assert not overlap(box_a, box_b), f"{name}: {a!r} lies on {b!r}"


def words_outside(figure: Figure) -> list[Text]:
    """Every text that is drawn but the numbers in boxes."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    numbers = [text for axes in figure.axes for text in axes.texts]
    return [
        text
        for text in figure.findobj(Text)
        if isinstance(text, Text)
        and text.get_text().strip()
        and text.get_visible()
        and text not in hidden
        and not (text in numbers and text.get_text().isdigit())
    ]


def overlap(a: Bbox, b: Bbox) -> bool:
    """Whether two boxes share more than a rim of two pixels."""
    return bool(min(a.x1, b.x1) - max(a.x0, b.x0) > 2 and min(a.y1, b.y1) - max(a.y0, b.y0) > 2)


def test_memory_is_a_step_line_a_rank_with_its_peak_named(lay_out: LayOut) -> None:
    timeline = lay_out("1F1B", 4, 8)
    figure = memory_figure(timeline, capacity_bytes=15 * 2**30)
    (axes,) = figure.axes
    assert axes.get_ylabel() == "memory held (GiB)"
    lines = [points(path) for path in collection(figure, "memory").get_paths()]
    assert len(lines) == 4
    # 1F1B keeps p − rank micro-batches alive: 10 + 1.5 · (4, 3, 2, 1) GiB.
    assert sorted(line[:, 1].max() for line in lines) == pytest.approx([11.5, 13.0, 14.5, 16.0])
    fullest = max(lines, key=lambda line: line[:, 1].max())
    before_35_ms = fullest[fullest[:, 0] <= 35]
    assert before_35_ms[-1, 1] == pytest.approx(16.0)
    assert fullest[-1, 0] == pytest.approx(1e3 * timeline.end_s)
    words = texts(figure)
    assert "1F1B: rank 0 holds the most, 16.0 GiB, 1.0 GiB over the capacity" in words
    assert f"peak 16.0 GiB, rank 0, at {format_duration(0.03)}" in words
    assert "capacity 15.0 GiB" in words
    assert "1F1B: rank 0 holds the most, 16.0 GiB" in texts(memory_figure(timeline))


def test_comparison_draws_predicted_above_measured_for_each_rank(lay_out: LayOut) -> None:
    predicted = lay_out("1F1B", 4, 8)
    measured = lay_out("1F1B", 4, 8, forward_s=0.0125, source="measured")
    figure = comparison_figure(predicted, measured)
    (axes,) = figure.axes
    assert len(boxes(figure)) == len(predicted.spans) + len(measured.spans)
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert labels == [w for r in range(4) for w in (f"rank {r} predicted", "measured")]
    steps = f"predicted {format_duration(0.33)}, measured {format_duration(measured.end_s)}"
    assert f"1F1B: {steps}, 20% too short" in texts(figure)
    rows = boxes(figure)
    first, second = (rows[(rows[:, 2] >= at) & (rows[:, 3] <= at + 1)] for at in (0.0, 1.0))
    assert (first[:, 1].max(), second[:, 1].max()) == pytest.approx((330.0, 412.5))


def test_comparison_says_which_ranks_it_leaves_out(lay_out: LayOut) -> None:
    figure = comparison_figure(lay_out("1F1B", 2, 4), lay_out("1F1B", 4, 4, source="measured"))
    assert any("2 ranks that only one of them has left out" in text for text in texts(figure))
    elsewhere = Timeline(spans=(Span(9, "compute", "0F0", 0.0, 1.0, "forward", 0, 0),))
    with pytest.raises(ParsimError, match="no rank in common"):
        comparison_figure(lay_out("1F1B", 2, 4), elsewhere)


def test_schedules_share_a_time_axis_and_state_step_bubble_and_peak(lay_out: LayOut) -> None:
    panels = [
        Panel("gpipe", lay_out("GPipe", 4, 8), 8e9, fits=False),
        Panel("1f1b", lay_out("1F1B", 4, 8), 4e9),
        Panel("interleaved", lay_out("Interleaved 1F1B", 4, 8), 5e9, vpp=2),
    ]
    figure = schedules_figure(panels)
    compute = [sum(s.stream == "compute" for s in panel.timeline.spans) for panel in panels]
    assert [len(boxes(figure, i)) for i in range(3)] == compute
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    words = texts(figure)
    slow, fast = format_duration(0.330), format_duration(0.285)
    assert f"gpipe: step {slow}, bubble 27%, peak {format_bytes(8e9)}, does not fit" in words
    # Two chunks halve the bubble: (p − 1) / v over m + (p − 1) / v.
    peak = format_bytes(5e9)
    assert f"interleaved (2 chunks a rank): step {fast}, bubble 16%, peak {peak}" in words
    assert "fastest: interleaved of the 2 that fit, 14% less time than 1f1b" in words


def test_errors_are_told_group_by_group(lay_out: LayOut) -> None:
    figure = predicted_measured_figure(RUNS, title="Validation")
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == [
        "A100: 3 runs, median error 5.0%",
        "H100: 1 run, median error 30%",
    ]
    points = [line for line in axes.lines if (line.get_gid() or "").startswith("group")]
    assert [len(line.get_xdata()) for line in points] == [3, 1]  # type: ignore[arg-type]
    assert len({line.get_marker() for line in points}) == 2
    assert len({line.get_color() for line in points}) == 2
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlim() == axes.get_ylim()
    assert "4 runs, median error 7.5%; 3 of them within 10% (the band)" in texts(figure)


@pytest.mark.parametrize("runs", [[], [("A100", 0.0, 1.0)], [("A100", 1.0, float("nan"))]])
def test_errors_need_positive_times(runs: list[tuple[str, float, float]]) -> None:
    with pytest.raises(ParsimError):
        predicted_measured_figure(runs, title="Validation")


@pytest.mark.parametrize("name", ["chart.jpg", "chart", "chart.png.txt"])
def test_another_suffix_is_refused_and_nothing_is_written(
    lay_out: LayOut, tmp_path: Path, name: str
) -> None:
    timeline = lay_out("1F1B", 2, 2)
    path = tmp_path / name
    draws: list[Callable[[], object]] = [
        lambda: draw_gantt(timeline, path),
        lambda: draw_memory(timeline, path),
        lambda: draw_comparison(timeline, timeline, path),
        lambda: draw_schedules([Panel("1f1b", timeline, 1e9)], path),
        lambda: draw_predicted_measured(RUNS, path, title="t"),
    ]
    for draw in draws:
        with pytest.raises(ParsimError, match="unknown type of picture") as caught:
            draw()
        assert caught.value.expected == ".png, .svg, .pdf"
    assert list(tmp_path.iterdir()) == []


def test_an_empty_timeline_is_refused(lay_out: LayOut) -> None:
    empty = Timeline(spans=(), title="my step")
    full = lay_out("1F1B", 2, 2)
    draws: list[Callable[[], object]] = [
        lambda: gantt_figure(empty),
        lambda: memory_figure(empty),
        lambda: comparison_figure(full, empty),
        lambda: schedules_figure([Panel("full", full, 1e9), Panel("empty", empty, 1e9)]),
    ]
    for draw in draws:
        with pytest.raises(ParsimError, match="nothing to draw") as caught:
            draw()
        assert caught.value.where == "my step"
    with pytest.raises(ParsimError, match="no schedule"):
        schedules_figure([])


def draw_all(folder: Path, timeline: Timeline) -> dict[str, str]:
    """Every chart as every type of file; the hash of each."""
    for suffix in ("png", "svg", "pdf"):
        draw_gantt(timeline, folder / f"gantt.{suffix}")
    draw_memory(timeline, folder / "memory.svg", capacity_bytes=2e10)
    draw_comparison(timeline, timeline, folder / "comparison.svg")
    draw_schedules([Panel("1f1b", timeline, 1e9)] * 2, folder / "schedules.svg")
    draw_predicted_measured(RUNS, folder / "errors.svg", title="t")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


_DRAW_AGAIN = """
import json, sys, pathlib
from parsim.charts.comparison import draw_comparison
from parsim.charts.schedules import Panel, draw_schedules
from parsim.charts.errors import draw_predicted_measured
from parsim.charts.gantt import draw_gantt
from parsim.charts.memory import draw_memory
from parsim.export.timeline_json import timeline_from_data
folder = pathlib.Path(sys.argv[1])
timeline = timeline_from_data(json.loads((folder / "t.json").read_text()), where="t.json")
(folder / "t.json").unlink()
for suffix in ("png", "svg", "pdf"):
    draw_gantt(timeline, folder / f"gantt.{suffix}")
draw_memory(timeline, folder / "memory.svg", capacity_bytes=2e10)
draw_comparison(timeline, timeline, folder / "comparison.svg")
draw_schedules([Panel("1f1b", timeline, 1e9)] * 2, folder / "schedules.svg")
draw_predicted_measured(%r, folder / "errors.svg", title="t")
assert "matplotlib.pyplot" not in sys.modules, "pyplot keeps global state"
"""


def test_pictures_have_the_same_bytes_in_any_process(lay_out: LayOut, tmp_path: Path) -> None:
    """Whatever the order of sets, the user's settings of matplotlib and the place on earth are."""
    timeline = lay_out("Interleaved 1F1B", 4, 8, transfer_s=0.001, dp_s=0.01)
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    (there / "t.json").write_text(json.dumps(timeline_to_data(timeline)))
    settings = tmp_path / "matplotlibrc"
    settings.write_text("font.size: 30\nsavefig.dpi: 31\nsvg.fonttype: none\naxes.grid: True\n")
    subprocess.run(
        [sys.executable, "-c", _DRAW_AGAIN % RUNS, str(there)],
        env=os.environ | {"PYTHONHASHSEED": "1", "MATPLOTLIBRC": str(settings), "TZ": "Asia/Tokyo"},
        check=True,
        timeout=120,
    )
    hashes = draw_all(here, timeline)
    again = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(there.iterdir())}
    assert len(hashes) == 7
    assert hashes == again


def test_files_carry_no_date_and_no_program(lay_out: LayOut, tmp_path: Path) -> None:
    draw_all(tmp_path, lay_out("1F1B", 2, 2))
    data = (tmp_path / "gantt.png").read_bytes()
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append(data[at + 4 : at + 8].decode())
        crc = int.from_bytes(data[at + 8 + length : at + 12 + length], "big")
        assert crc == zlib.crc32(data[at + 4 : at + 8 + length])
        at += 12 + length
    assert set(chunks) == {"IHDR", "pHYs", "IDAT", "IEND"}
    svg = (tmp_path / "gantt.svg").read_text()
    assert "<dc:date>" not in svg
    assert "Matplotlib v" not in svg
    pdf = (tmp_path / "gantt.pdf").read_bytes()
    assert b"CreationDate" not in pdf
    assert b"/Producer" not in pdf


def test_drawing_leaves_the_callers_settings_alone(lay_out: LayOut) -> None:
    with mpl.rc_context({"font.size": 23.0}):
        before = dict(mpl.rcParams)
        gantt_figure(lay_out("1F1B", 2, 2))
        assert dict(mpl.rcParams) == before


# Machado, Oliveira and Fernandes 2009, doi:10.1109/TVCG.2009.113: severity 1.0, on linear RGB.
VISION = {
    "usual": np.eye(3),
    "no red cones": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "no green cones": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}


def lab(color: str, vision: str) -> np.ndarray:
    """CIELAB (D65) of a colour as someone sees it."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(VISION[vision] @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = to_xyz @ seen / np.array([0.9505, 1.0, 1.089])
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_colours_that_meet_stay_apart_for_colour_blind_eyes(vision: str) -> None:
    """A difference of 2.3 can just be seen; what shares a lane, or the lanes below it, has 20."""
    on_compute = ["forward", "backward", "input_grad", "weight_grad", "recompute", "optimizer"]
    beside = ["tp", "cp", "ep", "dp", "pp_send", "pp_recv", "host"]
    assert {*on_compute, *beside} == set(COLORS)
    for keys, ground in ((on_compute, IDLE_COLOR), (beside, "#FFFFFF")):
        colors = [COLORS[key] for key in keys] + [ground]
        for a, b in itertools.combinations(colors, 2):
            assert np.linalg.norm(lab(a, vision) - lab(b, vision)) > 20, (a, b)
