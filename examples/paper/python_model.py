"""A Llama of 0.46 million parameters that has read Python: pretrained here, once, and kept.

So that a CPU has something to fine-tune: small, but no random model, and what comes next is news to
it. The text is the running Python's own, as bytes; four minutes on two cores.
"""

import dataclasses
import fcntl
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import tqdm
from flax import traverse_util

from data import text
from llama.model import Llama, LlamaConfig
from paper.training import Rows, losses
from train.flags import PRESETS

STEPS, BATCH, LENGTH, RATE = 1500, 32, 64, 4e-3


def load(
    encode: Callable[[str], Sequence[int]], vocab_size: int, end_token: int
) -> tuple[LlamaConfig, Any]:
    """(config, parameters), from the user's cache or, the first time, by training.

    Args:
      encode: text -> tokens.
      vocab_size: how many tokens there are.
      end_token: ends a document.
    """
    config = dataclasses.replace(PRESETS["mini"], vocab_size=vocab_size)
    windows = text.Windows.cut(text.python_documents(), encode, end_token, LENGTH, seed=0)
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mora_jax"
    training = repr((config, STEPS, BATCH, LENGTH, RATE))  # and `_train`, of which there is one
    name = f"python-{windows.digest}-{hashlib.sha256(training.encode()).hexdigest()[:8]}"
    path = cache / f"{name}.safetensors"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:  # of several programs one trains
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            params = traverse_util.flatten_dict(_train(config, windows), sep="/")
            scratch = path.with_suffix(".partial")
            safetensors.numpy.save_file({k: np.asarray(v) for k, v in params.items()}, scratch)
            os.replace(scratch, path)
    loaded = safetensors.numpy.load_file(path)
    return config, traverse_util.unflatten_dict(loaded, sep="/")


def _train(config: LlamaConfig, windows: text.Windows) -> Any:
    model = Llama(config)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(RATE, STEPS))
    )
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    state = params, optimizer.init(params)

    @jax.jit
    def step(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = state
        rows = Rows(tokens, jnp.ones(tokens.shape, bool))
        loss, grads = jax.value_and_grad(lambda p: losses(model, p, rows).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    bar = tqdm.trange(STEPS, desc="pretraining a model to fine-tune", mininterval=5)
    for number in bar:
        state, loss = step(state, windows.tokens[windows.rows(number * BATCH, BATCH)])
        if number % 50 == 0:
            bar.set_postfix(loss=f"{float(loss):.3f}")
    return state[0]
