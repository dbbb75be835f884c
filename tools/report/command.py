"""One page about a run: what it is worth against a baseline, and why.

    python -m tools.report                            # the workspace, against the last committed results
    python -m tools.report my-experiment              # a DVC experiment, against the commit that it was made from
    python -m tools.report HEAD --against v1.0        # two git revisions

Writes report/report.html, which needs nothing beside it, and report/report.md, for a pull request.
"""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path

from stages.core.errors import run_main
from tools.report.data import read_run
from tools.report.machine import environment
from tools.report.page import markdown, page
from tools.report.profile import read_profile
from tools.report.source import WORKSPACE, default_baseline, open_source
from tools.shared.arguments import output_file, write_output


def main() -> int:
    """Read, render, write; says where the pages are."""
    arguments = _parse()
    source = open_source(arguments.revision)
    against = None if arguments.alone else arguments.against or default_baseline(source)
    run = read_run(source)
    baseline = read_run(open_source(against)) if against else None
    has_profile = source.is_workspace and "metrics/profile.json" in run.metrics
    profile = read_profile() if has_profile else None
    machine, date = environment(), datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    write_output("--html", arguments.html, page(run, baseline, profile, machine, date))
    write_output("--markdown", arguments.markdown, markdown(run, baseline, machine, date))
    print(f"report: {arguments.html} ({arguments.html.stat().st_size / 1e6:.1f} MB) and {arguments.markdown}")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "revision",
        nargs="?",
        default=WORKSPACE,
        metavar="REV",
        help="git revision or DVC experiment (default: the workspace)",
    )
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument(
        "--against",
        metavar="REV",
        help="what to compare with: a git revision, an experiment, or `workspace` (default: of an experiment the "
        "commit that it was made from, of the workspace HEAD, otherwise the last commit with other results)",
    )
    compared.add_argument("--alone", action="store_true", help="compare with nothing")
    parser.add_argument("--html", type=output_file, default=Path("report/report.html"), metavar="FILE")
    parser.add_argument("--markdown", type=output_file, default=Path("report/report.md"), metavar="FILE")
    return parser.parse_args()


def run() -> None:
    """The body of the process."""
    run_main(main, "report")
