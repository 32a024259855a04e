"""A debug mode (`--hq-audit N`): every N batches the books of both tiers are checked, and bytes of packed pages against the day they
were packed. It reads what the scheduler decides by and decides nothing itself."""
