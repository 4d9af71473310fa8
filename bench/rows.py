"""Result rows: appended to bench/results/NAME.jsonl, one JSON object a line; a row that exists is not made again.

A row: name, config (what was measured), config_hash, seed, commit, machine, versions, command, date, seconds, figures.
`python bench/rows.py` generates bench/RESULTS.md from all rows.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"


def config_hash(name: str, config: dict[str, Any], seed: int) -> str:
    """Twelve hex digits that name a measurement."""
    text = json.dumps([name, config, seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def machine() -> str:
    """Processor model, cores and memory in words."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    flags = ""
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
        model = names[0] if names else model
        flags = "AVX-512" if " avx512f " in text else "AVX2" if " avx2 " in text else ""
    return ", ".join(part for part in (model, flags, f"{os.cpu_count()} cores, shared") if part)


def versions() -> dict[str, str]:
    """Versions of what decides a number, and of the other libraries where they are installed."""
    from importlib import metadata

    import torch

    import mixbit
    from mixbit._build_info import CXX_COMPILER

    peers = {}
    for name in ("brevitas", "torchao", "nncf", "aimet-torch", "zigzag-dse"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            peers[name] = metadata.version(name)
    return {
        "mixbit": mixbit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": CXX_COMPILER,
        **peers,
    }


def read_rows(name: str) -> list[dict[str, Any]]:
    """All rows of a result file, oldest first."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def measure(
    name: str, config: dict[str, Any], figures: Callable[[], dict[str, Any]], *, seed: int = 0, again: bool = False
) -> dict[str, Any]:
    """Returns the row of `config`, calling `figures` for it only if it does not exist (or `again` is true)."""
    key = config_hash(name, config, seed)
    if not again:
        for row in read_rows(name):
            if row["config_hash"] == key:
                return row
    start = time.perf_counter()
    measured = figures()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=BENCH, check=False
    )
    row = {
        "name": name,
        "config": config,
        "config_hash": key,
        "seed": seed,
        "commit": commit.stdout.strip(),
        "machine": machine(),
        "versions": versions(),
        "command": shlex.join(
            [
                Path(sys.executable).name,
                *(os.path.relpath(a, BENCH.parent) if a == sys.argv[0] else a for a in sys.argv),
            ]
        ),
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.perf_counter() - start, 3),
        "figures": measured,
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " ".join(_cell(v) for v in value)
    return str(value)


def results_markdown() -> str:
    """The tables of bench/RESULTS.md: one section a result file, newest row of each config."""
    parts = [
        "# Measured results",
        "",
        "Generated from `bench/results/*.jsonl` by `python bench/rows.py`; do not edit. Ratios are measured side by",
        "side in one run. Machines are shared and noisy: ratios travel between machines, absolute times do not.",
    ]
    for path in sorted(RESULTS.glob("*.jsonl")):
        newest = {row["config_hash"]: row for row in read_rows(path.stem)}
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in newest.values():
            groups.setdefault((*row["config"], "|", *row["figures"]), []).append(row)
        parts += ["", f"## {path.stem}", ""]
        about = sorted({(row["machine"], row["date"], json.dumps(row["versions"])) for row in newest.values()})
        parts += [f"* {m}; {d}; {', '.join(f'{k} {v}' for k, v in json.loads(v).items())}" for m, d, v in about]
        parts += [f"* `{command}`" for command in sorted({row["command"] for row in newest.values()})]
        for rows in groups.values():
            columns = [*rows[0]["config"], *rows[0]["figures"], "commit"]
            parts += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            for row in rows:
                cells = [*row["config"].values(), *row["figures"].values(), row["commit"]]
                parts.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    notes = BENCH / "NOTES.md"
    if notes.exists():
        parts += ["", notes.read_text().rstrip()]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (BENCH / "RESULTS.md").write_text(results_markdown())
    print("wrote bench/RESULTS.md")
