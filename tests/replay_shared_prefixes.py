"""What a load of shared prefixes makes the cache lose, without a model: python tests/replay_shared_prefixes.py --working-set 3.3

The real tree, pools and allocator, no K and V, and a scheduler as simple as may be: first come first served, chunks of prefill before
decode steps. The load is `shared` of the plan `pressure-h200`, all requests of a phase waiting from the start. Printed for each phase:
tokens prefilled again that had been cached.
"""

from __future__ import annotations

import argparse
import os
import random
from collections import deque
from dataclasses import dataclass

import torch
from two_tier_machine import Request
from two_tier_parts import P, Parts, build, radix_key

from sgl_hq.config import AUTO, HQConfig

HEADS, HEAD_DIM = 4, 128  # of Qwen2.5-7B; one layer, since all layers' pages share their ids


@dataclass(frozen=True)
class Load:
    """Lengths in tokens. working_set: of all prefixes, over the budget."""

    budget: int = 200_000
    working_set: float = 3.3
    prefix: int = 8192
    question: int = 64
    answer: int = 32
    users: int = 4
    concurrency: int = 64
    chunk: int = 8192
    seed: int = 1

    @property
    def prefixes(self) -> int:
        return round(self.working_set * self.budget / self.prefix)

    def requests(self, phase: int) -> deque[Request]:
        pairs = [(prefix, user) for prefix in range(self.prefixes) for user in range(self.users)]
        random.Random(f"{self.seed} {phase}").shuffle(pairs)
        return deque(self._request(phase, *pair) for pair in pairs)

    def _request(self, phase: int, prefix: int, user: int) -> Request:
        own = 10**9 * (1 + phase) + (prefix * self.users + user) * self.question
        shared = prefix * self.prefix
        return Request(f"{phase} {prefix} {user}", [*range(shared, shared + self.prefix), *range(own, own + self.question)])

    def ideal_tokens(self, phase: int) -> int:
        """That have to be computed if nothing cached is ever lost, nor computed twice at the same time."""
        return self.prefixes * (self.users * self.question + (self.prefix if phase == 0 else 0))


