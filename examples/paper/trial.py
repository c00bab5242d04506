"""One run of one method: from its start, or from its last checkpoint, to its line of results."""

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from etils import epath

import mora_jax
from data import text
from llama.model import Llama
from paper.training import CompiledSteps, Rows, Training, all_finite, make_rates, merges_of, parted
from train.checkpoints import Checkpoints
from train.state import TrainState

#: What an evaluation found, by name; with the step it was made at.
Measures = dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What all methods are trained for.

    Attributes:
      base_model: the model.
      start: seed -> its parameters, new arrays.
      rows: seed -> what is trained on.
      measure: (step, seed, parameters of the base model) -> what they are worth.
      cost: what is measured over a run -> what the best rate has least of.
      finish: (parameters at the start, those at the end without adapters, those with, plan) ->
        what else is told of a run. The plan is None where there are no adapters.
      also_train: pattern of parameters trained in full beside adapters.
      base: tells the numbers that training starts from, where the flags do not.
    """

    base_model: Llama
    start: Callable[[int], Any]
    rows: Callable[[int], Rows]
    measure: Callable[[int, int, Any], Measures]
    cost: Callable[[list[Measures]], float]
    finish: Callable[[Any, Any, Any, mora_jax.Plan | None], dict[str, Any]]
    also_train: str | None = None
    base: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """One run.

    Attributes:
      method: its name.
      rate: of learning, at its height.
      seed: of the adapters' start and of the order of the rows.
      settings: what its losses depend on beside those, by name.
      folder: for its checkpoints, until its results are safe.
    """

    method: str
    rate: float
    seed: int
    settings: dict[str, Any]
    folder: pathlib.Path


def begin(
    training: Training, params: Any, plan: mora_jax.Plan | None, key: jax.Array
) -> TrainState:
    """The state before the first step; the parameters stay."""
    # A copy, for merges and steps give up what they change.
    params = jax.tree.map(jnp.copy, params)
    if plan is not None:
        params = mora_jax.attach(plan, params, key=key)
    trainable, _, frozen = parted(params, plan, None)
    return TrainState(trainable, training.optimizer.init(trainable), frozen)


def run(
    args: argparse.Namespace,
    task: Task,
    training: Training,
    steps_of: CompiledSteps,
    start: mora_jax.Plan | None,
    trial: Trial,
    deadline: float,
) -> dict[str, Any] | None:
    """Trains; None where the time is over before the end.

    A run that diverges ends there, with None as its cost.

    Args:
      args: the flags.
      task: what for.
      training: the method's.
      steps_of: its compiled steps.
      start: its adapters at the start.
      trial: the run.
      deadline: by `time.monotonic`.
    """
    recipe, seed = training.recipe, trial.seed
    rows = task.rows(seed)
    order = text.Windows(rows.tokens, seed)
    rows = jax.tree.map(jnp.asarray, rows)
    initial, plan = task.start(seed), start
    key = jax.random.fold_in(jax.random.key(seed), 1)
    merges = merges_of(args, recipe)
    rates = make_rates(args, recipe, trial.rate)
    stops = {*args.evaluate_at, *merges, args.steps}

    state, first, curve = begin(training, initial, start, key), 0, []
    curve_file = trial.folder / "curve.json"
    name = {"method": trial.method, "rate": trial.rate, "seed": seed, "recipe": repr(recipe)}
    name |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    of_run = {key: name[key] for key in ("method", "rate", "seed", "recipe")}
    # Of a base that stays as it was, no checkpoint need hold a copy.
    with Checkpoints(epath.Path(trial.folder), run=trial.settings | of_run, keep=1,
                     keeps_base=bool(recipe.merges), say=tqdm.tqdm.write) as saved:  # fmt: skip
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        if (restored := saved.restore(jax.eval_shape(lambda: state), places, start)) is not None:
            first, found, plan = restored
            state = found if recipe.merges else found._replace(frozen=state.frozen)
            curve = [
                found for found in json.loads(curve_file.read_text()) if found["step"] <= first
            ]
        bar = tqdm.tqdm(desc=f"{trial.method}, {trial.rate:g}, seed {seed}", initial=first,
                        total=args.steps, mininterval=5, leave=False)  # fmt: skip
        if 0 in args.evaluate_at and not first:
            curve.append({"step": 0, **task.measure(0, seed, initial)})
        for step in range(first + 1, args.steps + 1):
            index = jnp.asarray(order.rows((step - 1) * args.batch, args.batch))
            given = (
                (state.trainable, state.opt_state), state.frozen, rows, index,
                rates[step - 1],
            )  # fmt: skip
            (trainable, opt_state), loss = steps_of.of(*given, plan)(*given)
            state = TrainState(trainable, opt_state, state.frozen)
            bar.update()
            if step % 10 == 0 or step in stops:
                bar.set_postfix(loss=f"{float(loss):.4f}")  # waits, so that the clock is true
                if not (jnp.isfinite(loss) and all_finite(state.trainable)):
                    return {**name, "cost": None, "curve": curve, "diverged": step}
            if step in args.evaluate_at and step < args.steps:
                found = task.measure(step, seed, training.merged(state, plan))
                curve.append({"step": step, **found})
            if step in merges:
                state, plan = training.restart(state, plan, jax.random.fold_in(key, step))
            over = time.monotonic() > deadline
            if over or step % args.save_every == 0 or step == args.steps:
                scratch = curve_file.with_suffix(".partial")
                scratch.write_text(json.dumps(curve))
                scratch.replace(curve_file)
                saved.save(step, state, plan)
                if over:
                    return None
        # Its own checkpoint is there: what comes now may take long.
        found = task.measure(args.steps, seed, training.merged(state, plan))
        curve.append({"step": args.steps, **found})
        bar.close()
    adapted = mora_jax.join(state.trainable, state.frozen)
    final = training.merged(state, plan)
    return {
        **name, "cost": task.cost(curve), "curve": curve,
        **task.finish(initial, final, adapted, plan),
        "trained": sum(leaf.size for leaf in jax.tree.leaves(state.trainable)),
    }  # fmt: skip
