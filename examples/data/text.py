"""Real text as batches of tokens: batch k is a function of the seed and k alone.

So the position in the data is the step, and a resumed run reads on where the killed one stopped,
on any number of devices. By default the text is what every Python carries: the language reference
and the sources of the standard library (some 5 million characters under Python's own licence).

Shape letters: N windows, A microbatches, B sequences of a batch, T tokens of a sequence.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import pathlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

#: Text -> token ids.
Encode = Callable[[str], Sequence[int] | np.ndarray]


def encode_bytes(text: str) -> np.ndarray:
    """UTF-8 bytes as tokens: a vocabulary of 256, where 0 is free to end a document.

    >>> encode_bytes("mora")
    array([109, 111, 114,  97], dtype=uint8)
    """
    return np.frombuffer(text.encode(), np.uint8)


def python_documents() -> Iterator[str]:
    """The Python language reference, topic by topic, and the standard library's own modules."""
    yield from importlib.import_module("pydoc_data.topics").topics.values()
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8")


def read_documents(paths: Sequence[pathlib.Path], fields: Sequence[str] = ()) -> Iterator[str]:
    """The documents of text files: a file each, or of a `.jsonl` file a line each.

    Args:
      paths: files of text, or of JSON objects, one a line.
      fields: which of an object's fields make the document; by default all that are strings.

    Raises:
      ValueError: a line is no JSON object, or lacks a field.
    """
    for path in paths:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            continue
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    names = fields or [name for name in row if isinstance(row[name], str)]
                    yield "\n".join(row[name] for name in names)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {number}: wanted a JSON object with "
                        f"{', '.join(fields) or 'strings'}, got {line[:80]!r} ({error!r})."
                    ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Text cut into windows of T + 1 tokens, in an order of its own in every epoch.

    Attributes:
      tokens: [N, T + 1]; the last token of a window is only predicted.
      seed: of the order.
    """

    tokens: np.ndarray
    seed: int

    @classmethod
    def cut(
        cls, documents: Iterator[str], encode: Encode, end: int, length: int, seed: int
    ) -> "Windows":
        """Joins documents by the token `end` and cuts them; what is left at the end is dropped.

        Raises:
          ValueError: the text is shorter than one window.

        >>> Windows.cut(iter(["mora", "lora"]), encode_bytes, end=0, length=3, seed=0).tokens
        array([[109, 111, 114,  97],
               [  0, 108, 111, 114]], dtype=int32)
        """
        parts = [np.append(np.asarray(encode(text), np.int32), np.int32(end)) for text in documents]
        stream = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        count = len(stream) // (length + 1)
        if not count:
            raise ValueError(f"the text has {len(stream)} tokens; one window is {length + 1}.")
        return cls(stream[: count * (length + 1)].reshape(count, length + 1), seed)

    @property
    def digest(self) -> str:
        """Names the tokens: a resumed run must read the same."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens).tobytes()).hexdigest()[:16]

    def rows(self, start: int, count: int) -> np.ndarray:
        """Which windows are the `count` from number `start` on, epoch after epoch: [count] int."""
        numbers = np.arange(start, start + count)
        epochs, places = np.divmod(numbers, len(self.tokens))
        rows = np.zeros(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = _order(self.seed, int(epoch), len(self.tokens))[places[here]]
        return rows

    def batch(self, step: int, shape: tuple[int, int], sharding: NamedSharding) -> jax.Array:
        """The batch of a step, of which each process reads only what its devices hold.

        Args:
          step: from 0.
          shape: (A, B / A): microbatches, and sequences in each.
          sharding: where [A, B / A, T + 1] lies.

        Returns:
          [A, B / A, T + 1] int32.
        """
        count = shape[0] * shape[1]
        rows = self.rows(step * count, count).reshape(shape)
        length = self.tokens.shape[1]

        def read(index: Any) -> np.ndarray:
            return self.tokens[rows[index[:2]]][..., index[2]]

        return jax.make_array_from_callback((*shape, length), sharding, read)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
