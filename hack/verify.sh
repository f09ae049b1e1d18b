#!/bin/bash
# Checks that what is generated or formatted by tools is as the tools leave it.
set -euo pipefail
cd "$(dirname "$0")/.."

unformatted=$(git ls-files -- '*.go' | xargs gofmt -l)
if [[ -n $unformatted ]]; then
  echo "not formatted by gofmt:" >&2
  echo "$unformatted" >&2
  exit 1
fi
go mod verify
before=$(git status --porcelain)
go generate ./...
after=$(git status --porcelain)
if [[ $before != "$after" ]]; then
  echo "go generate changed files: run make generate and commit" >&2
  diff <(echo "$before") <(echo "$after") >&2 || true
  exit 1
fi
# The chart: lint, the API's types, and what is committed of it.
(cd tools/helm && go test -count=1 ./...)
# What the tests in a cluster are made of, as far as it needs none.
(cd e2e && go vet ./... && go test -count=1 ./...)
