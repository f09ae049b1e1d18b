#!/bin/bash
# Runs every fuzz test for FUZZTIME (30s if not set). What one finds is kept by go as a
# test case in the package's testdata.
set -euo pipefail
cd "$(dirname "$0")/.."

time=${FUZZTIME:-30s}
found=0
while read -r file; do
  package=./$(dirname "$file")
  while read -r name; do
    echo "== $package $name"
    go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" "$package"
    found=$((found + 1))
  done < <(grep -ohE '^func Fuzz[A-Za-z0-9_]+' "$file" | sed 's/^func //')
done < <(git ls-files -- '*_test.go' | xargs grep -lE '^func Fuzz')
echo "fuzzed $found parsers for $time each"
