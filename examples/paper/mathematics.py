"""Fine-tunes a pretrained model on worked grade-school problems, by adapters of every kind.

    python3 examples/paper/mathematics.py train --data train.jsonl --test test.jsonl --minutes 9
    python3 examples/paper/mathematics.py plot                 # from the JSON alone

The mathematics of Table 1 of arXiv 2405.12130, and its table of compressions (Table 4), with
SmolLM2-135M. The files are those of GSM8K (github.com/openai/grade-school-math, MIT licence);
without them reasoning-gym makes problems of the kind. A rate is chosen by the loss of problems held
out of the training files; only runs at chosen rates answer those of the test, greedily, and an
answer counts if it ends in the right number after `####`. Pairs longer than a row are not trained
on, nor in a loss; they are asked all the same.
"""

import argparse
import functools
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from finetune import chat_data, prompts, solve
from llama.model import Llama
from paper import base_models, study
from paper.figures import draw_tests
from paper.recipes import FINETUNING
from paper.results import COST, Columns, Results
from paper.training import Rows
from paper.trial import Measures, Task

COLUMNS: Columns = {
    "test loss|.4f": lambda run: run["curve"][-1].get("test"),
    "right, %|.1f": lambda run: 100 * run["curve"][-1]["exact"] if "exact" in run["curve"][-1]
    else None,
    "held-out loss|.4f": lambda run: run["cost"],
    **COST,
}  # fmt: skip


def columns(results: Results) -> Columns:
    """What the table shows, of whatever results."""
    del results
    return COLUMNS


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; `--help` prints them."""
    parser = study.parser_of(__file__, FINETUNING, "Fine-tunes on grade-school mathematics.")
    add = parser.add_argument
    add("--model", choices=base_models.NAMES, default="smollm2")
    add("--data", type=pathlib.Path, help="JSON lines; by default problems that are made")
    add("--test", type=pathlib.Path, help="JSON lines, with --data")
    add("--prompt-field", default="question")
    add("--response-field", default="answer")
    add("--pairs", type=int, default=7000, help="how many are made without --data")
    add("--held-out", type=int, default=200, help="pairs to choose rates by")
    add("--test-items", type=int, default=1319)
    add("--new-tokens", type=int, default=256, help="of an answer at most")
    add("--test-batch", type=int, default=330, help="prompts that are answered at a time")
    parser.set_defaults(steps=690, batch=32, length=384, merge_every=173, warmup=50)
    args = parser.parse_args(arguments)
    if (args.data is None) != (args.test is None):
        parser.error("--data goes with --test")
    args.evaluate_at = args.evaluate_at or [0, args.steps // 3, args.steps * 2 // 3]
    return args


def make_task(args: argparse.Namespace) -> Task:
    """Problems, a row each."""
    base = base_models.load(args.model)
    fields = args.prompt_field, args.response_field
    if args.data:
        pairs, tested = (prompts.read_pairs(path, *fields) for path in (args.data, args.test))
    else:
        made = prompts.gsm_symbolic(args.pairs + args.test_items, seed=0)
        pairs, tested = prompts.hold_out(made, args.test_items)
    pairs, held_out = prompts.hold_out(pairs, args.held_out)
    special = [token.content for token in base.tokenizer.get_added_tokens_decoder().values()]
    template = prompts.make_template(None if special else "{prompt}\n", special)
    encode = functools.partial(chat_data.encode, tokenizer=base.tokenizer, template=template,
                               end_token=base.end_token)  # fmt: skip
    tested = tested[: args.test_items]
    examples = encode(tested)

    def rows_of(encoded: list[chat_data.Example]) -> Rows:
        packed = chat_data.pack(encoded, args.length, packing=False)
        return Rows(packed.tokens, packed.response)

    trained, chosen_by, test = rows_of(encode(pairs)), rows_of(encode(held_out)), rows_of(examples)
    print(
        f"{len(trained.tokens):,} of {len(pairs):,} pairs are no longer than {args.length} tokens "
        f"and trained on; {len(chosen_by.tokens):,} choose the rate; {len(tested):,} test"
    )

    def examine(model: Llama, params: Any) -> Measures:
        answers = solve.solve(model, params, examples, base.tokenizer, base.end_token,
                              args.test_batch, args.new_tokens)  # fmt: skip
        return solve.accuracy(answers, [pair.response for pair in tested])

    rows = trained, chosen_by, test  # measured as the first runs in the JSON were
    return base_models.finetuning_task(args, base, rows, examine, args.dtype)


def draw(results: Results, path: pathlib.Path) -> None:
    """The loss of the test's answers, of those that choose rates, and the answers right."""
    draw_tests(results, COLUMNS, path)


if __name__ == "__main__":
    study.main(parse_args(), make_task, FINETUNING, columns, draw)
