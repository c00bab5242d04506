"""The flags of train_llama.py, those of every training, and which of them the losses depend on."""

import argparse
import dataclasses
import pathlib
from collections.abc import Set
from typing import Any

from llama.model import LlamaConfig


def _sizes(features, hidden_features, num_layers, num_heads, num_kv_heads, **other):
    return LlamaConfig(
        vocab_size=other.pop("vocab_size", 0),  # 0: the tokenizer's
        features=features,
        hidden_features=hidden_features,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_features=features // num_heads,
        **other,
    )


_LLAMA_3 = {"vocab_size": 128256, "rope_theta": 500000.0, "norm_epsilon": 1e-5}

#: Models with random weights. 20m and 60m have so many with a vocabulary of 32,000; with bytes as
#: tokens 3 and 25 million, 150m 152, and mini 0.4.
PRESETS = {
    "tiny": _sizes(32, 96, 2, 4, 2),
    "mini": _sizes(128, 344, 2, 4, 4),
    "20m": _sizes(256, 688, 4, 4, 4),
    "60m": _sizes(512, 1376, 8, 8, 8),
    "150m": _sizes(1024, 2736, 12, 16, 16),
    "8b": _sizes(4096, 14336, 32, 32, 8, **_LLAMA_3),
    "70b": _sizes(8192, 28672, 80, 64, 8, **_LLAMA_3),
}

LEARNING_RATES = {"mora": 1e-3, "lora": 1e-3, "full": 1e-4, "baseline": 1e-3}

#: What ReMoRA trains in full beside the adapters where the base is random.
FROM_SCRATCH = r".*norm/scale|embed_tokens/embedding|lm_head/kernel"

