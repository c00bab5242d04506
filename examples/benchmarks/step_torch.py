# pyright: basic, reportMissingImports=false
"""Times the training step in PyTorch: MoRA as its authors compute it, PEFT's LoRA, no adapter.

The step of `step.py`: a frozen bfloat16 base, float32 adapters that are cast on use (PEFT's too,
which by default widens its input instead), AdamW. Ratios are medians over the frozen baseline (no
adapter) of the same mode and round. "compiled" is `torch.compile` of a layer, recomputation
included. Types 1 (sharing) and 6 (rotation): the algorithm is that of the authors of MoRA (arXiv
2405.12130), in the activations as in their PyTorch code, written anew here. Needs torch, tqdm and,
for LoRA, peft.
"""

import argparse
import copy
import gc
import importlib.metadata
import itertools
import json
import pathlib
import platform
import statistics
import timeit
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# Each variant, and what `step.py` calls the same.
SCHEMES = {"baseline": "baseline", "type 1": "sharing", "type 6": "rotation", "peft lora": "lora"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_3_8B, TINY = (4096, 14336, 32, 8, 128), (64, 160, 4, 2, 16)


class CastLinear(nn.Linear):
    """A linear layer that casts its float32 weight to the dtype of its input on use."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight.to(x.dtype))


class MoRALinear(nn.Module):
    """A frozen linear layer with the authors' type 1 or, with `rotate`, type 6 beside it."""

    def __init__(self, base: nn.Linear, rank: int, rotate: bool):
        super().__init__()
        size = int(((base.in_features + base.out_features) * rank) ** 0.5 + 0.5)
        size -= size % 2 if rotate else 0  # the rotation pairs features
        self.base, self.rotate, self.size = base, rotate, size
        self.matrix = CastLinear(size, size, bias=False, device=base.weight.device)
        nn.init.zeros_(self.matrix.weight)
        self.blocks = -(-base.in_features // size)
        self.copies = -(-base.out_features // (size * self.blocks if rotate else size))
        for name, table in zip(("cos", "sin"), rotary_tables(self.blocks, size), strict=True):
            self.register_buffer(name, table.to(base.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        result, pad = self.base(x), self.blocks * self.size - x.shape[-1]
        x = torch.cat([x, x[..., :pad]], dim=-1) if pad else x  # around the end
        x = x.unflatten(-1, (self.blocks, self.size))
        x = x * self.cos + rotate_half(x) * self.sin if self.rotate else x.sum(-2, keepdim=True)
        y = self.matrix(x).flatten(-2)
        y = torch.cat([y] * self.copies, dim=-1) if self.copies > 1 else y
        return result + y[..., : result.shape[-1]]


def rotary_tables(positions: int, features: int, theta: float = 1e4) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [positions, features] float32."""
    frequencies = theta ** (-torch.arange(0, features, 2).float() / features)
    angles = torch.outer(torch.arange(positions).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate_half(x: Tensor) -> Tensor:
    """A quarter turn of each pair of features j and j + half."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: tuple[int, int, int, int, int]):
        super().__init__()
        d, h, heads, kv_heads, self.head_features = shape
        q, k = heads * self.head_features, kv_heads * self.head_features
        sizes = [(d, q), (d, k), (d, k), (q, d), (d, h), (d, h), (h, d)]
        for name, (inputs, outputs) in zip(PROJECTIONS, sizes, strict=True):
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))
        self.attention_norm, self.mlp_norm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, tokens, features] -> the same; rotary tables [tokens, head_features]."""
        y = self.attention_norm(x)
        q, k, v = self.q_proj(y), self.k_proj(y), self.v_proj(y)
        q, k, v = (z.unflatten(-1, (-1, self.head_features)).transpose(1, 2) for z in (q, k, v))
        q, k = (z * cos + rotate_half(z) * sin for z in (q, k))
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(y.transpose(1, 2).flatten(-2))
        y = self.mlp_norm(x)
        return x + self.down_proj(silu(self.gate_proj(y)) * self.up_proj(y))


def adapt(layers: nn.ModuleList, variant: str, rank: int) -> None:
    """Puts the variant's adapters into the layers."""
    if variant == "peft lora":
        from peft import LoraConfig, get_peft_model

        get_peft_model(layers, LoraConfig(r=rank, lora_alpha=16, target_modules=PROJECTIONS))
        for module in layers.modules():
            module.cast_input_dtype_enabled = False
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                module.__class__ = CastLinear
    elif variant != "baseline":
        for layer, name in itertools.product(layers, PROJECTIONS):
            setattr(layer, name, MoRALinear(getattr(layer, name), rank, variant == "type 6"))


def build(base: nn.ModuleList, row: dict, x: Tensor) -> Callable[[], Tensor]:
    """The training step of a row, warmed up; it gives the loss. The row learns its peak memory."""
    gc.collect()  # what failed before, or was timed for other sizes
    layers = copy.deepcopy(base, {id(p): p for p in base.parameters()})  # shares the weights
    adapt(layers, row["variant"], row["rank"])
    adapters = [p for p in layers.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=2e-4, fused=True) if adapters else None
    tables = [table.to(x) for table in rotary_tables(x.shape[1], base[0].head_features, 5e5)]
    run, loss_of = lambda layer, *x: layer(*x), lambda y: y.float().square().mean()
    if row["remat"]:  # nothing in a layer is random
        run = lambda layer, *x: checkpoint(layer, *x, use_reentrant=False, preserve_rng_state=False)
    if row["mode"] == "compiled":  # what cannot be compiled whole shall fail, not run half eager
        run, loss_of = (torch.compile(f, fullgraph=True, dynamic=False) for f in (run, loss_of))

    def step() -> Tensor:
        y = x
        for layer in layers:
            y = run(layer, y, *tables)
        loss = loss_of(y)
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        x.grad = None
        return loss.detach()

    step()
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated()
        step()
        row["peak_mb"] = (torch.cuda.max_memory_allocated() - rest) / 1e6
    return step


def time_steps(step: Callable[[], Tensor], count: int, cuda: bool) -> float:
    """Milliseconds a step, after an untimed one that brings the allocator's cache in order."""
    if not step().isfinite():
        raise FloatingPointError("the loss is not finite")
    if not cuda:
        return timeit.timeit(step, number=count) * 1e3 / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def attempt(row: dict, action: Callable, *arguments):
    """What the action gives; or None, and its failure is the row's error."""
    try:
        return action(*arguments)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    torch.cuda.empty_cache()  # in the clause above, the traceback still holds the tensors
    return None


def measure(args: argparse.Namespace, base: nn.ModuleList, tokens: int, rank: int) -> list[dict]:
    """Rows of the table for one number of tokens and one rank."""
    length, features = min(tokens, 4096), base[0].q_proj.in_features  # of a sequence
    x = torch.randn(tokens // length, length, features, device=args.device).bfloat16()
    x, title, rows, steps = x.requires_grad_(), f"{tokens} tokens, rank {rank}", {}, {}
    keys = list(itertools.product(SCHEMES, ("eager", "compiled")))
    for variant, mode in tqdm(keys, f"{title}: build", leave=False):
        setting = {"tokens": tokens, "rank": rank, "remat": args.remat}
        row = rows[variant, mode] = setting | {"variant": variant, "mode": mode}
        if step := attempt(row, build, base, row, x):
            steps[variant, mode] = step
    times = {key: [] for key in keys}
    for _ in tqdm(range(args.rounds), f"{title}: time", leave=False):
        for key in list(steps):
            ms = attempt(rows[key], time_steps, steps[key], args.steps, x.is_cuda)
            times[key].append(ms) if ms else steps.pop(key)
    for key in steps:
        mine, frozen = times[key], times["baseline", key[1]]
        rows[key] |= {"ms": statistics.median(mine), "low": min(mine), "high": max(mine)}
        if len(frozen) == len(mine):
            rows[key]["ratio"] = statistics.median(a / b for a, b in zip(mine, frozen, strict=True))
    torch.compiler.reset()
    return list(rows.values())


def show(rows: list[dict], machine: dict[str, str], *columns: str) -> None:
    """Prints a table of the columns, and the machine."""
    names = "".join(f"{column:>11}" for column in columns)
    print(f"\n{'tokens':>6}{'rank':>6}  {'remat':7}{'variant':11}{'mode':9}{names}")
    for row in rows:
        start = f"{row['tokens']:6}{row['rank']:6}  {row['remat']!s:7}{row['variant']:11}"
        texts = (f"{row[c]:.{3 if row[c] < 10 else 2}f}" if c in row else "-" for c in columns)
        print(f"{start}{row['mode']:9}{row.get('error') or ''.join(f'{t:>11}' for t in texts)}")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))


def main() -> None:
    """Reads the flags, measures every setting, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--remat", action="store_true", help="recompute each layer going back")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--rounds", type=int, default=5, help="in each, every variant is timed once"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed in each round")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="64 features, 2 layers")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all rows")
    parser.add_argument("--jax-json", type=pathlib.Path, help="what step.py wrote, to compare with")
    args = parser.parse_args()
    if any(tokens % min(tokens, 4096) for tokens in args.tokens):
        parser.error("--tokens: more than 4096 are whole sequences of 4096")
    ours = json.loads(args.jax_json.read_text()) if args.jax_json else None
    torch.manual_seed(0)
    with torch.device(args.device):
        shapes = [TINY] * 2 if args.tiny else [LLAMA_3_8B] * args.layers
        base = nn.ModuleList(map(Layer, shapes)).bfloat16().requires_grad_(False)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    found = {d.name: d.version for d in importlib.metadata.distributions()}
    machine = {"device": name, "python": platform.python_version()}
    machine |= {key: found.get(key, "none") for key in ("torch", "triton", "peft")}
    rows = []
    for tokens, rank in itertools.product(args.tokens, args.rank):
        rows += measure(args, base, tokens, rank)
        if args.json:
            args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    show(rows, machine, "ms", "low", "high", "ratio", "peak_mb")
    if ours:
        at = lambda row, scheme: (row["tokens"], row["rank"], row["remat"], scheme)
        auto = [r for r in ours["rows"] if r["placement"] == "auto" or r["scheme"] == "baseline"]
        known = {at(r, r["scheme"]): r["ms"] for r in auto}
        for row in rows:
            ms = known.get(at(row, SCHEMES[row["variant"]]))
            row |= {"mora_jax": ms, "over": row["ms"] / ms} if ms and "ms" in row else {}
        show(rows, ours["machine"], "ms", "mora_jax", "over")


if __name__ == "__main__":
    main()
