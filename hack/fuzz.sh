#!/bin/bash
# Runs every fuzz target for FUZZTIME (30s if not set), one for each processor at a time,
# each in FUZZMEMORY KiB of address space (8 GiB if not set). What one finds is kept by go
# as a test case in the package's testdata.
#
#   PACKAGES=./pkg/formats/... hack/fuzz.sh   only those in some packages
set -euo pipefail
cd "$(dirname "$0")/.."

time=${FUZZTIME:-30s}
export CGO_ENABLED=0 FUZZTIME=$time FUZZMEMORY=${FUZZMEMORY:-8388608} GOMEMLIMIT=1GiB
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export work

# targets: lines of "directory name", from the tests of the packages asked for.
targets() {
  go list -f '{{$dir := .Dir}}{{range .TestGoFiles}}{{$dir}}/{{.}}{{"\n"}}{{end}}{{range .XTestGoFiles}}{{$dir}}/{{.}}{{"\n"}}{{end}}' ${PACKAGES:-./...} |
    grep -v '^$' | xargs grep -oHE '^func Fuzz[A-Za-z0-9_]+' |
    while IFS=: read -r file function; do
      echo "$(dirname "$file") ${function#func }"
    done
}

# One binary for each package, with the instrumentation that fuzzing needs.
build() { # DIRECTORY
  go test -c -fuzz=. -o "$work/$(tr / _ <<<"$1").test" "$1"
}

# The target runs in its package's directory, where its corpus is.
fuzz() { # DIRECTORY NAME
  local dir=$1 name=$2 binary log
  binary=$work/$(tr / _ <<<"$dir").test
  log=$work/$(tr / _ <<<"$dir").$name.log
  cd "$dir"
  ulimit -v "$FUZZMEMORY"
  if "$binary" -test.run='^$' -test.fuzz="^$name\$" -test.fuzztime="$FUZZTIME" -test.fuzzminimizetime=5s \
    -test.parallel=1 -test.fuzzcachedir="$work/cache/$(tr / _ <<<"$dir")" >"$log" 2>&1 || time_was_up "$log"; then
    echo "ok   ${dir#"$PWD_ROOT"/} $name: $(grep -oE 'execs: [0-9]+' "$log" | tail -1)"
  else
    echo "FAIL ${dir#"$PWD_ROOT"/} $name"
    tail -n 60 "$log"
    return 1
  fi
}

# Go's fuzzer now and then reports the end of its own time as a failure, with nothing else
# to say: no input, no message of the target's.
time_was_up() { # LOG
  ! grep -q 'Failing input' "$1" &&
    [[ $(grep -A1 -e '^--- FAIL' "$1") =~ ^'--- FAIL: '[A-Za-z0-9_]+' ('[0-9.]+s\)$'\n'' '+'context deadline exceeded'$ ]]
}
export -f fuzz time_was_up
export PWD_ROOT=$PWD

targets >"$work/targets"
found=$(wc -l <"$work/targets")
[[ $found -gt 0 ]] || { echo "no fuzz targets" >&2; exit 1; }
cut -d' ' -f1 "$work/targets" | sort -u | while read -r dir; do build "$dir"; done
status=0
xargs -P "$(nproc)" -L1 bash -c 'fuzz "$0" "$1"' <"$work/targets" || status=$?
[[ $status -eq 0 ]] || { echo "fuzzing found something, see above" >&2; exit 1; }
echo "fuzzed $found targets for $time each"
