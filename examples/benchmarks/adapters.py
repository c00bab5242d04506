"""Times many adapters over one base: memory, switching, and a batch with all of them in it.

    python3 examples/benchmarks/adapters.py    # layers of Llama-3-8B's shape, on a large GPU
    python3 run.py adapters --tiny             # any machine, seconds: does it run?

The first wants an environment with JAX for the accelerator. What is timed is the forward pass of a
batch with an example for each adapter, some tokens long, without a key-value cache, in variants
that run one after the other, several times, in one process over the same weights:

    base         no adapter: the frozen baseline
    kernel       one adapter for all examples, its delta in the kernel
    activation   one adapter for all examples, its delta in the activations
    mixed        each example with an adapter of its own

Columns: ms a pass; its ratio to the base's of the same repeat (median, lowest and highest); temp
memory of the compiled pass in GB. *Differs* is the largest difference between the mixed batch and
as many single runs, over the largest output; ask for --dtype float32 to see it without rounding.
"""

import argparse
import collections
import functools
import json
import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from tqdm import tqdm

import mora_jax
from benchmarks.layers import LLAMA_3_8B, TINY, Layers, make_params
from benchmarks.step import SCHEMES, machine

#: Everything that was compiled, an entry each.
COMPILATIONS: list[str] = []


def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
    """Notes what JAX compiles."""
    del duration_secs, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILATIONS.append(event)


def gigabytes(tree: Any) -> float:
    """The memory of a tree of arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e9


def timed(function: Any, *args: Any) -> tuple[float, Any]:
    """(seconds, result)."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread, in ms."""
    middle = statistics.median(values)
    return {"ms": middle * 1e3, "low": min(values) * 1e3, "high": max(values) * 1e3}


class Case:
    """A bank over random layers, and the forward passes that are timed."""

    def __init__(self, args: argparse.Namespace, scheme: str):
        """Makes the layers, the adapters and the bank."""
        dtype = jnp.dtype(args.dtype)
        base = Layers(TINY if args.tiny else LLAMA_3_8B, scan=args.scan, dtype=dtype)
        self.shape = (args.adapters, args.tokens[0], base.config.features)
        x = jax.ShapeDtypeStruct(self.shape, dtype)
        config = functools.partial(
            mora_jax.MoRAConfig, rank=args.rank, scheme=SCHEMES[scheme], targets=".*_proj"
        )
        self.models = {
            place: mora_jax.adapt(base, config(placement=place))
            for place in ("kernel", "activation")
        }
        self.models["base"] = base
        self.plan = mora_jax.plan(self.models["activation"], x)
        self.base = make_params(base, x)
        new, _ = mora_jax.split(
            mora_jax.attach(self.plan, self.base, key=jax.random.key(1)), self.plan
        )

        @jax.jit
        def draw(key):
            keys = jax.random.split(key, len(jax.tree.leaves(new)))
            keys = jax.tree.unflatten(jax.tree.structure(new), list(keys))
            return jax.tree.map(
                lambda a, k: a + 0.01 * jax.random.normal(k, a.shape, a.dtype), new, keys
            )

        self.draw, self.dtype = draw, args.bank_dtype
        self.bank = mora_jax.stack_adapters(
            {"0": (draw(jax.random.key(0)), self.plan)},
            capacity=args.adapters,
            dtype=self.dtype,
        )
        self.add_seconds = [self.add(i) for i in tqdm(range(1, args.adapters), "add", leave=False)]

    def add(self, index: int) -> float:
        """Seconds to add one more adapter."""
        adapter = jax.tree.map(
            lambda leaf: leaf.astype(self.dtype), self.draw(jax.random.key(index))
        )
        jax.block_until_ready(adapter)
        start = time.perf_counter()
        self.bank = self.bank.add(str(index), adapter, self.plan, donate=True)
        jax.block_until_ready(self.bank.adapters)
        return time.perf_counter() - start

    def passes(self) -> dict[str, tuple[Any, Any]]:
        """Variant -> (jitted function of parameters, ids and inputs; its parameters)."""
        one = mora_jax.join(self.bank.select(0), self.base)
        every = mora_jax.join(self.bank.adapters, self.base)

        def single(model, params, ids, x):
            del ids
            return model.apply({"params": params}, x)

        def mixed(params, ids, x):
            variables = {"params": params, "mora": {"adapter_ids": ids}}
            return self.models["activation"].apply(variables, x)

        found = {}
        for name, model in self.models.items():
            params = self.base if name == "base" else one
            found[name] = (jax.jit(functools.partial(single, model)), params)
        order = ("base", "kernel", "activation")
        return {name: found[name] for name in order} | {"mixed": (jax.jit(mixed), every)}


