"""The rank that merges can add up to, without training: random matrices in place of trained ones.

    python3 examples/paper/rank.py           # some minutes on 2 CPU cores
    python3 examples/paper/rank.py --plot    # the table and the figure from the JSON alone

Every merge of ReMoRA adds a delta to the kernel. How many singular values the sum has is bounded by
the groupings alone: with random matrices, in float64, every bound is met. Rank is not all: a sum of
rotations has full rank, and is one rotation, with the numbers of one matrix to choose. What
training makes of the room is for `pretrain.py` to say.

Shape letters: I input features, O output features, K merges.
"""

import argparse
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tqdm

import mora_jax
from paper.recipes import RECIPES, Recipe

METHODS = (
    "ReLoRA", "one grouping", "two groupings", "four groupings", "shifts", "signs",
    "random groups", "rotation", "cycled rotation",
)  # fmt: skip


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; `--help` prints them."""
    parser = argparse.ArgumentParser(
        description="The rank of the sum of merged deltas.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    here = pathlib.Path(__file__).with_suffix("")
    add = parser.add_argument
    add("--layers", nargs="+", default=["1024x1024:16", "1024x2752:8", "2752x1024:8"],
        help="inputs x outputs : LoRA's rank, whose number of parameters all have")  # fmt: skip
    add("--merges", type=int, default=12)
    add("--seed", type=int, default=0)
    add("--threshold", type=float, default=1e-6, help="of the largest singular value")
    add("--json", type=pathlib.Path, default=here.with_suffix(".json"))
    add("--picture", type=pathlib.Path, default=here.with_suffix(".png"))
    add("--plot", action="store_true", help="only print and draw what the JSON has")
    return parser.parse_args(arguments)


def layer(params: Any, x: jax.Array) -> jax.Array:
    """A linear layer: [T, I] -> [T, O]."""
    return x @ params["layer"]["kernel"]


def sums(recipe: Recipe, shape: tuple[int, int], rank: int, seed: int) -> Iterator[np.ndarray]:
    """The sum of all deltas after each merge, [I, O] float64, without end."""
    assert recipe.scheme is not None
    with jax.enable_x64(True):
        base = {"layer": {"kernel": jnp.zeros(shape)}}
        config = mora_jax.MoRAConfig(
            rank=rank, scheme=recipe.scheme, cycle=recipe.cycle, dtype="float64"
        )
        x = jax.ShapeDtypeStruct((1, shape[0]), "float64")
        plan = mora_jax.plan(mora_jax.adapt(layer, config), base, x)
    rng, total = np.random.default_rng(seed), np.zeros(shape)
    while True:
        with jax.enable_x64(True):
            new = mora_jax.attach(plan, base, key=jax.random.key(0))
            adapter, _ = mora_jax.split(new, plan)
            drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), adapter)
            delta: Any = mora_jax.merge(mora_jax.join(drawn, base), plan)
            total = total + np.asarray(delta["layer"]["kernel"])
        yield total
        plan = plan.advance()


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A dict for each layer and method."""
    rows = []
    cases = [*itertools.product(args.layers, METHODS)]
    with tqdm.tqdm(total=len(cases) * args.merges, unit="merge") as bar:
        for name, method in cases:
            sizes, _, rank = name.partition(":")
            shape = int(sizes.partition("x")[0]), int(sizes.partition("x")[2])
            bar.set_description(f"{name}, {method}")
            row = {"layer": name, "method": method, "rank": [], "effective_rank": []}
            for total in itertools.islice(
                sums(RECIPES[method], shape, int(rank), args.seed), args.merges
            ):
                values = np.linalg.svd(total, compute_uv=False)
                row["rank"].append(int((values > args.threshold * values[0]).sum()))
                spectrum = mora_jax.Spectrum(values, 0.0)
                row["effective_rank"].append(round(spectrum.effective_rank, 1))
                bar.update()
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Ranks after each merge, and the effective rank after the last."""
    count, lines = len(rows[0]["rank"]), []
    for name in dict.fromkeys(row["layer"] for row in rows):
        merges = "".join(f"{number:6}" for number in range(1, count + 1))
        lines += [f"{name:16}{merges}  effective"]
        for row in (row for row in rows if row["layer"] == name):
            ranks = "".join(f"{rank:6}" for rank in row["rank"])
            lines.append(f"{row['method']:16}{ranks}{row['effective_rank'][-1]:11.1f}")
        lines.append("")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """A column for each layer: the rank above, the effective rank below."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    layers = [*dict.fromkeys(row["layer"] for row in rows)]
    figure, axes = pyplot.subplots(
        2, len(layers), figsize=(3.6 * len(layers), 6), layout="constrained", squeeze=False,
        sharex=True, sharey="col",
    )  # fmt: skip
    for column, name in zip(axes.T, layers, strict=True):
        sizes, _, rank = name.partition(":")
        found = [row for row in rows if row["layer"] == name]
        for axis, field in zip(column, ("rank", "effective_rank"), strict=True):
            for number, row in enumerate(found):
                # Some lie on one another: thick lines below thin ones.
                axis.plot(
                    range(1, len(row[field]) + 1), row[field], label=row["method"],
                    color=f"C{number}", linewidth=1 + 0.5 * (len(found) - number),
                    marker="o", markersize=3, alpha=0.8,
                )  # fmt: skip
            axis.axhline(min(map(int, sizes.split("x"))), color="black", linestyle=":", linewidth=1)
            axis.set(ylabel=f"{field.replace('_', ' ')} of the sum", ylim=(0, None))
            axis.xaxis.get_major_locator().set_params(integer=True)
        column[0].set_title(f"{sizes}, parameters of LoRA's rank {rank}", fontsize=10)
        column[1].set_xlabel("merges")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Measures, or reads what was measured; prints and draws."""
    args = parse_args(arguments)
    if not args.plot:
        setting = {"merges": args.merges, "seed": args.seed, "threshold": args.threshold}
        lines = ",\n".join(" " + json.dumps(row) for row in measure(args))
        args.json.write_text(f'{{"setting": {json.dumps(setting)},\n"rows": [\n{lines}\n]}}\n')
    rows = json.loads(args.json.read_text())["rows"]
    print(table(rows))
    draw(rows, args.picture)


if __name__ == "__main__":
    main()
