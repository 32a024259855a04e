"""The text of `GET /metrics` as samples."""

from __future__ import annotations

from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families


class Sample(NamedTuple):
    """One Prometheus sample."""

    name: str
    labels: dict[str, str]
    value: float


def read_samples(text: str) -> list[Sample]:
    """Raises ValueError where the text is none of Prometheus."""
    return [Sample(s.name, dict(s.labels), s.value) for family in text_string_to_metric_families(text) for s in family.samples]
