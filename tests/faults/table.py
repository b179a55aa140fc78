"""Run the fault tests, and print the table in README.md: the number of cases for each fault.

Arguments are passed to pytest. Without arguments, only the core runs. With ``-m "slow or not slow" -k "not flat"``, the
sweeps run, and each replaces its core, so that no case counts twice. Without ``-k "not flat"``, the run of 30 minutes
under load is included too.
"""

import sys
from collections import defaultdict
from pathlib import Path

import pytest


def is_core(item: pytest.Function, sweeps: list[pytest.Function]) -> bool:
    """Whether one of the sweeps is the same test with another value of a single parameter."""
    if item in sweeps or not hasattr(item, "callspec"):
        return False
    params = item.callspec.params
    others = [other.callspec.params for other in sweeps if other.obj is item.obj]
    return any(sum(params[name] != other[name] for name in params) == 1 for other in others)


class Table:
    """Pytest plugin that counts the cases and failures of each ``fault`` marker."""

    def __init__(self) -> None:
        self.faults: dict[str, str] = {}  # text of the marker, by test
        self.tried: dict[str, int] = defaultdict(int)  # number of cases, by fault
        self.lost: dict[str, int] = defaultdict(int)  # number of failures, by fault
        self.skipped: list[str] = []

    @pytest.hookimpl(trylast=True)  # after -m and -k
    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        sweeps = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not is_core(item, sweeps)]
        for item in items:
            marker = item.get_closest_marker("fault")
            assert marker is not None, f"{item.nodeid} has no fault marker"
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
    code = pytest.main([str(Path(__file__).parent), "-n0", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[table])
    print("\n| fault | cases | lost |\n| --- | --- | --- |")
    for fault in table.tried:
        print(f"| {fault} | {table.tried[fault]:,} | {table.lost[fault]} |")
    print(f"| **all** | **{sum(table.tried.values()):,}** | **{sum(table.lost.values())}** |")
    for fault in table.skipped:
        print(f"not tried here: {fault}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
