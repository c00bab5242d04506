"""Fine-tunes a Llama on pairs of prompt and response: adapters, a merged model, a figure.

    python3 run.py finetune                                # SmolLM2 on made grade-school maths
    python3 run.py finetune --data train.jsonl --prompt-field question --response-field answer
    python3 run.py finetune --model DIRECTORY --data train.jsonl --test test.jsonl --dtype bfloat16

The loss is that of the responses alone, and pairs that share a row do not see each other. Pairs
that are held out are measured by their loss and by the answers that the model generates, before and
after. Started again with the same flags, it resumes at its newest whole checkpoint.
"""

import argparse
import csv
import json
import math
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mora_jax
from data import text
from finetune import chat_data, prompts, results
from finetune.flags import FREE_TOO, parse_args
from finetune.held_out import HeldOut
from llama import pretrained
from llama.mesh import RULES, batch_sharding
from llama.model import Llama
from train import log as train_log
from train.checkpoints import Checkpoints, OtherRunError
from train.flags import of_the_run
from train.state import TrainState
from train.step import make_method, make_optimizer, make_step
from train.train_llama import base_places, lay_out, mesh_of

EVALUATIONS = ("step", "loss")


def load_data(
    args: argparse.Namespace, base: pretrained.Pretrained, mesh: Mesh
) -> tuple[chat_data.Rows, HeldOut]:
    """Reads or makes the pairs, holds some out, and lays the others into rows."""
    fields = args.prompt_field, args.response_field
    pairs = prompts.read_pairs(args.jsonl, *fields) if args.jsonl else (
        prompts.gsm_symbolic(args.pairs, seed=0))  # fmt: skip
    if args.test:
        held_out = prompts.read_pairs(args.test, *fields)[: args.test_items]
    else:
        pairs, held_out = prompts.hold_out(pairs, args.test_items)
    special = [token.content for token in base.tokenizer.get_added_tokens_decoder().values()]
    template = prompts.make_template(args.template, special)
    examples = chat_data.encode(pairs, base.tokenizer, template, base.end_token)
    rows = chat_data.pack(examples, args.length, packing=args.packing, seed=args.seed)
    examples = chat_data.encode(held_out, base.tokenizer, template, base.end_token)
    longest = max(args.length, *(len(x.prompt) + len(x.response) for x in examples))
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    measured = HeldOut(
        pairs=held_out,
        examples=examples,
        rows=chat_data.pack(examples, longest, packing=args.packing),
        base=base,
        batch=args.batch // args.accumulate,
        prompts=-(-args.test_batch // parts) * parts,
        new_tokens=args.new_tokens,
        place=batch_sharding(mesh),
    )
    left_out = len(pairs) - rows.segments.max(axis=1).sum()
    print(
        f"{len(pairs):,} pairs in {len(rows.tokens):,} rows of {args.length} tokens, "
        f"{(rows.segments > 0).mean():.0%} filled, {rows.response.sum():,} tokens learned; "
        f"{left_out:,} pairs are longer and left out; {len(held_out):,} are held out. The first "
        f"prompt:\n{template(pairs[0].prompt)}{pairs[0].response}"
    )
    return rows, measured


def finetune(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the fine-tuning and gives its summary."""
    started, mesh = time.perf_counter(), mesh_of(args)
    directory = None if args.model == "smollm2" else pathlib.Path(args.model)
    base = pretrained.load(directory, args.param_dtype)
    rows, held_out = load_data(args, base, mesh)
    order = text.Windows(rows.tokens, args.seed)
    base_model = Llama(base.config, args.dtype, args.param_dtype, args.remat)
    base_shardings = base_places(base_model, mesh)
    method = make_method(args, base_model).on_mesh(base_shardings)
    print(method.plan or "all parameters are trained")
    optimizer, schedule = make_optimizer(args, method.plan)
    shapes, shardings, make = lay_out(
        args, base_shardings, base_model, base.params, method, optimizer
    )
    step_once = make_step(optimizer, schedule, shardings, loss=chat_data.response_loss)
    place = NamedSharding(mesh, P(None, *batch_sharding(mesh).spec))
    key = jax.random.fold_in(jax.random.key(args.seed), 1) if args.dropout else None
    out, last = pathlib.Path(args.out).absolute(), min(args.steps, args.stop_at or args.steps)
    evaluations, before_path = out / "evaluations.csv", out / "before.json"

    def evaluate(step: int, loss: float) -> None:
        with evaluations.open("a") as file:
            csv.writer(file, lineterminator="\n").writerow([step, loss])

    run = of_the_run(args, order.digest, FREE_TOO)
    checkpoints = Checkpoints(
        epath.Path(out / "checkpoints"), run, keeps_base=False, keep=args.keep, say=print
    )
    with checkpoints, jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        first, state = 0, None
        if (restored := checkpoints.restore(shapes, shardings, method.plan)) is not None:
            first, state, _ = restored
        if state is None or state.frozen is None:
            begun = make()
            state = begun if state is None else state._replace(frozen=begun.frozen)
        model = method.adapt(base_model)
        train_log.cut(evaluations, first, EVALUATIONS)
        if not first:  # new adapters add nothing: this is the base
            before = held_out.measure(model, mora_jax.join(state.trainable, state.frozen))
            before_path.write_text(json.dumps(before))
            evaluate(0, before["loss"])
        before, train_started = json.loads(before_path.read_text()), time.perf_counter()
        with train_log.TrainLog(args.csv, first, args.steps, args.batch * args.length) as log:
            for step in range(first + 1, last + 1):
                index = order.rows((step - 1) * args.batch, args.batch)
                index = index.reshape(args.accumulate, -1)
                learned = rows.response[index, 1:].sum() / args.accumulate
                trainable, opt_state, metrics = step_once(
                    model, state.trainable, state.opt_state, state.frozen,
                    chat_data.make_batch(rows, index, place, learned), step - 1, key,
                )  # fmt: skip
                state = TrainState(trainable, opt_state, state.frozen)
                log.write(step, metrics)
                if step % args.eval_every == 0 or step == last:
                    with log.pause():
                        params = mora_jax.join(state.trainable, state.frozen)
                        evaluate(step, held_out.loss(model, params))
                if step % args.save_every == 0 or step == last:
                    log.flush()
                    checkpoints.save(step, state, method.plan)
        params = mora_jax.join(state.trainable, state.frozen)
        train_seconds = time.perf_counter() - train_started
        after = held_out.measure(model, params)
        sizes = results.save_models(args, out, params, method.plan, base_model, held_out)
    trained = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.trainable))
    summary = {
        **{name: getattr(args, name) for name in ("model", "method", "scheme", "rank", "lr",
           "batch", "accumulate", "length", "packing", "dtype", "param_dtype", "seed")},
        "steps": [first, last], "rows": len(rows.tokens), "test_items": len(held_out.pairs),
        "trained_parameters": trained, **sizes,
        "loss": [before["loss"], after["loss"]],
        "accuracy": [before["accuracy"], after["accuracy"]],
        "seconds": {"before": before["seconds"], "training": train_seconds,
                    "after": after["seconds"], "all": time.perf_counter() - started},
        **log.speed(), "device": jax.devices()[0].device_kind, "devices": jax.device_count(),
        "jax": jax.__version__,
        "peak_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }  # fmt: skip
    results.write(args, out, summary, held_out.pairs, before["answers"], after["answers"])
    return summary


def main() -> None:
    """Fine-tunes, and prints the summary as JSON."""
    args = parse_args()
    try:
        summary = json.dumps(finetune(args))
    except OtherRunError as error:
        raise SystemExit(str(error)) from None
    print(summary)
    if args.json:
        args.json.write_text(summary + "\n")


if __name__ == "__main__":
    main()
