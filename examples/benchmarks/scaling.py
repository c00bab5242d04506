"""Trains Llamas on 1, 2, 4, ... GPUs of a host, over the frozen baseline on the same mesh.

    python3 scaling.py --cases 1 2:2x1 4:4x1 4:2x2 4:4x1p -- --model 8b --remat

A case is DEVICES:FSDPxTENSOR; with a `p` there is one process for each device, else one for all.
Each line is runs of train_llama.py, one for each method; what follows `--` goes to it. The batch is
a fixed number of sequences a device.

Columns: tokens a second on all devices, of the median step; that over one device's, a device; and
the time of a step over the baseline's.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from typing import Any

from tqdm import tqdm

HERE = pathlib.Path(__file__).resolve().parent
TRAIN = HERE.parent / "train" / "train_llama.py"


def parse_case(case: str) -> tuple[int, int, int, bool]:
    """(devices, fsdp, tensor, one process for each device).

    >>> parse_case("4:2x2p"), parse_case("1")
    ((4, 2, 2, True), (1, 1, 1, False))
    """
    found = re.fullmatch(r"(\d+)(?::(\d+)x(\d+)(p?))?", case)
    if found is None:
        raise argparse.ArgumentTypeError(f"{case!r}: wanted DEVICES:FSDPxTENSOR, as in 4:2x2")
    devices, fsdp, tensor, processes = found.groups()
    return int(devices), int(fsdp or 1), int(tensor or 1), bool(processes)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def run(method: str, case: tuple[int, int, int, bool], first: int, args, rest) -> Any:
    """Starts the processes of one method on devices `first`, ...; call it for the summary."""
    devices, fsdp, tensor, many = case
    folder = pathlib.Path(tempfile.mkdtemp())
    command = [sys.executable, TRAIN, "--method", method, "--fsdp", fsdp, "--tensor", tensor]
    command += ["--batch", args.batch * devices, "--steps", args.steps, "--tokenizer", "bytes"]
    command += ["--length", args.length, "--save-every", args.steps + 1, "--json"]
    command += [folder / "summary.json", "--out", folder / "out", *rest]
    numbers = range(devices) if many else [0]
    address = f"localhost:{_free_port()}"
    processes = []
    for number in numbers:
        seen = [first + number] if many else range(first, first + devices)
        extra = ["--coordinator", address, "--process", number, "--processes", devices]
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, seen))}
        with (folder / f"log{number}.txt").open("w") as log:
            one = [*command, *(extra if many else [])]
            environment = {**os.environ, **visible}
            processes.append(
                subprocess.Popen(list(map(str, one)), env=environment, stdout=log, stderr=log)
            )

    def finish() -> dict[str, Any]:
        codes = [process.wait() for process in processes]
        if any(codes):
            logs = (folder / "log0.txt").read_text()[-3000:]
            raise SystemExit(f"{method} on {devices} devices failed:\n{logs}")
        summary = json.loads((folder / "summary.json").read_text())
        shutil.rmtree(folder)
        return {"case": case, **summary}

    return finish


def main() -> None:
    """Runs every case, prints a line for each method, writes all rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", type=parse_case, default=[parse_case("1")])
    parser.add_argument("--methods", nargs="+", default=["baseline", "lora", "mora"])
    parser.add_argument("--batch", type=int, default=4, help="sequences a device")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument(
        "--side-by-side", type=int, default=1, help="devices to spread the methods of a case over"
    )
    parser.add_argument("--json", type=pathlib.Path, help="where to write all rows")
    parser.add_argument("rest", nargs="*", help="flags of train_llama.py, after --")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(
        f"{'devices  mesh':24}{'':10}{'tokens/s':>10}{'scaling':>9}{'x baseline':>12}{'peak GB':>9}"
    )
    bar = tqdm(total=len(args.cases) * len(args.methods))
    for case in args.cases:
        devices, fsdp, tensor, many = case
        at_once = max(1, args.side_by_side // devices)
        found = []
        for start in range(0, len(args.methods), at_once):
            methods = args.methods[start : start + at_once]
            started = [run(m, case, i * devices, args, args.rest) for i, m in enumerate(methods)]
            for finish in started:
                found.append(finish())
                bar.update()
        rows += found
        for row in found:
            speed = row["tokens_per_second_median"]
            same = [r for r in rows if r["method"] == row["method"] and r["case"][0] == 1]
            alone = same[0]["tokens_per_second_median"] if same else float("nan")
            baseline = next((r for r in found if r["method"] == "baseline"), None)
            ratio = baseline["tokens_per_second_median"] / speed if baseline else float("nan")
            name = f"{devices}  fsdp {fsdp} tensor {tensor}{', a process each' * many}"
            tqdm.write(
                f"{name:24}{row['method']:>10}{speed:10,.0f}{speed / devices / alone:9.3f}"
                f"{ratio:12.3f}{(row['peak_bytes'] or 0) / 1e9:9.1f}"
            )
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
