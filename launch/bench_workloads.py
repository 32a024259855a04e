"""The workloads of `sgl-hq bench serve`: waves of SGLang's own generator `generated-shared-prefix`, and the goals.

Prompts are random token ids (`bench_generator.py`). A wave and its priming have the same seed, so the same prefixes; their
questions have other lengths, so other ids. A wave without a limit on concurrency is wholly in the scheduler's queue when its
time begins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sgl_hq.launch.bench_facts import BenchError

SEED = 1
PACKS = ("shared", "insert")  # policies a workload may ask for
PRIME_QUESTION, PRIME_OUTPUT = 64, 4
NOISE = 0.98  # what counts as "not worse"


@dataclass(frozen=True)
class Wave:
    """One run of the generator: `groups` prefixes, `per_group` requests on each; tokens asked of the generator."""

    groups: int
    per_group: int
    prefix: int
    question: int
    output: int
    concurrency: int | None = None  # requests in flight at a time; None: all, and all of them at once
    seed: int = SEED

    @property
    def requests(self) -> int:
        return self.groups * self.per_group

    def arguments(self, url: str, model: str, tokenizer: str) -> list[str]:
        """The command line of `python -m sglang.bench_serving`, without its output file."""
        args = ["--backend", "sglang", "--base-url", url, "--model", model, "--tokenizer", tokenizer]
        args += ["--dataset-name", "generated-shared-prefix", "--seed", str(self.seed), "--disable-tqdm", "--tokenize-prompt"]
        args += ["--gsp-num-groups", str(self.groups), "--gsp-prompts-per-group", str(self.per_group)]
        args += ["--gsp-system-prompt-len", str(self.prefix), "--gsp-question-len", str(self.question)]
        args += ["--gsp-output-len", str(self.output), "--warmup-requests", "0", "--cache-report", "--ready-check-timeout-sec", "0"]
        return args if self.concurrency is None else [*args, "--max-concurrency", str(self.concurrency)]


@dataclass(frozen=True)
class Goal:
    """`metric` of the best vanilla arm and of ours, as a ratio that is larger where ours is better, is at least so much."""

    metric: str
    at_least: float


@dataclass(frozen=True)
class Workload:
    """prime: requests on each prefix before the measured wave, 0 for a cold one. kv_tokens: KV budget it needs, bfloat16."""

    name: str
    wave: Wave
    pack: str
    prime: int
    kv_tokens: int
    about: str
    goals: tuple[Goal, ...] = ()

    def under(self, pack: str) -> Workload:
        """The same with another packing policy: under `shared` a second request packs what is read later."""
        return self if pack == self.pack else replace(self, pack=pack, prime=self.prime and (2 if pack == "shared" else 1))

    @property
    def priming(self) -> Wave | None:
        """One request at a time where a second one must find the first one's prefix, so that it is packed."""
        if not self.prime:
            return None
        in_flight = 1 if self.prime > 1 else 8
        return Wave(self.wave.groups, self.prime, self.wave.prefix, PRIME_QUESTION, PRIME_OUTPUT, in_flight)


# What is compiled or allocated at first use: one request behind a shared prefix at a time, then full prefills and a large batch.
WARM_UP = (Wave(2, 2, 2048, 64, 4, concurrency=1, seed=7), Wave(2, 64, 2048, 128, 8, seed=7))
_TTFT = Goal("ttft_ms", NOISE)
WORKLOADS = {
    load.name: load
    for load in (
        Workload("4x16", Wave(4, 16, 8192, 128, 256), "shared", 2, 1 << 18, "4 cached prefixes, 16 users each",
                 (Goal("tpot_ms", 1.45), _TTFT)),
        Workload("1x256", Wave(1, 256, 8192, 128, 256), "shared", 2, 1 << 18, "a cached prefix, 256 users",
                 (Goal("tpot_ms", 2.2), _TTFT)),
        Workload("cold", Wave(12, 1, 8192, 128, 8), "shared", 0, 1 << 18, "cold prefill, nothing shared", (Goal("ttft_ms", 0.97),)),
        Workload("unshared", Wave(64, 1, 1024, 128, 256), "shared", 0, 1 << 18, "nothing shared, nothing packed",
                 (Goal("output_tok_s", 0.98),)),
        Workload("own8192", Wave(64, 1, 8192, 128, 256), "insert", 1, 1_200_000, "64 cached prefixes, one user each"),
        Workload("own32000", Wave(16, 1, 32000, 128, 256), "insert", 1, 1_200_000, "16 long cached prefixes, one user each"),
    )
}  # fmt: skip
QUICK_WORKLOADS = "4x16"


def parse_workloads(text: str) -> list[Workload]:
    """Comma-separated names, in order; raises BenchError that names the unknown one and the known ones."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown or not names:
        raise BenchError(f"--workloads: {', '.join(unknown) or '(none)'} is unknown: choose from {', '.join(WORKLOADS)}")
    return [WORKLOADS[name] for name in dict.fromkeys(names)]


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of a bench_serving result that we report; milliseconds, tokens per second, requests per second."""
    kept: dict[str, Any] = {}
    for metric in ("tpot", "ttft", "itl"):
        kept[f"{metric}_ms"], kept[f"{metric}_ms_p99"] = result[f"median_{metric}_ms"], result[f"p99_{metric}_ms"]
    return kept | {
        "output_tok_s": result["output_throughput"],
        "input_tok_s": result["input_throughput"],
        "requests_s": result["request_throughput"],
        "duration_s": result["duration"],
        "prompt_tokens": result["cache_report"]["total_prompt_tokens"],
        "cached_tokens": result["cache_report"]["total_cached_tokens"],
        "output_tokens": result["total_output_tokens"],
    }


def better(metric: str, reference: float, ours: float) -> float | None:
    """How many times better `ours` is: less is better for milliseconds, more for rates. None where one is 0."""
    if not reference or not ours:
        return None
    return reference / ours if "_ms" in metric else ours / reference
