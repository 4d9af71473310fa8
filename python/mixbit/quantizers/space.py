"""What `prepare_` takes in place of a recipe when the bits themselves are to be learned."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping

import torch

from mixbit.errors import MixbitError, did_you_mean
from mixbit.quantizers.quantizer import Quantizer
from mixbit.recipe import GRANULARITIES, LayerPrecision, match_name


def check_precisions(argument: str, widths: Iterable[int]) -> tuple[int, ...]:
    """The candidates of a search as a tuple.

    Raises:
        MixbitError: They are not whole numbers from 1 to 16, ascending and without duplicates.
    """
    found = tuple(widths)
    fits = all(isinstance(b, int) and not isinstance(b, bool) and 1 <= b <= 16 for b in found)
    if not found or not fits or list(found) != sorted(set(found)):
        raise MixbitError(
            f"{argument}={list(found)}: expected ascending whole numbers of bits from 1 to 16 without duplicates"
        )
    return found


class SearchSpace(abc.ABC):
    """Candidates of every operand, and the quantizers that choose among them while the network trains.

    Args:
        precisions: Ascending bit-widths of weights and activations.
        act_precisions: Of the activations, if they are to differ; a single one is not searched.
        weight_precisions: Of the weights, likewise.
        input_act: Bits of layers that read the network's input, which are not searched; None searches them, too.
        granularity: "per_channel" or "per_tensor" ranges of the weights.
        frozen: Layers that are not searched: {name or glob: precision}, None leaving a layer float. A list of names
            leaves those layers float, 32 bits in every cost.

    Raises:
        MixbitError: Widths that are unsorted, doubled or out of range, or nothing to choose.
    """

    def __init__(
        self,
        precisions: Iterable[int] = (2, 4, 8),
        *,
        act_precisions: Iterable[int] | None = None,
        weight_precisions: Iterable[int] | None = None,
        input_act: int | None = 8,
        granularity: str = "per_channel",
        frozen: Mapping[str, LayerPrecision | None] | Iterable[str] = (),
    ) -> None:
        common = check_precisions("precisions", precisions)
        self.act_precisions = common if act_precisions is None else check_precisions("act_precisions", act_precisions)
        self.weight_precisions = (
            common if weight_precisions is None else check_precisions("weight_precisions", weight_precisions)
        )
        if len(self.act_precisions) + len(self.weight_precisions) < 3:
            raise MixbitError(f"precisions={list(common)}: expected at least two bit-widths to choose from")
        self.input_act = None if input_act is None else check_precisions("input_act", (input_act,))[0]
        if granularity not in GRANULARITIES:
            raise MixbitError(
                f"granularity={granularity!r}: expected one of {list(GRANULARITIES)}"
                f"{did_you_mean(granularity, GRANULARITIES)}"
            )
        self.granularity = granularity
        if isinstance(frozen, str):
            raise MixbitError(f"frozen={frozen!r}: expected a list of names, or {{name or glob: precision}}")
        self.frozen = dict(frozen) if isinstance(frozen, Mapping) else dict.fromkeys(frozen)

    def frozen_precision(self, name: str) -> tuple[bool, LayerPrecision | None]:
        """Whether a layer is frozen, and its precision then."""
        pattern = match_name(name, self.frozen)
        return pattern is not None, None if pattern is None else self.frozen[pattern]

    @abc.abstractmethod
    def weight_quantizer(self, channels: int, act: Quantizer | None, device: torch.device) -> Quantizer:
        """A quantizer of a weight with `channels` ranges (along dimension 0), whose layer's input has `act`."""

    @abc.abstractmethod
    def act_quantizer(self, device: torch.device) -> Quantizer:
        """A quantizer of an activation."""