#: What the losses do not depend on: the machine, how memory is saved, what is written and where.
FREE = {
    "accumulate", "coordinator", "csv", "data", "distributed", "fsdp", "json", "keep", "out",
    "process", "processes", "remat", "save_every", "split_adapters", "stop_at", "tensor", "text",
    "text_fields",
}  # fmt: skip


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; `--help` prints them."""
    parser = argparse.ArgumentParser(
        description="Trains a Llama on a mesh.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=["smollm2", *PRESETS], default="smollm2", help="or a random one's size")
    add_training(parser, [*LEARNING_RATES])
    add = parser.add_argument_group("ReMoRA").add_argument
    add("--remora-every", type=int, default=0, help="steps between merges, or 0")
    add("--cycle", choices=["auto", "groupings", "shifts", "signs"], default="auto",
        help="the groupings of sharing, one after each merge")  # fmt: skip
    add("--rounding", choices=["nearest", "stochastic"], default="nearest", help="of merges into "
        "kernels narrower than float32")  # fmt: skip
    add("--also-train", help="parameters trained in full, a pattern; ReMoRA from scratch has one")
    add = parser.add_argument_group("text").add_argument
    add("--text", type=pathlib.Path, nargs="+", help="files, .jsonl too; by default Python's own")
    add("--text-fields", nargs="+", default=[], help="of .jsonl; by default all that are strings")
    add("--tokenizer", choices=["bytes", "smollm2"], help="by default bytes for tiny alone")
    add = parser.add_argument_group("mesh and processes").add_argument
    add("--data", type=int, default=0, help="copies of the model; 0: as many as devices allow")
    add("--fsdp", type=int, default=1, help="parts of the batch and of every kernel")
    add("--tensor", type=int, default=1, help="parts of heads and of hidden features")
    add("--split-adapters", action="store_true", help="keep adapters and their optimizer's state "
        "in parts over the fsdp devices, for large ranks")  # fmt: skip
    add("--distributed", action="store_true", help="several processes, which JAX finds by itself "
        "under Slurm, Open MPI, on Cloud TPU and GKE")  # fmt: skip
    add("--coordinator", help="HOST:PORT of process 0, where nothing else says; then also:")
    add("--process", type=int, help="the number of this process, from 0")
    add("--processes", type=int, help="how many there are")
    args = check_training(parser, parser.parse_args(arguments))
    args.tokenizer = args.tokenizer or ("bytes" if args.model == "tiny" else "smollm2")
    if args.also_train is None:
        from_scratch = args.remora_every and args.model != "smollm2"
        args.also_train = FROM_SCRATCH if from_scratch else ""
    if args.remora_every and args.method not in ("mora", "lora"):
        parser.error(f"--remora-every merges adapters; --method {args.method} has none")
    return args


def add_training(parser: argparse.ArgumentParser, methods: list[str]) -> None:
    """Adds the flags of every training: precision, method, steps, output."""
    add = parser.add_argument_group("precision and memory").add_argument
    add("--dtype", default="float32", help="of the computation")
    add("--param-dtype", default="float32", help="of frozen parameters; trained ones are float32")
    add("--remat", action="store_true", help="recompute layers: less memory")
    add = parser.add_argument_group("method").add_argument
    baseline = "; baseline: through the frozen base alone, which the others are compared to"
    add(
        "--method",
        choices=methods,
        default="mora",
        help="what is trained" + baseline * ("baseline" in methods),
        type=lambda name: "baseline" if name == "floor" else name,  # its former name
    )
    add("--scheme", default="sharing", help="MoRA's scheme, by name, or auto")
    add("--rank", type=int, default=8, help="LoRA's rank; MoRA trains as much")
    add("--size-multiple", type=int, default=1, help="of which matrices' sizes are multiples, such "
        "as what --split-adapters must divide")  # fmt: skip
    add("--targets", default=r".*_proj", help="the layers to adapt, a pattern")
    add("--dropout", type=float, default=0.0, help="of the adapters' inputs")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, default=50, help="the length of the schedule")
    add("--stop-at", type=int, help="save and end at this step of it")
    add("--batch", type=int, default=4, help="sequences in a step, on all devices together")
    add("--accumulate", type=int, default=1, help="microbatches in a step")
    add("--length", type=int, default=128, help="tokens in a sequence")
    add("--lr", type=float, help="learning rate; by default one that fits the method")
    add("--warmup", type=int, default=10, help="steps of it")
    add("--weight-decay", type=float, default=0.0)
    add("--clip", type=float, default=1.0, help="norm that gradients are clipped to")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("output").add_argument
    add("--out", default="results/train", help="a directory that all processes share, gs:// too")
    add("--csv", type=pathlib.Path, help="a file for metrics; by default metrics.csv in --out")
    add("--save-every", type=int, default=20, help="steps between checkpoints")
    add("--keep", type=int, default=2, help="checkpoints that stay")
    add("--json", type=pathlib.Path, help="a file for the summary that is printed last")


def check_training(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Fills in the defaults that depend on others, and refuses what does not fit together."""
    args.lr = args.lr or LEARNING_RATES[args.method]
    if args.batch % args.accumulate:
        parser.error(f"--batch {args.batch} is no multiple of --accumulate {args.accumulate}")
    if args.csv is None and "://" in args.out:
        parser.error(f"--out {args.out} is no file system: give --csv, which is appended to")
    args.csv = args.csv or pathlib.Path(args.out) / "metrics.csv"
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: wanted at least 2")
    return args


def of_the_run(args: argparse.Namespace, digest: str, free: Set[str] = FREE) -> dict[str, Any]:
    """What the losses depend on, by name: a checkpoint goes on under the same alone.

    Args:
      args: the flags.
      digest: of the tokens that are read.
      free: the flags that the losses do not depend on.
    """
    return {name: x for name, x in vars(args).items() if name not in free} | {"tokens": digest}


def sizes(args: argparse.Namespace, vocabulary: int) -> LlamaConfig:
    """The sizes of a model with random weights, for a tokenizer's vocabulary."""
    config = PRESETS[args.model]
    return dataclasses.replace(config, vocab_size=config.vocab_size or vocabulary)
