"""Tiny runs of the training script."""

from helpers.files import ROOT
from train import log, train_llama
from train.flags import parse_args

FLAGS = ("--model", "tiny", "--rank", "2", "--targets", ".*up_proj", "--length", "16",
         "--batch", "4", "--steps", "8", "--lr", "1e-2", "--save-every", "2", "--remora-every", "4",
         "--text", ROOT / "LICENSE")  # fmt: skip


def train(out, *flags):
    """In this process, on its one device."""
    return train_llama.train(parse_args([*map(str, (*FLAGS, "--out", out, *flags))]))


def losses(path):
    """Loss by step, in the order of a file of metrics."""
    return {row["step"]: float(row["loss"]) for row in log.read(path)}
