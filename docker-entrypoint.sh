#!/bin/sh
# Before the command: put the Google Drive key where dvc finds it and no stage's environment shows it.
#
# GDRIVE_CREDENTIALS_DATA        the text of the service account's JSON key, or
# /run/secrets/gdrive-key.json   that file, mounted (GDRIVE_KEY_FILE names another place)
# DVC_CACHE_DIR                  DVC's cache, mounted at this path (the repository's own setting, .dvc/config.local, comes first)
# CI_MODE=1                      for unattended runs: no prompt, plain output, one line of what runs where
set -eu
umask 077
key="no"
configuration=""

fail() { echo "docker-entrypoint: $*" >&2; exit 2; }

# dvc's configuration for all repositories, in a folder of this container: .dvc/config.local would outlive it on the host.
own_configuration() {
  [ -n "${configuration:-}" ] || configuration=$(mktemp -d)
  export DVC_GLOBAL_CONFIG_DIR="$configuration"
}

[ -w "$HOME" ] || { home=$(mktemp -d 2> /dev/null) && export HOME="$home"; } || fail "neither HOME nor /tmp is writable: with --read-only, say -v /tmp -v $HOME"
[ -d "${TMPDIR:-/tmp}" ] && [ -w "${TMPDIR:-/tmp}" ] || fail "${TMPDIR:-/tmp} is not writable: with --read-only, say -v /tmp"

mounted=${GDRIVE_KEY_FILE:-/run/secrets/gdrive-key.json}
if [ -n "${GDRIVE_KEY_FILE:-}" ] || [ -e "$mounted" ]; then
  [ -f "$mounted" ] || fail "$mounted is no file: mount the key there, as in -v /path/to/key.json:$mounted:ro (docker makes a folder where the path is wrong)"
  [ -r "$mounted" ] || fail "$mounted cannot be read by user $(id -u): run as its owner, --user \$(id -u):\$(id -g)"
  GDRIVE_CREDENTIALS_DATA=$(cat "$mounted")
  origin=$mounted
else
  origin=GDRIVE_CREDENTIALS_DATA
fi
if [ -n "${GDRIVE_CREDENTIALS_DATA:-}" ]; then
  printf '%s' "$GDRIVE_CREDENTIALS_DATA" | python -c 'import json, sys; sys.exit(not isinstance(json.load(sys.stdin), dict))' 2> /dev/null \
    || fail "$origin is not JSON: give the text of the service account's key file, not its path and not base64"
  own_configuration
  printf '%s' "$GDRIVE_CREDENTIALS_DATA" > "$DVC_GLOBAL_CONFIG_DIR/gdrive-key.json"
  # For every remote of the repository on Google Drive: a section of one that is not there would break every command.
  dvc remote list 2> /dev/null | awk '$2 ~ /^gdrive:/ { print $1 }' | while read -r remote; do
    printf "['remote \"%s\"']\n    gdrive_service_account_json_file_path = %s\n" \
      "$remote" "$DVC_GLOBAL_CONFIG_DIR/gdrive-key.json" >> "$DVC_GLOBAL_CONFIG_DIR/config"
  done
  key="a"
fi
if [ -n "${DVC_CACHE_DIR:-}" ]; then
  [ -w "$DVC_CACHE_DIR" ] || fail "DVC_CACHE_DIR: $DVC_CACHE_DIR is no folder that user $(id -u) can write to: mount it, as in -v $DVC_CACHE_DIR:$DVC_CACHE_DIR"
  own_configuration
  printf '[cache]\n    dir = %s\n' "$DVC_CACHE_DIR" >> "$DVC_GLOBAL_CONFIG_DIR/config"
fi
unset GDRIVE_CREDENTIALS_DATA mounted origin configuration home

if [ "${CI_MODE:-0}" != 0 ]; then
  export GIT_TERMINAL_PROMPT=0 WANDB_SILENT=true TERM=dumb NO_COLOR=1
  echo "docker-entrypoint: $(git describe --always --dirty 2> /dev/null || echo no repository), $(python --version)," \
    "$(nproc) cores, user $(id -u), $key Google Drive key" >&2
fi

umask 022
exec "$@"
