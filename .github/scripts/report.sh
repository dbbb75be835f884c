#!/usr/bin/env bash
# The report of this run, for the summary of the job and for the pull request.
#
# BASE      commit to compare with; empty: as tools.report chooses
# NUMBER    of the pull request; empty: none
set -euo pipefail

against=()
[ -z "${BASE:-}" ] || against=(--against "$BASE")
python -m tools.report workspace "${against[@]}"
[ -z "${NUMBER:-}" ] || printf '%d\n' "$NUMBER" > report/number
cat report/report.md >> "${GITHUB_STEP_SUMMARY:-/dev/null}"
