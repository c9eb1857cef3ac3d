"""What each file of tests costs, shown at the end of a run; and what a process keeps compiled.

A plugin of pytest. Where there are several workers each one counts, and the first process adds.
"""

import collections
import pathlib
import resource
import sys
import time

import jax
import pytest
from processes import forked_cpu_seconds

LONGEST = tuple(
    f"tests/{file}.py"
    for file in (
        "experiments/test_compare",
        "test_distributed",
        "compare/test_distributed",
        "compare/test_tuning",
        "examples/test_examples",
        "compare/test_resume",
        "test_sharding",
        "loss_weightings/test_shared_checks",
        "compare/test_training",
        "experiments/test_networks",
        "documentation/test_code",
    )
)
"""Files of tests, the longest first."""

MOST_MAPS = 30_000
"""A process may have 65,530 memory maps, and each compiled program has some."""

SHOWN = 1.0
"""CPU seconds. Files that cost less are added up."""

COLUMNS = ("tests", "CPU s", "programs", "compile s", "processes")


def file_of(item):
    return item.nodeid.split("::")[0]


class Costs:
    """Counts what is done while the tests of each file run."""

    def __init__(self, config):
        self._files = collections.defaultdict(lambda: dict.fromkeys(COLUMNS, 0))
        self._now = self._files["(imports)"]
        self._cpu = 0.0
        self._unchecked = 0
        self._to_first_process = getattr(config, "workeroutput", None)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        sys.addaudithook(self._on_audit)

    def _on_duration(self, event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self._now["programs"] += 1
            self._now["compile s"] += seconds
            self._unchecked += 1

    def _on_audit(self, event, _):
        self._now["processes"] += event == "subprocess.Popen"

    def _spend_on(self, file):
        """Put the time since the last call down to what was going on, and go on with a file."""
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        now = time.process_time() + children.ru_utime + children.ru_stime + forked_cpu_seconds()
        self._now["CPU s"] += now - self._cpu
        self._now, self._cpu = self._files[file], now

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self._spend_on(file_of(item))
        self._now["tests"] += 1
        found = yield
        if self._unchecked > 200:
            self._unchecked = 0
            maps = pathlib.Path("/proc/self/maps")  # of Linux
            if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
                jax.clear_caches()
        return found

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self):
        if self._now["tests"]:  # the first process of several has none, and all for its children
            self._spend_on("(imports)")
        if self._to_first_process is not None:
            self._to_first_process["costs"] = dict(self._files)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        for file, row in getattr(node, "workeroutput", {}).get("costs", {}).items():
            for column, value in row.items():
                self._files[file][column] += value

    def pytest_terminal_summary(self, terminalreporter):
        rows = sorted(self._files.items(), key=lambda entry: -entry[1]["CPU s"])
        little = [row for _, row in rows if row["CPU s"] < SHOWN]
        shown = [(file, row) for file, row in rows if row["CPU s"] >= SHOWN]
        shown.append(("all others", _sum(little)))
        shown.append(("all", _sum(row for _, row in rows)))
        terminalreporter.section("costs")
        terminalreporter.write_line("  ".join((*COLUMNS, "file")))
        for file, row in shown:
            cells = (f"{row[column]:{len(column)}.0f}" for column in COLUMNS)
            terminalreporter.write_line("  ".join((*cells, file)))


def _sum(rows):
    total = dict.fromkeys(COLUMNS, 0)
    for row in rows:
        for column in COLUMNS:
            total[column] += row[column]
    return total
