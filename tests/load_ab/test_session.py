"""One arm: the window of its samples, rows for what failed, and the next case after it. Servers and client are stand-ins."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from sgl_hq.launch.bench_facts import BenchError
from sgl_hq.launch.bench_model import BenchModel
from sgl_hq.launch.load_ab import session
from sgl_hq.launch.load_ab.arms import make_arms
from sgl_hq.launch.load_ab.plan import ArmSpec
from sgl_hq.launch.load_ab.requests_file import LoadRequest, RequestSet
from sgl_hq.launch.load_ab.run_log import RunLog
from sgl_hq.launch.load_ab.sampler import Moment, Series
from sgl_hq.launch.load_ab.session import Case, Conditions, PhaseFile, measure_arm, while_under_load, without_folders
from sgl_hq.launch.server_process import ServerFailed

MODEL = BenchModel("folder", "shape", "folder", 1000, True)
ARM = make_arms([ArmSpec(name="vanilla")], 6_400_000, MODEL, on_cpu=False)[0]


def series(*times: float) -> Series:
    return Series(tuple(Moment(t, 10 * t, 0, 0, 0, 0, 0) for t in times), 1.0)


@pytest.mark.parametrize(
    "start, latency, kept",
    [(101.1, 1.0, [1.0, 1.5, 2.0, 2.5]), (101.0, 1.0, [1.0, 1.5, 2.0]), (99.0, 9.0, [0.0, 1.0, 1.5, 2.0, 2.5, 3.0])],
)
def test_samples_before_and_after_the_load_are_left_out(start, latency, kept):
    window = while_under_load(series(0.0, 1.0, 1.5, 2.0, 2.5, 3.0), [{"start_s": start, "latency_s": latency}], began=100.0)
    assert [m.t_s for m in window.moments] == [t - kept[0] for t in kept] and [m.bytes_used for m in window.moments] == [10 * t for t in kept]


def test_published_sentences_name_files_without_their_folders():
    text = f"failed (log: {Path('/', 'x', 'y-z', 'server.log')}), see http://127.0.0.1:80/a/b and 3/4 of it"
    assert without_folders(text) == "failed (log: server.log), see http://127.0.0.1:80/a/b and 3/4 of it"


def case(workload: str, repeat: int = 0, at_s: float | None = None) -> Case:
    requests = tuple(LoadRequest((1, 2, 3), 2, at_s=at_s) for _ in range(3))
    sets = [RequestSet(workload, "unshared", phase, repeat, 3, requests, "some", 0) for phase in ("cold", "warm")]
    return Case(workload, repeat, tuple(PhaseFile(each, Path("file"), "ab12") for each in sets))


def test_in_an_open_loop_only_the_number_of_requests_limits_what_is_in_flight():
    closed, rate = (Conditions(MODEL, 2, rate, Path()) for rate in (None, 5.0))
    free, timed = case("w").phases[0].requests, case("w", at_s=0.0).phases[0].requests
    assert [closed.drive(free, 0).concurrency, closed.drive(timed, 0).concurrency, rate.drive(free, 0).concurrency] == [2, 3, 3]


class Quiet:
    notes: list[str]

    def __init__(self):
        self.notes = []

    def note(self, line):
        self.notes.append(line)

    def doing(self, _):
        pass

    def step(self, _):
        pass


@pytest.fixture
def measured(monkeypatch):
    """Measure three workloads; `wrong[workload]` is raised in its phases, `prepare` before the first."""

    def measure(wrong=(), prepare=None, not_started=None, alive=lambda: None):
        flushed = []

        def phase(arm, facts, server, phase, conditions, repeat, client):
            if phase.requests.workload in dict(wrong):
                raise dict(wrong)[phase.requests.workload]
            head = {"arm": arm.name, "workload": phase.requests.workload, "phase": phase.requests.phase, "repeat": repeat}
            return head | {"failure": None, "load": {"requests": 3, "duration_s": 1.0}}

        def prepared(*_):
            if prepare:
                raise prepare

        monkeypatch.setattr(session, "_phase", phase)
        monkeypatch.setattr(session, "_prepared", prepared)
        monkeypatch.setattr(session, "empty_cache", lambda *_: flushed.append(True))
        server = SimpleNamespace(start_s=1.0, check_alive=alive, flush_cache=None)
        log, progress = RunLog(None, {}), Quiet()
        cases = [case("a"), case("b"), case("c")]
        measure_arm(ARM, server, not_started, cases, Conditions(MODEL, 2, None, Path()), nullcontext(), log, progress)
        return [(row["workload"], row["phase"], row["failure"]) for row in log.rows], flushed, progress.notes

    return measure


def all_of(failures: dict[str, str | None]) -> list[tuple[str, str, str | None]]:
    return [(workload, phase, failure) for workload, failure in failures.items() for phase in ("cold", "warm")]


def test_the_cache_is_emptied_before_each_workload_and_not_between_its_phases(measured):
    rows, flushed, _ = measured()
    assert rows == all_of({"a": None, "b": None, "c": None}) and len(flushed) == 3


def test_a_workload_that_cannot_be_measured_does_not_end_the_arm(measured):
    rows, _, notes = measured({"b": BenchError("odd lengths")})
    assert rows == all_of({"a": None, "b": "odd lengths", "c": None}) and any("odd lengths" in note for note in notes)


def test_a_server_that_ended_fails_what_is_left(measured):
    def dead():
        raise ServerFailed("it ended with exit code 9")

    rows, _, _ = measured({"b": ServerFailed("no answer")}, alive=dead)
    assert rows == all_of({"a": None, "b": "it ended with exit code 9", "c": "it ended with exit code 9"})


@pytest.mark.parametrize("how", ["not_started", "prepare"])
def test_an_arm_that_cannot_begin_is_rows_with_the_reason(measured, how):
    rows, _, _ = measured(**{how: ServerFailed("out of memory")})
    assert rows == all_of(dict.fromkeys("abc", "out of memory"))


def test_a_bug_of_ours_ends_the_run(measured):
    with pytest.raises(ZeroDivisionError):
        measured({"a": ZeroDivisionError()})
