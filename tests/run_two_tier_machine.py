"""The bookkeeping machine for long: python tests/run_two_tier_machine.py --seeds 20 --steps 10000 (a seed takes some minutes).

Each seed is a series of runs of up to RUN_STEPS random steps, until `steps` were done; the first finding ends it with hypothesis's
account of the steps that lead there.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ["SGLANG_PLATFORM"] = "sgl_hq_cpu"  # before SGLang is imported

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import invariant, run_state_machine_as_test
from two_tier_machine import TwoTierMachine

RUN_STEPS = 100
SETTINGS = settings(
    max_examples=20, stateful_step_count=RUN_STEPS, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


class CountingMachine(TwoTierMachine):
    done = 0  # steps of all runs
    packed = demoted = dropped = 0  # pages, of all runs

    @invariant()
    def count(self):
        CountingMachine.done += 1

    def teardown(self):
        super().teardown()
        if hasattr(self, "tree"):
            counters = self.tree.counters
            CountingMachine.packed += counters.pages_packed
            CountingMachine.demoted += counters.pages_demoted
            CountingMachine.dropped += counters.pages_dropped + counters.dense_pages_dropped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10_000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for number in range(asked.first_seed, asked.first_seed + asked.seeds):
        start_time, CountingMachine.done, part = time.monotonic(), 0, 0
        while CountingMachine.done < asked.steps:
            seed(f"{number}.{part}")(CountingMachine)
            run_state_machine_as_test(CountingMachine, settings=SETTINGS)
            part += 1
        print(f"seed {number}: {CountingMachine.done} steps without a finding, {time.monotonic() - start_time:.0f} s", flush=True)
    machine = CountingMachine
    print(f"pages packed {machine.packed}, of these under pressure {machine.demoted}; dropped {machine.dropped}")


if __name__ == "__main__":
    main()
