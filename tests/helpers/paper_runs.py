"""Short runs of the paper's experiments, for the tests of these and of their results."""

from paper import study


def flags_of(folder, **flags):
    """The command line of a short training on one CPU."""
    folder.mkdir(exist_ok=True)
    files = {"json": folder / "runs.json", "out": folder / "out", "picture": folder / "runs.png"}
    flags = {"dtype": "float32", "rewarm": 1, "seeds": (0, 1), "model": "tiny", **files, **flags}
    found = []
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else (value,)
        found += ["--" + name.replace("_", "-"), *map(str, values)]
    return found


def trained(experiment, known, folder, **flags):
    """(flags, results) of an experiment."""
    args = experiment.parse_args(["train", *flags_of(folder, **flags)])
    return args, study.train(args, experiment.make_task(args), known)
