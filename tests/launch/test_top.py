"""`sgl-hq top`: rates from two scrapes, and what it says to an address that cannot be watched. The real server is in tests/e2e."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sgl_hq.launch import cli
from sgl_hq.launch.port_claim import PortClaim
from sgl_hq.launch.scrape import Scrape, ScrapeError, scrape
from sgl_hq.launch.top import frame
from sgl_hq.metrics import catalogue as names

INFO = 'sglang:hq_info{format="hq6",gate="passed",layout_version="1",pack="shared",version="1.0"} 1.0\n'


@pytest.fixture
def serve():
    """serve(status, text) -> address of a server that gives this answer to GET /metrics."""
    running = []

    def start(status: int, text: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status if self.path == "/metrics" else 404)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "status, text, said",
    [
        (404, "", "has no /metrics: start the server with --enable-metrics"),
        (200, 'sglang:num_running_reqs{model_name="m"} 0.0\n', "none of ours: start it with --hq-format"),
        (200, "", "none of ours"),
        (200, "<html>a page of something else</html>\n", "no Prometheus text"),
        (503, "", "answers with status 503: wait until the server is up"),
    ],
)
def test_an_address_that_cannot_be_watched_is_refused_in_one_sentence(serve, status, text, said):
    url = serve(status, text)
    with pytest.raises(ScrapeError, match=said) as refused:
        scrape(url, float)
    assert url in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:{free}", "no-such-host.invalid:30000", "http://["])
def test_no_server_is_said(url):
    with pytest.raises(ScrapeError, match="no server answers at .*: start one with sgl-hq serve"):
        scrape(url.format(free=PortClaim().port), float)


@pytest.mark.parametrize("form", ["{}", "{}/", "{}/metrics"])
def test_forms_of_the_address(serve, form):
    url = serve(200, INFO)
    assert scrape(form.format(url), lambda: 7.0).info["format"] == "hq6"
    assert scrape(form.format(url.removeprefix("http://")), lambda: 7.0).at_s == 7.0


def _scrape(at_s, **values) -> Scrape:
    """values: `NAME=number`, or `NAME__label__value=number`, names of the catalogue."""
    found = {names.INFO: {tuple(sorted({"version": "1", "format": "hq6", "pack": "shared", "gate": "passed"}.items())): 1.0}}
    for key, value in values.items():
        name, *pairs = key.split("__")
        labels = tuple(sorted(zip(pairs[::2], pairs[1::2])))
        found.setdefault(getattr(names, name), {})[labels] = float(value)
    return Scrape(at_s, found)


def _text(now: Scrape, before: Scrape) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(frame(now, before))
    return console.export_text()


def _row(text: str, begins: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(begins)).removeprefix(begins).split()


def test_rates_are_differences_over_the_time_between():
    before = _scrape(10.0, TOKENS_READ=1000, TOKENS_ATTENDED=4000, PAGES_MOVED__operation__pack=10, REFUSALS__reason__no_pages=1)
    now = _scrape(14.0, TOKENS_READ=2000, TOKENS_ATTENDED=16000, PAGES_MOVED__operation__pack=30, REFUSALS__reason__no_pages=3)
    text = _text(now, before)
    assert _row(text, "packed tokens read /s") == ["250", "2,000", "tokens"]
    assert _row(text, "packed tokens attended /s") == ["3,000", "16,000", "tokens"]
    assert _row(text, "reuse factor (attended / read)")[0] == "12.0", "of the interval, not since the start"
    assert _row(text, "packed when shared or inserted") == ["5.0", "30", "-"]
    assert _row(text, "no_pages") == ["0.5", "3"]


def test_a_server_that_began_again_has_no_negative_rates():
    text = _text(_scrape(2.0, TOKENS_READ=5), _scrape(1.0, TOKENS_READ=1000))
    assert _row(text, "packed tokens read /s")[0] == "0"


def test_tiers_and_findings():
    states = {"PAGES__state__live__tier__dense": 1, "PAGES__state__cached__tier__dense": 2, "PAGES__state__free__tier__dense": 1001}
    now = _scrape(1.0, **states, BYTES__state__live__tier__dense=5e8, BYTES__state__free__tier__dense=9e9, AUDIT_FINDINGS__check__tree=2)
    text = _text(now, now)
    assert _row(text, "dense")[-5:] == ["1,004", "1", "2", "1,001", "0.500"]
    assert "AUDIT FINDINGS: 2, see the server's log" in text
    assert "AUDIT" not in _text(_scrape(1.0), _scrape(1.0))


def test_the_command_prints_one_picture(serve):
    result = CliRunner().invoke(cli.app, ["top", serve(200, INFO), "--once", "--interval", "0.1"])
    assert result.exit_code == 0 and "format hq6  pack shared  gate passed" in result.output
