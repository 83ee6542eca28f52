#!/usr/bin/env bash
# Runs every fuzz target of the module for the given time each.
set -euo pipefail
time=${1:-30s}
out=$(mktemp)
trap 'rm -f "$out"' EXIT
fuzz() {
	# Minimising an input whose coverage varies with the scheduler never ends.
	go test -run '^$' -fuzz "^$2\$" -fuzztime "$time" -fuzzminimizetime 10x "$1" | tee "$out"
}
for pkg in $(go list ./...); do
	for target in $(go test -list '^Fuzz' "$pkg" | grep '^Fuzz' || true); do
		echo "$pkg $target"
		fuzz "$pkg" "$target" && continue
		# At the end of its time the tool compares the errors of two contexts of
		# which one is cancelled a moment later, and a busy machine makes a failure
		# of that ("context deadline exceeded"). With a real one it names an input.
		grep -q 'context deadline exceeded' "$out" && ! grep -q 'Failing input' "$out" || exit 1
		echo "$pkg $target: no input failed, once more"
		fuzz "$pkg" "$target"
	done
done
