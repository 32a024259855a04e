"""HypercubeQuant for SGLang: KV pages that requests share are held packed and read once per group.

The life of a page, each stage naming its file:

1. prompt -> dense pages     `pool/two_tier_pool.py`           stock SGLang MHA pool, bf16, written by the model
2. dense -> packed           `cache/packing_radix_cache.py`    when a second request uses a radix node (`cache/pack_policy.py`);
                             `cache/packings_under_way.py`     it stays dense until the device is done
3. packed tier               `pool/packed_tier.py`             uint8 records, 64 tokens each (`page_format.py`, `kernels/page_codec`)
4. next request hits         `cache/live_requests.py`          which packed pages each running request reads
5. grouped attention, merge  `attention/hq_attn_backend.py`    every packed page once per group (`attention/grouping.py`),
                                                               dense rest by the user's backend, states merged

Memory moves between 1 and 3: `cache/slab_lending.py` decides, `pool/elastic_memory.py` does it.

`plugin.register()` is the only function that touches SGLang; importing this package changes nothing.
"""

__version__ = "0.3.1"
