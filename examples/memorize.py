"""Memorises random UUID pairs with SmolLM2-135M: the paper's own test of what an adapter can store.

    python3 run.py memorize                                   # 2 CPU cores, a few minutes
    python3 run.py memorize --method lora                     # the same with LoRA's pair
    python3 run.py memorize --pairs 10000 --batch 1000 --steps 900 --lr 3e-4   # on a GPU

It adapts the model, trains, generates the values from the keys before and after, saves the
adapters, loads them into a fresh model, merges them, and draws loss and accuracy.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tqdm

import mora_jax
from data import uuids
from llama import pretrained
from llama.model import Llama, generate
from mora_jax import checkpoint

# Rates at which each method memorises 8 pairs with SmolLM2 in some forty steps.
LEARNING_RATES = {"mora": 3e-3, "lora": 1e-2, "fft": 1e-4}


def parse_args() -> argparse.Namespace:
    """The flags; `--help` prints them."""
    parser = argparse.ArgumentParser(
        description="Memorises random UUID pairs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--method", choices=["mora", "lora", "fft"], default="mora")
    parser.add_argument("--scheme", default="sharing", help="MoRA's scheme, by name, or auto")
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank; MoRA trains as much")
    parser.add_argument("--dora", action="store_true", help="train a magnitude too, with DoRA")
    parser.add_argument("--lr", type=float, help="learning rate; by default one that fits")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="pairs in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--remora-every", type=int, default=0, help="steps between merges, or 0")
    parser.add_argument("--evaluations", type=int, default=2, help="generations during training")
    parser.add_argument("--model", type=pathlib.Path, help="a directory in Hugging Face's layout")
    parser.add_argument("--dtype", default="float32", help="of the base model and its computation")
    parser.add_argument("--remat", action="store_true", help="recompute layers: less memory")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/memorize"))
    return parser.parse_args()


def loss_of(model: Llama, params: dict[str, Any], tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean cross-entropy of the masked tokens: [B, T] int, [B, T] bool -> float32 scalar."""
    logits: Any = model.apply({"params": params}, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses, where=mask[:, 1:])


@functools.partial(jax.jit, static_argnames=("model", "optimizer"), donate_argnames="state")
def train_step(model, optimizer, state, frozen, tokens, mask):
    """One step on the trainable half of the parameters; the frozen half is only read."""
    trainable, opt_state = state

    def loss(trainable):
        return loss_of(model, mora_jax.join(trainable, frozen), tokens, mask)

    value, gradients = jax.value_and_grad(loss)(trainable)
    updates, opt_state = optimizer.update(gradients, opt_state, trainable)
    return (optax.apply_updates(trainable, updates), opt_state), value


def answers(model: Llama, params: Any, examples: uuids.Examples, end_token: int, batch: int):
    """What the model generates for each prompt, as tokens [pairs, N]."""
    length = int(examples.loss_mask.sum(axis=1).max())
    chunks = []
    for start in range(0, len(examples.prompts), batch):
        rows = np.arange(start, start + batch) % len(examples.prompts)  # whole batches compile once
        prompts, mask = examples.prompts[rows], examples.prompt_mask[rows]
        chunks.append(generate(model, params, prompts, mask, length, end_token=end_token))
    return np.concatenate(chunks)[: len(examples.prompts)]


