"""Pretrains a small Llama from scratch in every way there is, each at its own best learning rate.

    python3 examples/paper/pretrain.py train --minutes 9       # again, until it says all is done
    python3 examples/paper/pretrain.py plot          # from the JSON alone

Table 3 of arXiv 2405.12130 in small, and what it leaves open: which cycle of groupings ReMoRA
should have. As there, norms and embeddings are trained in full beside the adapters, and every
method sees the same tokens in the same order. Of the text that is held out half chooses the rates,
the other half is what is told.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from data import text
from llama.model import Llama
from paper import libraries, study
from paper.figures import draw_curves, draw_dots, ranked
from paper.recipes import RECIPES
from paper.results import COST, Columns, Results, Run, note
from paper.training import Rows, held_out_loss
from paper.trial import Measures, Task
from train.flags import FROM_SCRATCH, PRESETS


def reference(results: Results) -> str:
    """What others are compared to on each seed's text and start: merges that change no groups.

    Where those have not run with seeds that tell, no merges.
    """
    found = [run["seed"] for run in results.best("one grouping")]
    return "one grouping" if {*found} - {results.setting["seed"]} else "MoRA"


def minus_reference(results: Results) -> Callable[[Run], float]:
    """Run -> its test loss minus the reference's of the same seed; NaN where that has none."""
    runs = results.best(reference(results))
    of_seed = {run["seed"]: run["curve"][-1]["test"] for run in runs}
    return lambda run: run["curve"][-1]["test"] - of_seed.get(run["seed"], np.nan)


def columns(results: Results) -> Columns:
    """Losses, also seed by seed beside the reference's, ranks, what it took."""
    difference = minus_reference(results)
    loss = lambda run: run["curve"][-1]["test"]
    return {
        "loss|.4f": loss,
        f"minus {reference(results)}'s|+.4f": difference,
        "perplexity of a byte|.3f": lambda run: float(np.exp(loss(run))),
        "rank|.0%": lambda run: run["rank"],
        "effective rank|.0%": lambda run: run["effective_rank"],
        **COST,
    }


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; `--help` prints them."""
    parser = study.parser_of(__file__, RECIPES, "Pretrains a small Llama in every way there is.")
    add = parser.add_argument
    add("--model", choices=["tiny", "mini", "20m", "60m", "150m"], default="20m")
    add("--rank", type=int, default=16, help="LoRA's; MoRA trains as much")
    add("--held-out", type=int, default=256, help="sequences that are measured, not trained on")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--text", type=pathlib.Path, nargs="+",
                       help="files, .jsonl too; by default Python's own")  # fmt: skip
    texts.add_argument("--libraries", action="store_true",
                       help="the sources of eight libraries, 109 MB")  # fmt: skip
    parser.set_defaults(steps=1500, batch=64, length=256, merge_every=250, warmup=100, rewarm=20)
    args = parser.parse_args(arguments)
    args.evaluate_at = args.evaluate_at or [*range(250, args.steps, 250)]
    return args


def model_of_bytes(preset: str, dtype: str) -> Llama:
    """A preset's model with bytes as tokens: 256, so it is smaller than its name says."""
    return Llama(dataclasses.replace(PRESETS[preset], vocab_size=256), dtype, "float32")


@functools.partial(jax.jit, static_argnums=0)
def random_params(base_model: Llama, seed: jax.Array) -> Any:
    """A base model's parameters."""
    return base_model.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))["params"]


def parameters_of(setting: Mapping[str, Any]) -> int:
    """How many a setting's model has."""
    model = model_of_bytes(setting["model"], setting["dtype"])
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(random_params, model, 0)))


def make_task(args: argparse.Namespace) -> Task:
    """Bytes of text, cut into windows of which some are held out."""
    if args.libraries:
        documents = libraries.documents()
    else:
        documents = text.read_documents(args.text) if args.text else text.python_documents()
    windows = text.Windows.cut(documents, text.encode_bytes, 0, args.length, 0)
    shuffled = np.random.default_rng(0).permutation(windows.tokens)
    ends = [-args.held_out, -(args.held_out // 2)]
    trained, chosen_by, test = (Rows.whole(x) for x in np.split(shuffled, ends))
    print(f"{len(trained.tokens):,} windows to train on, {args.held_out:,} held out")
    base_model = model_of_bytes(args.model, args.dtype)

    def measure(step: int, seed: int, params: Any) -> Measures:
        del step, seed
        loss = lambda rows: float(held_out_loss(base_model, params, rows, args.batch))
        return {"loss": loss(chosen_by), "test": loss(test)}

    return Task(
        base_model=base_model,
        start=functools.partial(random_params, base_model),
        rows=lambda seed: trained,
        measure=measure,
        cost=lambda curve: curve[-1]["loss"],
        finish=lambda before, after, adapted, plan: ranks(before, after),
        also_train=FROM_SCRATCH,
    )


def ranks(before: Any, after: Any) -> dict[str, float]:
    """How much of full rank the whole update has: means over the matrices of all layers.

    `rank` counts singular values above a thousandth of the largest; `effective_rank` is the
    exponential of the entropy of their shares (Roy and Vetterli, 2007).
    """
    old, new = (traverse_util.flatten_dict(jax.device_get(t), sep="/") for t in (before, after))
    found = []
    for path in (path for path in old if path.endswith("_proj/kernel")):
        updates = np.asarray(new[path]) - np.asarray(old[path])
        for update in updates.reshape(-1, *updates.shape[-2:]):  # one, or a stack of layers
            values = np.linalg.svd(update, compute_uv=False)
            share = values / max(values.sum(), 1e-30)
            entropy = -(share * np.log(np.maximum(share, 1e-30))).sum()
            full = len(values)
            found.append(((values > 1e-3 * values[0]).sum() / full, np.exp(entropy) / full))
    rank, effective = np.mean(found, 0)
    return {"rank": float(rank), "effective_rank": float(effective)}


def draw(results: Results, path: pathlib.Path) -> None:
    """Held-out loss by step, and at the end what each seed has less than the reference."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    methods = ranked(results, columns(results)["loss|.4f"])
    draw_curves(left, results, methods, "test")
    left.set_ylabel("held-out loss")
    draw_dots(right, results, methods, minus_reference(results))
    right.axvline(0, color="gray", linestyle=":", linewidth=1)
    right.set_xlabel(f"held-out loss minus that of {reference(results)}, each seed")
    setting = results.setting
    tokens = setting["batch"] * setting["length"]
    figure.suptitle(
        f"{parameters_of(setting) / 1e6:.3g} million parameters, rank {setting['rank']}, "
        f"{setting['steps']:,} steps of {tokens:,} tokens, a merge every "
        f"{setting['merge_every']}; {note(results)}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    study.main(parse_args(), make_task, RECIPES, columns, draw)
