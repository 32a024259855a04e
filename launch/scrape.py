"""The metrics of one server, asked over HTTP, as plain values."""

from __future__ import annotations

from typing import NamedTuple

import httpx

from sgl_hq.launch.prometheus_text import read_samples
from sgl_hq.metrics.catalogue import INFO

TIMEOUT_S = 10.0
Labels = tuple[tuple[str, str], ...]  # sorted (name, value) pairs


class ScrapeError(RuntimeError):
    """The address does not give our metrics; the message is one sentence with the remedy."""


class Scrape(NamedTuple):
    """values[name][labels]: all samples whose names begin with `sglang:hq_`; at_s: time of the client's clock."""

    at_s: float
    values: dict[str, dict[Labels, float]]

    def get(self, name: str, **labels: str) -> float:
        """One value; 0 if the server has not counted it yet."""
        return self.values.get(name, {}).get(tuple(sorted(labels.items())), 0.0)

    def by(self, name: str, label: str) -> dict[str, float]:
        """The values of a metric by one of its labels, summed over the others."""
        found: dict[str, float] = {}
        for labels, value in self.values.get(name, {}).items():
            key = dict(labels)[label]
            found[key] = found.get(key, 0.0) + value
        return found

    @property
    def info(self) -> dict[str, str]:
        """Labels of the info metric."""
        return dict(next(iter(self.values[INFO])))


def scrape(url: str, clock) -> Scrape:
    """`url`: root of the server; clock: seconds. Raises ScrapeError."""
    root = url.rstrip("/").removesuffix("/metrics")
    if not root.startswith(("http://", "https://")):
        root = "http://" + root
    try:
        answer = httpx.get(root + "/metrics", timeout=TIMEOUT_S, trust_env=False, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ScrapeError(f"no server answers at {root} ({error}): start one with sgl-hq serve, or correct the address") from error
    if answer.status_code == 404:
        raise ScrapeError(f"{root} has no /metrics: start the server with --enable-metrics, if it is an SGLang server")
    if answer.status_code != 200:
        raise ScrapeError(f"{root}/metrics answers with status {answer.status_code}: wait until the server is up, or correct the address")
    values = _values(answer.text, root)
    if INFO not in values:
        raise ScrapeError(
            f"the server at {root} has metrics but none of ours: start it with --hq-format in an environment where sgl_hq is installed "
            "(`sgl-hq doctor` checks it)"
        )
    return Scrape(clock(), values)


def _values(text: str, root: str) -> dict[str, dict[Labels, float]]:
    try:
        samples = read_samples(text)
    except ValueError as error:
        raise ScrapeError(f"{root}/metrics is no Prometheus text ({error}): give the address of an SGLang server") from error
    values: dict[str, dict[Labels, float]] = {}
    for sample in samples:
        if sample.name.startswith("sglang:hq_"):
            values.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return values
