"""How large a page of many results is, and how soon it is there.

    python tests/benchmarks/report_page.py [RESULTS]

Copies of the result behind the README's table, every figure moved by itself, 200 unless another number is given; then
the page in headless Chromium, opened from disk by a fresh context each time. Needs playwright and chromium. Results go
to docs/results/report-page.json, or to the file that RESULTS names in the environment.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report.html.document import html_page
from bench.results.load import results_in
from trainer.provenance import cpu_name, git_commit

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parents[2]
RESULTS = Path(os.environ.get("RESULTS", ROOT / "docs" / "results" / "report-page.json"))
SOURCE = ROOT / "docs" / "results" / "bench-cpu.json"
OPENINGS = 7
TIMES = """() => {
  const [page] = performance.getEntriesByType("navigation");
  const [paint] = performance.getEntriesByName("first-contentful-paint");
  return page.loadEventEnd && paint ? [page.loadEventEnd, paint.startTime] : null;
}"""
ASK_EVERY_MS = 50


def opened_ms(browser: Browser, path: Path) -> tuple[float, float, float]:
    """From the start of the navigation to the load event and to the first paint, and choosing the last result."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(path.as_uri())
    while (times := page.evaluate(TIMES)) is None:  # the page's policy forbids to wait in the page itself
        page.wait_for_timeout(ASK_EVERY_MS)
    load, paint = times
    last = page.locator("#chooser option").count() - 1
    before = time.perf_counter()
    page.select_option("#chooser", str(last))
    page.wait_for_selector(f"#r{last}-throughput")
    chosen = 1000 * (time.perf_counter() - before)
    context.close()
    return load, paint, chosen


def measure(count: int) -> dict[str, Any]:
    """Size and times of a page of so many results."""
    from playwright.sync_api import sync_playwright

    sys.path.append(str(ROOT / "tests" / "support"))
    from report_pages import many

    sources = many(results_in(SOURCE).results[0], count)
    before = time.perf_counter()
    page = html_page(sources)
    made_s = time.perf_counter() - before
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "report.html"
        path.write_text(page)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        load, paint, chosen = zip(*(opened_ms(browser, path) for _ in range(OPENINGS)), strict=True)
        version = browser.version
        browser.close()
    return {
        "results": count,
        "rows": sum(len(source.results[0].rows) for source in sources),
        "page_bytes": len(page.encode()),
        "made_s": round(made_s, 2),
        "openings": OPENINGS,
        "load_ms": round(statistics.median(load), 1),
        "load_longest_ms": round(max(load), 1),
        "first_paint_ms": round(statistics.median(paint), 1),
        "choosing_another_ms": round(statistics.median(chosen), 1),
        "chromium": version,
        "machine": f"{cpu_name()}, {os.cpu_count()} CPUs, {platform.platform()}",
        "commit": git_commit(Path(__file__)),
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    found = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
