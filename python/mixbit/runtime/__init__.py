"""Integer packages, run by the C++ runtime: no torch in sight."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mixbit import _C
from mixbit.errors import MixbitError

__all__ = ["Network", "program"]

Reals = npt.NDArray[np.float32]


def _call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A function of the C++ room, whose bad arguments are ours."""
    try:
        return function(*arguments, **options)
    except ValueError as error:
        raise MixbitError(str(error)) from error


class Network:
    """A network from an integer package (docs/package_format.md), ready to run.

    Outputs equal those of `mixbit.export.reference` bit for bit, for any number of threads and any instruction set.

    Attributes:
        input_shape: Sizes of one input, without the batch.
        outputs: Name and shape (without the batch) of each output.
        isa: Instruction set of the kernels: "scalar", "avx2", "avx512", "vnni" or "amx". `MIXBIT_CPU_ISA` caps it.
        threads: Threads that work on a batch.
        arena_bytes: Bytes that one image needs for its values.
        weight_bytes: Bytes of all weights as the kernels lay them out.
        manifest: The package's manifest.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int = 1,
        isa: str | None = None,
        keep_values: bool = False,
        max_memory: int = 2**30,
    ) -> None:
        """Maps a package and lays out its weights.

        Args:
            path: A file that `mixbit.export.integer` wrote. It must not change while the network lives.
            threads: 1 to 1024.
            isa: Caps the instruction set; None is the processor's widest.
            keep_values: Every value keeps its codes and nothing is fused, for `values`.
            max_memory: Bytes of values (of one image), weights and scratch together that the package may ask for, 1 to
                2^62; a small file can name large images.

        Raises:
            MixbitError: The file is damaged, no package, or of a newer version; it needs more than `max_memory`; or an
                argument is wrong.
        """
        self._take(_C.runtime.Network, os.fspath(path), threads, isa, keep_values, max_memory)

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        *,
        threads: int = 1,
        isa: str | None = None,
        keep_values: bool = False,
        max_memory: int = 2**30,
    ) -> Network:
        """A network from a package in memory, which is copied.

        Args:
            data: What a file of `mixbit.export.integer` holds.
            threads: As of `Network`, like the others.
            isa: See there.
            keep_values: See there.
            max_memory: See there.
        """
        if not isinstance(data, bytes):
            raise MixbitError(f"data is a {type(data).__name__}, expected bytes")
        network = cls.__new__(cls)
        network._take(_C.runtime.Network.from_bytes, data, threads, isa, keep_values, max_memory)
        return network

    def _take(
        self,
        make: Callable[..., Any],
        source: str | bytes,
        threads: int,
        isa: str | None,
        keep_values: bool,
        max_memory: int,
    ) -> None:
        if isinstance(max_memory, bool) or not isinstance(max_memory, int) or not 1 <= max_memory <= 2**62:
            raise MixbitError(f"max_memory={max_memory!r}: expected a whole number of bytes from 1 to 2^62")
        for name, value, kind, expected in (
            ("threads", threads, (int, np.integer), "a whole number from 1 to 1024"),
            ("isa", isa or "", str, "a text or None"),
            ("keep_values", keep_values, bool, "True or False"),
        ):
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise MixbitError(f"{name}={value!r}: expected {expected}")
        options = {"threads": threads, "isa": isa or "", "keep_values": keep_values, "max_memory": max_memory}
        self._network = _call(make, source, **options)
        self.input_shape: tuple[int, ...] = tuple(self._network.input_shape)
        self.outputs: list[tuple[str, tuple[int, ...]]] = [(n, tuple(shape)) for n, shape in self._network.outputs]
        self.isa: str = self._network.isa
        self.threads: int = self._network.threads
        self.arena_bytes: int = self._network.arena_bytes
        self.weight_bytes: int = self._network.weight_bytes

    @property
    def manifest(self) -> dict[str, Any]:
        """The package's manifest: nodes, outputs and tensors."""
        manifest: dict[str, Any] = json.loads(self._network.manifest)
        return manifest

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What runs, in order: node, module, op, kernel, bits, macs and bytes of one image."""
        steps: list[dict[str, Any]] = self._network.steps
        return steps

    def __call__(self, x: Any) -> list[Reals]:
        """The network's outputs.

        Args:
            x: float32 [batch, *input_shape]. NaN counts as the lowest code.

        Returns:
            float32 [batch, ...] for each output.

        Raises:
            MixbitError: Another dtype or shape.
        """
        outputs: list[Reals] = _call(self._network.run, self._checked(x))
        return outputs

    def values(self, x: Any) -> dict[str, npt.NDArray[np.int16]]:
        """Codes of every value by name, as `IntegerReference.tensors` has them; needs `keep_values=True`.

        Args:
            x: As of a call.
        """
        values: dict[str, npt.NDArray[np.int16]] = _call(self._network.values, self._checked(x))
        return values

    def profile(self, x: Any) -> list[dict[str, Any]]:
        """`steps` with the seconds that each took in one run.

        Args:
            x: As of a call.
        """
        steps: list[dict[str, Any]] = _call(self._network.profile, self._checked(x))
        return steps

    def peaks(self) -> tuple[float, float]:
        """Multiply-accumulates and bytes a second that this machine gives to the network's kernels and threads.

        Measured anew with each call, for about a fifth of a second: a large product of bytes within the caches, and
        reading memory beyond them. The roof of a roofline over `profile`.
        """
        peaks: tuple[float, float] = self._network.peaks()
        return peaks

    def _checked(self, x: Any) -> Reals:
        array = np.asarray(x)
        if array.dtype != np.float32:
            raise MixbitError(f"input has dtype {array.dtype}, expected float32")
        # Views into files and buffers may begin anywhere.
        return np.require(array, requirements=("C", "A"))


def program() -> Path:
    """Where the program `mixbit-run` of this installation is; it needs neither Python nor torch, and can be copied.

    Raises:
        MixbitError: This build of mixbit has none.
    """
    path = Path(__file__).resolve().parent.parent / "bin" / "mixbit-run"
    if not path.is_file():
        raise MixbitError(f"{str(path)!r} is missing; build mixbit anew")
    return path


def run_program() -> NoReturn:
    """The command `mixbit-run`: becomes the program."""
    try:
        path = program()
    except MixbitError as error:
        sys.exit(f"mixbit-run: {error}")
    os.execv(path, [str(path), *sys.argv[1:]])