def measure_switching(case: Case, repeats: int, combines: bool) -> dict[str, Any]:
    """Seconds to have another adapter's parameters, and what that compiles.

    `combines` is false for LoRA, which has no weighted sum.
    """
    run = jax.jit(lambda params, x: case.models["activation"].apply({"params": params}, x))
    x = jnp.zeros((1, *case.shape[1:]), case.models["base"].dtype)

    def switch(adapter):
        return mora_jax.join(case.bank.select(adapter), case.base)

    weights = {"0": 0.5}
    run(switch("0"), x)
    if combines:
        run(mora_jax.join(case.bank.combine(weights), case.base), x)
    COMPILATIONS.clear()
    switches, combinations = [], []
    for repeat in range(repeats):
        name = case.bank.names[repeat % len(case.bank.names)]
        seconds, params = timed(switch, name)
        switches.append(seconds)
        jax.block_until_ready(run(params, x))
        if not combines:
            continue
        seconds, adapters = timed(case.bank.combine, {name: 0.25, "0": 0.75})
        combinations.append(seconds)
        jax.block_until_ready(run(mora_jax.join(adapters, case.base), x))
    found: dict[str, Any] = {"switch": summary(switches)}
    if combines:
        found["combine"] = summary(combinations)
    return found | {"compilations": len(COMPILATIONS)}


def difference(case: Case, passes: dict[str, tuple[Any, Any]], ids: Any, x: Any) -> float:
    """How far the mixed batch is from single runs, over the largest output."""
    run, params = passes["mixed"]
    together = run(params, ids, x)
    alone, _ = passes["activation"]
    worst = 0.0
    for row, index in enumerate(tqdm(jax.device_get(ids), "single runs", leave=False)):
        params = mora_jax.join(case.bank.select(int(index)), case.base)
        found = alone(params, None, x[row : row + 1])[0].astype(jnp.float32)
        worst = max(worst, float(jnp.abs(found - together[row].astype(jnp.float32)).max()))
    return worst / float(jnp.abs(together.astype(jnp.float32)).max())


def measure(args: argparse.Namespace, scheme: str) -> dict[str, Any]:
    """All of one scheme; prints its tables."""
    case = Case(args, scheme)
    one = gigabytes(case.bank.select(0))
    memory = {
        "base_gb": gigabytes(case.base),
        "adapter_gb": one,
        "bank_gb": gigabytes(case.bank.adapters),
    }
    switching = measure_switching(case, args.switches, scheme != "lora")
    adding = summary(case.add_seconds[1:])
    print(
        f"\n{scheme}, rank {args.rank}, {args.adapters} adapters in {args.bank_dtype}, "
        f"base in {args.dtype}"
    )
    print(
        f"memory: base {memory['base_gb']:.3f} GB, an adapter {one:.5f} GB, the bank "
        f"{memory['bank_gb']:.4f} GB"
    )
    for name, found in {"add": adding, **switching}.items():
        if isinstance(found, dict):
            print(f"{name}: {found['ms']:.2f} ms ({found['low']:.2f} to {found['high']:.2f})")
    print(f"compilations in {args.switches} switches and combinations: {switching['compilations']}")
    rows, passes = [], case.passes()
    ids = jax.random.permutation(jax.random.key(3), args.adapters).astype(jnp.int32)
    for tokens in args.tokens:
        shape = (args.adapters, tokens, case.shape[-1])
        x = jax.random.normal(jax.random.key(2), shape, case.models["base"].dtype)
        compiled = {
            name: (run.lower(params, ids, x).compile(), params)
            for name, (run, params) in tqdm(passes.items(), "compile", leave=False)
        }
        times = collections.defaultdict(list)
        for repeat in tqdm(range(args.repeats + 1), "time", leave=False):
            for name, (run, params) in compiled.items():
                seconds, _ = timed(run, params, ids, x)
                if repeat:  # the first one warms up
                    times[name].append(seconds)
        differs = difference(case, passes, ids, x)
        print(f"\n{args.adapters} examples of {tokens} tokens; mixed differs by {differs:.1e}")
        print(f"{'':12}{'ms':>9}{'x base':>8}{'low':>7}{'high':>7}{'temp GB':>9}")
        for name, values in times.items():
            ratios = [a / b for a, b in zip(values, times["base"], strict=True)]
            analysis = compiled[name][0].memory_analysis()
            row = {
                "tokens": tokens,
                "variant": name,
                "ms": statistics.median(values) * 1e3,
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "temp_gb": analysis.temp_size_in_bytes / 1e9 if analysis else float("nan"),
                "differs": differs,
            }
            rows.append(row)
            print(
                f"{name:12}{row['ms']:9.2f}{row['ratio']:8.3f}{row['low']:7.3f}{row['high']:7.3f}"
                f"{row['temp_gb']:9.3f}"
            )
    return {"scheme": scheme, **memory, "add": adding, **switching, "rows": rows}


def main() -> None:
    """Reads the flags, measures every scheme, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=64, help="and examples in the batch")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256], help="an example's")
    parser.add_argument("--schemes", nargs="+", default=["sharing"], choices=SCHEMES)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--bank-dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--scan", action="store_true", help="scan over the layers")
    parser.add_argument("--repeats", "--turns", type=int, default=10)
    parser.add_argument("--switches", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="two layers of 64 features")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all of it")
    args = parser.parse_args()
    if args.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    jax.monitoring.register_event_duration_secs_listener(listen)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    cases = []
    for scheme in args.schemes:
        cases.append(measure(args, scheme))
        if args.json:
            args.json.write_text(json.dumps({"machine": machine(), "cases": cases}, indent=1))


if __name__ == "__main__":
    main()
