"""Says loudly which tests could not run."""

import re


def pytest_terminal_summary(terminalreporter):
    reasons = {
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
        and re.search("BROWSER TESTS|RAY TESTS", report.longrepr[2])
    }
    for reason in sorted(reasons):
        terminalreporter.write_line(f"DID NOT RUN: {reason}", red=True, bold=True)
