"""Costs by name, as configs and the command line give them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mixbit.costs.latency import latency
from mixbit.costs.mapper import mapper
from mixbit.costs.pulp import KERNELS, TARGETS, pulp
from mixbit.errors import MixbitError, check_choice
from mixbit.files import file_digest
from mixbit.hw import OBJECTIVES, Architecture
from mixbit.hw.documents import known
from mixbit.tables import CostTable

FAMILIES = MAPPER, LATENCY, PULP = "mapper", "latency", "pulp"
_SYNTAX = (
    f'"{MAPPER}:ARCHITECTURE", "{MAPPER}:ARCHITECTURE:OBJECTIVE" or {{"{MAPPER}": {{"arch": ..., "objective": ...}}}}, '
    f'"{LATENCY}:FILE.csv", "{PULP}:TARGET"'
)
#: Options of the mapper beside the architecture, with their defaults and what they add to the cost's name.
_FLAGS = {"depthwise_as_full": "full", "scale_mac": "scaled"}


@dataclasses.dataclass(frozen=True)
class NamedCost:
    """A cost that was asked for.

    Attributes:
        name: Of the cost in results; fit for a file name.
        digest: Names what the numbers depend on beside the network, or "".
        make: (model, example, widths) -> table; widths are those that recipes may use.
    """

    name: str
    digest: str
    make: Callable[[nn.Module, Any, Iterable[int]], CostTable]


def named_cost(argument: str, given: Any, tables: Mapping[str, Callable[[nn.Module, Any], CostTable]]) -> NamedCost:
    """Reads a cost.

    Args:
        argument: What errors call it.
        given: A name of `tables`, "mapper:ARCHITECTURE[:OBJECTIVE]", {"mapper": {"arch": name or file, "objective":
            "energy" (default), "delay", "edp" or "last_level_accesses", "depthwise_as_full", "scale_mac"}},
            "latency:FILE.csv" (a measured table, with the widths that it has), or "pulp:TARGET" (`costs.pulp`).
        tables: Costs that need no options.

    Raises:
        MixbitError: There is no such cost, architecture, objective, option, file or target.
    """
    options: Any
    family, _, rest = given.partition(":") if isinstance(given, str) else ("", "", "")
    if family == LATENCY:
        if not Path(rest).is_file():
            raise MixbitError(f"{argument}={given!r}: there is no latency table {rest!r}; expected {LATENCY}:FILE.csv")
        return _named([LATENCY, Path(rest).stem], file_digest(rest), lambda m, x, widths: latency(rest, m, x))
    if family == PULP:
        target = check_choice(f"{argument}: {PULP}", rest, TARGETS)
        return _named([PULP, target], "", lambda m, x, widths: pulp(target, m, x, {*KERNELS, *widths}))
    if family == MAPPER:
        name, colon, last = given[len(MAPPER) + 1 :].rpartition(":")
        options = {"arch": name, "objective": last} if colon else {"arch": last}
    elif isinstance(given, Mapping) and list(given) == [MAPPER]:
        options = given[MAPPER]
    elif isinstance(given, Mapping):
        raise MixbitError(f"{argument}={dict(given)!r}: expected one of {[*tables]} or {_SYNTAX}")
    else:
        name = check_choice(argument, given, [*tables, *FAMILIES])
        return NamedCost(name, "", lambda model, example, widths: tables[name](model, example))
    where = f"{argument}: {MAPPER}"
    found = known(where, options, ["arch"], ["objective", *_FLAGS])
    if not isinstance(found["arch"], str) or not found["arch"]:
        raise MixbitError(f"{where}: arch is {found['arch']!r}; expected an architecture: {_SYNTAX}")
    arch = Architecture.load(found["arch"])
    objective = check_choice(f"{where}: objective", found.get("objective", "energy"), OBJECTIVES)
    flags = {flag: found.get(flag, False) for flag in _FLAGS}
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise MixbitError(f"{where}: {flag} is {value!r}; expected true or false")
    said = [MAPPER, arch.name, objective, *(text for flag, text in _FLAGS.items() if flags[flag])]

    return _named(said, arch.digest, lambda m, x, widths: mapper(arch, m, x, objective, widths=widths, **flags))


def _named(said: Iterable[str], digest: str, make: Callable[[nn.Module, Any, Iterable[int]], CostTable]) -> NamedCost:
    return NamedCost(re.sub(r"[^\w.-]", "_", "-".join(said)), digest, make)
