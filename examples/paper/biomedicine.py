"""Goes on pretraining a model on biomedical text, by adapters of every kind.

    python3 examples/paper/biomedicine.py train --medquad medquad.jsonl.xz \
        --pubmedqa pubmedqa.jsonl --minutes 9
    python3 examples/paper/biomedicine.py plot                 # from the JSON alone

The continual pretraining of Table 1 of arXiv 2405.12130, with SmolLM2-135M. It is trained on the
answers of MedQuAD (github.com/abachaa/MedQuAD, CC BY 4.0; JSON lines with `question` and `answer`)
and the abstracts of half of PubMedQA (github.com/pubmedqa/pubmedqa, MIT licence; JSON lines with
`question`, `context` and `answer`). MedQuAD asks the same of every disease in the same words, so a
twentieth of the diseases is held out, not of the rows: half of them choose the rate, the others
are the test. What is trained on and shares half of its runs of thirteen words with them is left
out. Of the questions of PubMedQA's other half those are right whose answer is likelier than the two
others (yes, no, maybe); nothing is generated.
"""

import argparse
import hashlib
import json
import lzma
import pathlib
import re
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from data import text
from llama.model import Llama
from paper import base_models, study
from paper.figures import draw_tests
from paper.recipes import FINETUNING
from paper.results import COST, Columns, Results
from paper.training import Rows, losses
from paper.trial import Measures, Task

#: What MedQuAD asks, up to the disease.
_ASKS = re.compile(
    r"(what (is \(are\)|causes|to do for|is the outlook for"
    r"|are the (symptoms of|treatments for|stages of|complications of)"
    r"|are the genetic changes related to|research \(or clinical trials\) is being done for)"
    r"|how many people are affected by|how to (diagnose|prevent)|who is at risk for|is"
    r"|do you have information about) +",
    re.IGNORECASE,
)

COLUMNS: Columns = {
    "test loss|.4f": lambda run: run["curve"][-1].get("test"),
    "PubMedQA right, %|.1f": lambda run: 100 * run["curve"][-1]["right"]
    if "right" in run["curve"][-1] else None,
    "held-out loss|.4f": lambda run: run["cost"],
    **COST,
}  # fmt: skip


def columns(results: Results) -> Columns:
    """What the table shows, of whatever results."""
    del results
    return COLUMNS


CHOICES = (" yes", " no", " maybe")

token_losses = jax.jit(losses, static_argnums=0)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; `--help` prints them."""
    parser = study.parser_of(__file__, FINETUNING, "Goes on pretraining on biomedical text.")
    add = parser.add_argument
    add("--model", choices=base_models.NAMES, default="smollm2")
    add("--medquad", type=pathlib.Path, help="JSON lines, plain or .xz; not for plot")
    add("--pubmedqa", type=pathlib.Path, help="JSON lines, plain or .xz; by default none")
    add("--held-out", type=int, help="rows of either part that is held out, at most")
    parser.set_defaults(steps=800, batch=32, length=512, merge_every=200, warmup=50)
    args = parser.parse_args(arguments)
    if args.mode != "plot" and not args.medquad:
        parser.error(f"{args.mode} needs --medquad")
    if args.held_out is not None and args.held_out < 1:
        parser.error(f"--held-out is {args.held_out}, wanted a number of rows")
    args.evaluate_at = args.evaluate_at or [0, args.steps // 4, args.steps // 2]
    return args


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """The objects of a file of JSON lines, which may be compressed."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def disease(question: str) -> str:
    """What a question of MedQuAD is about, in small letters and without punctuation.

    >>> disease("What are the symptoms of Hairy Cell Leukemia ?"), disease("Is Gout inherited ?")
    ('hairy cell leukemia', 'gout')
    >>> disease("How to prevent Parasites - Toxocariasis (also known as Roundworm) ?")
    'toxocariasis'
    """
    asks = _ASKS.match(question)
    about = question[asks.end() if asks else 0 :].strip(" ?").lower()
    about = about.removesuffix(" inherited").removeprefix("parasites - ")
    about = re.sub(r"\(.*?\)|^what i need to know about ", " ", about)
    return " ".join(re.findall(r"\w+", about))


