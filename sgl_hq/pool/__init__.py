"""Where KV pages live: the dense tier of SGLang, the packed tier, and how a byte budget is split between them."""
