"""`mixbit bench`: contenders, the comparison with the reference, and what is written."""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from mixbit import bench
from mixbit.bench import contenders as registry
from mixbit.cli import main
from mixbit.errors import MixbitError


def quick(case: str, tensor: str = "64", **options) -> bench.Outcome:
    return bench.race(case, tensor, repeats=2, compiled=False, **options)


@pytest.mark.parametrize("case", list(bench.CASES))
def test_every_case_agrees_with_the_reference(case: str) -> None:
    outcome = quick(case, "4Ki", refcheck=True, contenders=["mixbit", "mixbit loop", "eager", "function"])
    rows = {row.contender: row for row in outcome.rows}
    limit = bench.CASES[case].limit
    assert rows[limit].ratio == 1.0
    assert rows[limit].difference is None
    assert {"mixbit", "eager"} <= set(rows)
    for name, row in rows.items():
        if name != limit:
            assert set(row.difference) == {
                "forward": {"y"}, "training": {"y", "dx", "dscale"}, "fixed": {"y", "dx"}, "noise": {"noise"},
                "weights": {"y"}, "gated": {"y", "dx", "dgates"}, "mixture": {"y", "dx", "dscales", "dweights"},
            }[case]  # fmt: skip
            assert not any(row.difference.values()), name
        assert row.ratio == pytest.approx(row.microseconds / rows[limit].microseconds, rel=0.05)
        assert row.median_microseconds >= row.microseconds > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tensor", ["64Ki", "weights"])
def test_other_types_and_channels(dtype: str, tensor: str) -> None:
    for case in ("training", "gated", "mixture"):
        outcome = quick(case, tensor, dtype=dtype, refcheck=True, contenders=["mixbit"])
        assert outcome.rows[-1].dtype == dtype
        assert not any(outcome.rows[-1].difference.values())


def test_a_wrong_contender_is_seen_and_a_broken_one_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = registry.CONTENDERS["mixbit"]

    def shifted(case, inputs):
        return registry.quantizer_run(case, inputs, lambda x: x + 0.5, [])

    def broken(case, inputs):
        raise RuntimeError("no such kernel\nlong story")

    extra = {
        "wrong": dataclasses.replace(honest, make=shifted),
        "broken": dataclasses.replace(honest, make=broken),
        "absent": dataclasses.replace(honest, module="a_library_that_nobody_has"),
    }
    for name, contender in extra.items():
        monkeypatch.setitem(registry.CONTENDERS, name, contender)
    told = []
    outcome = quick("forward", refcheck=True, contenders=[*extra, "mixbit"], say=told.append)
    rows = {row.contender: row for row in outcome.rows}
    assert rows["wrong"].difference["y"] > 0.5
    assert rows["mixbit"].difference["y"] == 0.0
    assert "broken" not in rows
    reasons = {name: reason for _, name, reason in outcome.skipped}
    assert reasons["broken"] == "fails: RuntimeError: no such kernel"
    assert "a_library_that_nobody_has is not installed" in reasons["absent"]
    assert len(told) == 2


def test_peers_take_part_or_say_why_not() -> None:
    outcome = quick("training", "64", contenders=["brevitas", "torchao", "nncf", "aimet"])
    seen = {row.contender for row in outcome.rows} | {name for _, name, _ in outcome.skipped}
    assert {"brevitas", "torchao", "nncf", "aimet"} <= seen


def test_candidates_take_turns_and_short_ones_are_repeated() -> None:
    order = []

    def run(name: str, seconds: float):
        def call() -> None:
            order.append(name)
            time.sleep(seconds)

        return call

    times = bench.side_by_side({"a": run("a", 0.002), "b": run("b", 0.004)}, repeats=3, warmup=1)
    assert order == ["a", "b", *["a", "b"] * 3]
    assert 0.002 <= times["a"].least <= times["a"].median
    assert times["b"].least >= 0.004
    fast = bench.side_by_side({"fast": lambda: None}, repeats=2)["fast"]
    assert fast.calls > 100
    assert fast.least < 1e-5


def test_files_and_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    arguments = ["bench", "forward", "training", "--tensor", "64", "--no-compile", "--repeats", "2", "--refcheck"]
    arguments += ["--contenders", "mixbit,aten", "--bits", "3"]
    assert main([*arguments, "--json", str(tmp_path / "b.json"), "--csv", str(tmp_path / "b.csv")]) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert "ratios to copy+mul" in out
    document = json.loads((tmp_path / "b.json").read_text())
    assert [row["contender"] for row in document["rows"]] == ["copy", "mixbit", "aten", "copy+mul", "mixbit", "aten"]
    assert {row["bits"] for row in document["rows"]} == {3}
    with (tmp_path / "b.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[1]["difference"] == "y=0.0"
    assert main(["bench", "--list"]) == 0
    assert "brevitas" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["forwrd"], "case='forwrd' is not known"),
        (["forward", "--tensor", "48"], "tensor='48' is not known"),
        (["forward", "--tensor", "64", "--contenders", "mixbut"], "did you mean 'mixbit'"),
        (["forward", "--tensor", "64", "--dtype", "float8"], "dtype='float8' is not known"),
        (["forward", "--tensor", "64", "--bits", "1"], "bits=1: expected 2 to 16"),
        (["forward", "--tensor", "64", "--repeats", "0"], "expected at least 1"),
    ],
)
def test_bad_input_is_named(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_bad_names_raise() -> None:
    with pytest.raises(MixbitError, match="case="):
        quick("nothing")
    with pytest.raises(MixbitError, match="measured in float32 only"):
        quick("weights", dtype="bfloat16")
