"""Does half the budget, spent where `mora_jax.allocate` says, learn what uniform targeting learns?

    python3 run.py allocate --pairs 8 --steps 40 --seeds 0        # hours on 2 CPU cores
    python3 examples/analysis/allocate.py --pairs 2000 --batch 200 --length 76 --steps 400 \
        --warmup 25 --lrs 1e-3 2e-3 4e-3 8e-3 --variants uniform half allocated --dtype bfloat16 \
        --out examples/analysis/allocation/uuid
    python3 examples/analysis/allocate.py --data gsm8k_train.jsonl --test gsm8k_test.jsonl \
        --test-items 1000 --length 384 --batch 32 --steps 600 --warmup 50 --lrs 5e-4 1e-3 2e-3 \
        --variants uniform half allocated --dtype bfloat16 --out examples/analysis/allocation/gsm8k

The first two memorise random UUIDs and are measured on these; the third is measured on held-out
pairs. Every variant sees the same batches of a seed, and the best of the rates counts. Finished
runs are lines of `results.jsonl`; started again with the same flags, it does the others. Several
programs with other seeds each may share an `--out`. `--draw` draws what it holds, and writes what
the figure and the table need of it to `results.json`, a tenth as large; with that file alone it
draws the same.

Variants: *uniform*, every layer at `--rank`; *half*, every layer at the rank that the budget
allows; *allocated*, ranks by the scores; *chosen*, layers by the scores, at `--rank`; *reversed*,
at `--rank` the layers that the scores advise against. The last three may have as many parameters as
*half* has.

Unrolled layers take long to compile, on a GPU longer than to train. So there is one program for a
variant's ranks, at all rates, to train and to measure: *uniform* and *half* have one each for all
seeds, the others one for a seed. All seeds are scored by one more.
"""

import argparse
import collections
import dataclasses
import functools
import json
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import mora_jax
from analysis import allocate_plots
from data import text, uuids
from finetune import chat_data, prompts
from llama import pretrained
from llama.model import Llama

