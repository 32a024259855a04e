"""The kinds of workload a plan may name, and the requests of each."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated, Any, get_args

from pydantic import Field, TypeAdapter, ValidationError

from sgl_hq.launch.load_ab import workload_fewshot, workload_multiturn, workload_shared, workload_trace, workload_unshared
from sgl_hq.launch.load_ab.requests_file import RequestSet
from sgl_hq.launch.load_ab.workload_spec import WorkloadSpec, message
from sgl_hq.launch.workload import WorkloadError

_MODULES = {
    workload_shared.Shared: workload_shared,
    workload_multiturn.Multiturn: workload_multiturn,
    workload_trace.Trace: workload_trace,
    workload_fewshot.Fewshot: workload_fewshot,
    workload_unshared.Unshared: workload_unshared,
}
_MODELS = {get_args(model.model_fields["kind"].annotation)[0]: model for model in _MODULES}
_ANY = TypeAdapter(Annotated[reduce(or_, _MODULES), Field(discriminator="kind")])


def parse_workload(given: dict[str, Any]) -> WorkloadSpec:
    """The workload that a plan's mapping describes; raises WorkloadError, one clause for each wrong key."""
    try:
        return _ANY.validate_python(given)
    except ValidationError as error:
        wrong = "; ".join(_clause(each) for each in error.errors())
        raise WorkloadError(f"Workload {given.get('name', '(no name)')}: {wrong}. Mend it in the plan") from error


def request_sets(spec: WorkloadSpec, tokenizer: Any, seed: int, kv_tokens: int) -> list[RequestSet]:
    """The phases of a workload in order. kv_tokens: the KV budget of every arm in bf16 tokens, which `working_set` is a multiple of.

    The same arguments make the same requests. Raises WorkloadError for data that is missing or too short.
    """
    if isinstance(spec, workload_shared.Shared):
        spec = spec.sized(kv_tokens)
    return _MODULES[type(spec)].request_sets(spec, tokenizer, seed)


def _clause(error: Any) -> str:
    """`key: message`; an unknown kind is told the known ones, an unknown key the keys of its kind."""
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"kind must be one of {', '.join(_MODELS)}"
    kind, *keys = error["loc"]
    where = ".".join(str(key) for key in keys)
    if error["type"] == "extra_forbidden":
        return f"{where} is unknown, the keys of {kind} are {', '.join(_MODELS[kind].model_fields)}"
    return f"{where}: {message(error)}" if where else message(error)
