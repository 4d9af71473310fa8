"""The pybind11 module: objects and functions without tensors."""

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

Result = tuple[list[int], list[int], bool, list[tuple[int, bool]]]

def greedy_target(
    nsr: npt.NDArray[Any],
    allowed: npt.NDArray[Any],
    groups: Sequence[int],
    cost: npt.NDArray[Any],
    maximum: bool,
    limit: float,
    reader: Sequence[int] = (),
) -> Result: ...
def greedy_budget(
    nsr: npt.NDArray[Any],
    allowed: npt.NDArray[Any],
    groups: Sequence[int],
    costs: Sequence[npt.NDArray[Any]],
    maximum: Sequence[bool],
    budgets: Sequence[float],
    readers: Sequence[Sequence[int]] = (),
) -> Result: ...
def threshold(
    gamma: npt.NDArray[Any], shares: Sequence[float], groups: Sequence[int], target_db: float
) -> list[int]: ...
def aimet_order(gamma: npt.NDArray[Any]) -> list[tuple[int, int]]: ...

class hw:  # a submodule; docs/mapper.md has the notation of the dicts
    @staticmethod
    def evaluate(
        arch: dict[str, Any],
        problem: dict[str, Any],
        mapping: list[dict[str, Any]],
        bits: dict[str, int] | None = None,
        semantics: str = "v3",
        reuse: str = "sampled",
        scale_mac: bool = False,
    ) -> dict[str, Any]: ...
    @staticmethod
    def elements(problem: dict[str, Any]) -> dict[str, int]: ...
    @staticmethod
    def count_mappings(
        arch: dict[str, Any], problem: dict[str, Any], bits: dict[str, int] | None = None, threads: int = 1
    ) -> dict[str, Any]: ...
    @staticmethod
    def search(
        arch: dict[str, Any],
        problem: dict[str, Any],
        bits: dict[str, int] | None = None,
        objective: str = "edp",
        threads: int = 1,
        method: str = "bounded",
        semantics: str = "v3",
        scale_mac: bool = False,
    ) -> dict[str, Any]: ...
    @staticmethod
    def sweep(
        arch: dict[str, Any],
        problem: dict[str, Any],
        widths: Sequence[int] | dict[str, Any],
        objective: str = "edp",
        threads: int = 1,
        method: str = "bounded",
        semantics: str = "v3",
        scale_mac: bool = False,
    ) -> dict[str, Any]: ...
    @staticmethod
    def pareto(
        arch: dict[str, Any],
        problem: dict[str, Any],
        bits: dict[str, int] | None = None,
        objectives: Sequence[str] = ...,
        threads: int = 1,
        method: str = "bounded",
        semantics: str = "v3",
        scale_mac: bool = False,
    ) -> dict[str, Any]: ...
    @staticmethod
    def random_search(
        arch: dict[str, Any],
        problem: dict[str, Any],
        bits: dict[str, int] | None = None,
        objective: str = "edp",
        seed: int = 0,
        victory: int = 500,
        timeout: int = 15000,
        orders: int = 16,
        semantics: str = "v3",
        scale_mac: bool = False,
    ) -> dict[str, Any]: ...

class pe:  # a submodule; docs/pe.md
    KINDS: list[str]
    @staticmethod
    def throughput(pe: str, weight_bits: int, act_bits: int) -> float: ...
    @staticmethod
    def product(pe: str, weight: int, weight_bits: int, act: int, act_bits: int) -> tuple[int, int]: ...
    @staticmethod
    def dot(
        pe: str,
        codes: npt.NDArray[Any],
        extra_bits: npt.NDArray[Any],
        acts: npt.NDArray[Any],
        base_bits: int,
        act_bits: int,
    ) -> int: ...
    @staticmethod
    def cost(**options: Any) -> dict[str, float]: ...
    @staticmethod
    def proportional_share(saving: float, compression: float) -> float: ...

class storage:  # a submodule; docs/storage.md
    INDEX_MODES: list[str]
    @staticmethod
    def encode(
        codes: npt.NDArray[Any],
        extra_bits: npt.NDArray[Any],
        base_bits: int,
        index: str,
        group_size: int = 0,
        group_axis: int = 0,
    ) -> bytes: ...
    @staticmethod
    def inspect(data: bytes | bytearray | memoryview) -> dict[str, Any]: ...
    @staticmethod
    def decode(
        data: bytes | bytearray | memoryview, extra_bits: npt.NDArray[Any] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]: ...
    @staticmethod
    def expected_bits(base_bits: int, fraction: float, index: str, group_size: int = 16, extra: int = 1) -> float: ...
    @staticmethod
    def index_bits(fraction: float, index: str, group_size: int = 16) -> float: ...
    @staticmethod
    def fraction_at(bits: float, base_bits: int, index: str, group_size: int = 16, extra: int = 1) -> float: ...

class runtime:  # a submodule; docs/package_format.md has the manifest
    @staticmethod
    def make_package(manifest: str, tensors: Sequence[tuple[str, int, npt.NDArray[Any]]]) -> bytes: ...

    class Network:
        def __init__(
            self,
            path: str,
            threads: int = 1,
            isa: str = "",
            keep_values: bool = False,
            max_memory: int = ...,
        ) -> None: ...
        @staticmethod
        def from_bytes(
            data: bytes,
            threads: int = 1,
            isa: str = "",
            keep_values: bool = False,
            max_memory: int = ...,
        ) -> runtime.Network: ...
        manifest: str
        file_bytes: int
        input_shape: list[int]
        outputs: list[tuple[str, list[int]]]
        isa: str
        threads: int
        arena_bytes: int
        weight_bytes: int
        steps: list[dict[str, Any]]
        def run(self, x: npt.NDArray[Any]) -> list[npt.NDArray[Any]]: ...
        def profile(self, x: npt.NDArray[Any]) -> list[dict[str, Any]]: ...
        def peaks(self) -> tuple[float, float]: ...
        def values(self, x: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]: ...
