"""What every experiment here does: flags, runs one after the other, JSON, a table, a figure.

Runs that are done stand in the JSON. One that was cut off, by the time allowed or by a kill, goes
on from its last checkpoint: the same command is given again until it says that all is done. Several
programs may train at a time, other methods or other seeds and in another `--out` each; `time` is
for a device that does nothing else.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import mora_jax
from data import text
from paper.recipes import Recipe
from paper.results import Columns, Results, table
from paper.training import CompiledSteps, Training, make_optimizer, make_plan
from paper.trial import Task, Trial, begin, run

#: Flags that the losses of a run do not depend on.
FREE = {"mode", "methods", "seeds", "minutes", "json", "picture", "out", "rate_scale", "save_every"}

#: What `train` says at the end, where nothing is left to do.
DONE = "all is done"

#: When the program began; the time allowed is its own, not the training's.
STARTED = time.monotonic()


def parser_of(file: str, methods: Mapping[str, Recipe], does: str) -> argparse.ArgumentParser:
    """The flags that all experiments have.

    Args:
      file: the experiment's; its results lie beside it.
      methods: what it can compare.
      does: for `--help`.
    """
    parser = argparse.ArgumentParser(
        description=does, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    here = pathlib.Path(file)
    add = parser.add_argument
    add("mode", choices=["train", "time", "plot"], help="plot draws what the JSON holds")
    add("--methods", nargs="+", choices=methods, default=[*methods])
    add("--steps", type=int)
    add("--batch", type=int, help="rows in a step")
    add("--length", type=int, help="tokens of a row")
    add("--evaluate-at", type=int, nargs="+", default=[], help="steps, beside the last")
    add("--merge-every", type=int, help="steps; only of the methods that merge")
    add("--warmup", type=int, help="steps")
    add("--rewarm", type=int, default=25, help="steps of the climb after a merge")
    add("--clip", type=float, default=1.0, help="norm that gradients are clipped to")
    add("--rate-scale", type=float, default=1.0, help="multiplies where searches for rates "
        "begin")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="the first chooses the rate")
    add("--dtype", default="bfloat16", help="of the training; parameters are float32")
    add("--minutes", type=float, default=1e9, help="after these, save and end")
    add("--save-every", type=int, default=300, help="steps between checkpoints of a run")
    add("--out", type=pathlib.Path, default=pathlib.Path("results", here.stem),
        help="a directory for the run that is under way")  # fmt: skip
    add("--json", type=pathlib.Path, default=here.with_suffix(".json"))
    add("--picture", type=pathlib.Path, default=here.with_suffix(".png"))
    return parser


def settings(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """What all losses depend on, by name, as JSON holds it; `seed` is the one that finds rates."""

    def plain(value: Any) -> Any:
        """Of a file its name: where it lies is the machine's."""
        if isinstance(value, list):
            return [plain(part) for part in value]
        return value.name if isinstance(value, pathlib.Path) else value

    flags = {name: plain(value) for name, value in vars(args).items() if name not in FREE}
    first = args.seeds[0]
    flags |= {"base": task.base} if task.base else {}
    return flags | {"seed": first, "rows": text.Windows(task.rows(first).tokens, first).digest}


def prepare(
    args: argparse.Namespace, task: Task, recipe: Recipe
) -> tuple[mora_jax.Plan | None, Training, CompiledSteps]:
    """What a method needs, whatever its rate and seed."""
    plan = make_plan(recipe, task.base_model, getattr(args, "rank", 0), task.also_train)
    # Without a loop over layers: it copies what they keep into a stack, and its parts out again.
    model = dataclasses.replace(task.base_model, unroll=task.base_model.config.num_layers)
    training = Training(model, recipe, make_optimizer(args.clip, plan))
    return plan, training, CompiledSteps(training)


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other programs out of a directory, until the end or, at the latest, this program's.

    Raises:
      ValueError: one is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another program trains in {folder}: give this one another --out."
            raise ValueError(message) from None
        yield


