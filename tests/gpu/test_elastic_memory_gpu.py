"""Memory that moves between the tiers, on a GPU: addresses stay, so do captured graphs; the sum of bytes stays; nothing faults."""

from array import array

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture
def store():
    from sgl_hq.pool.chunks import granularity, make_chunks

    store = make_chunks("cuda", granularity("cuda"))
    yield store
    store.close()


def _ints(store, where) -> torch.Tensor:
    """[chunks, words] int32 over a range."""
    return store.bytes_of(where).view(torch.int32).view(len(where.handles), -1)


def test_a_chunk_is_read_where_it_was_moved_to(store):
    dense, arena = store.reserve(4, shared_holes=True), store.reserve(8)
    store.create(dense, 0, 4)
    store.create(arena, 0, 1)
    d, a = _ints(store, dense), _ints(store, arena)
    addresses = d.data_ptr(), a.data_ptr()
    d[:] = torch.arange(4, device="cuda")[:, None]
    torch.cuda.synchronize()
    store.move(dense, 2, arena, 1, 2)
    a[1:3] = 9
    assert d[:2].eq(torch.arange(2, device="cuda")[:, None]).all(), "other chunks are left alone"
    assert (dense.mapped, arena.mapped, store.bytes_created) == (2, 3, 5 * store.chunk_bytes)
    torch.cuda.synchronize()
    store.move(arena, 1, dense, 2, 2)
    d[2:] = 7
    assert d.sum(1).tolist() == [0, d.shape[1], 7 * d.shape[1], 7 * d.shape[1]]
    assert addresses == (_ints(store, dense).data_ptr(), _ints(store, arena).data_ptr())


def test_a_stale_read_of_a_hole_does_not_fault(store):
    dense, arena = store.reserve(3, shared_holes=True), store.reserve(4)
    store.create(dense, 0, 3)
    store.create(arena, 0, 1)
    d = _ints(store, dense)
    d[:] = 1
    torch.cuda.synchronize()
    store.move(dense, 1, arena, 1, 1)
    d.sum().item()
    d[1] = 5  # so does a write, which no other range sees
    assert (d[0] == 1).all() and (d[2] == 1).all() and not (_ints(store, arena)[1] == 5).any()


def test_addresses_are_made_while_the_gpu_is_busy(store):
    """The hole is filled with zeros before chunks take its place: behind other work, that fill once came after them, and faulted."""
    torch.cuda._sleep(1 << 30)  # about half a second
    dense = store.reserve(4, shared_holes=True)
    store.create(dense, 0, 4)
    torch.cuda.synchronize()
    assert not _ints(store, dense).any()


def test_memory_is_taken_once_and_given_back_at_the_end():
    from sgl_hq.pool.chunks import granularity, make_chunks

    torch.zeros(1, device="cuda")
    chunk, free = granularity("cuda"), lambda: torch.cuda.mem_get_info()[0]
    before = free()
    store = make_chunks("cuda", chunk)
    dense, arena = store.reserve(64, shared_holes=True), store.reserve(1 << 12)
    store.create(dense, 0, 64)
    store.create(arena, 0, 1)
    taken = before - free()
    assert abs(taken - 66 * chunk) <= 8 * chunk, "the chunks, the one that holes share, and tables of addresses"
    for slab in range(1, 40):
        torch.cuda.synchronize()
        store.move(dense, slab, arena, slab, 1)
        assert abs(before - free() - taken) <= 2 * chunk
    store.close()
    assert abs(before - free()) <= 8 * chunk


def _tiers(name="hq6", layers=4, slabs=6):
    """A slab is 32 pages here: K of a page and layer has 64 KiB."""
    from sgl_hq.layer_codecs import layer_codecs
    from sgl_hq.page_format import PAGE_TOKENS
    from sgl_hq.pool.chunks import granularity
    from sgl_hq.pool.elastic_memory import ElasticMemory
    from sgl_hq.pool.packed_tier import PackedTier
    from sgl_hq.pool.sizing import KVShape
    from sgl_hq.pool.slabs import slabs_of_dense

    shape = KVShape(layers, 4, 128, 128)
    codecs = layer_codecs(name, layers, 128, 128, None, "cuda")
    layouts = [codec.layout for codec in codecs]
    cut = slabs_of_dense((slabs * 32 - 1) * PAGE_TOKENS, layouts, shape, granularity("cuda"))
    assert (cut.slabs, cut.pages) == (slabs, 32)
    memory = ElasticMemory(cut, layouts, shape, "cuda")
    return memory, PackedTier(codecs, shape, cut.sizes(layouts), "cuda", memory)


