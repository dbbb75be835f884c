#!/usr/bin/env bash
# `batch.sh ADDRESS FOLDER [NAME]`: get a batch of production images, and print its name.
#
# ADDRESS is a folder of batches, whatever `dvc get-url` takes; without NAME, the newest is taken: the last by name.
set -euo pipefail

address=${1%/}
name=${3:-}
if [ -z "$name" ]; then
  name=$(dvc ls-url "$address" | sed 's,/$,,' | LC_ALL=C sort | tail -n 1)
fi
if ! [[ $name =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]]; then
  echo "batch: '$name' in $address is no name of a batch (letters, digits, dots, dashes, underscores)" >&2
  exit 2
fi
mkdir -p "$2"
dvc get-url --quiet --force "$address/$name" "$2/$name"
echo "$name"
