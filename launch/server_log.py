"""What an SGLang server's log says: why it failed, and which batches its scheduler built."""

from __future__ import annotations

import re

# "ValueError: ...", "some.module.SomeError: ...", "launch_server.py: error: ...", with or without a "[time] " before it.
_ERROR = re.compile(r"^(\[[^\]]*\] )?([\w.]*(Error|Exception|Refused|Failed)\b: |[\w.-]+: error: )")
_PREFILL = re.compile(r"Prefill batch, #new-seq: (\d+), #new-token: (\d+), #cached-token: (\d+)")
_DECODE = re.compile(r"Decode batch, #running-req: (\d+)")


def failure_reason(log: str, lines: int = 2) -> str:
    """The last error lines of a log, joined by ' | '; without any, its last lines."""
    meaningful = [line.strip() for line in log.splitlines() if line.strip()]
    if not meaningful:
        return "it wrote nothing"
    errors = [line for line in meaningful if _ERROR.match(line)]
    unique = list(dict.fromkeys(errors or meaningful))
    return " | ".join(line[:400] for line in unique[-lines:])


def logged_batches(log: str) -> tuple[tuple, ...]:
    """The batches of the scheduler, in order (decode batches are all logged only with --decode-log-interval 1).

    A batch is ("prefill", new requests, new tokens, cached tokens) or ("decode", running requests).
    """
    batches: list[tuple] = []
    for line in log.splitlines():
        if found := _PREFILL.search(line):
            batches.append(("prefill", *map(int, found.groups())))
        elif found := _DECODE.search(line):
            batches.append(("decode", int(found[1])))
    return tuple(batches)