def main() -> None:
    """Runs the experiment."""
    started = time.perf_counter()
    args = parse_args()
    args.lr = args.lr or LEARNING_RATES[args.method]
    args.batch = min(args.batch, args.pairs)
    args.out.mkdir(parents=True, exist_ok=True)
    config, base, tokenizer, end_token = pretrained.load(args.model, args.dtype)
    pairs = uuids.make_pairs(args.pairs, args.seed)
    examples = uuids.encode(pairs, tokenizer, end_token)
    base_model = Llama(config, dtype=args.dtype, remat=args.remat)

    # From here to the optimizer: all that a program needs to change to train adapters.
    plan = None
    model, trainable, frozen = base_model, base, {}
    if args.method != "fft":
        scheme = mora_jax.LowRank() if args.method == "lora" else args.scheme
        adapters = mora_jax.MoRAConfig(
            rank=args.rank, scheme=scheme, targets=r".*_proj", dora=args.dora
        )
        model = mora_jax.adapt(base_model, adapters)
        plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 8), jnp.int32))
        params = mora_jax.attach(plan, base, key=jax.random.key(args.seed))
        trainable, frozen = mora_jax.split(params, plan)
        print(plan)
    warmup = min(5, args.steps // 2)
    rate = optax.linear_schedule(args.lr / (warmup + 1), args.lr, warmup)
    if args.remora_every:
        rate = mora_jax.jagged_cosine_schedule(
            args.lr, args.steps + 1, args.remora_every, warmup_steps=warmup, rewarm_steps=5
        )
    optimizer = optax.adamw(rate, weight_decay=0.0)
    state = (trainable, optimizer.init(trainable))

    def measure(step: int, model: Llama, params: Any) -> np.ndarray:
        tokens = answers(model, params, examples, end_token, args.batch)
        texts = tokenizer.decode_batch(tokens)
        accuracy = uuids.character_accuracy(texts, [value for _, value in pairs])
        history["accuracy"].append((step, accuracy))
        tqdm.tqdm.write(f"step {step}: character accuracy by generation {accuracy:.1%}")
        return tokens

    history: dict[str, list[Any]] = {"loss": [], "accuracy": []}
    measure(0, base_model, base)
    order = np.random.default_rng(args.seed)
    queue = np.zeros(0, int)
    measured = set(np.linspace(0, args.steps, args.evaluations + 2).round()[1:-1])
    with tqdm.trange(1, args.steps + 1, desc=f"training ({args.method})") as bar:
        for step in bar:
            if len(queue) < args.batch:
                queue = np.concatenate([queue, order.permutation(args.pairs)])
            rows, queue = queue[: args.batch], queue[args.batch :]
            batch = examples.tokens[rows], examples.loss_mask[rows]
            state, loss = train_step(model, optimizer, state, frozen, *batch)
            history["loss"].append(float(loss))
            bar.set_postfix(loss=f"{history['loss'][-1]:.4f}")
            if step in measured:
                measure(step, model, mora_jax.join(state[0], frozen))
            merges = args.remora_every and step % args.remora_every == 0 and step < args.steps
            if plan is not None and merges:
                params, opt_state, plan, report = mora_jax.merge_and_reset(
                    mora_jax.join(state[0], frozen), state[1], plan,
                    key=jax.random.fold_in(jax.random.key(args.seed), step), optimizer=optimizer,
                )  # fmt: skip
                model = mora_jax.adapt(base_model, plan)
                trainable, frozen = mora_jax.split(params, plan)
                state = (trainable, opt_state)
                bar.write(f"step {step}: merged and restarted, {report}")

    params = mora_jax.join(state[0], frozen)
    generated = measure(args.steps, model, params)
    if plan is not None:
        check_travel(args, base_model, params, plan, frozen, examples, end_token, generated)
    plot(history, args)
    (args.out / "history.json").write_text(json.dumps({**vars(args), **history}, default=str))
    print(f"{args.out}/memorize.png, history.json; {time.perf_counter() - started:.0f} s in all")


def check_travel(args, base_model, params, plan, frozen, examples, end_token, generated) -> None:
    """Saves, loads into a fresh model, merges: the values generated must stay the same."""
    directory = args.out / "adapters"
    shutil.rmtree(directory, ignore_errors=True)
    checkpoint.save_adapters(directory, params, plan)
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    # ReMoRA has changed the base, which the adapters alone do not hold.
    fresh = frozen if args.remora_every else pretrained.load(args.model, args.dtype).params
    loaded, loaded_plan = checkpoint.load_adapters(directory, fresh)
    merged = mora_jax.merge(params, plan)
    for name, model, tree in (
        ("loaded into a fresh model", mora_jax.adapt(base_model, loaded_plan), loaded),
        ("merged into the base", base_model, merged),
    ):
        again = answers(model, tree, examples, end_token, args.batch)
        same = (again == generated).all(axis=1).sum()
        # What is half learned can tip over under another rounding; what is learned does not.
        print(f"{name}: generates the same for {same:,} of {len(generated):,} keys")
    print(f"{directory}: {size / 1e6:.1f} MB on disk")


def plot(history: dict[str, list[Any]], args: argparse.Namespace) -> None:
    """Draws loss and accuracy over the steps."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, loss_axis = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    steps = range(1, len(history["loss"]) + 1)
    loss_axis.plot(steps, history["loss"], color="tab:gray", label="loss")
    loss_axis.set(xlabel="step", ylabel="cross-entropy of the values", ylim=(0, None))
    accuracy_axis = loss_axis.twinx()
    at, accuracy = zip(*history["accuracy"], strict=True)
    accuracy_axis.plot(at, np.multiply(accuracy, 100), "o-", color="tab:blue")
    accuracy_axis.set_ylabel("characters generated right, %", color="tab:blue")
    accuracy_axis.set_ylim(0, 103)
    accuracy_axis.axhline(100 / 16, color="tab:blue", linestyle=":", linewidth=1)
    accuracy_axis.annotate("chance", (0, 100 / 16), (0, 3), textcoords="offset points", fontsize=8)
    name = args.scheme if args.method == "mora" else ""
    loss_axis.set_title(
        f"{args.pairs} UUID pairs, {args.method} {name}, rank {args.rank}, lr {args.lr:g}"
    )
    figure.savefig(args.out / "memorize.png", dpi=150)


if __name__ == "__main__":
    main()
