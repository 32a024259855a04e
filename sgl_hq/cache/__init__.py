"""Who shares which pages, and when they are packed. Never imports `sgl_hq.attention`: they meet in `records` only."""
