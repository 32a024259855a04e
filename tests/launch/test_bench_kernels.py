"""`sgl-hq bench kernels` without a GPU: sizes, floors and verdicts, rows, and what a wrong result does."""

from __future__ import annotations

import json
import types

import pytest
import torch

from sgl_hq.kernels.grouped_attention import bench
from sgl_hq.kernels.grouped_attention.bench_cases import CASES, Case, floor_us, goal_us, parse_cases, verdict
from sgl_hq.launch import bench_kernels
from sgl_hq.launch.bench_facts import BenchError, check_json_path, command_line, write_rows
from sgl_hq.launch.bench_kernels import WrongResult, accept, fill, new_row
from sgl_hq.launch.bench_kernels_report import line, show_case
from sgl_hq.page_format import get_format

SMALL = Case("T", requests=4, prefixes=2, prefix_tokens=128, private_tokens=64, q_heads=4, kv_heads=2, head_dim=64)


def test_bytes_and_floors_are_those_of_the_published_table():
    """../shared/gpu/README.md counts K and V only; queries and outputs are 0.2 to 3.7 MB more."""
    for name, megabytes in {"A": 117, "B": 1124, "C": 151, "D": 1061}.items():
        case = CASES[name]
        assert abs((case.dense_bytes(2) - case.io_bytes) / 1e6 - megabytes) < 1
        assert case.dense_bytes(1) - case.io_bytes == (case.dense_bytes(2) - case.io_bytes) / 2
    a, c = CASES["A"], CASES["C"]
    assert floor_us(a.dense_bytes(2), a.flops(8576)) == pytest.approx(118.36 / 4.35, rel=1e-3)  # memory
    assert floor_us(c.dense_bytes(2), c.flops(8448)) == pytest.approx(31.0 / 0.790, rel=1e-2)  # compute: above 155 / 4.35


def test_packed_bytes_are_records_sinks_and_the_dense_rest():
    case, layout = CASES["A"], get_format("hq4").layout(128)
    assert case.record_bytes(layout) == 4 * 4 * (128 * 8592 + 2048)
    assert case.packed_bytes(layout) == case.record_bytes(layout) + 64 * 384 * 4 * 2 * 128 * 2 + 2 * 64 * 28 * 128 * 2
    assert CASES["B"].packed_bytes(get_format("bf16").layout(128)) == CASES["B"].dense_bytes(2)


def test_flops_count_both_products():
    assert SMALL.flops(10) == 2 * 2 * 4 * 4 * 64 * 10


@pytest.mark.parametrize(
    "case, fmt, us, expected",
    [
        ("A", "lossless", 45.0, "met"),
        ("A", "hq2", 35.0, "stretch"),
        ("A", "int8", 45.1, "missed"),
        ("B", "hq4", 94.9, "stretch"),
        ("B", "hq4", 119.0, "met"),
        ("B", "hq6", 90.0, "met"),  # no stretch goal
        ("B", "hq5", 1.0, "-"),
        ("C", "bf16", 96.0, "missed"),
        ("D", "hq6", 145.0, "met"),
    ],
)
def test_verdicts_of_the_issue(case, fmt, us, expected):
    assert verdict(case, fmt, us) == expected
    assert (goal_us(case, fmt) is None) == (expected == "-")


def test_cases_are_parsed_and_refused():
    assert [case.name for case in parse_cases("b, A")] == ["B", "A"]
    for text in ("E", "A,x", ""):
        with pytest.raises(ValueError, match="choose from A, B, C, D"):
            parse_cases(text)
    with pytest.raises(ValueError, match="whole pages"):
        Case("odd", 4, 2, 100, 64)
    with pytest.raises(ValueError, match="equal sizes"):
        Case("odd", 5, 2, 128, 64)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    tables = bench.Tables.scattered(SMALL)
    return tables, bench.Layer(tables, 0)


def attention(tables, layer, leave_out: int = 0) -> torch.Tensor:
    """Of all rows, in float32 by PyTorch, rounded; the last `leave_out` tokens are not read."""
    out = torch.empty_like(layer.q)
    for row in range(SMALL.requests):
        slots = bench.slots_of(tables.request_pages[row : row + 1])[0]
        k, v = (side[slots[: len(slots) - leave_out]].transpose(0, 1).float().repeat_interleave(2, 0) for side in (layer.k, layer.v))
        out[row] = torch.nn.functional.scaled_dot_product_attention(layer.q[row, :, None].float(), k, v)[:, 0].bfloat16()
    return out


def test_every_token_has_one_slot_and_groups_share_prefixes(on_cpu):
    tables, _ = on_cpu
    pages = tables.request_pages
    assert pages.shape == (4, 3) and tables.slots == 2 * 128 + 4 * 64
    assert torch.equal(pages[0, :2], pages[1, :2]) and not set(pages[0, :2].tolist()) & set(pages[2, :2].tolist())
    assert sorted({*tables.prefix_pages.flatten().tolist(), *tables.private_pages.flatten().tolist()}) == list(range(8))
    assert bench.slots_of(torch.tensor([[3, 0]]))[0].tolist() == [*range(192, 256), *range(64)]


