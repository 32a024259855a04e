"""Questions that every report asks a result: which arms, which cases, one figure, what failed. A case is one workload and phase."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

Row = dict[str, Any]
Case = tuple[str, str]  # workload, phase


class ReportError(RuntimeError):
    """A report that cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class ResultView:
    """`result` is the harness's JSON file. Raises ReportError where it holds no row."""

    result: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.result["summary"]:
            raise ReportError("The result holds no row: run `sgl-hq ab PLAN.yaml` again, it goes on where it ended")

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """In the plan's order; the first one is what the others are compared with."""
        measured = {row["arm"] for row in self.result["summary"]}
        return tuple(arm["name"] for arm in self.result["plan"]["arms"] if arm["name"] in measured)

    @cached_property
    def ours(self) -> tuple[str, ...]:
        """Arms served with this project's plugin: those for which the plan names a format."""
        formats = {arm["name"]: arm.get("format") for arm in self.result["plan"]["arms"]}
        return tuple(arm for arm in self.arms if formats[arm])

    @cached_property
    def workloads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row["workload"] for row in self.result["summary"]))

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """Workload by workload, its phases in the order they ran."""
        found = dict.fromkeys((row["workload"], row["phase"]) for row in self.result["summary"])
        return tuple(case for workload in self.workloads for case in found if case[0] == workload)

    def figure(self, arm: str, case: Case, name: str) -> Row | None:
        """Mean, interval and count of repeats; None where it was not measured."""
        row = self._summary.get((arm, *case))
        figure = row["figures"].get(name) if row else None
        return figure if figure and figure["mean"] is not None else None

    def mean(self, arm: str, case: Case, name: str) -> float | None:
        figure = self.figure(arm, case, name)
        return figure["mean"] if figure else None

    def runs(self, arm: str, case: Case) -> list[Row]:
        """The rows of all repeats; none where one of them failed: the others may be the ones that went well."""
        return [] if self.failure(arm, case) else self._repeats(arm, case)

    def all_runs(self, case: Case) -> list[Row]:
        """`runs` of every arm."""
        return [run for arm in self.arms for run in self.runs(arm, case)]

    def failure(self, arm: str, case: Case) -> str | None:
        """Why this arm and case have no figures though they were run, None where every repeat was measured."""
        reasons = dict.fromkeys(run["failure"] for run in self._repeats(arm, case) if run["failure"])
        return "; ".join(reasons) or None

    def was_run(self, arm: str, case: Case) -> bool:
        """A run may leave out arms and workloads of its plan; what was tried and failed has rows."""
        return bool(self._repeats(arm, case))

    @cached_property
    def failures(self) -> tuple[tuple[str, str, str], ...]:
        """(arm, cases, sentence), one for each arm and sentence."""
        where: dict[tuple[str, str], list[str]] = {}
        for arm in self.arms:
            for case in self.cases:
                if sentence := self.failure(arm, case):
                    where.setdefault((arm, sentence), []).append(", ".join(case))
        return tuple((arm, self._where(cases), sentence) for (arm, sentence), cases in where.items())

    @cached_property
    def left_out(self) -> tuple[tuple[str, str], ...]:
        """(arm, cases) that were not run."""
        missing = {arm: [", ".join(case) for case in self.cases if not self.was_run(arm, case)] for arm in self.arms}
        return tuple((arm, self._where(cases)) for arm, cases in missing.items() if cases)

    def _where(self, cases: list[str]) -> str:
        return "everywhere" if len(cases) == len(self.cases) else "; ".join(cases)

    @cached_property
    def _summary(self) -> dict[tuple[str, str, str], Row]:
        return {(row["arm"], row["workload"], row["phase"]): row for row in self.result["summary"]}

    def _repeats(self, arm: str, case: Case) -> list[Row]:
        return [run for run in self.result["runs"] if (run["arm"], run["workload"], run["phase"]) == (arm, *case)]
