"""README's tables come from their rows: all of them, and none by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from load_ab.result_example import ARMS, BUDGET, result_example
from sgl_hq.launch.load_ab.readme_table import BEGIN, END, _main, committed_results, full_page, is_current, readme_table, update_readme
from sgl_hq.launch.load_ab.result_view import ReportError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def result():
    return result_example()


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nrest\n")
    return path


def rendered_tables(text):
    """Rows of cells of every table, as a Markdown parser reads them."""
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    return [
        [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]
        for table in re.findall(r"<table>(.*?)</table>", shown, re.DOTALL)
    ]


@pytest.mark.parametrize("text_of", [readme_table, full_page])
def test_three_tables_with_a_row_for_every_arm_and_case(result, text_of):
    tables = rendered_tables(text_of([result]))
    assert len(tables) == 3
    for table in tables:
        assert len(table) == 1 + len(ARMS) * 6
        assert {len(row) for row in table} == {len(table[0])}
        assert [row[1] for row in table[1:7]] == ["hicache (failed)" if arm == "hicache" else arm for arm in ARMS]


@pytest.mark.parametrize("text_of", [readme_table, full_page])
def test_memory_and_latency_do_not_share_a_table_and_memory_rows_have_reuse_factor_and_p(result, text_of):
    memory, latency, _ = (table[0] for table in rendered_tables(text_of([result])))
    assert memory[2:4] == ["reuse factor", "packed fraction p"]
    assert not any("TTFT" in heading or "/s" in heading for heading in memory)
    assert not any("KV" in heading or "bytes" in heading for heading in latency)


def test_missing_figure_is_a_dash(result):
    next(r for r in result["summary"] if r["arm"] == "hq4")["figures"]["reuse_factor"]["mean"] = None
    row = next(row for row in rendered_tables(readme_table([result]))[0] if row[1] == "hq4")
    assert row[0] == "shared-1.3, cold" and row[2] == "-" and row[3] != "-"


def test_failures_losses_budget_and_facts_are_told(result):
    short, full = readme_table([result]), full_page([result])
    for text in (short, full):
        assert "- Failed: hicache, everywhere: the server ended" in text and "&lt;host pool &amp; device pool&gt;" in text
        assert "`sgl-hq ab pressure-h200" in text and "NVIDIA H200" in text and "0123456789ab" in text
        assert f"{BUDGET / 1e6:,.1f} MB an arm" in text
    assert "Our arms: lossless `--hq-format lossless`, hq6 `--hq-format hq6`, hq4 `--hq-format hq4`." in short
    assert "- lossless is worse than the best other arm in" in full and "hicache 34,359.7 MB" in full


def test_no_folder_of_this_machine_is_published(result):
    result["plan"]["model"] = str(Path.home() / "models" / "qwen")
    for text in (readme_table([result]), full_page([result])):
        assert "model qwen," in text and str(Path.home()) not in text


def test_update_replaces_what_stands_between_the_marks_and_check_sees_every_change(readme, result):
    assert not is_current(readme, [result])
    update_readme(readme, [result])
    assert readme.read_text() == f"# Title\n\n{BEGIN}\n{readme_table([result])}\n{END}\n\nrest\n"
    assert is_current(readme, [result])
    readme.write_text(readme.read_text().replace("0.62", "0.63", 1))
    assert not is_current(readme, [result])


def test_command(readme, result, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "ab-test.json").write_text(json.dumps(result))
    (tmp_path / "results" / "kernels.json").write_text("[]")
    (tmp_path / "results" / "older").mkdir()
    (tmp_path / "results" / "older" / "ab-past.json").write_text(json.dumps(result))
    assert _main(str(readme), str(tmp_path), "--check") == 1 and "differs from its rows" in capsys.readouterr().err
    assert _main(str(readme), str(tmp_path)) == 0 and _main(str(readme), str(tmp_path), "--check") == 0
    assert (tmp_path / "ab.md").read_text() == full_page([result, result]) and is_current(readme, [result])
    (tmp_path / "ab.md").write_text("by hand")
    assert _main(str(readme), str(tmp_path), "--check") == 1 and "ab.md differs from its rows" in capsys.readouterr().err
    with pytest.raises(ReportError, match="--chekc is not an option"):
        _main(str(readme), str(tmp_path), "--chekc")


@pytest.mark.parametrize("text", ["no marks", BEGIN, END, f"{END}\n{BEGIN}"])
def test_readme_without_marks_is_refused(readme, result, text):
    readme.write_text(text)
    with pytest.raises(ReportError, match="has no place for the tables"):
        update_readme(readme, [result])
    assert readme.read_text() == text


def test_no_results_are_refused(readme, tmp_path):
    with pytest.raises(ReportError, match="There is no result"):
        update_readme(readme, committed_results(tmp_path))


def test_this_readme_equals_its_rows():
    assert _main(str(ROOT / "README.md"), str(ROOT / "docs"), "--check") == 0
