#!/bin/bash
# A drill of each kind on the staging run, one after the other; for cron or a scheduled pipeline.
# Exit code 1 when one did not pass. The scorecards are appended to drills.jsonl, one JSON object a line.
set -uo pipefail
config="${1:-/etc/stepguard/staging.toml}"
cards="${2:-drills.jsonl}"

# A drill begins only on a run that is well, so each waits for the servers first.
failed=0
stepguard wait --config "$config" --timeout-s 900 || exit 1
stepguard drill --config "$config" --fault kill --timeout-s 1800 --json >>"$cards" || failed=1

stepguard wait --config "$config" --timeout-s 900 || exit 1
stepguard drill --config "$config" --fault hang --timeout-s 1800 --json >>"$cards" || failed=1
exit "$failed"
