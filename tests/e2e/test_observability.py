"""What a real server shows of itself: /metrics and /server_info agree, the dashboard and `sgl-hq top` read what is there."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from sgl_hq.launch.server_process import ServerProcess
from sgl_hq.metrics.catalogue import CATALOGUE, GROUP_SIZE, HISTOGRAM

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-sgl-hq.json"
# The packed tier has room for the short prefix and is smaller than the long one.
ARGS = "--hq-format int8 --hq-allow-ungated --hq-packed-fraction 0.1 --max-total-tokens 4096 --hq-audit 2 --hq-audit-raise".split()
ARGS += "--enable-metrics --grammar-backend none --log-level warning --log-level-http warning --skip-server-warmup".split()
SHORT, LONG, SHARERS, ANSWER = 320, 1088, 3, 6


def _prompt(prefix_tokens: int, user: int) -> list[int]:
    return [1000 + prefix_tokens + (i * 7) % 3000 for i in range(prefix_tokens)] + [50 + user, 60, 70]


@pytest.fixture(scope="module")
def server(model):
    with ServerProcess(str(model), ARGS, stop_grace_s=0, start_timeout_s=780) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
        for prefix in (SHORT, LONG):
            client.completions.create(model="m", prompt=_prompt(prefix, 0), max_tokens=ANSWER, temperature=0)
            together = [_prompt(prefix, user) for user in range(1, 1 + SHARERS)]
            client.completions.create(model="m", prompt=together, max_tokens=ANSWER, temperature=0)
        yield server


def _check(metric, block, metrics) -> None:
    for values, said in metric.read(block).items():
        labels = frozenset(zip(metric.labels, values, strict=True))
        if metric.kind != HISTOGRAM:
            assert metrics[metric.name, labels] == pytest.approx(said)
            continue
        below = 0
        for bound, count in zip((*said["bounds"], float("inf")), said["counts"], strict=True):
            below += count
            le = "+Inf" if bound == float("inf") else str(float(bound))
            assert metrics[metric.name + "_bucket", labels | {("le", le)}] == below
        assert metrics[metric.name + "_sum", labels] == pytest.approx(said["total"])
        assert metrics[metric.name + "_count", labels] == below


@pytest.fixture(scope="module")
def shown(server) -> tuple[dict, dict]:
    """The hq block of the idle server; /metrics as values by name and labels.

    An answer leaves before the scheduler has gone idle and exported what its last batches changed, so there is time for that here.
    Whatever differs after it is for the tests to find.
    """
    for _ in range(100):
        metrics = {(s.name, frozenset(s.labels.items())): s.value for s in server.metrics() if s.name.startswith("sglang:hq_")}
        block = server.server_info()["internal_states"][0]["hq"]
        with contextlib.suppress(AssertionError, KeyError):
            assert block["live_requests"] == 0
            for metric in CATALOGUE:
                _check(metric, block, metrics)
            break
        time.sleep(0.1)
    return block, metrics


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda m: m.name)
def test_a_metric_shows_what_server_info_says(shown, metric):
    _check(metric, *shown)


def test_the_figures_are_those_of_the_requests(shown):
    block, _ = shown
    dense, packed, counters = block["dense"], block["packed"], block["counters"]
    assert packed["pages_used"] == packed["pages_cached"] == counters["pages_packed"] == SHORT // 64
    assert packed["pages_live"] == dense["pages_live"] == 0 and dense["pages_cached"] == LONG // 64
    assert packed["pages_free"] + packed["pages_used"] == packed["pages_total"] < LONG // 64
    assert dense["pages_free"] + dense["pages_cached"] == dense["tokens_total"] // 64
    assert block["packed_token_fraction"] == pytest.approx(SHORT / (SHORT + LONG))
    assert 1 < block["reuse_factor"] <= SHARERS
    assert block["group_requests"]["total"] * SHORT == counters["packed_tokens_attended"], "one group of pages, read by its sharers"
    assert sum(block["seconds"]["pack"]["counts"]) == counters["nodes_packed"] == 1
    assert block["audit"]["audits"] >= 5 and not any(block["audit"]["findings"].values())


def test_a_refusal_is_counted_and_explained_once(server, shown):
    refused = shown[0]["counters"]["refused"]
    assert refused["too_large"] >= 2 and sum(refused.values()) == refused["too_large"]
    total = shown[0]["packed"]["pages_total"]
    lines = [line for line in server.log_text().splitlines() if "are not packed" in line]
    assert len(lines) == 1
    assert f"17 pages (1088 tokens) of a prefix are not packed: the packed tier has {total} pages in all, {17 - total} too few." in lines[0]
    assert "raise --hq-packed-fraction" in lines[0]


def _expressions() -> list[str]:
    return [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]


def test_every_metric_on_the_dashboard_is_shown_by_the_server(shown):
    on_dashboard = {name for expression in _expressions() for name in re.findall(r"sglang:\w+", expression)}
    assert on_dashboard and on_dashboard <= {name for name, _ in shown[1]}


def test_every_label_on_the_dashboard_is_one_of_its_metric(shown):
    known = {label for _, labels in shown[1] for label, _ in labels} | {"instance"}  # which Prometheus adds
    for expression in _expressions():
        selected = re.findall(r'[{,](\w+)=~?"', expression)
        grouped = [label.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(",")]
        assert set(selected + grouped) <= known, expression


def test_every_metric_of_ours_is_on_the_dashboard():
    expressions = "\n".join(_expressions())
    for metric in CATALOGUE:
        assert re.search(metric.name + (r"_bucket\b" if metric.kind == HISTOGRAM else r"\b"), expressions), metric.name


def test_the_dashboard_asks_for_its_data_source():
    dashboard = json.loads(DASHBOARD.read_text())
    variable = next(v for v in dashboard["templating"]["list"] if v["type"] == "datasource")
    assert variable["query"] == "prometheus"
    for panel in dashboard["panels"]:
        assert all(part["datasource"] == {"type": "prometheus", "uid": f"${{{variable['name']}}}"} for part in (panel, *panel["targets"]))


def test_top_prints_one_picture_and_ends(server, shown):
    command = [Path(sys.executable).with_name("sgl-hq"), "top", server.url, "--once", "--interval", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    block, metrics = shown
    assert f"format int8  pack shared  gate {block['gate']['verdict']}" in done.stdout
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("packed  "))
    assert row[-5:-1] == [str(block["packed"]["pages_" + state]) for state in ("total", "live", "cached", "free")]
    assert f"{block['counters']['packed_tokens_read']:,} tokens" in done.stdout
    groups = metrics[GROUP_SIZE + "_sum", frozenset()] / metrics[GROUP_SIZE + "_count", frozenset()]
    assert re.search(rf"requests a group, mean +- +{groups:.1f}\b", done.stdout)
    assert re.search(rf"too_large +0\.0 +{block['counters']['refused']['too_large']}\b", done.stdout)
