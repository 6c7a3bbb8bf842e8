#!/usr/bin/env bash
# Prepares VENV: system packages that FFCV is built with, a virtual environment, fastssl in editable mode.
# The Makefile calls it when setup.py, pyproject.toml or this file has changed since it last succeeded.
#   [PYTHON=python3.12] [EXTRAS=test,gpu] [WHEELHOUSE=folder] tools/setup.sh VENV
set -euo pipefail
venv=$1
info() { echo "fastssl: $*" >&2; }
fail() { info "$@"; exit 1; }

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
suitable() { [[ " 3.10 3.11 3.12 3.13 " == *" $(version "$1") "* ]]; }
complete() { # can make a virtual environment and compile an extension
    "$1" - 2>/dev/null <<<'import ensurepip, os, sysconfig
raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
}

find_python() { # the newest complete one; else the newest, to which apt adds what is missing
    local candidates=(python3.13 python3.12 python3.11 python3.10 python3 python) p
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for p in "${candidates[@]}"; do if suitable "$p" && complete "$p"; then echo "$p"; return; fi; done
    for p in "${candidates[@]}"; do if suitable "$p"; then echo "$p"; return; fi; done
    local found=""
    for p in "${candidates[@]}"; do if version "$p" >/dev/null; then found+=" $p is $(version "$p");"; fi; done
    fail "needs Python 3.10 to 3.13, found:${found:- none;} install one (apt-get install python3 python3-venv" \
        "python3-dev) or name one: make test PYTHON=/path/to/python3.12"
}

missing_packages() { # names of missing packages in Debian and Ubuntu
    local names=()
    command -v g++ >/dev/null || names+=(g++)
    command -v pkg-config >/dev/null || names+=(pkg-config)
    pkg-config --exists opencv4 2>/dev/null || names+=(libopencv-dev)
    pkg-config --exists libturbojpeg 2>/dev/null || names+=(libturbojpeg0-dev)
    "$python" -c 'import ctypes; ctypes.CDLL("libGL.so.1")' 2>/dev/null || names+=(libgl1) # for opencv-python's cv2
    complete "$python" || names+=("python$(version "$python")-venv" "python$(version "$python")-dev")
    echo "${names[*]-}"
}

install_packages() { # names...
    local root=() advice="ask an administrator to run: apt-get update && apt-get install -y $*"
    local offline="Installing from wheels needs none of them: docs/install.md, \"Without compiler, root or network\"."
    command -v apt-get >/dev/null || fail "FFCV needs these packages (Debian's names; this machine has no apt): $*. $offline"
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || fail "system packages are missing, and there is no sudo: $advice. $offline"
        root=(sudo)
        [ -t 0 ] || root=(sudo -n)
    fi
    info "installing system packages: $*"
    root+=(env DEBIAN_FRONTEND=noninteractive)
    "${root[@]}" apt-get update >"$log" 2>&1 &&
        "${root[@]}" apt-get install -y --no-install-recommends "$@" >>"$log" 2>&1 ||
        { tail -n 15 "$log" >&2; fail "apt-get did not succeed: $advice. $offline"; }
}

install_browser() { # for tests/test_report.py: about 100 MB; everything else works without it
    local name root=() why="this machine's apt knows no chromium-headless-shell"
    for name in chromium-headless-shell chromium google-chrome; do
        if command -v "$name" >/dev/null; then return; fi
    done
    if ! command -v apt-get >/dev/null; then
        why="this machine has no apt"
    elif [ "$(id -u)" -ne 0 ] && ! sudo -n true 2>/dev/null; then
        why="it needs root"
    else
        [ "$(id -u)" -eq 0 ] || root=(sudo -n)
        root+=(env DEBIAN_FRONTEND=noninteractive)
        "${root[@]}" apt-get update >"$log" 2>&1 || true
        if apt-cache show chromium-headless-shell >/dev/null 2>&1; then
            info "installing chromium-headless-shell for the tests: about 100 MB"
            if "${root[@]}" apt-get install -y --no-install-recommends chromium-headless-shell >"$log" 2>&1; then return; fi
            why="apt-get did not succeed: $(tail -n 1 "$log")"
        fi
    fi
    info "no Chromium is installed ($why): the test that opens the report's page is skipped here, and fails with CI set." \
        "Debian: apt-get install chromium-headless-shell; elsewhere FASTSSL_BROWSER=/path/to/chrome names one"
}

exec 9<"${BASH_SOURCE[0]}"
flock 9 # if `make test` and `make quickstart` run at the same time, the second waits for the first
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if suitable "$venv/bin/python"; then python=$venv/bin/python; else python=$(find_python); fi
if [ -z "${WHEELHOUSE:-}" ]; then
    missing=$(missing_packages)
    # shellcheck disable=SC2086
    [ -z "$missing" ] || install_packages $missing
    if [[ ",${EXTRAS:-test}," == *,test,* ]]; then install_browser; fi
    source=()
else
    ls "$WHEELHOUSE"/ffcv-*.whl >/dev/null 2>&1 || fail "WHEELHOUSE=$WHEELHOUSE holds no wheel of ffcv: make wheelhouse"
    source=(--no-index --find-links "$WHEELHOUSE")
fi

[ "$python" = "$venv/bin/python" ] || "$python" -m venv --clear "$venv" >"$log" 2>&1 ||
    { tail -n 15 "$log" >&2; fail "$python could not make a virtual environment in $venv"; }
info "installing into $venv with Python $(version "$python"): some minutes and about 7 GB (tail -f $venv/setup.log)"
"$venv/bin/python" -m pip install --disable-pip-version-check "${source[@]}" \
    -e ".[${EXTRAS:-test}]" >"$venv/setup.log" 2>&1 ||
    { tail -n 30 "$venv/setup.log" >&2; fail "pip did not succeed; the whole log is $venv/setup.log"; }
