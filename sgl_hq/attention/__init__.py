"""From packed runs to groups of rows, and from attention states to one output. Never imports `sgl_hq.cache`."""