def test_the_check_sees_a_token_left_out_and_a_nan(on_cpu):
    tables, layer = on_cpu
    right = attention(tables, layer)
    assert bench.error_of(tables, layer, right) < bench.TOLERANCE / 2
    assert bench.error_of(tables, layer, attention(tables, layer, leave_out=64)) > 5 * bench.TOLERANCE
    row = new_row(SMALL, "x", 1)
    with pytest.raises(WrongResult, match="error"):
        accept(row, bench.error_of(tables, layer, attention(tables, layer, leave_out=64)))
    right[0, 0, 0] = torch.nan
    with pytest.raises(WrongResult):
        accept(row, bench.error_of(tables, layer, right))
    assert row["error"] is None  # JSON has no NaN


def test_rows_have_ratio_floor_goal_and_fit_json(tmp_path, capsys):
    case, rows = CASES["A"], []
    vanilla, ours = new_row(case, "flashinfer bf16", 4), new_row(case, "ours hq4", 4, "hq4")
    part = new_row(case, "ours hq4", 4, "hq4", "packed")
    missing = new_row(case, "fa3", 4) | {"failure": "flash_ops is not installed", "skipped": True}
    for row, us in ((vanilla, 140.0), (ours, 40.0), (part, 20.0)):
        rows.append(row)
        fill(row, rows, bench.Times(us, us - 1, us + 1), 118_000_000, case.flops(8576))
    rows.append(missing)
    assert vanilla["speed_up"] == 1 and ours["speed_up"] == 3.5 and part["speed_up"] is None
    assert (ours["verdict"], ours["goal_us"], ours["stretch_us"]) == ("met", 45, 35) and part["verdict"] == "-"
    assert ours["of_floor"] == pytest.approx(118 / 4.35 / 40, rel=1e-6)
    show_case(case, rows)
    shown = capsys.readouterr().out
    assert "3.50x" in shown and "<= 45" in shown and "fa3: not measured: flash_ops is not installed" in shown
    assert line(missing)[1] == "-"

    facts = {"commit": "abc", "versions": {"sglang": "0.5.17"}, "command": "sgl-hq bench kernels", "machine": {"gpu": "NVIDIA H200"}}
    write_rows(rows, facts, tmp_path / "rows.json")
    read = json.loads((tmp_path / "rows.json").read_text())
    assert len(read) == 4 and all(row["commit"] == "abc" and row["machine"]["gpu"] == "NVIDIA H200" for row in read)
    assert read[1]["us_median"] == 40.0 and read[1]["part"] == "total"


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchError, match="No CUDA device"):
        bench_kernels.run()
    for options in ({"cases": "Z"}, {"formats": "hq9"}):
        with pytest.raises(BenchError, match="unknown"):
            bench_kernels.run(**options)


def test_a_broken_arm_leaves_the_others(monkeypatch, capsys):
    """One baseline raises, one is missing here, one is wrong: three rows say so, the fourth has its time; no format is lost."""
    from sgl_hq.launch import bench_baselines
    from sgl_hq.launch.bench_progress import Steps

    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "graph_times", lambda calls, replays: bench.Times(10.0, 9.0, 11.0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    result = {}

    def right(tables, layers):
        result["out"] = attention(tables, layers[0])
        return types.SimpleNamespace(calls=[lambda: None], outs=[result["out"]], layers=layers, value_bytes=2)

    def wrong(tables, layers):
        return types.SimpleNamespace(calls=[lambda: None], outs=[torch.zeros_like(layers[0].q)], layers=layers, value_bytes=2)

    def raises(tables, layers):
        raise RuntimeError("planted")

    def absent(tables, layers):
        raise bench_baselines.NotHere("not built")

    monkeypatch.setattr(bench_baselines, "BASELINES", {"flashinfer bf16": right, "wrong": wrong, "raises": raises, "absent": absent})
    rows = []
    bench_kernels._measure_case(SMALL, [], 3, rows, Steps(4))
    assert [row["us_median"] for row in rows] == [10.0, None, None, None]
    assert "wrong result" in rows[1]["failure"] and rows[2]["failure"] == "RuntimeError: planted"
    assert rows[3]["failure"] == "not built" and [row["skipped"] for row in rows] == [False, False, False, True]
    assert "Traceback" in capsys.readouterr().err


def test_the_command_in_a_row_names_no_folder(tmp_path):
    typed = ["bench", "serve", "--tokenizer", str(tmp_path / "tok"), "--json", "docs/results/x.json", "--arms", "vanilla/fa3"]
    assert command_line(typed) == "sgl-hq bench serve --tokenizer tok --json docs/results/x.json --arms vanilla/fa3"


def test_a_missing_folder_for_the_rows_is_found_before_measuring(tmp_path):
    check_json_path(tmp_path / "rows.json")
    with pytest.raises(BenchError, match="no directory"):
        check_json_path(tmp_path / "nowhere" / "rows.json")
