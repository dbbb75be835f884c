#!/usr/bin/env bash
# One experiment, left as a branch and a report; or, with BATCH, a retraining on a batch of production images.
#
# NAME         of the experiment; empty: of the run of the workflow
# RECIPE       presets of recipes/; empty: none
# OVERRIDES    section.key=value ..., as for `dvc exp run -S`
# BATCH        name of a batch in BATCHES, with its labelled images under the same name in LABELS; empty: an experiment
set -euo pipefail

refuse() { echo "train: $1" >&2; exit 2; }

name=${NAME:-run-${GITHUB_RUN_ID:?}-${GITHUB_RUN_ATTEMPT:-1}}
[[ $name =~ ^[a-z0-9][a-z0-9-]*$ ]] || refuse "name '$name': small letters, digits and dashes only"
[[ ${RECIPE:-} =~ ^[a-z0-9_,-]*$ ]] || refuse "recipe '$RECIPE': names in recipes/, with commas between them"
read -r -d '' -a words <<< "${OVERRIDES:-}" || true
for word in "${words[@]}"; do
  [[ $word =~ ^[a-z]+\.[a-z0-9_]+= ]] || refuse "override '$word' is not section.key=value"
done

[ -z "${BATCH:-}" ] || [ -z "${OVERRIDES:-}${RECIPE:-}" ] || refuse "a batch is retrained on by the params as they are: leave overrides and recipe empty"

git config user.name "github-actions[bot]"
git config user.email "41898282+github-actions[bot]@users.noreply.github.com"
before=$(git rev-parse HEAD)
# A runner of your own still has the experiment of an earlier run of this name; checkout has removed its branch.
git for-each-ref --format='delete %(refname)' "refs/exps/*/*/$name" | git update-ref --stdin
if [ -n "${BATCH:-}" ]; then
  bash .github/scripts/batch.sh "${BATCHES:?}" "${RUNNER_TEMP:?}/production" "$BATCH"
  bash .github/scripts/batch.sh "${LABELS:?}" "$RUNNER_TEMP/labels" "$BATCH"
  dvc repro # what the remote lacks: the images are not pushed
  # Results that this runner made anew are in their last bits others, and a retraining begins with a commit.
  if ! git diff --quiet -- dvc.lock metrics plots; then
    git commit --quiet --message "Results of this runner" -- dvc.lock metrics plots
    before=$(git rev-parse HEAD)
  fi
  summary=$RUNNER_TEMP/retrain.json
  rm -f "$summary"
  status=0
  python -m tools.retrain "$RUNNER_TEMP/production/$BATCH" --labels "$RUNNER_TEMP/labels/$BATCH" --json "$summary" || status=$?
  # 1 with these words: tried, and the old model stays. Without them, something broke.
  [ "$status" = 0 ] || { [ "$status" = 1 ] && grep -q '"decision": "not promoted"' "$summary"; } || exit "$status"
  git branch "experiment/$name"
else
  # Several values of a key are several experiments, in the queue: none of this name, and none that has run.
  if python -m tools.exp --dry ${RECIPE:+--recipe "$RECIPE"} --name "$name" "${words[@]}" | grep -q "dvc exp run --queue"; then
    refuse "overrides '$OVERRIDES': one value for each key"
  fi
  python -m tools.exp ${RECIPE:+--recipe "$RECIPE"} --name "$name" "${words[@]}"
  dvc exp branch "$name" "experiment/$name"
fi
if git diff --quiet "$before" "experiment/$name"; then
  echo "train: nothing differs from $before"
  exit 0
fi
python -m tools.report "experiment/$name" --against "$before"
cat report/report.md >> "${GITHUB_STEP_SUMMARY:-/dev/null}"
printf 'branch=%s\n' "experiment/$name" >> "${GITHUB_OUTPUT:-/dev/null}"
