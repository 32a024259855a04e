"""`sgl-hq ab PLAN.yaml`: servers under load at equal KV bytes, vanilla, FP8, HiCache and ours, on the same requests."""
