#!/bin/sh
# What action.yml runs: the suite on $ENGINE, for the layouts in $LAYOUTS and with the options in
# $OPTIONS. The stream, the page and a JUnit file go to conformance-report/, the table and the first
# failure to the job's summary. The status is that of `helix-conformance run`.
set -eu
reports=conformance-report
mkdir -p "$reports"

set -- --engine "$ENGINE" --json "$reports/run.jsonl"
for layout in ${LAYOUTS:-}; do
    set -- "$@" --layout "$layout"
done

status=0
# shellcheck disable=SC2086  # options are words
COLUMNS=200 helix-conformance run "$@" ${OPTIONS:-} >"$reports/run.txt" || status=$?
cat "$reports/run.txt"

{
    printf '### Helix conformance: status %s\n\n' "$status"
    sed 's/^/    /' "$reports/run.txt" # indented, so that no line of an engine is Markdown
    printf '\n'
} >>"${GITHUB_STEP_SUMMARY:-/dev/null}"

# Its own status is that of the run, which is known already.
helix-conformance report "$reports/run.jsonl" --html "$reports/run.html" \
    --junit "$reports/run.xml" >/dev/null || true
exit "$status"
