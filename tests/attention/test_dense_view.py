"""What the stock backend is told about a batch whose requests begin with packed pages: the rows it would read are the dense ones."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from sgl_hq.attention.dense_view import DenseView, as_one_column, swapped
from sgl_hq.records import EMPTY_RUN, PackedRun

ROW_TOKENS = 640
RUNS = [PackedRun((), 128), EMPTY_RUN, PackedRun((), 64)]


def _batch():
    rows, lens, prefixes = [3, 1, 2], [200, 70, 65], [192, 0, 64]
    return SimpleNamespace(
        batch_size=len(rows), req_pool_indices=torch.tensor(rows), seq_lens=torch.tensor(lens), seq_lens_cpu=torch.tensor(lens),
        seq_lens_sum=sum(lens), extend_prefix_lens_cpu=prefixes, extend_prefix_lens=torch.tensor(prefixes, dtype=torch.int32),
    )  # fmt: skip


def test_shifted_rows_of_one_column_are_the_dense_tokens():
    table = torch.arange(5 * ROW_TOKENS, dtype=torch.int32).view(5, ROW_TOKENS)
    batch = _batch()
    view = DenseView(ROW_TOKENS, "cpu").of(batch, RUNS)
    column = as_one_column(table)
    assert column.data_ptr() == table.data_ptr() and column.stride(0) == 1 and column.shape[1] == 1
    for i, run in enumerate(RUNS):
        begin, n = int(view.req_pool_indices[i]), int(view.seq_lens[i])
        assert torch.equal(column[begin : begin + n, 0], table[batch.req_pool_indices[i], run.tokens : batch.seq_lens[i]])
    assert view.seq_lens.tolist() == view.seq_lens_cpu.tolist() == [72, 70, 1] and view.seq_lens_sum == 143
    assert view.extend_prefix_lens.tolist() == view.extend_prefix_lens_cpu == [64, 0, 0]
    assert view.extend_prefix_lens.dtype == torch.int32
    assert batch.seq_lens.tolist() == [200, 70, 65] and batch.extend_prefix_lens_cpu == [192, 0, 64], "the batch itself was changed"


def test_a_missing_host_mirror_stays_missing():
    batch = _batch()
    batch.seq_lens_cpu = batch.seq_lens_sum = None
    view = DenseView(ROW_TOKENS, "cpu").of(batch, RUNS)
    assert view.seq_lens.tolist() == [72, 70, 1] and view.seq_lens_cpu is None and view.seq_lens_sum is None


def test_starts_are_kept_while_the_batch_is_the_same_and_padding_starts_at_0():
    dense = DenseView(ROW_TOKENS, "cpu")
    first = dense.starts(RUNS, 4)
    assert first.tolist() == [128, 0, 64, 0] and dense.starts(list(RUNS), 4) is first
    assert dense.starts([EMPTY_RUN] * 3, 4).tolist() == [0, 0, 0, 0] and dense.starts(RUNS, 3).tolist() == [128, 0, 64]


def test_swapped_puts_the_stock_value_back():
    owner = SimpleNamespace(table="stock")
    try:
        with swapped(owner, "table", "ours"):
            assert owner.table == "ours"
            raise KeyError
    except KeyError:
        pass
    assert owner.table == "stock"
