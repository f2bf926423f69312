import shutil

import bench_records
import pytest

pytest.importorskip("altair")
pytest.importorskip("playwright")

from bench.page import write_page
from bench.results import Record

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
WIDTHS = (1280, 360)

pytestmark = [
    pytest.mark.full,
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium is installed: apt-get install chromium"),
]

# What is drawn in each chart: its size, its marks, and the smallest text as the reader sees it.
MEASURE = """() => Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) => {
  const svg = chart.querySelector("svg");
  const box = svg.getBoundingClientRect();
  const view = svg.viewBox.baseVal;
  const scale = view && view.width ? box.width / view.width : 1;
  const visible = (text) => text.textContent && text.getBoundingClientRect().width;
  const texts = [...svg.querySelectorAll("text")].filter(visible);
  const inside = texts.every((text) => {
    const at = text.getBoundingClientRect();
    return at.left >= box.left - 1 && at.right <= box.right + 1 && at.top >= box.top - 1 && at.bottom <= box.bottom + 1;
  });
  const {width, height, right} = box;
  const marks = svg.querySelectorAll("[class*=mark-symbol] path, [class*=mark-rect] path").length;
  const font = Math.min(...texts.map((text) => scale * parseFloat(getComputedStyle(text).fontSize)));
  const label = chart.querySelector("[aria-label]")?.getAttribute("aria-label") ?? "";
  return [chart.id, {width, height, right, marks, font, inside, label}];
}))"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=list(QUIET))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    records = {"plausible": bench_records.plausible(), "awkward": bench_records.awkward(), "empty": Record({}, "quick")}
    for name, record in records.items():
        write_page(record, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in records}


@pytest.fixture
def visit(browser, paths):
    """Opens a page, and fails at the end if it complained or asked the network for anything."""
    complaints = []
    opened = []

    def open_page(name, width=1280, **options):
        page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        opened.append(page)
        url = paths[name].as_uri()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.extend({f"request: {request.url}"} - {f"request: {url}"}))
        page.goto(url)
        page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
        return page

    yield open_page
    for page in opened:
        page.close()
    assert complaints == []


def assert_fits(page, width):
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name, chart in page.evaluate(MEASURE).items():
        assert chart["width"] > 200, name
        assert chart["height"] > 50, name
        assert chart["right"] <= width, name
        assert chart["marks"] > 0, name
        assert chart["font"] >= 10, name
        assert chart["inside"], f"{name}: text is cut off"
        assert len(chart["label"]) > 20, f"{name}: nothing is said to those who do not see it"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_chart_is_drawn_and_fits(visit, width, scheme):
    page = visit("plausible", width, color_scheme=scheme)
    expected = {f"{name}-{k}" for name, number in bench_records.CHARTS.items() for k in range(number)}
    assert set(page.evaluate(MEASURE)) == expected
    assert_fits(page, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_with_little_in_it(visit, width):
    page = visit("awkward", width)
    assert set(page.evaluate(MEASURE)) == {"sizes-0", "threads-0", "options-0"}
    assert_fits(page, width)
    assert page.locator("main script").count() == 0
    text = page.locator("#left-out").inner_text()
    for part in ("w is off by 0.25", "pip install torch", "adam-1g needs about", bench_records.HOSTILE):
        assert part in text


def test_a_page_with_nothing_in_it(visit):
    page = visit("empty", 360)
    assert page.locator(".chart").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_charts_follow_the_width_of_the_window(visit):
    page = visit("plausible", 1280)
    wide = page.evaluate(MEASURE)["arrays-0"]
    page.set_viewport_size({"width": 360, "height": 800})
    page.wait_for_function("document.getElementById('arrays-0').dataset.columns === '2'")
    page.wait_for_function("document.querySelector('#arrays-0 svg')?.getBoundingClientRect().width < 340")
    page.wait_for_timeout(500)
    assert page.evaluate(MEASURE)["arrays-0"]["width"] < wide["width"]
    assert_fits(page, 360)


def test_losses_come_first_and_tables_sort(visit):
    page = visit("plausible")
    headings = page.locator("h2").all_inner_texts()
    assert headings[:3] == ["Where fastopt loses", "Bars: reached, missed, not measured", "Real models"]
    rows = page.locator("#losses > .scroll tbody tr")
    ratio = "(rows) => rows.map((row) => Number(row.cells[3].dataset.value))"
    before = rows.evaluate_all(ratio)
    assert before == sorted(before, reverse=True)
    button = page.locator("#losses > .scroll").get_by_role("button", name="ours ÷ faster")
    button.click()
    assert rows.evaluate_all(ratio) == sorted(before)
    assert page.locator("#losses > .scroll th[aria-sort]").get_attribute("aria-sort") == "ascending"
    button.click()
    assert rows.evaluate_all(ratio) == before