class Replay:
    """at_once: a packing ends when it begins, as if the device needed no time."""

    def __init__(self, load: Load, fmt: str, at_once: bool = False):
        self.load = load
        self.parts = _parts(load, fmt)
        self.tree, self.allocator, self.rows = self.parts.tree, self.parts.allocator, self.parts.rows
        self.parts.pool.packed._pack_on_cpu = lambda *_: lambda: None
        self.at_once = at_once
        self.running: list[Request] = []

    def phase(self, number: int) -> int:
        """Runs all its requests; returns the tokens prefilled."""
        waiting, prefilled, unfinished = self.load.requests(number), 0, None
        while waiting or self.running or unfinished:
            batch = self._batch(waiting, unfinished)
            if not batch:
                self._decode()
                continue
            prefilled += sum(end - request.allocated for request, end in batch)
            for request, end in batch:
                self._prefill(request, end)
            self._booked([request for request, _ in batch])
            unfinished = next((r for r, _ in batch if r.allocated < len(r.tokens)), None)
            self.running += [r for r, _ in batch if r is not unfinished]
        self.tree.settle()
        return prefilled

    def _batch(self, waiting: deque[Request], unfinished: Request | None) -> list[tuple[Request, int]]:
        """Requests of a prefill, with where their chunk ends. Nothing joins a prompt that is not at its end."""
        left, batch, promised = self.load.chunk, [], 0
        for request in (unfinished, *waiting) if unfinished else tuple(waiting):
            new = request is not unfinished
            if not left or len(self.running) + len(batch) >= self.load.concurrency:
                break
            if new:
                self._match(request)
            end = min(len(request.tokens), request.allocated + left)
            wanted = _pages(end) - request.allocated
            answers = _pages(self.load.answer) * (len(self.running) + len(batch) + 1)
            if promised + wanted + answers > self._room():
                if new:
                    self.tree.dec_lock_ref(request.last_node)
                break
            if new:
                waiting.popleft()
                self.rows.alloc([request])
            batch.append((request, end))
            promised, left = promised + wanted, left - (end - request.allocated)
            if end < len(request.tokens):
                break
        return batch

    def _match(self, request: Request) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        match = self.tree.match_prefix(MatchPrefixParams(key=radix_key(request.tokens[:-1])))
        request.prefix_indices, request.last_node = match.device_indices, match.last_device_node
        request.allocated = request.filled = request.cache_protected_len = len(match.device_indices)
        self.tree.inc_lock_ref(request.last_node)

    def _prefill(self, request: Request, end: int) -> None:
        one, start = lambda x: torch.tensor([x]), request.allocated
        self._make_free(_pages(end) - _pages(start))
        row = self.rows.req_to_token[request.req_pool_idx]
        row[: len(request.prefix_indices)] = request.prefix_indices.int()
        last = row[start - 1 : start].long() if start else one(-1)
        row[start:end] = self.allocator.alloc_extend(one(start), one(start), one(end), one(end), last, end - start).int()
        request.allocated = request.filled = end

    def _booked(self, batch: list[Request]) -> None:
        self.tree.on_rows_allocated(batch)
        for request in batch:
            self.tree.cache_unfinished_req(request, chunked=request.allocated < len(request.tokens))
        self._batch_done()

    def _decode(self) -> None:
        self._make_free(sum(P for request in self.running if request.allocated % P == 0))
        for request in self.running:
            row, at = self.rows.req_to_token[request.req_pool_idx], torch.tensor([request.allocated + 1])
            row[request.allocated] = self.allocator.alloc_decode(at, at, row[request.allocated - 1 : request.allocated].long())[0]
            request.output_ids.append(0)
            request.tokens.append(0)
            request.allocated = request.filled = request.allocated + 1
        self._batch_done()
        for request in [r for r in self.running if len(r.output_ids) == self.load.answer]:
            self.tree.cache_finished_req(request, kv_len_to_handle=request.allocated)
            self.tree.live.unregister(request)
            self.rows.free(request)
            self.running.remove(request)

    def _batch_done(self) -> None:
        self.tree.batch_done()
        if self.at_once:
            self.tree.settle()

    def _room(self) -> int:
        return self.allocator.available_size() + self.tree.evictable_size()

    def _make_free(self, tokens: int) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        if (short := tokens - self.allocator.available_size()) > 0:
            self.tree.evict(EvictParams(num_tokens=short))


def _parts(load: Load, fmt: str) -> Parts:
    from sgl_hq.pool.chunks import granularity
    from sgl_hq.pool.codecs import codecs_of_server
    from sgl_hq.pool.sizing import KVShape
    from sgl_hq.pool.slabs import slabs_of_budget

    shape = KVShape(1, HEADS, HEAD_DIM, HEAD_DIM)
    layouts = [codec.layout for codec in codecs_of_server(HQConfig(fmt, "insert", AUTO), shape, "cpu")]
    slabs = slabs_of_budget(load.budget * shape.dense_bytes_per_token, layouts, shape, granularity("cpu"))
    return build(fmt, "insert", slabs.dense_tokens // P, AUTO, layers=1, heads=HEADS, dim=HEAD_DIM, requests=load.concurrency + 1)


def _pages(tokens: int) -> int:
    """In whole pages, as tokens."""
    return -(-tokens // P) * P


if __name__ == "__main__":
    os.environ["SGLANG_PLATFORM"] = "sgl_hq_cpu"  # before SGLang is imported
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--working-set", type=float, default=3.3, help="size of all prefixes over the KV budget")
    parser.add_argument("--format", default="hq4")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", action="store_true", help="packings end when they begin")
    given = parser.parse_args()
    replay = Replay(Load(working_set=given.working_set, seed=given.seed), given.format, given.at_once)
    for number, name in enumerate(("cold", "warm")):
        again = replay.phase(number) - replay.load.ideal_tokens(number)
        print(f"{name}: {again:,} tokens recomputed, {replay.tree.counters.pages_dropped:,} pages dropped so far")