VARIANTS = ("uniform", "half", "allocated", "chosen", "reversed")
SHAPE = jax.ShapeDtypeStruct((1, 8), jnp.int32)
#: At a rate of one, which each step multiplies: a step is compiled for a model, not for a rate.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0, weight_decay=0.0))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; `--help` prints them."""
    parser = argparse.ArgumentParser(
        description="Compares allocated ranks with uniform ones.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=pathlib.Path, help="a directory in Hugging Face's layout; else SmolLM2")
    add("--data", type=pathlib.Path, help="JSON lines of pairs; else random UUIDs")
    add("--test", type=pathlib.Path, help="JSON lines, with --data")
    add("--test-items", type=int, default=200)
    add("--prompt-field", default="question")
    add("--response-field", default="answer")
    add("--pairs", type=int, default=8, help="of random UUIDs")
    add("--length", type=int, default=128, help="tokens of a row")
    add("--batch", type=int, default=8, help="rows in a step")
    add("--steps", type=int, default=40)
    add("--warmup", type=int, default=5)
    add("--lrs", type=float, nargs="+", default=[3e-3])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--rank", type=int, default=8)
    add("--scheme", default="sharing")
    add("--budget", type=float, default=0.5, help="as a fraction of uniform targeting")
    add("--score-batches", type=int, default=2)
    add("--stacked", action="store_true", help="one rank for all layers of a kind, in a scan")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--dtype", default="float32", help="of the base model and its computation")
    add("--remat", action="store_true")
    add("--out", type=pathlib.Path, default=pathlib.Path("results/allocate"))
    add("--draw", action="store_true", help="train nothing; losses.png from what --out holds")
    return parser.parse_args(arguments)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The base and the rows of one seed."""

    base_model: Llama
    base: dict[str, Any]
    order: text.Windows
    rows: chat_data.Rows
    measured: chat_data.Rows

    def batch(self, step: int, size: int) -> chat_data.Batch:
        """The batch of a step, a function of the seed and the step."""
        return _batch(self.rows, self.order.rows(step * size, size))

    def measures(self, size: int) -> Iterator[chat_data.Batch]:
        """Batches of what is measured, whose losses add up to the mean cross-entropy."""
        index = np.arange(-(-len(self.measured.tokens) // size) * size).reshape(-1, size)
        index = np.where(index < len(self.measured.tokens), index, -1)
        total = self.measured.response[:, 1:].sum()
        return (_batch(self.measured, i, total) for i in index)


def _batch(rows: chat_data.Rows, index: np.ndarray, total: float | None = None) -> Any:
    total = rows.response[index, 1:].sum() if total is None else total
    return chat_data.make_batch(rows, index, jax.devices()[0], total)  # pyright: ignore


def unstack(params: dict[str, Any], count: int) -> dict[str, Any]:
    """Parameters of the unrolled model from those of the stacked one."""
    layers = {
        f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count)
    }
    return {name: value for name, value in params.items() if name != "layers"} | layers


def load_base(
    args: argparse.Namespace, base: pretrained.Pretrained
) -> tuple[Llama, dict[str, Any]]:
    """(model, params) that all runs have in common: a model compiles once, an equal one again."""
    shared = {"dtype": args.dtype, "param_dtype": args.dtype, "remat": args.remat}
    model = Llama(base.config, unrolled=not args.stacked, **shared)
    params = base.params if args.stacked else unstack(base.params, base.config.num_layers)
    return model, jax.device_put(params, jax.devices()[0])


def load_task(args: argparse.Namespace, base: pretrained.Pretrained, model: Llama, params: Any,
              seed: int) -> Task:  # fmt: skip
    """The data of a seed: other pairs, or other batches."""
    if args.data:
        fields = args.prompt_field, args.response_field
        pairs = prompts.read_pairs(args.data, *fields)
        tested = prompts.read_pairs(args.test, *fields)[: args.test_items]
        special = [token.content for token in base.tokenizer.get_added_tokens_decoder().values()]
        template = prompts.make_template(None, special)
    else:
        pairs = tested = [prompts.Pair(*pair) for pair in uuids.make_pairs(args.pairs, seed)]
        template = prompts.make_template("{prompt}\n", [])
    encode = functools.partial(
        chat_data.encode, tokenizer=base.tokenizer, template=template, end_token=base.end_token
    )
    rows, measured = (
        chat_data.pack(encode(found), args.length, packing=False) for found in (pairs, tested)
    )
    return Task(model, params, text.Windows(rows.tokens, seed), rows, measured)


@functools.cache
def loss_of(model: Any) -> Any:
    """(params, batch) -> loss; the same function for a model, so that it is compiled once."""
    return functools.partial(chat_data.response_loss, model)


def allocations(args: argparse.Namespace, task: Task, seed: int) -> dict[str, mora_jax.MoRAConfig]:
    """Variant -> config."""
    uniform = mora_jax.MoRAConfig(rank=args.rank, scheme=args.scheme, targets=r".*_proj")
    half = dataclasses.replace(uniform, rank=max(1, round(args.budget * args.rank)))
    model: Any = mora_jax.adapt(task.base_model, uniform)
    plan = mora_jax.plan(model, SHAPE)
    params = mora_jax.attach(plan, task.base)
    allowed = sum(
        spec.parameters
        for spec in mora_jax.plan(mora_jax.adapt(task.base_model, half), SHAPE).values()
    )
    loss = loss_of(model)
    batches = [task.batch(step, args.batch) for step in range(args.score_batches)]
    started = time.perf_counter()
    found = mora_jax.allocate(params, plan, loss, batches, allowed)
    seconds = time.perf_counter() - started
    chosen = mora_jax.allocate(params, plan, loss, batches, allowed, ranks=[args.rank])
    left, worst = chosen.budget, []
    for path, score in sorted(chosen.scores.items(), key=lambda x: x[1].gain / x[1].parameters):
        if score.parameters <= left:
            left -= score.parameters
            worst.append(path)
    report = f"scored in {seconds:.1f} s, compiling included\n{found}\n\n{chosen}\n"
    (args.out / f"allocation-{seed}.txt").write_text(report)
    allocate_plots.draw_scores(found, args.out / f"scores-{seed}.png")
    reverse = dataclasses.replace(uniform, targets="|".join(map(re.escape, worst)))
    return {"uniform": uniform, "half": half, "allocated": found.config, "chosen": chosen.config,
            "reversed": reverse}  # fmt: skip


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def train_step(model, state, frozen, batch, rate):
    """One step on the trainable half; at a rate of zero it measures."""
    trainable, opt_state = state
    value, gradients = jax.value_and_grad(
        lambda trainable: chat_data.response_loss(model, mora_jax.join(trainable, frozen), batch)
    )(trainable)
    updates, opt_state = OPTIMIZER.update(gradients, opt_state, trainable)
    updates = jax.tree.map(lambda update: rate * update, updates)
    return (optax.apply_updates(trainable, updates), opt_state), value


def train(
    args: argparse.Namespace, task: Task, config: Any, lr: float, label: str
) -> dict[str, Any]:
    """Trains one variant and gives what it came to."""
    model = mora_jax.adapt(task.base_model, config)
    plan = mora_jax.plan(model, SHAPE)
    trainable, frozen = mora_jax.split(mora_jax.attach(plan, task.base), plan)
    # On a device for good, as batches are: the step would be compiled again for what it gives back.
    state, frozen = jax.device_put(
        ((trainable, OPTIMIZER.init(trainable)), frozen), jax.devices()[0]
    )
    warmup = min(args.warmup, args.steps // 2)
    rates: Any = optax.warmup_cosine_decay_schedule(lr / (warmup + 1), lr, warmup, args.steps + 1)
    rates = np.asarray(jax.vmap(rates)(jnp.arange(args.steps)))  # read once, not waited for
    losses = []
    for step in tqdm.trange(args.steps, desc=label, leave=False):
        batch = task.batch(step, args.batch)
        state, loss = train_step(model, state, frozen, batch, rates[step])
        losses.append(loss)
    loss = 0.0
    for batch in task.measures(args.batch):
        state, part = train_step(model, state, frozen, batch, np.float32(0))
        loss += float(part)
    return {"loss": loss, "trained": plan.trained_parameters,
            "losses": np.asarray(jnp.stack(losses)).round(5).tolist()}  # fmt: skip


def summarise(runs: list[dict[str, Any]]) -> str:
    """A row for each variant and rate."""
    groups = collections.defaultdict(list)
    for run in runs:
        groups[run["variant"], run["lr"]].append(run)
    rows = []
    for (variant, lr), found in groups.items():
        losses = [run["loss"] for run in found]
        spread = ", ".join(f"{loss:.4f}" for loss in losses)
        trained = np.mean([run["trained"] for run in found])
        rows.append(f"{variant:10} {lr:<8g} {trained:>12,.0f}  {np.mean(losses):.4f}  ({spread})")
    head = f"{'variant':10} {'lr':8} {'trained':>12}  loss, mean of the seeds, and each"
    return "\n".join([head, *rows])


def main(arguments: list[str] | None = None) -> None:
    """Runs what is not there yet, and prints the table."""
    args = parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    free = ("out", "seeds", "lrs", "variants", "draw")
    # Of a file its name: where it lies is the machine's.
    flags = {
        name: getattr(value, "name", str(value))
        for name, value in vars(args).items()
        if name not in free
    }
    path, runs = args.out / "results.jsonl", []
    if path.exists():
        runs = [json.loads(line) for line in path.read_text().splitlines()]
    if args.draw:
        summary = args.out / "results.json"
        if runs:
            allocate_plots.write_summary(runs, VARIANTS, summary)
        runs = json.loads(summary.read_text())["runs"]
        allocate_plots.draw_losses(runs, VARIANTS, args.out / "losses.png")
        print(summarise(runs))
        return
    if other := [run for run in runs if run["flags"] != flags]:
        raise SystemExit(f"{path} is of other flags: {other[0]['flags']}, not {flags}")
    base = pretrained.load(args.model, args.dtype)
    model, params = load_base(args, base)
    done = {(run["variant"], run["seed"], run["lr"]) for run in runs}
    for seed in args.seeds:
        wanted = [(v, lr) for v in args.variants for lr in args.lrs if (v, seed, lr) not in done]
        if not wanted:
            continue
        task = load_task(args, base, model, params, seed)
        configs = allocations(args, task, seed)
        for variant, lr in wanted:
            found = train(args, task, configs[variant], lr, f"{variant}, seed {seed}, lr {lr:g}")
            run = {"variant": variant, "seed": seed, "lr": lr, **found, "flags": flags,
                   "device": jax.devices()[0].device_kind, "jax": jax.__version__}  # fmt: skip
            runs.append(run)
            with path.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(f"{variant}, seed {seed}, lr {lr:g}: loss {run['loss']:.4f}", flush=True)
    print(summarise(runs))


if __name__ == "__main__":
    main()
