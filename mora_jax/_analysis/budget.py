"""A budget of trained parameters, spent on the layers whose adapters would gain most."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence

from mora_jax._plans.layer import AdapterSpec


def check_budget(budget: int | float, uniform: int) -> int:
    """The budget as a number of parameters; a fraction is one of the plan's `uniform`."""
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(
                f"budget must be a number of parameters (an int) or a fraction of the plan's "
                f"{uniform:,}, above 0 and up to 1, got {budget}."
            )
        return int(budget * uniform)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"budget must be a positive int or a fraction, got {budget!r}.")
    return budget


def offers_of(spec: AdapterSpec, ranks: Sequence[int]) -> list[tuple[int, int]]:
    """(rank, trained numbers) of what the layer can have, dearer and dearer."""
    offers: list[tuple[int, int]] = []
    for rank in ranks:
        other = dataclasses.replace(spec, config=dataclasses.replace(spec.config, rank=rank))
        fits = not other.dead_entries and other.size <= min(spec.features)
        if fits and other.parameters > (offers[-1][1] if offers else 0):
            offers.append((rank, other.parameters))
    return offers


def spend(
    gains: Mapping[str, float], offers: Mapping[str, Sequence[tuple[int, int]]], budget: int
) -> dict[str, tuple[int, int]]:
    """Path -> (rank, trained numbers) that make the most of the sum of gain * log(numbers).

    Where what a layer leaves of the loss falls with its numbers p as gain p^-b, the best there is
    has p in proportion to gain^(1 / (1 + b)), of layers of one size. The first step has b = -1/2,
    for gradients without preferred signs are worth p^(1/2) together: p as gain^2, most of it in a
    few layers, which by the last step have long learned what they can. Losses after training fall
    by small powers of the trained parameters (arXiv 2402.17193). Their limit, b = 0, is the
    logarithm: each layer's share of the budget is its share of the gains, and there is no constant
    to choose. In a tiny Llama that memorises UUIDs b = 0 and b = 1 both beat equal ranks; b = -1/2
    was as good on average, and uneven. On held-out sums nothing beat equal ranks, and in SmolLM2
    equal ranks were as good or better on both tasks that were tried.

    Each step up is worth less for its price than the one before, so that to take the best one next
    is best, but for what is left over.
    """
    bought: dict[str, tuple[int, int]] = {path: (0, 0) for path in offers}  # noqa: C420
    left = budget
    queue: list[tuple[bool, float, str, int]] = []

    def offer(path: str, number: int) -> None:
        if gains[path] > 0 and number < len(offers[path]):
            before, after = bought[path][1], offers[path][number][1]
            # The logarithm's first step is worth more than any other: those go by their density.
            rate = math.log(after / before) / (after - before) if before else 1 / after
            heapq.heappush(queue, (before > 0, -gains[path] * rate, path, number))

    for path in offers:
        offer(path, 0)
    while queue:
        _, _, path, number = heapq.heappop(queue)
        price = offers[path][number][1] - bought[path][1]
        if price <= left:
            left -= price
            bought[path] = offers[path][number]
            offer(path, number + 1)
    if not any(rank for rank, _ in bought.values()):
        cheapest = min((own[0][1] for own in offers.values() if own), default=0)
        raise ValueError(
            f"a budget of {budget:,} parameters buys no adapter: the smallest has {cheapest:,}."
            if cheapest
            else "none of the ranks fits any layer: their matrices are larger than the layers."
        )
    return bought
