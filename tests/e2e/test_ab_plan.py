"""`sgl-hq ab PLAN` on the CPU: two real servers under SGLang's load generator, cut off after the first one and taken up again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from sgl_hq.launch.load_ab.refusals import check_comparable
from sgl_hq.launch.load_ab.run_log import log_path

CONTEXT, REQUESTS, OUTPUT = 256, 4, 4
PLAN = {
    "device": "cpu",
    "kv_tokens": 4096,
    "concurrency": 2,
    "arms": [{"name": "vanilla"}, {"name": "hq7", "format": "hq7", "hq_pack": "insert"}],
    "workloads": [{"name": "shared", "kind": "shared", "context": CONTEXT, "prefixes": 2, "users": 2, "output": OUTPUT}],
}
COMMAND = [sys.executable, "-c", "from sgl_hq.launch.cli import main; main()", "ab"]
TIMEOUT_S = 800
pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)  # 4 minutes where nothing else runs: three server starts


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The result, and what the second run printed; the first one was ended when the first arm had its rows."""
    folder = tmp_path_factory.mktemp("ab")
    plan, result, page = folder / "plan.yaml", folder / "result.json", folder / "page.html"
    plan.write_text(yaml.safe_dump(PLAN | {"model": str(model)}))
    command = [*COMMAND, str(plan), "--json", str(result), "--commit", "e2e"]  # a tree edited meanwhile would be another one
    with (folder / "first.log").open("wb") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while len(rows_of(log_path(result), "vanilla")) < 2:
            assert first.poll() is None and time.monotonic() < deadline, (folder / "first.log").read_text()
            time.sleep(0.2)
        children = psutil.Process(first.pid).children(recursive=True)
    finally:
        first.send_signal(signal.SIGTERM)
        ended = first.wait(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert ended == 128 + signal.SIGTERM and children and not alive, "servers or the generator were left running"
    assert not result.exists(), "a result of half a run"
    measured = rows_of(log_path(result), "vanilla")
    assert [row["failure"] for row in measured] == [None, None]
    second = subprocess.run([*command, "--html", str(page)], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert second.returncode == 0, second.stderr
    assert rows_of(log_path(result), "vanilla") == measured, "the first arm was measured again"
    return json.loads(result.read_text()), second, page.read_text()


def rows_of(path, arm):
    """Rows of an arm in the file of a run that may be writing it."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    rows = [json.loads(line).get("row") for line in lines]
    return [row for row in rows if row and row["arm"] == arm]


def test_the_run_went_on_where_it_ended(finished):
    result, second, _ = finished
    assert "vanilla: 1 of 1 workloads and repeats were measured before" in second.stderr
    assert "hq7: server ready" in second.stderr and "vanilla: server ready" not in second.stderr
    assert [(row["arm"], row["phase"], row["failure"]) for row in result["runs"]] == [
        (arm, phase, None) for arm in ("vanilla", "hq7") for phase in ("cold", "warm")
    ]
    assert [(row["arm"], row["phase"]) for row in result["summary"]] == [(row["arm"], row["phase"]) for row in result["runs"]]


def test_rows_are_comparable_and_of_the_same_requests(finished):
    rows = finished[0]["runs"]
    check_comparable(rows)
    for row in rows:
        assert row["per_request"]["prompt_tokens"] == [CONTEXT] * REQUESTS
        assert row["load"]["output_tokens"] == REQUESTS * OUTPUT and row["load"]["concurrency"] == 2
        figures = {name: figure["value"] for name, figure in row["figures"].items()}
        assert 0 < figures["kv_bytes_used_peak"] <= figures["kv_bytes_allocated"]
        assert figures["reuse_factor"] > 0 and figures["hit_rate"] <= figures["ideal_hit_rate"] and figures["requests_s"] > 0
        assert 0 < figures["ttft_ms_p50"] < figures["e2e_ms_p50"]
        assert row["series"]["t_s"][-1] == pytest.approx(row["load"]["duration_s"], abs=2), "idle time is left out"
    warm = [row for row in rows if row["phase"] == "warm"]
    assert all(row["figures"]["hit_rate"]["value"] == row["figures"]["ideal_hit_rate"]["value"] > 0.5 for row in warm)


def test_bytes_are_equal_and_only_ours_packs(finished):
    result = finished[0]
    equal = result["equal_bytes"]
    for arm in equal["arms"].values():
        assert 0.95 * equal["budget_bytes"] < arm["allocated_bytes"] <= equal["budget_bytes"] and arm["host_bytes"] == 0
    assert "--hq-format" in equal["arms"]["hq7"]["args"] and not any("hq" in word for word in equal["arms"]["vanilla"]["args"])
    fraction = {(row["arm"], row["phase"]): row["figures"]["packed_fraction"]["value"] for row in result["runs"]}
    assert fraction["vanilla", "warm"] == 0 and fraction["hq7", "warm"] > 0.4
    longest = {row["arm"]: row["figures"]["max_context_tokens"]["value"] for row in result["runs"]}
    assert 3700 < longest["vanilla"] < 4096 and 3400 < longest["hq7"] < 4096, "memory moves, so a request may take nearly all of the budget"


def test_what_is_shown_names_the_run(finished):
    result, second, page = finished
    assert result["facts"]["machine"]["cores"] and result["facts"]["date"] and result["plan"]["arms"][1]["hq_pack"] == "insert"
    assert "Equal KV bytes" in second.stdout and "hq7" in second.stdout and "<svg" in page
