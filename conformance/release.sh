#!/bin/sh
# Builds wheel and sdist into dist/, and checks both in fresh environments of every Python that is
# supported: the command runs, and what `init` writes passes. Nothing is uploaded.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -z "$(git status --porcelain)" ] || { echo "The working tree has changes; commit them first." >&2; exit 1; }

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
grep -q "^## $version (" CHANGELOG.md || { echo "CHANGELOG.md has no section $version: towncrier build --version $version." >&2; exit 1; }
for one in changes/+*.md; do
    [ ! -e "$one" ] || { echo "$one is not in CHANGELOG.md: towncrier build --version VERSION." >&2; exit 1; }
done

for one in 3.11 3.12 3.13; do
    command -v "python$one" >/dev/null || { echo "python$one is missing; a release is checked on 3.11 to 3.13." >&2; exit 1; }
done

rm -rf dist
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/build"
"$scratch/build/bin/pip" install --quiet --constraint constraints.txt build
"$scratch/build/bin/python" -m build --outdir dist . >"$scratch/build.log" || { cat "$scratch/build.log" >&2; exit 1; }

for one in 3.11 3.12 3.13; do
    for package in dist/*.whl dist/*.tar.gz; do
        env=$scratch/$one-${package##*.}
        "python$one" -m venv "$env"
        "$env/bin/pip" install --quiet --constraint constraints.txt "$package"
        "$env/bin/helix-conformance" init "$env/new" >/dev/null
        PATH="$env/bin:$PATH" sh "$env/new/conformance.sh" --examples 20 >"$env/run.txt" || { cat "$env/run.txt" >&2; exit 1; }
        echo "Python $one, $package: $("$env/bin/helix-conformance" --version); $(tail -n 1 "$env/run.txt")"
    done
done

echo "To upload, after a tag v$("$scratch/3.12-whl/bin/helix-conformance" --version | sed 's/.* //') of this commit:"
ls dist/*
