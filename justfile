# The words of daily work. `just` alone lists them.

export PATH := justfile_directory() / ".cache/bin:" + env("PATH")

[private]
default:
    @just --list --unsorted

# Start everything in one process, on loopback
dev *args:
    go run . dev {{ args }}

# Show a session survive cuts and kills, and count what was lost
demo *args:
    go run . demo {{ args }}

# Write Go and protobuf in the one form
fmt: tools
    golangci-lint fmt ./...
    cd schema && buf format -w

# Say what the linters find; change nothing
lint: tools
    go vet ./...
    golangci-lint run ./...
    go fix -diff ./...
    cd schema && buf lint && buf format --diff --exit-code

# Run the tests
test *args:
    go test {{ args }} ./...

# Run the core's tests under the race detector
race *args:
    go test -race -timeout 30m {{ args }} $(go list ./... | grep -E '^tidemark/(broker|internal/gateway|schema|edge-ws|edge-grpc)(/|$)')

# Run the slow tests too: kills, random worlds, long streams
sim *args:
    #!/usr/bin/env bash
    set -euo pipefail
    dirs=$({ grep -rl --include='*_test.go' --exclude-dir=.cache TIDEMARK_SLOW . || true; } | xargs -r -n1 dirname | sort -u)
    if [ -z "$dirs" ]; then echo "no test asks for TIDEMARK_SLOW"; exit; fi
    TIDEMARK_SLOW=1 go test -count=1 -timeout 60m {{ args }} $dirs

# Run the clients in other languages against a running dev
clients:
    {{ if path_exists("clients") == "true" { "clients/run" } else { "echo 'there are no clients yet'" } }}

# Fuzz every parser for so many runs each (counted, for Go's fuzzer sometimes takes its own deadline for a failure)
fuzz runs="10000":
    #!/usr/bin/env bash
    set -euo pipefail
    while IFS=: read -r file name; do
        name=${name#func }
        echo "$name in $(dirname "$file")"
        go test -run '^$' -fuzz "^$name\$" -fuzztime {{ runs }}x -fuzzminimizetime 100x "$(dirname "$file")" </dev/null
    done < <(grep -roE --include='*_test.go' --exclude-dir=.cache '^func Fuzz\w+' . | sort)

# Run the Go benchmarks that match
bench match="." *args:
    go test -run '^$' -bench '{{ match }}' -benchmem {{ args }} ./...

# Generate code from the protobuf definitions, unless they broke what was agreed before
gen: tools
    #!/usr/bin/env bash
    set -euo pipefail
    cd schema
    # contract.binpb is what the definitions said last: bytes and JSON of then must be read for ever.
    if [ -f contract.binpb ] && ! buf breaking --against contract.binpb; then
        echo "these definitions break what was agreed; where that was never released, delete schema/contract.binpb, and say why in the commit"
        exit 1
    fi
    buf generate
    buf build -o contract.binpb --exclude-source-info

# Run everything that CI runs
ci:
    .ci/run

# Prove that what is checked in is what `just gen` makes
[private]
fresh: tools
    #!/usr/bin/env bash
    set -euo pipefail
    made=$(mktemp -d)
    trap 'rm -rf "$made"' EXIT
    mkdir "$made/schema"
    (cd schema && buf generate -o "$made/schema" && buf build -o "$made/schema/contract.binpb" --exclude-source-info)
    sums() { find schema -name '*.pb.go' -o -name '*.connect.go' -o -name contract.binpb | sort | xargs sha256sum; }
    diff <(sums) <(cd "$made" && sums) || { echo "generated code is not what the definitions make: run just gen"; exit 1; }

# Build the development tools that tools/go.mod pins
[private]
tools:
    @cd tools && go build -o ../.cache/bin/ tool
