"""The flags of finetune_llama.py: those of every training, and its own for data and evaluation."""

import argparse
import pathlib

from train.flags import FREE, add_training, check_training

#: What the losses of the training do not depend on.
FREE_TOO = FREE | {"eval_every", "jsonl", "new_tokens", "test", "test_batch", "test_items"}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; `--help` prints them."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes a Llama on pairs of prompt and response.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", help="or a directory in Hugging Face's "
        "layout: config.json, tokenizer.json, safetensors")  # fmt: skip
    add = parser.add_argument_group("data").add_argument
    add("--data", dest="jsonl", type=pathlib.Path, metavar="FILE", help="JSON lines; by default "
        "grade-school maths that reasoning-gym makes")  # fmt: skip
    add("--prompt-field", default="question", help="of the JSON lines")
    add("--response-field", default="answer", help="of the JSON lines")
    add("--pairs", type=int, default=4000, help="how many are made without --data")
    add("--template", help="a text with {prompt} in it, up to where the response begins; by "
        "default SmolLM2's, for tokenizers that know its tokens")  # fmt: skip
    add("--packing", action=argparse.BooleanOptionalAction, default=True, help="several pairs in a "
        "row, which do not see each other; else a row for each, padded")  # fmt: skip
    add_training(parser, ["mora", "lora", "full"])
    add = parser.add_argument_group("evaluation").add_argument
    add("--test", type=pathlib.Path, metavar="FILE", help="JSON lines; by default pairs that are "
        "held out of the data")  # fmt: skip
    add("--test-items", type=int, default=16, help="pairs to evaluate on, the first of --test")
    add("--test-batch", type=int, default=16, help="prompts that are answered at a time")
    add("--new-tokens", type=int, default=256, help="tokens of an answer at most; 0: generate none")
    add("--eval-every", type=int, default=20, help="steps between losses on the held-out pairs")
    parser.add_argument_group("mesh").add_argument("--fsdp", type=int, default=1, help="devices "
        "that share each kernel; the others hold copies")  # fmt: skip
    parser.set_defaults(out="results/finetune", length=512, batch=2, data=0, tensor=1)
    parser.set_defaults(remora_every=0, also_train="", split_adapters=False)
    args = check_training(parser, parser.parse_args(arguments))
    if args.test_items < 1:
        parser.error(f"--test-items {args.test_items}: wanted at least 1")
    if args.model != "smollm2":
        out = pathlib.Path(args.out).resolve()
        if pathlib.Path(args.model).resolve().is_relative_to(out):
            parser.error(f"--model {args.model} lies in --out {args.out}, where models of an "
                "earlier run are deleted: wanted another --out")  # fmt: skip
    if args.method == "full":
        args.param_dtype = "float32"  # what is trained is
    args.test_batch = min(args.test_batch, args.test_items)
    return args
