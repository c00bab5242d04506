"""What a compiled program does, read off the text that the compiler prints.

A program is a list of computations, and some run many times: the body of a loop over layers once a
layer. `jax.stages.Compiled.cost_analysis` counts every body once, so what is counted here is
multiplied by the trips of the loops around it, which stand in their conditions.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
# The computations that an instruction runs; the one that a reduction applies sends nothing.
_RUNS = re.compile(r"\b(?:calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the text: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of what it takes."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")", 1)[0])


class Program:
    """The computations of a compiled program, and how often each runs.

    Attributes:
      computations: name -> instructions, by name.
      entry: name of the one that runs first.
    """

    def __init__(self, text: str):
        """Reads `jax.stages.Compiled.as_text()`."""
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                current[found[1]] = Instruction(*found.groups())

    def runs(self) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        """(instruction, its computation, how often it runs) of all that runs, fused ones too."""
        waiting = [(self.entry, 1)]
        while waiting:
            name, times = waiting.pop()
            computation = self.computations[name]
            for instruction in computation.values():
                yield instruction, computation, times
                trips = self.trips(instruction) if instruction.opcode == "while" else 1
                inner = [_RUNS.findall(instruction.rest)]
                inner += [re.findall(r"[\w.\-]+", b) for b in _BRANCHES.findall(instruction.rest)]
                if instruction.opcode == "call":
                    inner.append(re.findall(r"to_apply=%?([\w.\-]+)", instruction.rest))
                waiting += [(callee, times * trips) for names in inner for callee in names]

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs: as the compiler says, or the steps from 0 to its bound.

        Raises:
          ValueError: where it does not count to a constant by a constant.
        """
        if known := _TRIPS.search(loop.rest):
            return int(known[1])
        condition = self._called(_CONDITION, loop)
        bound = _constants(condition, list(condition))
        counters = [i for i in condition.values() if i.opcode == "get-tuple-element"]
        if len(bound) != 1 or len(counters) != 1:
            raise ValueError(f"{loop.name}: its condition compares no counter with a constant.")
        # The next value of the counter stands where the body's result has it.
        place = re.search(r"index=(\d+)", counters[0].rest)
        body = self._called(_BODY, loop)
        result = next(reversed(body.values()))
        following = body[result.operands[int(place[1]) if place else 0]]
        step = _constants(body, following.operands)
        if following.opcode != "add" or len(step) != 1:
            raise ValueError(f"{loop.name}: its counter does not grow by a constant.")
        return -(-bound[0] // step[0])

    def _called(self, attribute: re.Pattern[str], caller: Instruction) -> dict[str, Instruction]:
        found = attribute.search(caller.rest)
        return self.computations[found[1]] if found else {}

    def collectives(self) -> dict[str, dict[str, int]]:
        """Kind -> how often it runs and the bytes that enter it (that leave it, if it gathers)."""
        # TPUs run a gather beside products: each of their fusions then names it, by one channel.
        channels = collections.defaultdict(collections.Counter)
        sizes = {}
        for instruction, computation, times in self.runs():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            taken = sum(_bytes(computation[name].shape) for name in instruction.operands)
            given = _bytes(instruction.shape)
            if instruction.opcode.endswith("-start"):
                given -= taken  # of the pair of what it takes and gives
            number = _CHANNEL.search(instruction.rest)
            channel = (kind, number[1] if number else instruction.name)
            channels[channel][instruction.name] += times
            sizes[channel] = given if kind == "all-gather" else taken
        found = {}
        for (kind, number), names in channels.items():
            counts = found.setdefault(kind, {"count": 0, "bytes": 0})
            counts["count"] += min(names.values())
            counts["bytes"] += min(names.values()) * sizes[kind, number]
        return found

    def cycles(self) -> int:
        """The compiler's estimates for its kernels, added up; collectives have none."""
        total = 0
        for instruction, _, times in self.runs():
            if estimate := _CYCLES.search(instruction.rest):
                total += times * int(estimate[1])
        return total

    def product_flops(self) -> int:
        """Multiplications and additions of all products, two a term."""
        total = 0
        for instruction, computation, times in self.runs():
            if instruction.opcode in ("dot", "convolution"):
                total += times * _product_flops(instruction, computation)
        return total


def _shapes(text: str) -> list[tuple[int, list[int]]]:
    """(bits, sizes) of each array in a shape, which may be a tuple."""
    return [
        (int(bits or 8), [int(size) for size in sizes.split(",") if size])
        for _, bits, sizes in _ARRAY.findall(text)
    ]


def _bytes(shape: str) -> int:
    return sum(bits * math.prod(sizes) for bits, sizes in _shapes(shape)) // 8


def _constants(computation: dict[str, Instruction], names: list[str]) -> list[int]:
    """Those of the instructions that are whole numbers."""
    instructions = [computation[name] for name in names]
    return [
        int(i.rest.split(")")[0])
        for i in instructions
        if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.shape)
    ]


def _product_flops(product: Instruction, computation: dict[str, Instruction]) -> int:
    (_, result), *_ = _shapes(product.shape)
    (_, left), (_, right) = (_shapes(computation[name].shape)[0] for name in product.operands)
    if product.opcode == "dot":
        contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.rest)
        axes = contracting[1].split(",") if contracting and contracting[1] else []
        return 2 * math.prod(result) * math.prod(left[int(axis)] for axis in axes)
    # TPUs write products as convolutions, batch axes as spatial ones that are dilated and padded
    # until each position meets its own alone.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.rest)
    assert labels is not None, product
    inputs, kernel, outputs = labels.groups()
    window = _WINDOW.search(product.rest)
    options = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    spatial = sorted(set(outputs) - set("bf"))
    pairs = result[outputs.index("b")] * result[outputs.index("f")] * right[kernel.index("i")]
    for place, axis in enumerate(spatial):
        get = lambda name, default, place=place: options.get(name, default).split("x")[place]
        ones = "x".join(["1"] * len(spatial))
        low = int(get("pad", "x".join(["0_0"] * len(spatial))).split("_")[0])
        stride, spread = int(get("stride", ones)), int(get("lhs_dilate", ones))
        step, size = int(get("rhs_dilate", ones)), int(get("size", ones))
        length = left[inputs.index(axis)]
        meets = (
            out * stride + at * step - low
            for out in range(result[outputs.index(axis)])
            for at in range(size)
        )
        pairs *= sum(p >= 0 and p % spread == 0 and p // spread < length for p in meets)
    return 2 * pairs
