"""What of SGLang's load generator is ours, in its own process: prompts as token ids, and a clock that starts for all at once.

As text, 2.1 million prompt tokens pass the server's tokenizer for seconds: requests trickle in, and an arm that is faster
decodes fewer of them at a time. So prompts are ids, and a wave that goes out at once finds the scheduler held
(`bench_client.py`) until the server has taken in every request. A wave's times count from the moment it goes on: the
server's work, without the client's serializing and the server's parsing of the prompts, which are the same in every arm.
"""

from __future__ import annotations

import json
import random
import sys
from argparse import Namespace
from collections.abc import Sequence
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

DATASET = "generated-shared-prefix"  # whose arguments and name our prompts take
REQUEST_TIMEOUT_S = 3600
READ_BYTES = 10 << 20  # as the generator has it, so that its one thread keeps up with 256 streams


class Hold:
    """What the generator and the process that holds the scheduler tell each other; made before the generator starts.

    accepted: answers that the server has begun, which it does once it has read the whole request.
    released: `time.perf_counter()` (one clock for all processes of a machine) when the scheduler went on, 0 = never held.
    """

    def __init__(self, context: Any):
        self.accepted: Synchronized = context.Value("i", 0)
        self.released: Synchronized = context.Value("d", 0.0)

    def reset(self) -> None:
        self.accepted.value, self.released.value = 0, 0.0


class TokenIdPrompts:
    """Takes the place of SGLang's generator of that name: prefixes and questions are random ids of exactly the lengths asked for.

    A prefix depends on the seed, its length and its group alone, so a wave and its priming share prefixes; a question also on
    its length, so they do not share questions.
    """

    def __init__(self, args: Namespace):
        self._args = args

    @classmethod
    def from_args(cls, args: Namespace) -> TokenIdPrompts:
        return cls(args)

    def load(self, tokenizer: Any, model_id: str | None = None) -> list[Any]:
        """`DatasetRow`s in an order that mixes the groups."""
        from sglang.benchmark.datasets import DatasetRow

        special = set(tokenizer.all_special_ids)
        words = sorted(word for word in tokenizer.get_vocab().values() if word not in special)
        args, rows = self._args, []
        for group in range(args.gsp_num_groups):
            prefix = self._draw(words, args.gsp_system_prompt_len, "prefix", group)
            for user in range(args.gsp_prompts_per_group):
                prompt = prefix + self._draw(words, args.gsp_question_len, "question", group, user)
                rows.append(DatasetRow(prompt, len(prompt), args.gsp_output_len))
        random.Random(args.seed).shuffle(rows)
        return rows

    def _draw(self, words: Sequence[int], length: int, *what: object) -> list[int]:
        return random.Random(repr((self._args.seed, length, *what))).choices(words, k=length)


_spans: list[tuple[float, float]] = []  # start and end of every request of the wave


def prepare(hold: Hold) -> None:
    """Import the generator, which takes seconds, and put our prompts and our clock into it."""
    import aiohttp
    from sglang.benchmark import serving
    from sglang.benchmark.datasets import DATASET_MAPPING

    async def count(*_: object) -> None:
        with hold.accepted.get_lock():
            hold.accepted.value += 1

    begun = aiohttp.TraceConfig()
    begun.on_request_end.append(count)  # when the head of the answer is here
    send = serving.ASYNC_REQUEST_FUNCS["sglang"]

    def session() -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        return aiohttp.ClientSession(timeout=timeout, read_bufsize=READ_BYTES, trace_configs=[begun])

    async def send_and_time(request_func_input: Any, pbar: Any = None) -> Any:
        answer = await send(request_func_input=request_func_input, pbar=pbar)
        waited = max(0.0, hold.released.value - answer.start_time)
        answer.start_time, answer.ttft, answer.latency = answer.start_time + waited, answer.ttft - waited, answer.latency - waited
        _spans.append((answer.start_time, answer.start_time + answer.latency))
        return answer

    serving._create_bench_client_session = session
    serving.ASYNC_REQUEST_FUNCS["sglang"] = send_and_time
    DATASET_MAPPING[DATASET] = TokenIdPrompts


def send_wave(arguments: list[str], output: Path) -> dict[str, Any]:
    """The generator's result, its rates and `duration` from the first request's start to the last one's end.

    The generator's own duration also holds the time that the scheduler was held. Raises RuntimeError when it fails.
    """
    _spans.clear()
    run_command([*arguments, "--output-file", str(output)])
    result = json.loads(output.read_text().splitlines()[-1])
    seconds = max(end for _, end in _spans) - min(start for start, _ in _spans)
    counts = {"output": "total_output_tokens", "input": "total_input_tokens", "request": "completed"}
    return result | {"duration": seconds} | {f"{name}_throughput": result[count] / seconds for name, count in counts.items()}


def run_command(arguments: Sequence[str]) -> None:
    """`python -m sglang.bench_serving` in this process; raises RuntimeError when it fails."""
    from sglang.benchmark.serving import cli_main

    sys.argv = ["bench_serving", *arguments]
    try:
        cli_main()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"bench_serving ended with exit code {ended.code}") from ended
    finally:
        sys.stdout.flush()
