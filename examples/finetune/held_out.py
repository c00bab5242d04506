"""Pairs that a model is measured on: the loss of their responses, and answers that it generates."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from finetune import chat_data, solve
from finetune.chat_data import Example
from finetune.prompts import Pair
from llama.model import Llama
from llama.pretrained import Pretrained


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """The pairs and how many are measured at a time.

    Attributes:
      pairs: as texts.
      examples: as tokens.
      rows: as rows, with every pair in them.
      base: whose tokenizer and end token these are.
      batch: rows whose loss is computed at a time.
      prompts: how many are answered at a time.
      new_tokens: of an answer at most; 0: none is generated.
      place: where a batch lies.
    """

    pairs: Sequence[Pair]
    examples: Sequence[Example]
    rows: chat_data.Rows
    base: Pretrained
    batch: int
    prompts: int
    new_tokens: int
    place: NamedSharding

    def loss(self, model: Llama, params: Any) -> float:
        """Mean cross-entropy of all response tokens."""
        rows, total = self.rows, float(self.rows.response.sum())
        loss = 0.0
        for start in range(0, len(rows.tokens), self.batch):
            index = np.arange(start, start + self.batch)
            index = np.where(index < len(rows.tokens), index, -1)  # whole batches compile once
            batch = chat_data.make_batch(rows, index, self.place, total)
            loss += float(_loss(model, params, batch))
        return loss

    def measure(self, model: Llama, params: Any) -> dict[str, Any]:
        """Loss, accuracy by generation, the answers, and the seconds that these took."""
        loss, started, answers, accuracy = self.loss(model, params), time.perf_counter(), [], {}
        if self.new_tokens:
            answers = solve.solve(
                model, params, self.examples, self.base.tokenizer, self.base.end_token,
                self.prompts, self.new_tokens,
            )  # fmt: skip
            accuracy = solve.accuracy(answers, [pair.response for pair in self.pairs])
        seconds = time.perf_counter() - started
        rates = ", ".join(f"{name} {rate:.1%}" for name, rate in accuracy.items())
        print(f"held out: loss {loss:.4f}; right by generation: {rates or 'not measured'}")
        return {"loss": loss, "accuracy": accuracy, "seconds": seconds, "answers": answers}


_loss = jax.jit(chat_data.response_loss, static_argnames="model")
