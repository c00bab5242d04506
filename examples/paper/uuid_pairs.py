"""Memorises random UUID pairs with a pretrained model, by every scheme and LoRA of equal size.

    python3 examples/paper/uuid_pairs.py train --minutes 9     # again, until it says all is done
    python3 examples/paper/uuid_pairs.py plot                  # from the JSON alone

Table 2 of arXiv 2405.12130, and its table of compressions (Table 4) on this task: SmolLM2-135M
instead of LLaMA-2-7B, 2,000 pairs instead of 10,000. Nothing that was pretrained helps here: what
is right shows how much an adapter can store. `--model tiny` is a random model, for a CPU.
"""

import argparse
import functools
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

import mora_jax
from data import uuids
from llama.model import Llama, generate
from mora_jax import LowRank, Sharing
from paper import base_models, study
from paper.figures import dot_panels, ranked
from paper.recipes import STAGGERED, Recipe, adapters
from paper.results import COST, Columns, Results, Run, note
from paper.training import Rows
from paper.trial import Measures, Task

METHODS = {
    "all parameters": Recipe(None, rate=4e-4),
    **adapters(8, 4e-3, 4e-3),
    "staggered 8": Recipe(Sharing(), 8, schemes=STAGGERED),
    "LoRA 32": Recipe(LowRank(), 32, 2e-3),
    "sharing 32": Recipe(Sharing(), 32, 2e-3),
    **adapters(128, 1e-3, 1e-3),
}


def columns(results: Results) -> Columns:
    """Accuracies at some steps, what was learned, what it took."""

    def accuracy_at(step: int, run: Run) -> float | None:
        found = [100 * x["accuracy"] for x in run["curve"] if x["step"] == step]
        return found[0] if found else None

    steps = [*results.setting["evaluate_at"], results.setting["steps"]]
    return {
        **{f"% at {step}|.1f": functools.partial(accuracy_at, step) for step in steps},
        "singular values > 0.1|.0f": lambda run: run.get("above"),
        **COST,
    }


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; `--help` prints them."""
    parser = study.parser_of(__file__, METHODS, "Memorises random UUID pairs.")
    parser.add_argument("--model", choices=base_models.NAMES, default="smollm2")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--characters", type=int, default=32, help="of key and value, without "
        "dashes: the first ones of each UUID")  # fmt: skip
    parser.set_defaults(steps=900, batch=200, evaluate_at=[300, 500, 700], warmup=50)
    args = parser.parse_args(arguments)
    args.batch = min(args.batch, args.pairs)
    return args


def cost(curve: list[Measures]) -> float:
    """What is wrong in the end; of rates that end alike, the one that gets there first is best."""
    wrong = [1 - found["accuracy"] for found in curve]
    return wrong[-1] + 1e-3 * float(np.mean(wrong))


def make_task(args: argparse.Namespace) -> Task:
    """Pairs of the seed; accuracy by generation, over all of them."""
    base = base_models.load(args.model)
    base_model = Llama(base.config, dtype=args.dtype, param_dtype="float32")
    at_once = min(1000, args.pairs)

    @functools.cache
    def pairs_of(seed: int) -> tuple[list[tuple[str, str]], uuids.Examples]:
        pairs = uuids.make_pairs(args.pairs, seed)
        if args.characters < 32:
            short = lambda text: text.replace("-", "")[: args.characters]
            pairs = [(short(key), short(value)) for key, value in pairs]
        return pairs, uuids.encode(pairs, base.tokenizer, base.end_token)

    def rows(seed: int) -> Rows:
        examples = pairs_of(seed)[1]
        # Of a length that matrix units like, and that seeds whose longest pair differs by a token
        # share; what stands at the end is neither read nor learned.
        missing = ((0, 0), (0, (1 - examples.tokens.shape[1]) % 16))
        return Rows(np.pad(examples.tokens, missing), np.pad(examples.loss_mask, missing))

    def measure(step: int, seed: int, params: Any) -> Measures:
        del step
        pairs, examples = pairs_of(seed)
        length, texts = int(examples.loss_mask.sum(axis=1).max()), []
        for start in range(0, len(pairs), at_once):
            # Whole batches compile once.
            index = np.arange(start, start + at_once) % len(pairs)
            prompts, mask = examples.prompts[index], examples.prompt_mask[index]
            tokens = generate(base_model, params, prompts, mask, length, end_token=base.end_token)
            texts += base.tokenizer.decode_batch(np.asarray(tokens))
        values = [value for _, value in pairs]
        return {"accuracy": uuids.character_accuracy(texts[: len(pairs)], values)}

    def finish(before: Any, after: Any, adapted: Any, plan: mora_jax.Plan | None) -> dict[str, Any]:
        del before, after
        return {} if plan is None else {"above": mora_jax.spectrum(adapted, plan).mean_count}

    return Task(
        base_model=base_model,
        start=lambda seed: jax.tree.map(jnp.asarray, base.params),
        rows=rows,
        measure=measure,
        cost=cost,
        finish=finish,
        base=base_models.fingerprint(args.model, base),
    )


def draw(results: Results, path: pathlib.Path) -> None:
    """Accuracy at the first evaluation, and the spectrum at the end, as Figure 5 counts it."""
    setting, (head, accuracy) = results.setting, next(iter(columns(results).items()))
    early = f"characters right, {head.split('|')[0]} steps (dotted: by chance)"
    above = f"singular values above 0.1 at {setting['steps']} steps, mean of layers"
    methods = ranked(results, accuracy)[::-1]
    panels: Columns = {early: accuracy, above: lambda run: run.get("above")}
    figure, axes = dot_panels(results, methods, panels)
    axes[0].axvline(100 / 16, color="gray", linestyle=":", linewidth=1)
    figure.suptitle(f"{setting['pairs']:,} UUID pairs, {setting['model']}; {note(results)}",
                    fontsize=9)  # fmt: skip
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    study.main(parse_args(), make_task, METHODS, columns, draw)
