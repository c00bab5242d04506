"""Accuracy by generation: what a model answers to prompts it was not trained on, greedily.

Of a text such as `6 * 7 = 42 eggs.\n#### 42` the answer is what follows the last `####`, as GSM8K
has it; a text without one is its own answer. A model that was never shown this form may still end
in the right number, which `last_number` counts.
"""

import decimal
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
import tqdm

from finetune.chat_data import Example
from llama.model import Llama, generate

_NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")


def final_answer(text: str) -> str:
    """What follows the last `####`, else the whole text; a number in its shortest form.

    >>> final_answer("6 * 7 = 42 eggs.\\n#### $1,042.00"), final_answer(" yes ")
    ('1042', 'yes')
    """
    answer = text.rpartition("####")[2].strip()
    found = _NUMBER.fullmatch(answer.strip("$€£% ").rstrip("."))
    return _shortest(found[0]) if found else answer


def last_number(text: str) -> str | None:
    """The last number of a text in its shortest form.

    >>> last_number("She has 3 + 4.50 = 7.50 dollars left.")
    '7.5'
    """
    found = _NUMBER.findall(text)
    return _shortest(found[-1]) if found else None


def _shortest(number: str) -> str:
    return f"{decimal.Decimal(number.replace(',', '')).normalize():f}"


def accuracy(texts: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Parts of the texts that are right: in the form of those wanted, and in the last number.

    >>> accuracy(["3 + 4 = 7\\n#### 7", "It is 7."], ["#### 7.0", "#### 7"])
    {'exact': 0.5, 'last_number': 1.0}
    """
    answers = [final_answer(text) for text in wanted]
    exact = [final_answer(text) == answer for text, answer in zip(texts, answers, strict=True)]
    last = [last_number(text) == answer for text, answer in zip(texts, answers, strict=True)]
    return {"exact": float(np.mean(exact)), "last_number": float(np.mean(last))}


def solve(
    model: Llama,
    params: Any,
    examples: Sequence[Example],
    tokenizer: tokenizers.Tokenizer,
    end_token: int,
    batch: int,
    new_tokens: int,
) -> list[str]:
    """What the model generates for each example's prompt, up to the end token.

    All prompts are padded on the left to the longest, and the last batch is filled up with the
    first prompts: one shape, compiled once.

    Args:
      model: see `llama.model.generate`.
      params: its parameters.
      examples: of which only the prompts are read.
      tokenizer: turns tokens into text.
      end_token: ends an answer.
      batch: prompts at a time.
      new_tokens: at most, in an answer; one that is longer is cut off.
    """
    length = max(len(example.prompt) for example in examples)
    prompts = np.zeros((len(examples), length), np.int32)
    mask = np.zeros((len(examples), length), bool)
    for row, example in enumerate(examples):
        prompts[row, length - len(example.prompt) :] = example.prompt
        mask[row, length - len(example.prompt) :] = True
    texts: list[str] = []
    for start in tqdm.trange(0, len(examples), batch, desc="generating", leave=False):
        rows = np.arange(start, start + batch) % len(examples)
        tokens = generate(model, params, prompts[rows], mask[rows], new_tokens, end_token=end_token)
        answers = [row[: row.index(end_token)] if end_token in row else row
                   for row in np.asarray(tokens).tolist()]  # fmt: skip
        texts += tokenizer.decode_batch(answers)
    return texts[: len(examples)]
