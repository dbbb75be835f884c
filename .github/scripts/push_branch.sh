#!/usr/bin/env bash
# Push a branch with the token of the job, which no file and no command line shows. A branch of the same name that an
# earlier run left is replaced; one that somebody has pushed to meanwhile is not.
#
# BRANCH, GITHUB_TOKEN
set -euo pipefail

# shellcheck disable=SC2016  # git's shell reads the variable
git -c credential.helper= -c credential.helper='!f() { echo username=x-access-token; echo "password=$GITHUB_TOKEN"; }; f' \
  push --force-with-lease origin "refs/heads/$BRANCH:refs/heads/$BRANCH"