def train(args: argparse.Namespace, task: Task, methods: Mapping[str, Recipe]) -> Results:
    """Does what there is left to do, for as long as it may."""
    with alone(args.out):
        return _train(args, task, methods)


def _train(args: argparse.Namespace, task: Task, methods: Mapping[str, Recipe]) -> Results:
    deadline = STARTED + 60 * args.minutes
    setting = settings(args, task)
    results, begun = Results.open(args.json, setting), False
    for method in args.methods:
        recipe = methods[method]
        plan, training, steps_of = prepare(args, task, recipe)
        start = args.rate_scale * recipe.rate
        if other := {x["recipe"] for x in results.of(method)} - {repr(recipe)}:
            raise ValueError(f"{args.json}: {method} was {other.pop()}, and is {recipe}.")
        while (todo := results.next_of(method, start, args.seeds)) is not None:
            rate, seed = todo
            folder = args.out.absolute() / f"{method} {rate:g} {seed}".replace(" ", "_")
            trial = Trial(method, rate, seed, setting, folder)
            done = None
            if not begun or time.monotonic() < deadline:
                done = run(args, task, training, steps_of, plan, trial, deadline)
            if done is None:
                print("the time is over; the same command goes on")
                return results
            results.add(done)
            shutil.rmtree(folder, ignore_errors=True)
            begun = True
            print(f"{method}, rate {rate:g}, seed {seed}: cost {done['cost']}", flush=True)
    print(DONE)
    return results


def time_steps(args: argparse.Namespace, task: Task, methods: Mapping[str, Recipe]) -> Results:
    """Times each method's step: the median of five stretches of ten, after two to warm up.

    As a program it compiles every step anew, on the device that it has to itself.
    """
    results = Results.open(args.json, settings(args, task))
    rows = task.rows(args.seeds[0])
    index = jnp.arange(args.batch) % len(rows.tokens)
    rows = jax.tree.map(jnp.asarray, rows)
    for method in tqdm.tqdm(args.methods, desc="timing"):
        plan, training, steps_of = prepare(args, task, methods[method])
        params, key = task.start(args.seeds[0]), jax.random.key(0)
        state = begin(training, params, plan, key)
        trained, stretches = (state.trainable, state.opt_state), []
        given = state.frozen, rows, index, jnp.zeros((), jnp.float32)
        step_once = steps_of.of(trained, *given, plan)
        for steps in (2, 10, 10, 10, 10, 10):
            began = time.monotonic()
            for _ in range(steps):
                trained, loss = step_once(trained, *given)
            jax.block_until_ready(loss)  # pyright: ignore[reportPossiblyUnboundVariable]
            stretches.append(1000 * (time.monotonic() - began) / steps)
        found = {
            "milliseconds": float(np.median(stretches[1:])),
            "stretches": np.round(stretches[1:], 3).tolist(),
            "gigabytes": steps_of.bytes / 1e9, "compile_seconds": steps_of.seconds,
            "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        }  # fmt: skip
        results.add(times={method: found})
        print(f"{method}: {found['milliseconds']:.1f} ms, {found['gigabytes']:.1f} GB", flush=True)
    return results


def main(
    args: argparse.Namespace,
    make_task: Callable[[argparse.Namespace], Task],
    methods: Mapping[str, Recipe],
    columns: Callable[[Results], Columns],
    draw: Callable[[Results, pathlib.Path], None],
) -> None:
    """Trains, times, or draws what was trained."""
    if args.mode == "time":
        # A compiler tries kernels out: what was compiled on a busy device may have worse ones.
        jax.config.update("jax_enable_compilation_cache", False)
    elif not getattr(jax.config, "jax_compilation_cache_dir", None):
        # Started again, a program need not compile again.
        jax.config.update("jax_compilation_cache_dir", str(args.out.absolute() / "compiled"))
    if args.mode == "train":
        results = train(args, make_task(args), methods)
    elif args.mode == "time":
        results = time_steps(args, make_task(args), methods)
    else:
        results = Results.open(args.json)
        draw(results, args.picture)
    if results.runs:
        print(table(results, columns(results)))
