"""A pytest plugin that writes the node ids of skipped tests to the file $SKIPPED, one per line.

PYTHONPATH=.ci SKIPPED=FILE pytest -p skipped
"""

import os

import pytest


def note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped:
        with open(os.environ["SKIPPED"], "a") as file:
            file.write(f"{report.nodeid}\n")


pytest_runtest_logreport = pytest_collectreport = note
