"""When a dense radix node is packed. Pure: no torch, no sglang, no clock, nothing that could differ between ranks."""

from __future__ import annotations

# A node is shared from its second distinct request on; more users need not be told apart.
USERS_THAT_SHARE = 2


def add_user(users: tuple[str, ...], request_id: str) -> tuple[str, ...]:
    """Distinct requests that have used a node, at most USERS_THAT_SHARE of them.

    Counting distinct ids, not events: one request walks its own nodes many times (chunks, retraction, insertion),
    and SGLang's `hit_count` reaches 2 for a single request (design.md section 3.2).
    """
    if request_id in users or len(users) >= USERS_THAT_SHARE:
        return users
    return (*users, request_id)


def wants_pack(policy: str, users: tuple[str, ...]) -> bool:
    """True when `policy` packs a node used by `users` at once. Eviction packs under every policy, for `pressure` it alone does."""
    if policy == "shared":
        return len(users) >= USERS_THAT_SHARE
    return policy == "insert"
