"""What is wrong with this set-up, and what to type: one line for each check.

    python -m tools.doctor          make doctor
    python -m tools.doctor --json   the same as a list of {name, status, says, fix}

It runs with whatever is installed, and changes nothing. docs/TROUBLESHOOTING.md explains the checks.

Exit status: 0; 1 when a check fails (warnings do not count); 2 when this is not the repository's root.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from stages.core.errors import InputError, run_main
from tools.doctor import environment, hardware, repository, storage, tracking
from tools.doctor.finding import Finding, fail, warn

# In this order: what later checks need comes first. Their modules import nothing but the standard library at the top,
# because this has to run where the packages are missing or broken.
CHECKS: dict[str, Callable[[], Finding]] = {
    "python": environment.python,
    "commands": environment.commands,
    "lock": environment.lock,
    "gdrive": environment.gdrive,
    "git": repository.git,
    "history": repository.history,
    "secrets": repository.secrets,
    "params": repository.params,
    "untracked": repository.untracked,
    "dvc.lock": repository.stale,
    "cache": storage.cache,
    "disk": storage.disk,
    "remote": storage.remote,
    "gpu": hardware.gpu,
    "bf16": hardware.bf16,
    "threads": hardware.threads,
    "wandb": tracking.wandb,
}


def examine() -> Iterator[tuple[str, Finding]]:
    """Run the checks and yield what each finds. Only a wrong Python ends it early: nothing else can be told then."""
    failed: set[str] = set()
    for name, check in CHECKS.items():
        try:
            finding = check()
        except InputError as error:
            if "params" in failed and str(error).startswith("params.yaml"):
                finding = warn("cannot be checked (params.yaml is refused)", "mend params.yaml first, as above")
            else:
                finding = fail(_one_line(error), "mend it, then `python -m tools.doctor` again")
        except Exception as error:  # one broken package must not hide what the other checks find
            what = f"cannot be checked ({type(error).__name__}: {_one_line(error)[:200]})"
            if "lock" in failed:
                finding = warn(what, "mend the packages first, as above")
            elif "dvc.lock" in failed and _is_dvcs(error):
                finding = warn("cannot be checked (dvc refuses its files)", "mend dvc.lock first, as above")
            else:
                finding = fail(what, "python -m pip install --force-reinstall --no-deps -r requirements.txt")
        if finding.status == "FAIL":
            failed.add(name)
        yield name, finding
        if "python" in failed:
            return


def main(as_json: bool) -> int:
    """Print the findings; 1 when one of them is a failure."""
    if not (Path("dvc.yaml").exists() and Path("pyproject.toml").exists()):
        raise InputError("no dvc.yaml and pyproject.toml here; run this from the root of the repository")
    findings = []
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are no UTF-8
    for name, finding in examine():
        findings.append((name, finding))
        if not as_json:
            print(line(name, finding), flush=True)
    failures, warnings = (sum(f.status == status for _, f in findings) for status in ("FAIL", "warn"))
    if as_json:
        print(json.dumps([{"name": name, **dataclasses.asdict(finding)} for name, finding in findings], indent=2))
    else:
        print(f"doctor: {len(findings)} checks, {failures} failed, {warnings} to look at")
    return 1 if failures else 0


def line(name: str, finding: Finding) -> str:
    """A finding as it is printed."""
    fix = f"  ->  {finding.fix}" if finding.fix else ""
    return f"{finding.status:<4}  {name:<10} {finding.says}{fix}"


def _is_dvcs(error: Exception) -> bool:
    """Whether dvc raised it, which may not be imported where the packages are broken."""
    return any(cls.__name__ == "DvcException" for cls in type(error).__mro__)


def _one_line(error: Exception) -> str:
    """The message; of several lines, the first one may be a heading that ends in a colon."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return "; ".join(lines).replace(":; ", ": ")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.doctor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a list of {name, status, says, fix}")
    return parser.parse_args()


def run() -> None:
    """The body of the process."""
    run_main(lambda: main(_parse().json), "doctor")
