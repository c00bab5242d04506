"""Pairs of a prompt and a response: out of JSON lines, or made by reasoning-gym; their templates.

Nothing here knows of tokens: a pair is two texts, and a template puts the first into the form that
a model was taught, up to where its response begins.
"""

import importlib
import json
import pathlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from data import wheels
from llama import smollm2

WHEEL = "reasoning-gym==0.1.25"
SHA256 = "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435"

#: Prompt -> text that the response follows.
Template = Callable[[str], str]


class Pair(NamedTuple):
    """What is asked and what is to be answered."""

    prompt: str
    response: str


def read_pairs(path: pathlib.Path, prompt_field: str, response_field: str) -> list[Pair]:
    """The pairs of a file of JSON objects, one a line.

    Raises:
      ValueError: a line is no JSON object, or lacks a field, or a field is no text.
    """
    pairs = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                pair = Pair(row[prompt_field], row[response_field])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: wanted a JSON object with {prompt_field!r} and "
                    f"{response_field!r}, got {line[:80]!r} ({error!r}). The flags --prompt-field "
                    "and --response-field name them."
                ) from error
            if not all(isinstance(text, str) for text in pair):
                raise ValueError(f"{path}, line {number}: wanted two texts, got {line[:80]!r}.")
            pairs.append(pair)
    return pairs


def gsm_symbolic(count: int, seed: int) -> list[Pair]:
    """Grade-school maths from 85 templates, each with a worked answer that ends in `#### N`.

    reasoning-gym (Apache-2.0) makes them without end; its wheel is fetched the first time. Names
    and numbers are drawn anew, templates are not: what is held out of these pairs measures other
    numbers, not other problems.

    Args:
      count: how many to draw; those that repeat a prompt are left out.
      seed: of the draw.
    """
    wheel = wheels.fetch(WHEEL, None, SHA256)
    # Its packages import all that they hold, and the dozen libraries that those need. Empty ones in
    # their places, with the same paths, let the one data set be imported that needs none of them.
    for name in ("reasoning_gym", "reasoning_gym.arithmetic", "reasoning_gym.coaching"):
        package: Any = types.ModuleType(name)
        package.__path__ = [str(wheel.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, package)
    module = importlib.import_module("reasoning_gym.arithmetic.gsm_symbolic")
    data = module.GSMSymbolicDataset(module.GSMSymbolicDatasetConfig(seed=seed, size=count))
    rows = (data[i] for i in range(count))
    return [
        Pair(prompt, response)
        for prompt, response in {
            row["question"]: row["metadata"]["answer_cot"] for row in rows
        }.items()
    ]


def hold_out(pairs: Sequence[Pair], count: int) -> tuple[list[Pair], list[Pair]]:
    """(the rest, `count` of them): always the same ones, whatever the training's seed.

    Raises:
      ValueError: nothing would be left to train on.

    >>> rest, held_out = hold_out([Pair(str(i), "") for i in range(5)], 2)
    >>> [pair.prompt for pair in rest], [pair.prompt for pair in held_out]
    (['0', '1', '3'], ['2', '4'])
    """
    if count >= len(pairs):
        raise ValueError(f"there are {len(pairs)} pairs, of which {count} are to be held out.")
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[i] for i in sorted(order[count:])], [pairs[i] for i in order[:count]]


def make_template(text: str | None, tokens: Sequence[str]) -> Template:
    """The template of a text with `{prompt}` in it; without a text, SmolLM2's.

    Args:
      text: ends where the response begins; newlines and special tokens as they are to be read.
      tokens: special ones that the tokenizer knows.

    Raises:
      ValueError: the text has no `{prompt}`; there is none, and the model was not taught SmolLM2's.

    >>> make_template("Q: {prompt}\\nA: ", [])("Why?")
    'Q: Why?\\nA: '
    """
    if text is None:
        if "<|im_start|>" not in tokens:
            raise ValueError(
                "the tokenizer has no <|im_start|>, so the model was taught no ChatML: give "
                "--template, a text with {prompt} in it that ends where the response begins."
            )
        return smollm2.chat
    before, found, after = text.partition("{prompt}")
    if not found:
        raise ValueError(f"--template {text!r} has no {{prompt}} in it.")
    return lambda prompt: f"{before}{prompt}{after}"
