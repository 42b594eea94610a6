"""Reports in a real browser: Chromium, headless, driven by Playwright."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from parsim.cli.main import run_command

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PLAN = (
    "plan --model llama-3.1-8b --hardware h100-sxm-80gb --gpus 16 --global-batch 32 --pp 2,4 "
    "--schedule 1f1b,zb-h1 --tp 1,2,4 --zero 1"
).split()
SIMULATE = (
    "simulate --model llama-3.1-8b --hardware h100-sxm-80gb --global-batch 32 "
    "--plan tp=2,pp=16,micro_batch=1,schedule=interleaved,vpp=2"
).split()
DESKTOP = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}

OpenPage = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, started once."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is missing")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed (Debian: apt install chromium)")
    # Chromium's sandbox refuses to work for root, as whom containers run.
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pages of a plan and of a simulated step."""
    folder = tmp_path_factory.mktemp("reports")
    for command in (PLAN, SIMULATE):
        with contextlib.redirect_stdout(io.StringIO()):
            assert run_command([*command, "--report", str(folder)]) == 0
    return folder


@pytest.fixture
def open_page(browser: Any, reports: Path) -> Iterator[OpenPage]:
    """Opens a page; at the end it has reported no error and asked for nothing outside itself."""
    contexts, faults = [], []

    def opened(name: str, **settings: Any) -> Any:
        context = browser.new_context(**({"viewport": DESKTOP} | settings))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: faults.append(str(error)))
        own = (reports / name).as_uri()
        page.on("request", lambda r: None if r.url == own else faults.append(f"request: {r.url}"))
        page.goto(own)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def column(page: Any, key: str) -> list[str]:
    """The texts of a column of the ranking, in the rows that are shown."""
    place = (
        page.locator("[data-table]")
        .first.locator("thead th")
        .evaluate_all("(heads, key) => heads.findIndex((head) => head.dataset.key === key)", key)
    )
    rows = page.locator("[data-table]").first.locator("tbody tr:not([hidden])")
    found = rows.evaluate_all("(rows, i) => rows.map((row) => row.cells[i].textContent.trim())", place)
    return list(found)


def view(page: Any) -> tuple[float, float]:
    """The stretch of time that the schedule chart shows, in seconds."""
    data = page.locator("canvas").evaluate("(canvas) => [canvas.dataset.from, canvas.dataset.to]")
    return float(data[0]), float(data[1])


def test_the_answer_is_on_the_first_screen(open_page: OpenPage) -> None:
    page = open_page("plan.html")
    for words in ("Step time", "MFU", "Memory", "Cost", "What binds"):
        box = page.get_by_text(words, exact=True).first.bounding_box()
        assert box is not None
        assert box["y"] + box["height"] < DESKTOP["height"]
    assert page.get_by_role("heading", level=1).count() == 1


def test_the_ranking_is_sorted_by_mouse_and_keyboard(open_page: OpenPage) -> None:
    page = open_page("plan.html")
    assert [float(n) for n in column(page, "rank")] == sorted(float(n) for n in column(page, "rank"))
    heading = page.get_by_role("button", name="memory", exact=True)
    heading.click()
    sizes = [float(text.split()[0]) for text in column(page, "memory")]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 1
    heading.focus()
    page.keyboard.press("Enter")
    assert [float(text.split()[0]) for text in column(page, "memory")] == sorted(sizes, reverse=True)
    assert page.locator("th[data-key=memory]").first.get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="schedule", exact=True).press("Space")
    assert column(page, "schedule") == sorted(column(page, "schedule"))
    assert page.locator("th[data-key=memory]").first.get_attribute("aria-sort") == "none"


def test_the_ranking_is_filtered_by_words_and_columns(open_page: OpenPage) -> None:
    page = open_page("plan.html")
    everything = list(zip(column(page, "tp"), column(page, "schedule"), strict=True))
    box = page.get_by_label("Filter").first
    for words, kept in (
        ("zb-h1", lambda tp, schedule: schedule == "zb-h1"),
        ("tp=2", lambda tp, schedule: tp == "2"),
        ("tp<=2 schedule=1f1b", lambda tp, schedule: int(tp) <= 2 and schedule == "1f1b"),
        ("schedule!=zb-h1 bubble>0", lambda tp, schedule: schedule != "zb-h1"),
    ):
        box.fill(words)
        wanted = [row[1] for row in everything if kept(*row)]
        assert column(page, "schedule") == wanted
        assert 0 < len(wanted) < len(everything), "a filter that changes nothing tests nothing"
        shown = page.locator("[data-table] output").first.text_content()
        assert shown == f"{len(wanted)} of {len(everything)} rows"
    box.fill("nothing-is-called-so")
    assert column(page, "schedule") == []
    box.fill("")
    assert len(column(page, "schedule")) == len(everything)


