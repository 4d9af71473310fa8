"""Contenders side by side: what `mixbit bench` runs."""

from mixbit.bench.cases import CASES, DTYPES, TENSORS, Case, Inputs, make_inputs
from mixbit.bench.contenders import CONTENDERS, Contender, Unavailable
from mixbit.bench.race import Outcome, Row, race, rows_as_csv, rows_as_json
from mixbit.bench.timing import Timing, side_by_side

__all__ = [
    "CASES",
    "CONTENDERS",
    "DTYPES",
    "TENSORS",
    "Case",
    "Contender",
    "Inputs",
    "Outcome",
    "Row",
    "Timing",
    "Unavailable",
    "make_inputs",
    "race",
    "rows_as_csv",
    "rows_as_json",
    "side_by_side",
]
