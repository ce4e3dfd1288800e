#!/bin/sh
# Build the image of cluster/Containerfile, named for the version and the commit, and print its name.
#
#   cluster/build-image.sh                                   # scalp:0.1.0-3f2a91c0d4e5
#   cluster/build-image.sh registry.example.org/team/scalp   # for a registry, to push
#
# ENGINE is docker or podman (default: the first that is installed). BASE is another base image, such as
# python:3.11-slim-bookworm@sha256:…, which builds the same layers tomorrow. DRY_RUN=1 prints the command and
# runs nothing.
set -eu

repository=${1:-scalp}
root=$(cd "$(dirname "$0")/.." && pwd)
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml")
commit=$(git -C "$root" rev-parse HEAD)
name=$repository:$version-$(printf %.12s "$commit")

# The commit is the name: an uncommitted change would give two images one name.
if [ -n "$(git -C "$root" status --porcelain)" ]; then
    echo "error: the checkout has changes that are not committed; commit or stash them" >&2
    exit 2
fi

set -- build --file "$root/cluster/Containerfile" --tag "$name" \
    --build-arg "VERSION=$version" --build-arg "REVISION=$commit"
if [ -n "${BASE:-}" ]; then
    set -- "$@" --build-arg "BASE=$BASE"
fi
set -- "$@" "$root"

if [ -n "${DRY_RUN:-}" ]; then
    echo "${ENGINE:-docker} $*"
    exit 0
fi
engine=${ENGINE:-$(command -v docker || command -v podman || true)}
if [ -z "$engine" ]; then
    echo "error: neither docker nor podman is installed; install one, or set ENGINE" >&2
    exit 2
fi
"$engine" "$@" >&2
echo "$name"