def runs(document: str) -> set[int]:
    """All runs of thirteen words, by their hashes."""
    words = document.lower().split()
    return {hash(tuple(words[i : i + 13])) for i in range(max(1, len(words) - 12))}


def share(name: str) -> float:
    """A number from 0 to 1 that is a function of the name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32


def make_task(args: argparse.Namespace) -> Task:
    """Windows of text, and questions."""
    base = base_models.load(args.model)
    encode = lambda document: base.tokenizer.encode(document, add_special_tokens=False).ids

    def windows(documents: list[str]) -> Rows:
        order = np.random.default_rng(0).permutation(len(documents))
        shuffled = (documents[number] for number in order)
        cut = text.Windows.cut(shuffled, encode, base.end_token, args.length, 0)
        return Rows.whole(cut.tokens)

    parts: tuple[list[str], ...] = ([], [], [])
    for row in read(args.medquad):
        place = share(disease(row["question"]))
        parts[0 if place > 0.05 else 1 if place > 0.025 else 2].append(row["answer"])
    held = set().union(*map(runs, (*parts[1], *parts[2])))
    alike = lambda own: len(own & held) * 2 >= len(own)
    kept = [answer for answer in parts[0] if not alike(runs(answer))]
    print(f"{len(parts[0]) - len(kept):,} of {len(parts[0]):,} answers are too like those held out")
    parts = (kept, *parts[1:])
    studies = read(args.pubmedqa) if args.pubmedqa else []
    asked = [row for row in studies if share(row["question"]) < 0.5]
    parts[0].extend(row["context"] for row in studies if share(row["question"]) >= 0.5)
    trained, *held_out = map(windows, parts)
    chosen_by, test = (jax.tree.map(lambda x: x[: args.held_out], rows) for rows in held_out)
    print(
        f"{trained.tokens.size:,} tokens to train on, {chosen_by.tokens.size:,} choose the rate, "
        f"{test.tokens.size:,} and {len(asked):,} questions test"
    )
    choices = _choices(asked, encode, args.length)
    wanted = np.array([CHOICES.index(" " + row["answer"]) for row in asked])
    if asked:
        shares = np.bincount(wanted, minlength=len(CHOICES)) / len(asked)
        told = (f"{part:.1%}{choice}" for choice, part in zip(CHOICES, shares, strict=True))
        print(f"of the questions' answers {', '.join(told)}")

    def examine(model: Llama, params: Any) -> Measures:
        if not asked:
            return {}
        surprise = [
            token_losses(model, params, jax.tree.map(lambda x, at=at: x[at], choices))
            for at in np.arange(len(choices.tokens)).reshape(-1, len(CHOICES))
        ]
        likeliest = np.stack(surprise).sum(-1).argmin(-1)
        return {"right": float((likeliest == wanted).mean())}

    # In 16 bits the loss of one model differs by program, and by more than some methods differ.
    rows = trained, chosen_by, test
    return base_models.finetuning_task(args, base, rows, examine, "float32")


def _choices(asked: list[dict[str, str]], encode: text.Encode, length: int) -> Rows:
    """Each question with each answer, of which the answer's tokens alone are learned."""
    rows = Rows(np.zeros((len(asked) * len(CHOICES), length + 1), np.int32),
                np.zeros((len(asked) * len(CHOICES), length + 1), bool))  # fmt: skip
    numbers = iter(range(len(rows.tokens)))
    for row in asked:
        question = encode(f"\nQuestion: {row['question']}\nAnswer:")
        for choice in map(encode, CHOICES):
            number, room = next(numbers), length + 1 - len(question) - len(choice)
            found = [*encode(row["context"])[: max(room, 0)], *question, *choice]
            if len(found) > length + 1:
                raise ValueError(f"a question has {len(found)} tokens, --length is {length}.")
            rows.tokens[number, : len(found)] = found
            rows.learned[number, len(found) - len(choice) : len(found)] = True
    return rows


def draw(results: Results, path: pathlib.Path) -> None:
    """The loss of the test's diseases, of those that choose rates, and the questions right."""
    draw_tests(results, COLUMNS, path)


if __name__ == "__main__":
    study.main(parse_args(), make_task, FINETUNING, columns, draw)
