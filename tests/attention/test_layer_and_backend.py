"""The served attention path without a server: real pool, real layer, CPU backend with the HQ mixin, against float64.

A request's KV is split over a packed run (shared by a group), a dense rest and new tokens; the result must be the
attention over the whole sequence. Freed dense slots are NaN: touching one fails.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sgl_hq.kernels.grouped_attention.naive import attend_naive
from sgl_hq.page_format import PAGE_TOKENS as P
from sgl_hq.records import EMPTY_RUN, PackedRun, Segment

Q_HEADS, KV_HEADS, DIM, LAYERS = 6, 2, 64, 2
# Roundings to bf16 (half an ulp is 2**-9 relative): the softmax weights, o of each of two parts, o after the merge.
# Every one is at most 2**-9 of the largest |v|, which |o| cannot exceed.
BF16_TOLERANCE_PER_V = 4 * 2**-9


class Harness:
    def __init__(self, monkeypatch, fmt, lens, shared_pages):
        """Requests of `lens` tokens; the first `shared_pages` pages of requests 0 and 2 are one packed run."""
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

        from sgl_hq.attention.hq_attn_backend import install
        from sgl_hq.attention.hq_radix_attention import HQRadixAttention
        from sgl_hq.platform_cpu.attention import CPUAttnBackend
        from sgl_hq.pool.two_tier_pool import HQTokenToKVPool

        monkeypatch.setenv("SGLANG_HQ_FORMAT", fmt)
        monkeypatch.setenv("SGLANG_HQ_PACKED_FRACTION", "0.5")
        torch.manual_seed(3)
        self.pool = HQTokenToKVPool(
            64 * P, page_size=P, dtype=torch.bfloat16, head_num=KV_HEADS, head_dim=DIM, layer_num=LAYERS, device="cpu",
            enable_memory_saver=False,
        )
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.copy_(torch.randn(buffer.shape))
        self.rows = ReqToTokenPool(4, 32 * P, "cpu", False)
        self.truth = [[] for _ in range(LAYERS)]  # per layer, per request: (k, v) [kv_heads, len, dim]
        self.runs, page = [], 1
        shared = torch.arange(P, P + shared_pages * P)
        for i, n in enumerate(lens):
            own_start = shared_pages * P if i != 1 else 0
            page = max(page, 1 + shared_pages)
            own = torch.arange(page * P, page * P + n - own_start)
            page += -(-len(own) // P)
            slots = torch.cat([shared, own]) if i != 1 else own
            self.rows.req_to_token[i + 1, :n] = slots.int()
            for layer in range(LAYERS):
                k, v = self.pool.get_kv_buffer(layer)
                self.truth[layer].append((k[slots].transpose(0, 1).clone(), v[slots].transpose(0, 1).clone()))
        if shared_pages and fmt != "exact":
            pages = self.pool.pack_pages(shared, starts_sequence=True).pages
            run = PackedRun((Segment(0, tuple(pages)),), shared_pages * P)
            for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
                buffer[shared] = float("nan")
        else:
            run = EMPTY_RUN
        self.runs = [run, EMPTY_RUN, run][: len(lens)]
        runner = SimpleNamespace(device="cpu", req_to_token_pool=self.rows, token_to_kv_pool=self.pool)
        self.backend = CPUAttnBackend(runner)
        install(self.backend, packs=fmt != "exact")
        self.backend.forward_runs = lambda: (list(range(1, len(lens) + 1)), self.runs)
        self.layers = [HQRadixAttention(Q_HEADS, DIM, DIM**-0.5, KV_HEADS, layer_id=i) for i in range(LAYERS)]

    def batch(self, decode, prefix_lens, seq_lens):
        mode = SimpleNamespace(is_decode=lambda: decode, is_idle=lambda: False)
        new = [s - p for p, s in zip(prefix_lens, seq_lens)]
        slots = torch.cat([self.rows.req_to_token[i + 1, p:s].long() for i, (p, s) in enumerate(zip(prefix_lens, seq_lens))])
        return SimpleNamespace(
            forward_mode=mode, batch_size=len(seq_lens), req_pool_indices=torch.arange(1, len(seq_lens) + 1),
            seq_lens_cpu=torch.tensor(seq_lens), extend_prefix_lens_cpu=prefix_lens, extend_seq_lens_cpu=new, out_cache_loc=slots,
        )

    def run(self, decode, prefix_lens, seq_lens, layer):
        """Feeds the true K and V of the new tokens, as a model would. Returns (got, want) per new token."""
        fb = self.batch(decode, prefix_lens, seq_lens)
        q = torch.randn(sum(s - p for p, s in zip(prefix_lens, seq_lens)), Q_HEADS * DIM).bfloat16()
        spans = list(enumerate(zip(prefix_lens, seq_lens)))
        k, v = (torch.cat([self.truth[layer][i][side][:, p:s].transpose(0, 1) for i, (p, s) in spans]) for side in (0, 1))
        self.backend.init_forward_metadata(fb)
        forward = self.backend.forward_decode if decode else self.backend.forward_extend
        got = forward(q, k, v, self.layers[layer], fb).view(-1, Q_HEADS, DIM)
        want, at = [], 0
        for i, (p, s) in spans:
            for position in range(p, s):
                true_k, true_v = self.truth[layer][i]
                row = q[at : at + 1].view(1, Q_HEADS, DIM)
                want.append(attend_naive(row, true_k[:, : position + 1], true_v[:, : position + 1], DIM**-0.5).o)
                at += 1
        return got.double(), torch.cat(want)


CASES = [
    ("decode", True, [259, 70, 193], 2),
    ("decode, dense rest of one token", True, [129, 1, 130], 2),
    ("extend", False, [200, 100, 193], 2),
    ("extend, nothing shared", False, [50, 70, 3], 0),
]


@pytest.mark.parametrize("fmt", ["bf16", "exact"])
@pytest.mark.parametrize("name, decode, lens, shared", CASES, ids=[c[0] for c in CASES])
def test_lossless_modes_equal_attention_over_the_whole_sequence(monkeypatch, fmt, name, decode, lens, shared):
    h = Harness(monkeypatch, fmt, lens, shared)
    prefix = [n - 1 for n in lens] if decode else [shared * P + 5, 0, shared * P] if shared else [0, 64, 1]
    for layer in range(LAYERS):
        got, want = h.run(decode, prefix, lens, layer)
        largest_v = max(v.abs().max() for _, v in h.truth[layer])
        assert (got - want).abs().max() < BF16_TOLERANCE_PER_V * largest_v


@pytest.mark.parametrize("fmt, relative_error", [("int8", 0.02), ("hq6", 0.10)])
@pytest.mark.parametrize("name, decode, lens, shared", CASES[:3], ids=[c[0] for c in CASES[:3]])
def test_lossy_formats_stay_near_it(monkeypatch, fmt, relative_error, name, decode, lens, shared):
    """On Gaussian K and V: int8 has 127 steps a side over ~3 sigma, rms error 3/127/sqrt(12) < 1 %, twice that after
    the softmax; hq6 has 31 steps for V over ~5 sigma, rms error 5/31/sqrt(12) < 5 %, twice that with the K side."""
    h = Harness(monkeypatch, fmt, lens, shared)
    prefix = [n - 1 for n in lens] if decode else [shared * P + 5, 0, shared * P]
    got, want = h.run(decode, prefix, lens, 0)
    assert (got - want).norm() / want.norm() < relative_error
    assert not torch.equal(got, got.new_zeros(())), "nothing was computed"


def test_exact_is_bit_identical_to_the_backend_without_the_plugin(monkeypatch):
    from sgl_hq.platform_cpu.attention import CPUAttnBackend

    h = Harness(monkeypatch, "exact", [259, 70, 193], 2)
    fb = h.batch(True, [258, 69, 192], [259, 70, 193])
    q, k = torch.randn(3, Q_HEADS * DIM).bfloat16(), torch.randn(3, KV_HEADS, DIM).bfloat16()
    h.backend.init_forward_metadata(fb)
    ours = h.backend.forward_decode(q, k, k, h.layers[0], fb)
    stock = CPUAttnBackend(SimpleNamespace(device="cpu", req_to_token_pool=h.rows, token_to_kv_pool=h.pool))
    stock.init_forward_metadata(fb)
    assert torch.equal(ours, stock.forward_decode(q, k, k, h.layers[0], fb))


def test_a_batch_whose_rows_are_not_the_planned_ones_is_refused(monkeypatch):
    h = Harness(monkeypatch, "bf16", [129, 70, 130], 2)
    h.backend.forward_runs = lambda: ([2, 1, 3], h.runs)
    with pytest.raises(RuntimeError, match="packed runs were taken for"):
        h.backend.init_forward_metadata(h.batch(True, [128, 69, 129], [129, 70, 130]))


def test_a_backend_without_states_cannot_serve_packed_pages():
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    from sgl_hq.attention.hq_attn_backend import install
    from sgl_hq.config import HQConfigError

    class Other(AttentionBackend):
        pass

    with pytest.raises(HQConfigError, match="cannot serve packed pages: use --attention-backend flashinfer"):
        install(Other(), packs=True)
