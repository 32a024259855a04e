"""Server arguments that every server under load has in common, whatever its arm."""

from __future__ import annotations

# What figures and equal conditions need: counters, cached tokens in the answers, one seed, no request of the server's own.
MEASURED = ("--enable-metrics", "--enable-cache-report", "--random-seed", "0", "--skip-server-warmup", "--grammar-backend", "none")

START_TIMEOUT_S = 400.0
_DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)  # CUDA graphs; fewer than SGLang's default start sooner
_DECODE_LOG_INTERVAL = 16  # decode steps between two log lines, from which the concurrency and the step time are taken
# Tokens of a streamed chunk. With 1, the servers' HTTP side and the client end at about 15,000 tokens/s (256 requests on an H200).
_STREAM_INTERVAL = 8
# The pool is sized by --max-total-tokens. This is only the cap above it, high enough for several servers on one GPU.
_MEM_FRACTION = 0.93
ON_GPU = (
    "--mem-fraction-static", str(_MEM_FRACTION), "--cuda-graph-bs-decode", *map(str, _DECODE_BATCHES),
    "--decode-log-interval", str(_DECODE_LOG_INTERVAL), "--stream-interval", str(_STREAM_INTERVAL),
)  # fmt: skip
# A step takes tens of milliseconds: every one may be logged, and SGLang refreshes its gauges with every log line.
ON_CPU = ("--decode-log-interval", "1")
