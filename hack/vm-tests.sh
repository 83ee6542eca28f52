#!/usr/bin/env bash
# Runs in the machine of hack/vm.sh the tests that make vm compiled into
# build/vm, and lists what ran. A test that is skipped is a failure here: this
# is the kernel that has everything.
#   VM_RUN  pattern of the tests, instead of those below
set -euo pipefail
cd "$(dirname "$0")/.."
top=$PWD
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export REQUIRE_NETNS=1 REQUIRE_KERNEL=1 E2E_PROBE=$top/build/vm/probe E2E_SLOW=5
wrong=()

# The kernel loads what a rule needs in the middle of a transaction and starts
# over. Emulated, that takes the first transaction near the ten seconds that the
# plugin has to answer a call.
modprobe -a nf_tables nft_chain_nat nft_compat nft_ct nft_fib_inet nft_masq nft_nat xt_MASQUERADE xt_comment xt_mark

# run PACKAGE PATTERN runs the package's tests where go test would run them.
run() {
	local name=${1##*/} ran
	echo "=== $1, -run '$2', $(uname -r)"
	(cd "$1" && "$top/build/vm/$name.test" -test.v -test.timeout 25m -test.run "$2") 2>&1 | tee "$logs/$name" || wrong+=("$1 failed")
	ran=$(grep -E '^ *--- (PASS|FAIL|SKIP)' "$logs/$name" | tee -a "$logs/ran" || true)
	if grep -q -e '--- SKIP' <<<"$ran"; then
		wrong+=("$1 skipped tests")
	fi
	if [ -z "$ran" ]; then
		echo "no test of $1 matches '$2'"
		[ -n "${VM_RUN:-}" ] || wrong+=("$1 has no test that matches")
	fi
}

run internal/netnstest 'Kinds|Needs'
run internal/datapath "${VM_RUN:-^(TestLAN(VLANs|VLANOfAnother|Dummy|IPvlanAccess|KindsExclude|MacvlanAccess)|TestProbeOnParent|TestShortcut.*)\$}"
run driver "${VM_RUN:-^TestLANRealKernel\$/(ipvlan|VLAN|QinQ)}"
run e2e "${VM_RUN:-^(TestLAN(ParityKinds|Parent)|TestLeaseKinds)\$/(vlan|VLAN)}"

printf '\n=== ran in the virtual machine\n'
cat "$logs/ran"
for w in "${wrong[@]}"; do echo "WRONG: $w"; done
[ ${#wrong[@]} -eq 0 ]