def test_the_schedule_zooms_by_mouse(open_page: OpenPage) -> None:
    page = open_page("simulate.html")
    canvas = page.locator("canvas")
    canvas.scroll_into_view_if_needed()
    whole = view(page)
    assert whole[0] == 0
    box = canvas.bounding_box()
    left, right = box["x"] + 104, box["x"] + box["width"] - 4
    middle, y = (left + right) / 2, box["y"] + 40
    page.mouse.move(middle, y)
    page.mouse.down()
    page.mouse.move((middle + right) / 2, y, steps=4)
    page.mouse.up()
    assert view(page) == pytest.approx((whole[1] / 2, 0.75 * whole[1]), rel=0.01)
    page.mouse.dblclick(middle, y)
    assert view(page) == whole
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_function(
        "(to) => Number(document.querySelector('canvas').dataset.to) < to", arg=whole[1]
    )
    assert view(page)[1] - view(page)[0] < 0.8 * whole[1]
    page.get_by_role("button", name="Whole step").click()
    assert view(page) == whole
    page.get_by_role("button", name="Zoom in").click()
    page.get_by_role("button", name="Later").click()
    assert view(page) == pytest.approx((0.375 * whole[1], 0.875 * whole[1]))


def test_the_schedule_is_read_by_keyboard(open_page: OpenPage) -> None:
    page = open_page("simulate.html")
    canvas, readout = page.locator("canvas"), page.locator(".readout")
    whole = view(page)
    canvas.focus()
    page.keyboard.press("ArrowDown")
    first = readout.text_content()
    assert "rank 0, compute" in first
    assert first.startswith("0F0: forward")
    page.keyboard.press("ArrowRight")
    assert readout.text_content().startswith("0F1: forward")
    page.keyboard.press("ArrowLeft")
    assert readout.text_content() == first
    page.keyboard.press("ArrowDown")
    assert "rank 0" in readout.text_content()
    assert "compute" not in readout.text_content()
    for _ in range(3):
        page.keyboard.press("+")
    assert view(page)[1] - view(page)[0] == pytest.approx(whole[1] / 8)
    page.keyboard.press("-")
    page.keyboard.press("Shift+ArrowRight")
    assert view(page)[0] > 0
    page.keyboard.press("0")
    assert view(page) == whole


def test_hovering_over_the_schedule_names_the_task(open_page: OpenPage) -> None:
    page = open_page("simulate.html")
    canvas = page.locator("canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 104 + 0.03 * (box["width"] - 108), box["y"] + 8)
    tip = page.locator("#tip")
    tip.wait_for(state="visible")
    assert "rank 0, compute" in tip.text_content()
    page.mouse.move(5, 5)
    tip.wait_for(state="hidden")


def brightness(page: Any) -> int:
    """The mean of what the schedule chart shows, 0 to 765."""
    return int(
        page.locator("canvas").evaluate(
            """(chart) => {
              const one = new OffscreenCanvas(1, 1).getContext("2d");
              one.drawImage(chart, 0, 0, 1, 1);
              return one.getImageData(0, 0, 1, 1).data.slice(0, 3).reduce((a, b) => a + b);
            }"""
        )
    )


def test_dark_mode_follows_the_system_and_the_button(open_page: OpenPage) -> None:
    page = open_page("simulate.html", color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(15, 18, 23)"
    dark = brightness(page)
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate(ground) == "rgb(245, 246, 248)"
    assert brightness(page) > dark + 100, "the chart is redrawn on the light ground"
    light = open_page("simulate.html")
    assert light.evaluate(ground) == "rgb(245, 246, 248)"


def test_print_is_light_and_without_what_is_to_be_clicked(open_page: OpenPage) -> None:
    page = open_page("simulate.html", color_scheme="dark")
    screen = brightness(page)
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for hidden in (".tools", "nav", ".bar-tools"):
        assert not page.locator(hidden).first.is_visible()
    assert page.get_by_role("heading", name="Where the step goes").is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert brightness(page) > screen, "the chart is printed on white"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.pdf()[:5] == b"%PDF-"


@pytest.mark.parametrize("name", ["plan.html", "simulate.html"])
def test_a_phone_scrolls_down_only(open_page: OpenPage, name: str) -> None:
    page = open_page(name, viewport=PHONE, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.parametrize("name", ["plan.html", "simulate.html"])
def test_everything_has_a_name_for_those_who_cannot_see_it(open_page: OpenPage, name: str) -> None:
    page = open_page(name)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("[role=img], canvas, button, input, [role=region]")]
          .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length
            || document.getElementById(e.getAttribute("aria-labelledby"))?.textContent.trim()))
          .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    twice = page.evaluate(
        "() => { const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);"
        " return ids.filter((id, i) => ids.indexOf(id) !== i); }"
    )
    assert twice == []
    assert (
        page.locator("table caption, .waterfall table[aria-label]").count()
        == page.locator("table").count()
    )


def test_the_plan_that_the_page_carries_is_a_plan_file(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page("plan.html")
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Save plan.json").click()
    path = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(path)
    assert path.name == "plan.json"
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert run_command(["simulate", "--plan", str(path)]) == 0
    step = text.getvalue().split("step time")[1].split("(")[0].strip()
    assert page.get_by_role("heading", level=1).text_content().startswith(f"{step} a step")
