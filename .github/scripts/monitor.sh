#!/usr/bin/env bash
# The monitor's verdict on the newest batch of production images: words, numbers and a page in monitor/.
#
# BATCHES    folder of batches (batch.sh)
set -euo pipefail

: "${BATCHES:?set the variable BATCHES of the repository: the folder with batches of production images}"
mkdir -p monitor
batch=$(bash .github/scripts/batch.sh "$BATCHES" production)
status=0
python -m tools.monitor "production/$batch" --json monitor/verdict.json --html monitor/monitor.html \
  > monitor/words.txt || status=$?
case $status in
  0) verdict=ok ;;
  10) verdict=benign ;;
  20) verdict=harmful ;;
  *) exit "$status" ;;
esac
{
  echo "**$batch: $verdict**"
  echo
  sed 's/^/    /' monitor/words.txt # an indented block
} > monitor/monitor.md
cat monitor/words.txt
cat monitor/monitor.md >> "${GITHUB_STEP_SUMMARY:-/dev/null}"
printf 'batch=%s\nverdict=%s\n' "$batch" "$verdict" >> "${GITHUB_OUTPUT:-/dev/null}"
