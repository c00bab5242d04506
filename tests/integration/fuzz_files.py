"""Damaged and hostile files of every kind that the library reads: none may give other numbers.

    PYTHONPATH=. python tests/integration/fuzz_files.py [flips of each file] [hostile inputs]

Each is refused by a ValueError or FileNotFoundError, or gives what was saved. It prints a row for
each file; the tests run a sample. Memory is the growth of the process's peak.
"""

from __future__ import annotations

import pathlib
import random
import resource
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import mora_jax
from mora_jax import checkpoint, export, peft
from mora_jax._arrays.paths import flatten

SEED = 20_261_201
BASE = {
    "layers": {
        name: {"proj": {"kernel": np.full((8, 6), 0.5, np.float32)}} for name in ("attn", "mlp")
    }
}
NAMES = [peft.KernelName("layers/*/proj/kernel", "model.layers.*.proj")]
REFUSED = (ValueError, FileNotFoundError)


def same(found, wanted):
    """Whether two trees have the same paths, dtypes and bits."""
    found, wanted = flatten(found), flatten(wanted)
    return found.keys() == wanted.keys() and all(
        np.asarray(found[path]).dtype == np.asarray(wanted[path]).dtype
        and np.asarray(found[path]).tobytes() == np.asarray(wanted[path]).tobytes()
        for path in wanted
    )


def adapted(scheme):
    """(plan, parameters with adapters of random numbers)."""
    model = mora_jax.adapt(
        lambda params, x: [x @ own["proj"]["kernel"] for own in params["layers"].values()],
        mora_jax.MoRAConfig(rank=2, scheme=scheme),
    )
    plan = mora_jax.plan(model, BASE, jnp.ones((1, 8)))
    params = mora_jax.attach(plan, BASE, key=jax.random.key(0))
    trained, frozen = mora_jax.split(params, plan)
    draw = np.random.default_rng(0).standard_normal
    drawn = jax.tree.map(lambda leaf: draw(leaf.shape).astype(np.float32), trained)
    return plan, mora_jax.join(drawn, frozen)


def kinds(folder):
    """Name -> (directory, read it, whether what was read is what was saved)."""
    plan, params = adapted("sharing")
    checkpoint.save_adapters(folder / "checkpoint", params, plan)
    found = {
        "checkpoint": (
            lambda: checkpoint.load_adapters(folder / "checkpoint", BASE),
            lambda read: read[1] == plan and same(read[0], params),
        )
    }
    for name, scheme in (("mora", mora_jax.Sharing()), ("lora", mora_jax.LowRank(3.0))):
        its_plan, its_params = adapted(scheme)
        path = folder / f"peft_{name}"
        peft.save_adapters(path, its_params, its_plan, names=NAMES)
        wanted = peft.load_adapters(path, BASE, names=NAMES)
        found[path.name] = (
            lambda path=path: peft.load_adapters(path, BASE, names=NAMES),
            lambda read, wanted=wanted: read[1] == wanted[1] and same(read[0], wanted[0]),
        )
    (folder / "plan").mkdir()
    (folder / "plan" / "plan.json").write_text(plan.to_json())
    found["plan"] = (
        lambda: mora_jax.Plan.from_json((folder / "plan" / "plan.json").read_bytes().decode()),
        lambda read: read == plan,
    )
    found["merged"] = _merged(folder, plan, params)
    return found


def _merged(folder, plan, params):
    """A directory of save_merged, as the base of another export."""
    config = {"tie_word_embeddings": True, "hidden_size": 8}
    options = {"names": NAMES, "shard_bytes": 200}
    export.save_merged(folder / "merged", params, plan, config=config, **options)
    weights = {file.name: file.read_bytes() for file in (folder / "merged").glob("*.safetensors")}

    def read():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            out = pathlib.Path(scratch) / "out"
            export.save_merged(out, params, plan, config=folder / "merged", **options)
            return {file.name: file.read_bytes() for file in out.glob("*.safetensors")}

    return read, lambda read: read == weights


def outcome(read, is_same, what):
    """ "refused" or "same"; AssertionError for anything else."""
    try:
        value = read()
    except REFUSED:
        return "refused"
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    assert is_same(value), f"{what}: accepted, with other numbers"
    return "same"


