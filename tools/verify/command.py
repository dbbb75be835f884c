"""Hash every output that dvc.lock names, in the workspace and in DVC's cache, and say what is missing or damaged.

    python -m tools.verify            make verify
    python -m tools.verify --json     the same as a list, one entry an output
    python -m tools.verify --repair   mend it: from the cache, the workspace, the remote, or by running the stage again

What `--repair` replaces in the workspace, it first copies to .dvc/tmp/set-aside/. docs/TROUBLESHOOTING.md explains.

Exit status: 0 when all is as dvc.lock says (with --repair: in the end); 1 when not; 2 bad input.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from stages.core.errors import InputError, run_main
from tools.doctor.finding import some
from tools.verify.integrity import CACHE, LISTING, WORKSPACE, Problem, State, inspect


def main(arguments: argparse.Namespace) -> int:
    """Inspect, repair where asked for, and tell."""
    if not Path("dvc.yaml").exists():
        raise InputError("no dvc.yaml here; run this from the root of the repository")
    if not Path("dvc.lock").exists():
        raise InputError("there is no dvc.lock: nothing has run that could be verified; dvc repro")
    states = _inspect()
    if arguments.repair and _wrong(states):
        from tools.verify.repair import repair

        repair(states)
        states = _inspect()
    if arguments.json:
        print(json.dumps([_as_dict(state) for state in states], indent=2))
    else:
        print("\n".join(describe(states)))
    return 1 if _wrong(states) else 0


def describe(states: Sequence[State]) -> list[str]:
    """One line an output, then what it comes to."""
    width = max((len(state.path) for state in states), default=0)
    lines = []
    for state in states:
        if state.problems or state.kept_by == "dvc" or not state.digest:
            lines.append(f"{'ok  ' if not state.problems else 'FAIL'}  {state.path:<{width}}  {_says(state)}")
    by_git = [state for state in states if state.kept_by == "git" and state.digest and not state.problems]
    if by_git:
        lines.append(f"ok    {len(by_git)} small outputs that git keeps are intact")
    size = sum(state.size for state in states) / 1e6
    wrong = _wrong(states)
    end = f"{len(wrong)} of them are not as dvc.lock says: python -m tools.verify --repair" if wrong else "all intact"
    return [*lines, f"verify: {len(states)} outputs of {size:,.1f} MB, {end}"]


def _inspect() -> list[State]:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            return inspect(repo)
    except DvcException as error:
        raise InputError(f"dvc cannot read the pipeline: {' '.join(str(error).split())}") from error


def _wrong(states: Sequence[State]) -> list[State]:
    return [state for state in states if state.problems]


def _says(state: State) -> str:
    if not state.digest:
        return f"not made yet (dvc repro {state.stage})"
    if not state.problems:
        files = f"{state.num_files} files, " if state.is_folder else ""
        return f"{files}{state.size / 1e6:,.1f} MB, intact in workspace and cache"
    return "; ".join(filter(None, (_place(state, where) for where in (WORKSPACE, CACHE))))


def _place(state: State, where: str) -> str:
    """What is wrong in one place: `altered in the workspace: a, b`."""
    found = state.found(where)
    if len([problem for problem in found if problem.what == "missing"]) == len(state.expected) + (where == CACHE) > 1:
        return f"all of it is missing in the {where}"
    parts = []
    for what in dict.fromkeys(problem.what for problem in found):
        names = [_name(state, problem) for problem in found if problem.what == what]
        parts.append(
            f"{_WORDS[what]} in the {where}: {some(names)}" if any(names) else f"{_WORDS[what]} in the {where}"
        )
    return "; ".join(parts)


_WORDS = {
    "missing": "missing",
    "altered": "altered",
    "damaged": "damaged",
    "extra": "not in dvc.lock, but",
    "unknown": "altered, and no list of its files to say which,",
}


def _name(state: State, problem: Problem) -> str:
    if problem.file != LISTING:
        return problem.file
    return "the list of its files" if state.is_folder and problem.where == CACHE else ""


def _as_dict(state: State) -> dict[str, object]:
    problems = [
        {"file": problem.file or None, "where": problem.where, "what": problem.what} for problem in state.problems
    ]
    return {
        "output": state.path,
        "stage": state.stage,
        "kept_by": state.kept_by,
        "md5": state.digest or None,
        "files": state.num_files,
        "bytes": state.size,
        "problems": problems,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.verify", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repair", action="store_true", help="mend what is missing or damaged")
    parser.add_argument("--json", action="store_true", help="print a list of outputs with their problems")
    return parser.parse_args()


def run() -> None:
    """The body of the process."""
    run_main(lambda: main(_parse()), "verify")
