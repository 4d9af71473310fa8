"""The ops against their limits and rivals (`mixbit bench`), recorded as rows.

One row for each case, tensor, dtype and number of threads: the limit's microseconds, and every contender's time as a
multiple of it. Peers take part where they are installed (pip install -e '.[peers]').

Usage: python bench/bench_ops.py [--again] [--no-compile]
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

from rows import measure

from mixbit import bench

LARGE = ("activations", "weights")
SMALL = ("64", "4Ki", "64Ki")


def settings() -> list[dict[str, Any]]:
    """What is measured: everything in float32 on one thread, then the other types, small tensors and two threads."""
    found = [
        {"case": c, "tensor": t} for c in ("forward", "training", "fixed", "gated", "mixture", "noise") for t in LARGE
    ]
    found += [{"case": "weights", "tensor": "weights"}]
    found += [{"case": c, "tensor": t} for c in ("forward", "training") for t in SMALL]
    found += [{"case": c, "tensor": t, "dtype": "bfloat16"} for c in ("forward", "training", "noise") for t in LARGE]
    found += [{"case": c, "tensor": t, "threads": 2} for c in ("forward", "training", "noise") for t in LARGE]
    return [{"dtype": "float32", "threads": 1} | s for s in found]


def figures(setting: dict[str, Any], compiled: bool) -> dict[str, Any]:
    outcome = bench.race(**setting, compiled=compiled, refcheck=True, say=print)
    limit = bench.CASES[setting["case"]].limit
    times = {row.contender: row for row in outcome.rows}
    wrong = {
        name: row.difference
        for name, row in times.items()
        if name.startswith("mixbit") and any(share > 0 for share in (row.difference or {}).values())
    }
    if wrong:
        raise SystemExit(f"results away from the reference: {wrong}")
    return {
        f"{limit} us": times[limit].microseconds,
        "page faults of mixbit": times["mixbit"].page_faults,
        **{name: row.ratio for name, row in times.items() if name != limit},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    options = parser.parse_args()
    isa = os.environ.get("MIXBIT_CPU_ISA", "widest")
    for setting in settings():
        row = measure(
            "ops", setting | {"isa": isa}, lambda s=setting: figures(s, not options.no_compile), again=options.again
        )
        print(setting, row["figures"], flush=True)


if __name__ == "__main__":
    main()
