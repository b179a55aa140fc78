"""Run the fault tests, and print what they tried as the README's table.

Arguments are pytest's: ``python tests/faults/table.py`` runs the core, ``-m "slow or not slow" -k "not flat"`` the
sweeps too, ten minutes more; without the ``-k``, half an hour under load as well.
"""

import sys
from collections import defaultdict
from pathlib import Path

import pytest


class Table:
    """A pytest plugin: cases and outcomes by the ``fault`` marker's text."""

    def __init__(self) -> None:
        self.faults: dict[str, str] = {}  # by test
        self.tried: dict[str, int] = defaultdict(int)
        self.lost: dict[str, int] = defaultdict(int)
        self.skipped: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            marker = item.get_closest_marker("fault")
            assert marker is not None, f"{item.nodeid} says of no fault"
            self.faults[item.nodeid] = marker.args[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        fault = self.faults[report.nodeid]
        if report.when == "call" and report.passed:
            self.tried[fault] += sum(count for name, count in report.user_properties if name == "cases") or 1
        elif report.skipped:
            self.skipped.append(fault)
        elif report.failed:
            self.tried[fault] += 1
            self.lost[fault] += 1


def main() -> int:
    table = Table()
    code = pytest.main([str(Path(__file__).parent), "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[table])
    print("\n| fault | cases | lost |\n| --- | --- | --- |")
    for fault in table.tried:
        print(f"| {fault} | {table.tried[fault]:,} | {table.lost[fault]} |")
    print(f"| **all** | **{sum(table.tried.values()):,}** | **{sum(table.lost.values())}** |")
    for fault in table.skipped:
        print(f"not tried here: {fault}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
