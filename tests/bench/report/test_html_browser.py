"""The page in a real browser: it opens offline, is drawn, and its filters and its chooser do what they say."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from report_pages import many, with_parity, with_tails

from bench.report.html.document import html_page
from bench.results.load import Source
from bench.results.schema import Result

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page

SHOWN = "one => one.getClientRects().length > 0"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("no chromium on the path")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(result: Result, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of one result, one of three, one of a result that is wrong, and one of text that is markup."""
    result = with_tails(result)
    wrong = with_parity(result, "onnx-cpu", passed=False)
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    bundle = result.bundles[0].model_copy(update={"name": evil, "path": evil})
    machine = replace(result.environment, cpu=evil)
    hostile = result.model_copy(update={"bundles": (bundle,), "environment": machine, "command": evil})
    made = {
        "one": html_page([Source(Path("one.json"), (result,))]),
        "three": html_page(many(result, 3)),
        "wrong": html_page([Source(Path("wrong.json"), (with_parity(wrong, "onnx-cpu:unfolded", passed=False),))]),
        "hostile": html_page([Source(Path(evil), (hostile,)), Source(Path(evil), (hostile,))]),
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in made}


class Opened:
    """A page with all that it said and asked for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.told: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.told.append(message.text))
        page.on("pageerror", lambda error: self.told.append(str(error)))
        page.on("dialog", self._dismiss)
        page.on("request", lambda request: self.asked.append(request.url))

    def _dismiss(self, dialog: Dialog) -> None:
        self.told.append(dialog.message)
        dialog.dismiss()

    def shown(self, selector: str) -> int:
        """How many elements are to be seen."""
        found: int = self.page.eval_on_selector_all(selector, f"all => all.filter({SHOWN}).length")
        return found


@pytest.fixture
def opened(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Any]:
    made: list[Page] = []

    def open_(path: Path, **options: Any) -> Opened:
        page = browser.new_page(**options)
        made.append(page)
        found = Opened(page)
        page.goto(path.as_uri())
        return found

    yield open_
    for page in made:
        page.close()


def test_it_opens_offline_and_is_drawn(pages: dict[str, Path], opened: Any) -> None:
    found = opened(pages["one"])
    assert found.told == []
    assert found.asked == [pages["one"].as_uri()]
    assert found.shown("svg.chart") == found.page.locator("svg.chart").count() > 7
    boxes = found.page.eval_on_selector_all(
        ".chart [data-b] use", "all => all.map(one => one.getBoundingClientRect().width)"
    )
    assert len(boxes) > 10
    assert min(boxes) > 3, "markers are there"
    assert found.page.evaluate("getComputedStyle(document.querySelector('.c0 .line')).stroke") == "rgb(0, 114, 178)"


def test_the_batch_filter_changes_charts_and_tables(pages: dict[str, Path], opened: Any) -> None:
    found = opened(pages["one"])
    line = ".charts g.s .line"
    before = found.page.get_attribute(line, "points")
    assert found.shown('[data-b="1"]') > 10
    found.page.uncheck('[data-batch="1"]')
    assert found.shown('[data-b="1"]') == 0
    assert found.shown('tr[data-b="8"]') > 0
    assert found.shown('.chart [data-b="8"]') > 0
    assert len(found.page.get_attribute(line, "points").split()) < len(before.split())
    found.page.check('[data-batch="1"]')
    assert found.shown('[data-b="1"]') > 10
    assert [float(x) for x in found.page.get_attribute(line, "points").replace(",", " ").split()] == pytest.approx(
        [float(x) for x in before.replace(",", " ").split()], abs=0.06
    )


def test_the_frontier_is_that_of_what_is_shown(pages: dict[str, Path], opened: Any) -> None:
    """The script finds the same line as Python, and another one when its best point is hidden."""
    found = opened(pages["one"])
    drawn = found.page.get_attribute(".frontier", "points")
    found.page.uncheck('[data-subject="1"]')
    found.page.check('[data-subject="1"]')
    again = found.page.get_attribute(".frontier", "points")
    numbers = [[float(x) for x in points.replace(",", " ").split()] for points in (drawn, again)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.06)
    assert len(numbers[0]) >= 2
    for place in range(2):
        found.page.uncheck(f'[data-subject="{place}"]')
    assert found.page.get_attribute(".frontier", "points") == ""


def test_what_is_wrong_is_not_on_the_frontier(pages: dict[str, Path], opened: Any) -> None:
    found = opened(pages["wrong"])
    assert found.shown(".chart .crossed") == 4
    assert found.page.get_attribute(".frontier", "points") == ""
    found.page.uncheck('[data-batch="1"]')
    assert found.page.get_attribute(".frontier", "points") == ""


def test_a_backend_is_hidden_everywhere(pages: dict[str, Path], opened: Any) -> None:
    found = opened(pages["one"])
    found.page.focus('[data-subject="0"]')
    found.page.keyboard.press("Space")
    assert found.shown('[data-s="0"]') == 0
    assert found.shown('[data-s="1"]') > 10


def test_another_result_is_chosen_and_the_batch_filter_stays(pages: dict[str, Path], opened: Any) -> None:
    found = opened(pages["three"])
    first = found.page.inner_text("#r0-throughput")
    found.page.uncheck('[data-batch="1"]')
    found.page.select_option("#chooser", "2")
    found.page.wait_for_selector("#r2-throughput")
    assert found.page.url.endswith("#r2")
    assert not found.page.is_checked('[data-batch="1"]')
    assert found.shown('[data-b="1"]') == 0
    found.page.click("a[href='#r0']")
    found.page.wait_for_selector("#r0-throughput")
    found.page.check('[data-batch="1"]')
    assert found.page.inner_text("#r0-throughput") == first
    found.page.go_back()
    found.page.wait_for_selector("#r2-throughput")
    assert found.page.input_value("#chooser") == "2"
    assert found.told == []


def test_a_link_opens_the_result_that_it_names(pages: dict[str, Path], opened: Any) -> None:
    found = opened(pages["three"])
    found.page.goto(f"{pages['three'].as_uri()}#r1")
    found.page.reload()
    found.page.wait_for_selector("#r1-throughput")
    found.page.goto(f"{pages['three'].as_uri()}#r99")
    found.page.wait_for_selector("#r0-throughput")


def test_no_text_of_a_result_is_run(pages: dict[str, Path], opened: Any) -> None:
    found = opened(pages["hostile"])
    found.page.select_option("#chooser", "1")
    found.page.wait_for_selector("#r1-throughput")
    assert found.told == []
    assert found.asked == [pages["hostile"].as_uri()]
    assert found.page.locator("img").count() == 0


@pytest.mark.parametrize("name", ["one", "three"])
def test_a_phone_does_not_scroll_sideways(name: str, pages: dict[str, Path], opened: Any) -> None:
    found = opened(pages[name], viewport={"width": 390, "height": 800})
    assert found.page.evaluate("document.documentElement.scrollWidth") == 390
    assert found.page.eval_on_selector_all(".scroll", "all => all.some(one => one.scrollWidth > one.clientWidth)")


def test_light_and_dark(pages: dict[str, Path], opened: Any) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        found = opened(pages["one"], color_scheme=scheme)
        colours[scheme] = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colours == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}


def test_without_scripts_the_first_result_is_there(pages: dict[str, Path], opened: Any) -> None:
    found = opened(pages["three"], java_script_enabled=False)
    assert found.page.locator("#r0-throughput").is_visible()
    assert found.page.locator("svg.chart").first.is_visible()
    assert found.page.get_by_text("Only the first result can be shown without scripts.").is_visible()


def test_a_screen_reader_finds_a_name_and_the_table_of_each_chart(pages: dict[str, Path], opened: Any) -> None:
    found = opened(pages["one"])
    named = found.page.eval_on_selector_all(
        "svg.chart",
        "all => all.map(one => [one.getAttribute('role'), one.getAttribute('aria-label'), "
        "document.getElementById(one.getAttribute('aria-details'))?.tagName])",
    )
    assert named
    assert all(role == "img" and label and table == "TABLE" for role, label, table in named)
