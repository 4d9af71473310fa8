"""Kills a stage of a run twenty times at random moments and compares what the resumed run leaves with an undisturbed one.

`kill_and_resume.py CONFIG STAGE KILLS SEED FOLDER`. A process of its own, so that it can fork: each attempt is a child
that starts with everything loaded, and is killed within the stage. Exits with 0 and prints `KILLS kills, ROUNDS rounds`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

torch.set_num_threads(1)

from mixbit.pipeline import Config, Pipeline  # noqa: E402


def attempt(config: Config, stage: str, delay: float | None) -> bool:
    """Runs the pipeline in a child; kills it `delay` seconds into `stage`. Whether it was killed inside the stage."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            Pipeline(config, say=lambda text: os.write(writer, text.split(":")[0].encode() + b"\n") and None).run()
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        said = b""
        while delay is not None and not said.endswith(stage.encode() + b"\n"):
            got = pipe.read(256)
            if not got:
                break
            said += got
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"the run failed with {status}")
    return False


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the wall-clock figures."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "timings.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def main() -> None:
    """See the module."""
    path, stage, kills, seed, root = sys.argv[1:]
    config = Config.load(path)
    verbs = [verb for verb, _ in config.stages]
    last = verbs.index(stage) + 1
    choice = random.Random(int(seed))
    calm = replace(config, output=Path(root) / "calm", stages=config.stages[:last])
    before = replace(config, output=Path(root) / "before", stages=config.stages[: last - 1])
    if before.stages:
        Pipeline(before).run()
    else:
        before.output.mkdir(parents=True)
    shutil.copytree(before.output, calm.output)
    Pipeline(calm).run()  # also warms up what the children inherit
    shutil.rmtree(calm.output)
    shutil.copytree(before.output, calm.output)
    start = time.perf_counter()
    attempt(calm, stage, None)
    seconds = time.perf_counter() - start
    expected = files(calm.output)
    done = rounds = 0
    torn = replace(calm, output=Path(root) / "torn")
    while done < int(kills):
        shutil.rmtree(torn.output, ignore_errors=True)
        shutil.copytree(before.output, torn.output)
        for _ in range(choice.randint(1, 4)):
            if not attempt(torn, stage, choice.uniform(0.0, seconds)):
                break
            if (torn.output / f"{stage}.manifest.json").exists():
                break  # killed after the stage
            done += 1
        attempt(torn, stage, None)
        rounds += 1
        got = files(torn.output)
        if got != expected:
            different = sorted(n for n in {*got, *expected} if got.get(n) != expected.get(n))
            sys.exit(f"round {rounds} after {done} kills: {different} differ from the undisturbed run")
        if rounds > 20 * int(kills):
            sys.exit(f"only {done} kills landed inside {stage} in {rounds} rounds")
    print(f"{done} kills, {rounds} rounds")


if __name__ == "__main__":
    main()
