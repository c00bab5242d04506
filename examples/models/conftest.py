"""Prints the table of what passed."""

import check


def pytest_terminal_summary(terminalreporter):
    if check.TABLE:
        lines = ["| model | layers | loss, 20 steps | merged, off by | time |", "| --- " * 5 + "|"]
        terminalreporter.write_line("\n".join(["", *lines, *check.TABLE]))
