"""Pairs as rows of tokens: what is learned, which tokens belong together, several pairs in a row.

    row        <user> 2 + 2 ? <assistant> 4 <end> <user> 3 + 1 ? <assistant> 4 <end>  0  0
    segments     1    1 1 1 1      1      1   1     2    2 2 2 2      2      2   2    0  0
    response     .    . . . .      .      x   x     .    . . . .      .      x   x    .  .

Tokens attend within their segment, and positions restart in each, so that a pair's loss is the same
in a packed row as alone.

Shape letters: N rows, A microbatches, B rows of a microbatch, T tokens of a row that are read.
"""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from jax.sharding import NamedSharding

from finetune.prompts import Pair, Template
from llama.model import Llama


class Example(NamedTuple):
    """A pair as tokens; the response ends in the end token."""

    prompt: list[int]
    response: list[int]


class Rows(NamedTuple):
    """Pairs in rows of T + 1 tokens, the last of which is only predicted.

    Attributes:
      tokens: [N, T + 1] int32, 0 at the padding, which is on the right.
      segments: [N, T + 1] int32, which of its row's pairs a token is of, from 1; 0 at the padding.
      response: [N, T + 1] bool, what is learned.
      packed: whether a row can have several pairs.
    """

    tokens: np.ndarray
    segments: np.ndarray
    response: np.ndarray
    packed: bool


class Batch(NamedTuple):
    """Microbatches of rows; leading axes as they come.

    Attributes:
      tokens: [A, B, T + 1] int32.
      segments: [A, B, T] int32, of what is read; None where a row has one pair, whose tokens see
        none of the padding behind them anyway, so that attention need be causal alone.
      weights: [A, B, T] float32 of the losses, 0 where nothing is learned.
    """

    tokens: Any
    segments: Any
    weights: Any


def encode(
    pairs: Sequence[Pair], tokenizer: tokenizers.Tokenizer, template: Template, end_token: int
) -> list[Example]:
    """The pairs as tokens. The template holds all special tokens: the tokenizer adds none."""
    prompts = tokenizer.encode_batch([template(p.prompt) for p in pairs], add_special_tokens=False)
    responses = tokenizer.encode_batch([p.response for p in pairs], add_special_tokens=False)
    return [
        Example(prompt.ids, [*response.ids, end_token])
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def pack(examples: Sequence[Example], length: int, *, packing: bool, seed: int = 0) -> Rows:
    """Lays examples into rows, each whole in one; those longer than a row are left out.

    Args:
      examples: in any order.
      length: T, of a row.
      packing: put an example where it leaves the least room (best fit); else a row for each.
      seed: of the order in which they are laid.

    Raises:
      ValueError: none fits.

    >>> rows = pack([Example([5, 6], [7, 2]), Example([8], [9, 2])], length=7, packing=True)
    >>> rows.tokens, rows.response.astype(int)
    (array([[5, 6, 7, 2, 8, 9, 2, 0]], dtype=int32), array([[0, 0, 1, 1, 0, 1, 1, 0]]))
    """
    bins: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (what is left, number of the bin), in order
    for number in np.random.default_rng(seed).permutation(len(examples)):
        example = examples[number]
        size = len(example.prompt) + len(example.response)
        if size > length + 1:
            continue
        place = bisect.bisect_left(room, (size, -1)) if packing else len(room)
        if place == len(room):
            bins.append([])
            room.append((length + 1, len(bins) - 1))
        left, chosen = room.pop(place)
        bins[chosen].append(example)
        bisect.insort(room, (left - size, chosen))
    if not bins:
        raise ValueError(f"none of {len(examples)} pairs fits into a row of {length} tokens.")
    rows = Rows(
        np.zeros((len(bins), length + 1), np.int32),
        np.zeros((len(bins), length + 1), np.int32),
        np.zeros((len(bins), length + 1), bool),
        packing,
    )
    for row, held in enumerate(bins):
        start = 0
        for segment, (prompt, response) in enumerate(held, 1):
            middle, end = start + len(prompt), start + len(prompt) + len(response)
            rows.tokens[row, start:end] = prompt + response
            rows.segments[row, start:end] = segment
            # A segment's first token has none before it to be predicted from.
            rows.response[row, max(middle, start + 1) : end] = True
            start = end
    return rows


def make_batch(rows: Rows, index: np.ndarray, place: NamedSharding, total: float) -> Batch:
    """The rows of an index, on the mesh.

    Microbatches hold different numbers of response tokens. Weighted by one over those of all rows
    of a step, the sums of their losses add up to its mean, however it is cut.

    Args:
      rows: of which some are taken.
      index: [A, B] or [B] int; -1 for a row that only fills up the batch, and weighs nothing.
      place: where arrays of the index's shape and one axis more lie.
      total: what each token's loss is divided by.
    """
    response = rows.response[index, 1:] & (index >= 0)[..., None]
    weights = response.astype(np.float32) / np.float32(total)
    segments = rows.segments[index, :-1] if rows.packed else None
    batch = Batch(rows.tokens[index], segments, weights)
    return jax.device_put(batch, place)


def response_loss(model: Llama, params: Any, batch: Batch, rngs: Any = None) -> jax.Array:
    """The weighted sum of a microbatch's cross-entropy: leaves [B, ...] -> float32 scalar."""
    inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
    logits: Any = model.apply({"params": params}, inputs, segments=batch.segments, rngs=rngs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(losses * batch.weights)
