"""The whole run without servers: what is refused first, what is left to do, what is stopped, and in which order rows are told."""

from __future__ import annotations

import threading

import pytest
from row_samples import good_row
from word_tokenizer import WordTokenizer

from sgl_hq.launch.bench_facts import BenchError
from sgl_hq.launch.bench_model import BenchModel
from sgl_hq.launch.load_ab import run as runner
from sgl_hq.launch.load_ab.arms import make_arms
from sgl_hq.launch.load_ab.plan import PlanError, parse_plan
from sgl_hq.launch.load_ab.refusals import Incomparable
from sgl_hq.launch.load_ab.run_log import RunLog
from sgl_hq.launch.server_process import ServerFailed

MODEL = BenchModel("folder", "shape", "folder", 1000, True)
PLAN = parse_plan(
    {
        "kv_tokens": 6400,
        "concurrency": 4,
        "repeats": 2,
        "arms": [{"name": "vanilla"}, {"name": "lossless", "format": "lossless"}],
        "workloads": [
            {"name": "shared-2.6", "kind": "shared", "context": 128, "working_set": 0.06, "users": 2, "output": 2},
            {"name": "alone", "kind": "unshared", "context": 64, "requests": 4, "output": 2},
        ],
    }
)
ARMS = make_arms(PLAN.arms, 6_400_000, MODEL, on_cpu=False)


@pytest.fixture
def cases(monkeypatch, tmp_path):
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: WordTokenizer())
    return lambda plan=PLAN, workloads=("shared-2.6", "alone"): runner._cases(plan, workloads, MODEL, tmp_path)


def test_what_cannot_be_run_is_said_before_anything_starts(monkeypatch, tmp_path):
    with pytest.raises(PlanError, match="--arms: hq4 is not in the plan"):
        runner.run("quick-cpu", arms="hq4")
    with pytest.raises(BenchError, match="there is no directory"):
        runner.run("quick-cpu", json_path=tmp_path / "missing" / "rows.json")
    with pytest.raises(PlanError, match="device cuda and there is none here"):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        runner._on_cpu(PLAN.model_copy(update={"device": "cuda"}))
    monkeypatch.setenv("SGLANG_HQ_FORMAT", "bf16")
    with pytest.raises(PlanError, match="would inherit"):
        runner.run("quick-cpu")


def test_requests_are_made_once_for_all_arms_and_anew_for_each_repeat(cases):
    made = cases()
    assert [(case.workload, case.repeat, len(case.phases)) for case in made] == [
        ("shared-2.6", 0, 2), ("alone", 0, 1), ("shared-2.6", 1, 2), ("alone", 1, 1),
    ]  # fmt: skip
    digests = [phase.sha256 for case in made for phase in case.phases]
    assert len(set(digests)) == 6 and digests == [phase.sha256 for case in cases() for phase in case.phases]
    assert len(made[0].phases[0].requests.requests) == 3 * 2, "0.06 times 6,400 tokens are 3 prefixes of 128"
    cold = PLAN.model_copy(update={"workloads": ({**PLAN.workloads[0], "phases": ["cold"]},)})
    assert [len(case.phases) for case in cases(cold, ("shared-2.6",))] == [1, 1]


def test_what_was_measured_is_left_out_and_what_failed_is_not(cases):
    log = RunLog(None, {})
    done, failed = ({"arm": "vanilla", "workload": "alone", "phase": "cold", "repeat": n, "failure": why} for n, why in enumerate((None, "x")))
    log.append([done, failed])
    left = runner._unfinished(ARMS[0], cases(), log)
    assert [(case.workload, case.repeat) for case in left] == [("shared-2.6", 0), ("shared-2.6", 1), ("alone", 1)]
    assert len(runner._unfinished(ARMS[1], cases(), log)) == 4


class FakeServer:
    def __init__(self, fails=None):
        self.fails, self.stopped, self.leave = fails, threading.Event(), threading.Event()

    def start(self):
        if self.fails == "hangs":
            assert self.stopped.wait(10)
        elif self.fails:
            raise ServerFailed(self.fails)

    def stop(self):
        self.stopped.set()


def test_servers_that_start_together_fail_one_by_one_and_are_all_stopped():
    servers = [FakeServer(), FakeServer("out of memory")]
    with pytest.raises(KeyboardInterrupt), runner._started(servers) as reasons:
        assert [str(reason) for reason in reasons] == ["None", "out of memory"] and not servers[0].stopped.is_set()
        raise KeyboardInterrupt
    assert all(server.stopped.is_set() for server in servers)


def test_ctrl_c_during_a_start_does_not_wait_for_it(monkeypatch):
    servers = [FakeServer("hangs"), FakeServer("hangs")]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.exception", interrupted)
    with pytest.raises(KeyboardInterrupt), runner._started(servers):
        pass
    assert all(server.stopped.is_set() for server in servers)


def told(rows):
    log = RunLog(None, {})
    log.begun("ab --arms vanilla"), log.begun("ab --arms lossless")
    log.started("lossless", {"allocated_bytes": 6_300_000, "host_bytes": 0, "args": ["--hq-format", "lossless"]})
    log.started("vanilla", {"allocated_bytes": 6_400_000, "host_bytes": 0, "args": []})
    log.append(rows)
    return runner._result(PLAN, MODEL, ARMS, {"commit": "abc"}, log)


def test_a_result_has_all_rows_in_the_plans_order_whatever_was_measured_first():
    rows = [good_row(arm, repeat) for repeat in (1, 0) for arm in ("lossless", "vanilla")]
    result = told(rows)
    assert [(row["arm"], row["repeat"]) for row in result["runs"]] == [("vanilla", 0), ("vanilla", 1), ("lossless", 0), ("lossless", 1)]
    assert [row["arm"] for row in result["summary"]] == ["vanilla", "lossless"]
    assert result["facts"] == {"commit": "abc", "model": "shape", "command": "ab --arms vanilla && ab --arms lossless"}
    assert list(result["equal_bytes"]["arms"]) == ["vanilla", "lossless"] and "6,400,000 bytes" in result["equal_bytes"]["how"]


def test_the_original_mistake_makes_no_result():
    """One arm's allocated bytes under the name of used bytes, as an earlier project had published."""
    wrong = good_row("vanilla", 0)
    used, allocated = (wrong["figures"][name] for name in ("kv_bytes_used_peak", "kv_bytes_allocated"))
    wrong["figures"]["kv_bytes_used_peak"] = used | {"value": allocated["value"], "quantity": allocated["quantity"], "source": allocated["source"]}
    with pytest.raises(Incomparable, match="quantity of kv_bytes_used_peak"):
        told([wrong, good_row("lossless", 0)])


def test_rows_of_other_plans_machines_or_commits_do_not_mix():
    facts = {"versions": {}, "commit": "abc", "machine": {"cpu": "c", "cores": 2, "gpu": None, "ram_bytes": 3}, "date": "today"}
    belongs = [runner._belongs_to(plan, MODEL, facts | more) for plan, more in (
        (PLAN, {}), (PLAN, {"date": "later"}), (PLAN, {"commit": "def"}), (PLAN, {"machine": facts["machine"] | {"gpu": "H200"}}),
        (PLAN.model_copy(update={"seed": 1}), {}),
    )]  # fmt: skip
    assert belongs[0] == belongs[1] and all(belongs[0] != other for other in belongs[2:])
    assert set(belongs[0]) == {"plan", "model", "versions", "commit", "machine"}