def flip(data, rng):
    """The bytes with one bit changed."""
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def files_of(path):
    """The files of a directory that are not empty."""
    return [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size]


def flips(folder, found, count, seed=SEED):
    """(kind, file, refused, same) of `count` flips of each file."""
    for kind, (read, is_same) in found.items():
        for file in files_of(folder / kind):
            rng, whole, tally = random.Random(f"{seed} {kind}"), file.read_bytes(), {}
            for _ in range(count):
                file.write_bytes(damaged := flip(whole, rng))
                bits = [i for i, (a, b) in enumerate(zip(whole, damaged, strict=True)) if a != b]
                word = outcome(read, is_same, f"{kind} {file.name} byte {bits}")
                tally[word] = tally.get(word, 0) + 1
            file.write_bytes(whole)
            yield kind, file.name, tally.get("refused", 0), tally.get("same", 0)


def hostile(data, others, rng):
    """The bytes of a file as an attacker, or a torn disk, would have them."""
    number = rng.choice([b"-1", b"1e999", b"NaN", b"99999999999999999999", b"null", b'"x"', b"[]"])
    digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
    at = rng.choice(digits) if digits else 0
    pair = data.find(b'"', rng.randrange(len(data)))
    return rng.choice(
        [
            lambda: data[: rng.randrange(len(data))],
            lambda: data + rng.randbytes(rng.randrange(1, 100)),
            lambda: data[rng.randrange(len(data)) :] + data,
            lambda: rng.choice(others),
            lambda: rng.randbytes(rng.randrange(2000)),
            lambda: b"",
            lambda: b"[" * 10 ** rng.randrange(1, 6),
            lambda: b'{"a":' * 10 ** rng.randrange(1, 6),
            lambda: data[:at] + number + data[at + 1 :],
            lambda: data[:at] + data[at : at + 1] * rng.choice([2, 9, 40]) + data[at + 1 :],
            lambda: data[: max(pair, 0)] + b'"../../etc/passwd' + data[max(pair, 0) + 1 :],
            lambda: data.replace(b'"', b'"\\u0000', 1),
            lambda: data.replace(b"{", b'{"r":1,"r":2,"format":1,"format":2,', 1),
            lambda: (2**63 - 1).to_bytes(8, "little") + data[8:],
            lambda: (90_000_000).to_bytes(8, "little") + b"{" + b" " * 10**5,
            lambda: b"{" + b'"a":[],' * 10 ** rng.randrange(1, 6) + data,
            lambda: bytes(rng.randrange(256) for _ in data),
            lambda: data[:20] + bytes(len(data) - 20 if len(data) > 20 else 0),
        ]
    )()


def attacks(folder, found, count, seed=SEED):
    """(kind, refused, same, growth of the peak in MB) of `count` hostile inputs in all."""
    rng, share = random.Random(seed), -(-count // len(found))
    for kind, (read, is_same) in found.items():
        files, tally = files_of(folder / kind), {}
        wholes = {file: file.read_bytes() for file in files}
        before = peak()
        for number in range(share):
            file = rng.choice(files)
            file.write_bytes(hostile(wholes[file], [*wholes.values()], rng))
            word = outcome(read, is_same, f"{kind} {file.name} attack {number}")
            tally[word] = tally.get(word, 0) + 1
            file.write_bytes(wholes[file])
        yield kind, tally.get("refused", 0), tally.get("same", 0), peak() - before


def peak():
    """The most memory that the process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(of_each=500, inputs=1000):
    """Runs all of it and prints the tables."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        found = kinds(folder)
        for read, is_same in found.values():
            assert is_same(read())
        started = time.perf_counter()
        for kind, refused, same, growth in attacks(folder, found, inputs):
            print(f"hostile {kind}: {refused} refused, {same} same, {growth:.0f} MB", flush=True)
        for kind, file, refused, same in flips(folder, found, of_each):
            print(f"flips {kind} {file}: {refused} refused, {same} same", flush=True)
        print(f"{time.perf_counter() - started:.0f} s, peak {peak():.0f} MB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
