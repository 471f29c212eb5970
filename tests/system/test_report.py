"""The page of `dlion report` in a real browser, of real runs: what a reader sees, switches, opens and prints."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dlion_mpi.report.colours import DARK, LIGHT
from tests import runfiles
from tests.system.launch import run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is missing: pip install 'dlion-mpi[dev]'")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

pytestmark = pytest.mark.timeout(300)
BROWSERS = ("chromium", "google-chrome", "chromium-browser", "chrome")
SMALL = ("--data", "digits", "--model", "tests.nets:dense", "--progress-every", "0", "--evaluate-every", "10")
NAMES = ["dlion", "baseline", "real"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two simulated runs and one of two ranks under mpirun, compared."""
    folder = tmp_path_factory.mktemp("report")
    for strategy in ("dlion", "baseline"):
        simulated = ("--env", "homo-b", "--workers", "3", "--steps", "30", "--strategy", strategy)
        transfers = ("--transfer-period", "8") if strategy == "dlion" else ()
        ended = run(None, "dlion", "simulate", *SMALL, *simulated, *transfers, "--out", str(folder / strategy))
        assert ended.code == 0, ended.err
    ended = run(2, "dlion", "train", *SMALL, "--steps", "30", "--out", str(folder / "real"))
    assert ended.code == 0, ended.err
    out = folder / "report.html"
    ended = run(None, "dlion", "report", *(str(folder / name) for name in NAMES), "-o", str(out))
    assert (ended.code, ended.out, ended.err) == (0, f"{out}\n", "")
    return out


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """A headless browser of the system, 1280 pixels wide."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    control = shutil.which("chromedriver")
    if browser is None or control is None:
        pytest.skip("no headless browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(option)
    options.add_argument("--window-size=1280,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(control))
    try:
        yield started
    finally:
        started.quit()


@pytest.fixture
def browser(driver: Any, page: Path) -> Iterator[Any]:
    """The browser with the page open as it is at first; afterwards, nothing may have gone wrong in it."""
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    driver.get(page.as_uri())
    yield driver
    assert driver.get_log("browser") == []


def drawn_anew(browser: Any) -> None:
    """Waits for two frames: changes of media and size are told to the page with the next."""
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def charts(browser: Any, within: str = "") -> dict[str, str]:
    """The drawing of each chart, by figure."""
    drawn_anew(browser)
    script = """
        return [...document.querySelectorAll(arguments[0] + ' figure')].map((figure) => {
            const svg = figure.querySelector('.chart svg');
            return [figure.id.replace('figure-', ''), svg ? svg.outerHTML : ''];
        });
    """
    return dict(browser.execute_script(script, within))


def figures_of(page: Path) -> Any:
    text = page.read_text(encoding="utf-8")
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def media(browser: Any, **settings: Any) -> None:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", settings)


def dark(browser: Any) -> None:
    media(browser, features=[{"name": "prefers-color-scheme", "value": "dark"}])


def background(browser: Any) -> str:
    return str(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))


def test_every_figure_has_its_chart(browser: Any, page: Path) -> None:
    data = figures_of(page)
    drawn = charts(browser)
    assert list(drawn) == [f["key"] for f in (*data["comparison"], *data["runs"][0]["figures"])]
    for key, svg in drawn.items():
        assert svg.count("<path") + svg.count("<rect") > 5, key
        assert "NaN" not in svg, key
    # What was measured is drawn: lines of every run, a bar for each, numbers in the cells, a box for each transfer.
    for colour in LIGHT[:3]:
        assert colour in drawn["test-accuracy"]
        assert colour in drawn["target"]
    for name in NAMES:
        assert name in drawn["test-accuracy"]
        assert name in drawn["target"]
    shown = next(f for f in data["runs"][0]["figures"] if f["key"] == "matrix")
    value = shown["values"][0][1]
    assert f">{float(format(value, '.3g')):g}</text>" in drawn["matrix"]


def test_it_is_read_without_a_network(driver: Any, page: Path) -> None:
    driver.get_log("performance")
    driver.get(page.as_uri())
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith(("data:", page.as_uri()))] == []


def test_switching_the_run_switches_its_figures(browser: Any, page: Path) -> None:
    data = figures_of(page)
    before = charts(browser, "#single")
    comparison = charts(browser, "#comparison")
    choices = browser.find_elements("css selector", "#runs label")
    assert [choice.text for choice in choices] == NAMES
    seen = [before]
    for n in (1, 2):
        choices[n].click()
        seen.append(charts(browser, "#single"))
        assert list(seen[n]) == [f["key"] for f in data["runs"][n]["figures"]]
        assert "worker 2" in seen[1]["batch-size"]
        assert seen[n]["batch-size"] != seen[n - 1]["batch-size"]
    assert "worker 2" not in seen[2]["batch-size"]  # two ranks only
    assert charts(browser, "#comparison") == comparison
    choices[0].click()
    assert charts(browser, "#single").keys() == before.keys()


def test_what_a_run_has_nothing_of_is_said(browser: Any) -> None:
    browser.find_elements("css selector", "#runs label")[1].click()  # the Baseline transfers nothing
    assert charts(browser)["transfers"] == ""
    assert "no such data" in browser.find_element("css selector", "#figure-transfers").text


def test_the_target_can_be_chosen(browser: Any) -> None:
    before = charts(browser)["target"]
    select = browser.find_element("css selector", "#target")
    options = select.find_elements("css selector", "option")
    options[4].click()
    assert select.get_attribute("value") == "4"
    after = charts(browser)["target"]
    assert after != before
    assert "1.00 ×" in after


def test_every_chart_has_its_numbers_under_it(browser: Any, page: Path) -> None:
    data = figures_of(page)
    for figure in browser.find_elements("css selector", "figure:has(.chart)"):
        figure.find_element("css selector", "summary").click()
    # A table is filled when its opening is told to the page, which is some time after the click.
    unfilled = "figure details:not(:has(tbody))"
    WebDriverWait(browser, 60).until(lambda _: not browser.find_elements("css selector", unfilled))
    script = """
        return [...document.querySelectorAll('figure:has(.chart)')].map((figure) => [
            figure.id.replace('figure-', ''),
            [...figure.querySelectorAll('thead th')].map((cell) => cell.textContent),
            [...figure.querySelectorAll('tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent)),
        ]);
    """
    tables = {key: (head, rows) for key, head, rows in browser.execute_script(script)}
    assert len(tables) == len(data["comparison"]) + len(data["runs"][0]["figures"])
    for key, (head, rows) in tables.items():
        assert rows, key
        assert all(len(row) == len(head) for row in rows), key
        assert "(" in " ".join(head), f"{key} has no unit"
    accuracy = next(f for f in data["comparison"] if f["key"] == "test-accuracy")["panels"][0]["series"][0]
    assert tables["test-accuracy"][1][0] == [
        "dlion",
        *(f"{number:g}" for number in (accuracy["t"][0], accuracy["y"][0], accuracy["low"][0], accuracy["high"][0])),
    ]
    matrix = next(f for f in data["runs"][0]["figures"] if f["key"] == "matrix")
    assert tables["matrix"][1][1][1:] == [f"{value:g}" if value is not None else "–" for value in matrix["values"][1]]


def test_light_and_dark(browser: Any) -> None:
    assert background(browser) == "rgb(255, 255, 255)"
    light = charts(browser)
    dark(browser)
    assert background(browser) == "rgb(22, 24, 29)"
    shown = charts(browser)
    for key, svg in shown.items():
        assert not any(colour in svg for colour in LIGHT), key
    assert DARK[0] in shown["test-accuracy"]
    browser.find_element("css selector", "#theme option[value=light]").click()
    assert background(browser) == "rgb(255, 255, 255)"
    assert DARK[0] not in charts(browser)["test-accuracy"]
    assert list(charts(browser)) == list(light)
    media(browser, features=[])
    browser.find_element("css selector", "#theme option[value=dark]").click()
    assert DARK[0] in charts(browser)["test-accuracy"]


def test_on_paper_it_is_light_and_fits(browser: Any) -> None:
    dark(browser)
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})
    pdf = base64.b64decode(printed["data"])
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 9
    assert background(browser) == "rgb(22, 24, 29)"  # back on the screen
    assert DARK[0] in charts(browser)["test-accuracy"]
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")  # what browsers without a media event send
    assert LIGHT[0] in charts(browser)["test-accuracy"]
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert DARK[0] in charts(browser)["test-accuracy"]
    media(browser, media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert background(browser) == "rgb(255, 255, 255)"
    paper = charts(browser)
    widths = {key: int(re.search(r'width="(\d+)"', svg)[1]) for key, svg in paper.items() if svg}  # type: ignore[index]
    assert max(widths.values()) <= 703  # A4 less margins of 12 mm
    assert widths["rate"] > 2 * widths["test-accuracy"]
    assert LIGHT[0] in paper["test-accuracy"]
    assert not browser.find_element("css selector", "#theme").is_displayed()


def test_on_a_small_screen_nothing_is_cut_off(browser: Any) -> None:
    before = charts(browser)["test-accuracy"]
    browser.set_window_size(600, 900)
    try:
        # The charts are drawn anew with the frame after the one in which the window has its new width.
        fits = "return innerWidth <= 600 && document.documentElement.scrollWidth <= innerWidth"
        WebDriverWait(browser, 20).until(lambda _: browser.execute_script(fits))
        assert charts(browser)["test-accuracy"] != before
    finally:
        browser.set_window_size(1280, 900)


def test_the_tooltip_shows_names_as_they_are(driver: Any, tmp_path: Path) -> None:
    evil = "<img src=x onerror=window.hit=1>"
    config = f"[run]\nstrategy = '{evil}'\n"
    out = tmp_path / "page.html"
    folders = [str(runfiles.make_run(tmp_path / name, config=config, host=evil)) for name in ("<i>a", "<i>b")]
    assert run(None, "dlion", "report", *folders, "-o", str(out)).code == 0
    driver.get(out.as_uri())
    chart = driver.find_element("css selector", "#figure-test-accuracy .chart")

    def shows_names(_: Any) -> bool:
        webdriver.ActionChains(driver).move_to_element(chart).perform()
        return any("<i>" in tip.text for tip in driver.find_elements("css selector", ".tip"))

    WebDriverWait(driver, 20).until(shows_names)
    assert driver.execute_script("return window.hit") is None
    assert driver.find_elements("css selector", "main img, main i:not(.key)") == []
    assert driver.get_log("browser") == []


def test_a_run_that_was_killed_is_shown_as_far_as_it_went(driver: Any, tmp_path: Path) -> None:
    folder = runfiles.make_run(tmp_path / "a", ended=False)
    (folder / "metrics-00001.h5").unlink()
    out = tmp_path / "page.html"
    assert run(None, "dlion", "report", str(folder), "-o", str(out)).code == 0
    driver.get(out.as_uri())
    notes = driver.find_element("css selector", ".notes").text
    assert "rank 1: no metrics file" in notes
    assert "ranks 0, 2: not ended" in notes
    assert all(svg for svg in charts(driver).values())
    assert driver.get_log("browser") == []