def _lend(memory, tier, slab):
    torch.cuda.synchronize()
    memory.lend(slab)
    tier.set_capacity(memory.slabs.packed_pages(len(memory.lent)))


def _give_back(memory, tier, slab):
    tier.set_capacity(memory.slabs.packed_pages(len(memory.lent) - 1))
    torch.cuda.synchronize()
    memory.give_back(slab)


def _unpacked(tier, pages) -> torch.Tensor:
    """[layers, 2, kv_heads, tokens, head_dim] of packed pages."""
    where = torch.tensor(pages, device="cuda")
    return torch.stack([torch.stack([x.clone() for x in tier.read(layer, where, pages[0])]) for layer in range(len(tier.records))])


@pytest.mark.parametrize("name", ["bf16", "hq6", "lossless", "int8"])
def test_packed_pages_keep_their_values_while_slabs_come_and_go(name):
    memory, tier = _tiers(name)
    for buffer in (*memory.k_buffers, *memory.v_buffers):
        buffer.copy_(torch.randn(buffer.shape, device="cuda").bfloat16())
    dense = [buffer[: 32 * 64].clone() for buffer in (*memory.k_buffers, *memory.v_buffers)]
    slots = torch.arange(64, 20 * 64, device="cuda")
    _lend(memory, tier, 5)
    _lend(memory, tier, 3)
    tier._free_pages = array("i", sorted(tier._free_pages))  # the highest are taken first
    pages = tier.write(memory.k_buffers, memory.v_buffers, slots, True).pages
    assert max(pages) >= memory.slabs.packed_pages(1), "the last slab holds some of them"
    before = _unpacked(tier, pages)
    sources, targets = tier.moves_below(memory.slabs.packed_pages(1))
    tier.move(sources, targets)
    now = dict(zip(sources, targets, strict=True))
    pages = [now.get(page, page) for page in pages]
    _give_back(memory, tier, 3)
    assert torch.equal(_unpacked(tier, pages), before)
    tier.check_books(pages)
    assert memory.dense_bytes + memory.packed_bytes == memory.bytes_created
    for was, buffer in zip(dense, (*memory.k_buffers, *memory.v_buffers), strict=True):
        assert torch.equal(was, buffer[: 32 * 64]), "dense pages that stayed have other bytes"
        buffer[3 * 32 * 64 : 4 * 32 * 64] = 2.0  # the slab that came back
        assert buffer[3 * 32 * 64 : 4 * 32 * 64].eq(2).all()
    assert torch.equal(_unpacked(tier, pages), before), "what was written to the slab is seen in the packed tier"


def test_a_captured_graph_reads_right_after_chunks_have_moved():
    """The graph holds addresses of both tiers, as decode graphs do: it takes the mean of a dense slab's K and of a page's record."""
    memory, tier = _tiers("bf16")
    k, records = memory.k_buffers[0], tier.records[0]
    which, page = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    slab = 32 * 64

    def read():
        return k.view(-1, slab, 4, 128).index_select(0, which).float().mean(), records.index_select(0, page).float().mean()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        read()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answers = read()
    for number in range(6):
        k[number * slab : (number + 1) * slab] = number
    for lent in (4, 2):
        _lend(memory, tier, lent)
    end = memory.slabs.packed_pages(2) - 1
    records[end] = 77
    for number in (0, 1, 3, 5):
        which.fill_(number), page.fill_(end)
        graph.replay()
        assert [x.item() for x in answers] == [number, 77]
    _give_back(memory, tier, 2)
    k[2 * slab : 3 * slab] = 50
    which.fill_(2), page.fill_(0)
    graph.replay()
    assert answers[0].item() == 50
    which.fill_(4)  # lent: a hole, which must not fault
    graph.replay()
    torch.cuda.synchronize()


def test_what_moving_a_slab_costs(capsys):
    import time

    memory, tier = _tiers("bf16", layers=28, slabs=4)
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start_time = time.perf_counter()
        memory.lend(2)
        middle = time.perf_counter()
        memory.give_back(2)
        times.append((middle - start_time, time.perf_counter() - middle))
    lend, back = (sorted(column)[5] * 1e3 for column in zip(*times))
    with capsys.disabled():
        print(f"\nlending a slab of 28 layers: {lend:.2f} ms, giving it back: {back:.2f} ms")
    assert max(lend, back) < 100
