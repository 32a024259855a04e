"""What the stock backend is told about a batch whose requests begin with packed pages: the rows it would read are the dense ones."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from sgl_hq.attention.dense_view import DenseView, as_one_column, swapped
from sgl_hq.records import EMPTY_RUN, PackedRun

ROW_TOKENS = 640
RUNS = [PackedRun((), 128), EMPTY_RUN, PackedRun((), 64)]


def _batch(extend, rows=(3, 1, 2), lens=(200, 70, 65)):
    rows, lens = list(rows), list(lens)
    batch = SimpleNamespace(
        batch_size=len(rows), req_pool_indices=torch.tensor(rows), seq_lens=torch.tensor(lens), seq_lens_cpu=torch.tensor(lens),
        seq_lens_sum=sum(lens), forward_mode=SimpleNamespace(is_extend=lambda: extend),
    )
    if extend:
        batch.extend_prefix_lens_cpu = [192, 0, 64]
        batch.extend_prefix_lens = torch.tensor(batch.extend_prefix_lens_cpu, dtype=torch.int32)
    return batch


def test_shifted_rows_of_one_column_are_the_dense_tokens():
    table = torch.arange(5 * ROW_TOKENS, dtype=torch.int32).view(5, ROW_TOKENS)
    batch = _batch(extend=True)
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


def test_graph_padding_is_not_shifted_and_a_missing_host_mirror_stays_missing():
    batch = _batch(False, rows=(3, 1, 2, 0), lens=(200, 70, 65, 1))
    batch.seq_lens_cpu = batch.seq_lens_sum = None
    dense = DenseView(ROW_TOKENS, "cpu")
    for runs, lens in ((RUNS, [72, 70, 1, 1]), ([EMPTY_RUN] * 3, [200, 70, 65, 1]), (RUNS, [72, 70, 1, 1])):
        view = dense.of(batch, runs)
        assert view.seq_lens.tolist() == lens and view.seq_lens_cpu is None and view.seq_lens_sum is None
    assert view.req_pool_indices[3] == 0


def test_swapped_puts_the_stock_value_back():
    owner = SimpleNamespace(table="stock")
    try:
        with swapped(owner, "table", "ours"):
            assert owner.table == "ours"
            raise KeyError
    except KeyError:
        pass
    assert owner.table == "stock"
