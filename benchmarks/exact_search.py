"""Exact search over more than 10^15 networks: seconds, and the size of the whole front.

python benchmarks/exact_search.py
"""

import math
import random
import time
from functools import partial

from kdnas.ranking.exact import BlockTable, best, front


def blocks(sizes: list[int], seed: int = 0) -> list[BlockTable]:
    """Random tables in which bigger options tend to be better, and params and MACs go together but for a factor."""
    rng, tables = random.Random(seed), []
    for place, size in enumerate(sizes):
        macs = [rng.randint(10**6, 3 * 10**7) for _ in range(size)]
        params = [int(m * rng.uniform(0.01, 0.1)) for m in macs]
        scores = tuple(-math.exp(-m / 1e7) + 0.1 * rng.gauss(0, 1) for m in macs)
        costs = {"params": tuple(map(float, params)), "macs": tuple(map(float, macs))}
        tables.append(BlockTable(f"block{place}", tuple(range(size)), scores, costs))
    return tables


def main() -> None:
    for sizes in ([6] * 20, [4] * 26, [1100] * 5, [1300] * 6):
        tables = blocks(sizes)
        macs = 1.2e7 * len(sizes)
        both = {"macs": macs, "params": 0.05 * macs}
        print(f"{len(sizes)} blocks of {sizes[0]:,} options, {math.prod(sizes):.1e} networks")
        for title, run in (
            ("best under MACs", partial(best, tables, {"macs": macs})),
            ("best 100 under MACs", partial(best, tables, {"macs": macs}, 100)),
            ("best under MACs and params", partial(best, tables, both)),
            ("best 100 under MACs and params", partial(best, tables, both, 100)),
            ("front of score and MACs", partial(front, tables)),
            ("front of score and MACs under params", partial(front, tables, {"params": 0.05 * macs})),
        ):
            began = time.perf_counter()
            networks = run()
            print(f"  {title:<40}{time.perf_counter() - began:8.2f} s   {len(networks):,} networks", flush=True)


if __name__ == "__main__":
    main()
