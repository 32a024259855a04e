"""The page and its plots without a browser: self-contained, escaped, complete, and drawn from the rows."""

from __future__ import annotations

import html
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from load_ab.result_example import ARMS, FAILURE, result_example
from sgl_hq.launch.load_ab.plot_svg import COLOURS, style
from sgl_hq.launch.load_ab.report_html import page, write_html
from sgl_hq.launch.load_ab.report_plots import sections, working_sets
from sgl_hq.launch.load_ab.result_view import ResultView

ROOT = Path(__file__).parents[2]
MEASURED = [arm for arm in ARMS if arm != "hicache"]
VOID = {"meta", "img", "link", "br", "input"}


class Elements(HTMLParser):
    """Start tags with their attributes, and whether every one is closed."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def result():
    return result_example()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "ab.html"
    write_html(result_example(), path)
    return path.read_text(encoding="utf-8")


def plots(text):
    """Title -> <svg> element."""
    return {re.search("<title[^>]*>(.*?)</title>", svg)[1]: svg for svg in re.findall("<svg.*?</svg>", text, re.DOTALL)}


def test_page_refers_to_nothing_outside(text):
    for tag, attributes in Elements(text).found:
        assert tag not in ("script", "img", "link", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import", text)


def test_elements_are_closed_and_ids_and_references_agree(text):
    elements = Elements(text)
    assert elements.open == []
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert references and references <= set(ids)


def test_every_plot_has_title_and_description_and_every_table_caption_and_header_cells(text):
    drawn, tables = plots(text).values(), re.findall(r"<table.*?</table>", text, re.DOTALL)
    assert len(drawn) == 2 + 6 + 6 + 2 + 6 and len(tables) == 3 + 3 * 6
    assert all(re.search(r'role="img".*?<title id="[^"]+">[^<]+</title><desc id="[^"]+">[^<]+</desc>', svg) for svg in drawn)
    assert all("<caption>" in table and 'scope="col"' in table and 'scope="row"' in table for table in tables)


def test_facts_failures_and_definitions_are_on_the_page(text, result):
    assert FAILURE not in text and FAILURE.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in text
    assert result["facts"]["commit"] in text and result["facts"]["command"] in text and "NVIDIA H200" in text
    for name, figure in result["summary"][0]["figures"].items():
        assert name in text and figure["quantity"] in html.unescape(text)
    for facts in result["equal_bytes"]["arms"].values():
        assert " ".join(facts["args"]) in text


def test_same_rows_give_the_same_page_and_other_rows_other_plots(result, text):
    assert page(result) == text
    before = plots(text)
    run = next(r for r in result["runs"] if (r["arm"], r["workload"], r["phase"]) == ("hq4", "gsm8k", "warm"))
    run["per_request"]["ttft_ms"][0] *= 2
    run["series"]["kv_bytes_used"][-1] /= 2
    row = next(r for r in result["summary"] if (r["arm"], r["workload"], r["phase"]) == ("hq4", "shared-2.6", "cold"))
    row["figures"]["requests_s"]["mean"] *= 2
    row = next(r for r in result["summary"] if (r["arm"], r["workload"], r["phase"]) == ("hq4", "gsm8k", "cold"))
    row["figures"]["task_score"]["low"] /= 2
    row["figures"]["measured_gain"]["mean"] /= 2
    changed = {title for title, svg in plots(page(result)).items() if svg != before[title]}
    assert changed == {
        "gsm8k, warm: TTFT of all requests", "gsm8k, warm: KV bytes in use", "cold: requests/s against working set",
        "gsm8k, cold: task score against bits", "gsm8k, cold: gain in KV bytes",
    }  # fmt: skip


def test_legends_name_the_measured_arms(text):
    for title, svg in plots(text).items():
        shown = [arm for arm in ARMS if f">{arm}</text>" in svg]
        assert shown == (["lossless", "hq6", "hq4"] if "gain in" in title else MEASURED)


def test_missing_plots_are_said_to_be(result):
    for row in result["summary"]:
        if row["figures"]:
            row["figures"]["task_score"]["mean"] = None
            row["figures"]["packed_fraction"]["mean"] = 0.0
    result["plan"]["workloads"][1]["working_set"] = 1.3
    left_out = [section for section in sections(ResultView(result)) if not section.plots]
    assert [section.heading for section in left_out] == [
        "Requests a second against the working set", "Quality against bits", "Modelled and measured gain"
    ]  # fmt: skip
    text = page(result)
    assert all(section.missing in text for section in left_out)


def test_working_sets_come_from_the_plan(result):
    result["plan"]["workloads"][1] = {"name": "shared-2.6", "kind": "shared", "context": 8256, "prefixes": 64, "working_set": None}
    assert working_sets(ResultView(result)) == {"shared-1.3": 1.3, "shared-2.6": 64 * 8256 / 200_000}


def test_result_in_which_everything_failed_still_makes_a_page(result):
    for run in result["runs"]:
        run |= {"failure": "ended", "figures": {}, "per_request": {}, "series": {}}
    for row in result["summary"]:
        row |= {"failure": "ended", "figures": {}}
    assert "<svg" not in page(result) and page(result).count("failed: ended") == len(ARMS) * 6 * 3


def contrast(one, other):
    """WCAG 2 contrast ratio of two colours #rrggbb."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


def test_arms_colours_read_on_light_and_dark_ground(text):
    grounds = set(re.findall(r"--paper: (#\w{6})", text))
    assert len(grounds) == 2
    assert min(contrast(colour, ground) for colour in COLOURS for ground in grounds) >= 3
    for kind in ("ink", "soft"):
        pairs = zip(re.findall(rf"--{kind}: (#\w{{6}})", text), re.findall(r"--paper: (#\w{6})", text))
        assert min(contrast(*pair) for pair in pairs) >= 4.5


def test_nine_arms_are_told_apart_with_and_without_colour():
    styles = [style(number) for number in range(9)]
    assert len({colour for colour, _, _ in styles}) == len({(dashes, marker) for _, dashes, marker in styles}) == 9


def test_template_is_packaged():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "*.j2" in data["sgl_hq.launch.load_ab"] and (ROOT / "launch/load_ab/report.html.j2").is_file()


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_missing_library_names_the_extra(missing):
    code = f"import sys; sys.modules[{missing!r}] = None\nimport sgl_hq.launch.load_ab.report_html"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"ReportError: {missing} is not installed, which --html needs: pip install 'sgl-hq[plots]'" in ended.stderr
