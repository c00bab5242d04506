"""Which third-party models are tested when, and the table of what passed."""

from helpers import third_party

#: They download real weights: run by name alone.
collect_ignore = ["test_minilm.py", "test_tunix.py"]


def pytest_terminal_summary(terminalreporter):
    if third_party.TABLE:
        lines = ["| model | layers | loss, 20 steps | merged, off by | time |", "| --- " * 5 + "|"]
        terminalreporter.write_line("\n".join(["", *lines, *third_party.TABLE]))
