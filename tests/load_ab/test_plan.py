"""Plans: what is refused and in which words, what a result states of them, and that every shipped one can be read."""

from __future__ import annotations

import copy

import pytest

from sgl_hq.launch.load_ab.plan import PlanError, load_plan, parse_plan, select, shipped_plans
from sgl_hq.launch.workload import WorkloadError

GIVEN = {
    "kv_tokens": 4096,
    "concurrency": 4,
    "arms": [{"name": "vanilla"}, {"name": "hq7", "format": "hq7", "hq_pack": "insert"}],
    "workloads": [{"name": "alone", "kind": "unshared", "context": 64, "requests": 4, "output": 2}],
}


def changed(path: str, value: object) -> dict:
    """GIVEN with one key at `path` ("arms.0.format") set, or taken out for None."""
    given = copy.deepcopy(GIVEN)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = given
    for part in way:
        place = place[part]
    place[last] = value
    if value is None:
        del place[last]
    return given


@pytest.mark.parametrize("name", shipped_plans())
def test_shipped_plans_can_be_read(name):
    plan = load_plan(name)
    assert len(plan.arms) > 1 and plan.about and plan.arms[0].format is None, "the first arm is what the others are compared with"
    assert all(spec.name for spec in plan.specs())


def test_the_pressure_plan_is_the_issues():
    plan = load_plan("pressure-h200")
    shared = {spec.working_set: spec for spec in plan.specs() if spec.kind == "shared"}
    assert sorted(shared) == [1.3, 2.6, 3.3] and plan.kv_tokens == 200_000
    assert all(spec.users >= 4 and spec.context - spec.question == 8192 for spec in shared.values())


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("arm", [], "arm: unknown, known are about, model"),
        ("arms.1.packed", 1, r"arms\[1\].packed: unknown, known are name, format"),
        ("arms.0.hq_pack", "insert", r"arms\[0\]: hq_pack belong to our formats: add format"),
        ("arms.1.kv_cache_dtype", "fp8_e4m3", "give those an arm of their own"),
        ("arms.1.page_size", 1, "give those an arm of their own"),
        ("arms.0.page_size", 16, r"arms\[0\].page_size: Input should be 1 or 64"),
        ("arms.0.args", ["--max-total-tokens=9"], "args may not set --max-total-tokens=9"),
        ("arms.0.args", ["--hq-format", "hq4"], "args may not set --hq-format"),
        ("arms.1.name", "vanilla", "arms has vanilla twice"),
        ("kv_gib", 1, "give kv_gib or kv_tokens, and not both"),
        ("kv_tokens", None, "give kv_gib or kv_tokens, and not both"),
        ("concurrency", 1, "concurrency: Input should be greater than or equal to 2"),
        ("phases", ["cold"], "phases: unknown"),
        ("workloads", [], "workloads: Tuple should have at least 1 item"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_key(path, value, message):
    with pytest.raises(PlanError, match=message):
        parse_plan(changed(path, value))


def test_a_wrong_workload_is_refused_by_its_own_words():
    with pytest.raises(WorkloadError, match="alone: contxt is unknown"):
        parse_plan(changed("workloads.0.contxt", 64))
    with pytest.raises(WorkloadError, match="phases: give .cold. or .cold, warm.: a cache is warm only after a cold phase"):
        parse_plan(changed("workloads.0.phases", ["warm"]))


def test_files_that_are_no_plan_are_refused(tmp_path):
    with pytest.raises(PlanError, match="no plan nowhere: give a YAML file or one of .*quick-cpu"):
        load_plan("nowhere")
    (tmp_path / "a.yaml").write_text("arms: [")
    with pytest.raises(PlanError, match="cannot be read as YAML"):
        load_plan(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("- arms")
    with pytest.raises(PlanError, match="holds no keys"):
        load_plan(str(tmp_path / "a.yaml"))


def test_a_result_states_no_folders_and_a_digest_tells_plans_apart(tmp_path):
    plan = parse_plan(GIVEN | {"model": str(tmp_path / "model-7b"), "tokenizer": str(tmp_path / "words")})
    stated = plan.describe()
    assert (stated["model"], stated["tokenizer"]) == ("model-7b", "words") and str(tmp_path) not in repr(stated)
    digests = {parse_plan(changed(*change)).digest() for change in (("seed", 0), ("seed", 1), ("arms.1.format", "hq6"))}
    assert len(digests) == 3 and parse_plan(GIVEN).digest() in digests, "seed 0 is the default"


def test_names_are_chosen_in_the_plans_order():
    assert select("arms", None, ["a", "b"]) == ["a", "b"] and select("arms", "b, a", ["a", "b", "c"]) == ["a", "b"]
    for wrong in ("a,d", ""):
        with pytest.raises(PlanError, match="--arms: .*choose from a, b, c"):
            select("arms", wrong, ["a", "b", "c"])
