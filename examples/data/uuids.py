"""The memorisation task of the MoRA paper (arXiv 2405.12130, Table 2): pairs of random UUIDs.

Nothing that a pretrained model knows helps it here, so what it gets right shows how much an adapter
can store. The paper trains on 10,000 pairs and counts the characters of the values that are right;
a guess is right 1 time in 16.

Shape letters: B pairs, T tokens of the longest pair, P tokens of the longest prompt.
"""

import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

HEX_CHARACTERS = frozenset("0123456789abcdef")


class Tokenizer(Protocol):
    """What is asked of a `tokenizers.Tokenizer`."""

    def encode(self, sequence: str) -> Any:
        """Gives an object whose `ids` are the tokens of the text, a list of int."""


class Examples(NamedTuple):
    """Pairs as tokens, one a row, for training and for generation.

    Attributes:
      tokens: [B, T] int32, key, newline, value, end token; padded on the right.
      loss_mask: [B, T] bool, True at the tokens to learn: the value and the end token. Token t is
        predicted at t - 1, so a loss pairs `logits[:, :-1]` with `tokens[:, 1:], loss_mask[:, 1:]`.
      prompts: [B, P] int32, key, newline; padded on the left.
      prompt_mask: [B, P] bool, False at the padding.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    prompts: np.ndarray
    prompt_mask: np.ndarray


def make_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Draws `count` pairs (key, value) of random UUIDs, the same ones for the same seed.

    All 128 bits are random: `uuid.uuid4` fixes six of them, and a guess would score above 1/16.

    >>> make_pairs(1, seed=0)[0]
    ('5f82c2d9-cfeb-0fa3-21d7-d982f8bd1045', 'b8e8cd4e-a93d-7d0a-1df0-4213b6273b04')
    """
    random_bytes = np.random.default_rng(seed).bytes
    return [
        (str(uuid.UUID(bytes=random_bytes(16))), str(uuid.UUID(bytes=random_bytes(16))))
        for _ in range(count)
    ]


def encode(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, end_token: int) -> Examples:
    r"""Tokenizes pairs and pads them to the longest, with the end token.

    Prompt and value are tokenized apart: no token straddles them, so that a generation starts from
    exactly the tokens seen in training.

    >>> from tokenizers import Tokenizer, models
    >>> characters = Tokenizer(models.BPE({c: i for i, c in enumerate("abcdef\n.")}, merges=[]))
    >>> examples = encode([("a", "fed"), ("abc", "f")], characters, end_token=7)
    >>> examples.tokens
    array([[0, 6, 5, 4, 3, 7],
           [0, 1, 2, 6, 5, 7]], dtype=int32)
    >>> examples.loss_mask.astype(int)
    array([[0, 0, 1, 1, 1, 1],
           [0, 0, 0, 0, 1, 1]])
    >>> examples.prompts
    array([[7, 7, 0, 6],
           [0, 1, 2, 6]], dtype=int32)
    """
    prompts = [tokenizer.encode(f"{key}\n").ids for key, _ in pairs]
    values = [[*tokenizer.encode(value).ids, end_token] for _, value in pairs]
    rows = [prompt + value for prompt, value in zip(prompts, values, strict=True)]

    length, prompt_length = max(map(len, rows)), max(map(len, prompts))
    tokens = np.full((len(rows), length), end_token, np.int32)
    loss_mask = np.zeros(tokens.shape, bool)
    padded_prompts = np.full((len(rows), prompt_length), end_token, np.int32)
    prompt_mask = np.zeros(padded_prompts.shape, bool)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        tokens[i, : len(row)] = row
        loss_mask[i, len(prompt) : len(row)] = True
        padded_prompts[i, prompt_length - len(prompt) :] = prompt
        prompt_mask[i, prompt_length - len(prompt) :] = True
    return Examples(tokens, loss_mask, padded_prompts, prompt_mask)


def character_accuracy(generated: Sequence[str], values: Sequence[str]) -> float:
    """The share, from 0 to 1, of the values' hexadecimal characters generated in the right place.

    Dashes and all else that is not hexadecimal are dropped first. A character that is not generated
    is wrong, and those after the value's last are ignored.

    >>> character_accuracy(["1234-ab", "ff"], ["1234-ac", "ff00-00"])  # 5 of 6 and 2 of 6
    0.5833333333333334
    """
    right = total = 0
    for text, value in zip(generated, values, strict=True):
        got, want = ([c for c in s if c in HEX_CHARACTERS] for s in (text, value))
        right += sum(a == b for a, b in zip(got, want, strict=False))
        total += len(want)
    return right / total
