"""torchrun with two gloo processes: both give extra levels to the same weights, whole (DDP) or cut (FSDP2)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = ("distributed_switches.py", "distributed_shards.py")


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_flag_the_same_weights(name: str) -> None:
    script = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == 2
