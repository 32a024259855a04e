"""The page in headless Chromium: nothing is fetched, nothing overflows, every plot is drawn and every arm has its rows.

Needs Chromium and its driver. Where they cannot be installed, HQ_NO_BROWSER=1 leaves these tests out.
"""

from __future__ import annotations

import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

from load_ab.result_example import ARMS, FAILURE, result_example
from sgl_hq.launch.load_ab.plot_svg import style
from sgl_hq.launch.load_ab.report_html import write_html

NO_BROWSER = os.environ.get("HQ_NO_BROWSER") == "1"
DESKTOP, PHONE = (1280, 900), (400, 800)  # CSS pixels
QUIET = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
OVERFLOWING = """
const wide = (element) => element.scrollWidth > element.clientWidth + 1;
return [document.documentElement, ...document.querySelectorAll(arguments[0])].filter(wide).map((element) => element.outerHTML.slice(0, 80));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        if NO_BROWSER:
            pytest.skip("HQ_NO_BROWSER=1, and chromium or chromedriver is not installed")
        pytest.fail("chromium or chromedriver is not installed: apt-get install chromium chromium-driver, or set HQ_NO_BROWSER=1")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "ab.html"
    write_html(result_example(), path)
    return path


def opened(browser, page, size=DESKTOP, scheme="light"):
    """Load the page; returns the addresses it asked for and the console's errors."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    for log in ("performance", "browser"):
        browser.get_log(log)  # what other pages left
    browser.get(page.as_uri())
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return asked, [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def overflowing(browser, selector):
    """Starts of the elements (the page itself among them) whose content is wider than they are."""
    return browser.execute_script(OVERFLOWING, selector)


def picture(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.int16)


def pixels_like(image, colour, distance=24):
    """How many pixels are within `distance` of a colour #rrggbb in every channel."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((abs(image - wanted).max(axis=-1) <= distance).sum())


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_loads_alone_and_fits(browser, page, size, scheme):
    asked, errors = opened(browser, page, size, scheme)
    assert asked == [page.as_uri()] and errors == []
    assert overflowing(browser, "p, li, pre, figure, section" if size == PHONE else ".scroll, p, li, pre, figure, section") == []
    figures = browser.find_elements(By.CSS_SELECTOR, "figure svg")
    assert len(figures) == 22
    for figure in figures:
        assert figure.is_displayed() and 300 < figure.size["width"] <= size[0] and figure.size["height"] > 200


def test_tables_have_a_row_for_every_arm_and_the_failure_is_shown(browser, page):
    opened(browser, page)
    tables = browser.find_elements(By.CSS_SELECTOR, "table.scorecard")
    assert len(tables) == 3 * 6
    for table in tables:
        rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
        assert [row.find_element(By.TAG_NAME, "th").text.replace("\n", "") for row in rows] == list(ARMS)
        (failed,) = table.find_elements(By.CSS_SELECTOR, "td.failed")
        assert failed.is_displayed() and failed.text == f"failed: {FAILURE}"


@pytest.mark.parametrize("scheme, paper", [("light", "#ffffff"), ("dark", "#15181c")])
def test_screen_is_not_blank_and_lines_of_every_measured_arm_are_drawn(browser, page, scheme, paper):
    opened(browser, page, scheme=scheme)
    screen = picture(browser.get_screenshot_as_png())
    assert 0.5 < pixels_like(screen, paper) / screen[..., 0].size < 0.99
    plots = browser.find_elements(By.XPATH, "//figure[contains(., 'TTFT of all requests') or contains(., 'KV bytes in use')]")
    assert len(plots) == 12
    for plot in plots[::6]:
        drawn = picture(plot.screenshot_as_png)
        for number, arm in enumerate(ARMS):
            assert (pixels_like(drawn, style(number)[0]) > 100) == (arm != "hicache"), arm


def test_text_of_plots_has_the_page_s_colour(browser, page):
    ink = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    seen = set()
    for scheme in ("light", "dark"):
        opened(browser, page, scheme=scheme)
        assert browser.execute_script(ink, "figure svg text", "fill") == browser.execute_script(ink, "body", "color")
        seen.add(browser.execute_script(ink, "body", "color"))
    assert len(seen) == 2


DAMAGE = {
    "request": ("<img src='missing.png' alt=''>", "missing.png"),
    "console": ("<script>console.error('planted')</script>", "planted"),
    "width": ("<div style='width: 3000px'>planted</div>", "<html"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_planted_damage_is_seen(browser, page, tmp_path, damage):
    element, sign = DAMAGE[damage]
    damaged = tmp_path / "ab.html"
    damaged.write_text(page.read_text(encoding="utf-8").replace("</main>", f"{element}</main>"), encoding="utf-8")
    asked, errors = opened(browser, damaged)
    seen = {"request": asked, "console": errors, "width": overflowing(browser, "section")}[damage]
    assert any(sign in found for found in seen)
