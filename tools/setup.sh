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

install_for_tests() { # names...; where it returns 1, $why has the reason
    local root=()
    why="this machine has no apt"
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" -ne 0 ]; then
        why="it needs root"
        sudo -n true 2>/dev/null || return 1
        root=(sudo -n)
    fi
    root+=(env DEBIAN_FRONTEND=noninteractive)
    "${root[@]}" apt-get update >"$log" 2>&1 || true
    why="this machine's apt does not know all of: $*"
    apt-get install -s "$@" >/dev/null 2>&1 || return 1
    info "installing for the tests: $*"
    why="apt-get did not succeed"
    "${root[@]}" apt-get install -y --no-install-recommends "$@" >"$log" 2>&1 || { why+=": $(tail -n 1 "$log")"; return 1; }
}

install_browser() { # for tests/test_report.py: about 100 MB; everything else works without it
    local name
    for name in chromium-headless-shell chromium google-chrome; do
        if command -v "$name" >/dev/null; then return; fi
    done
    install_for_tests chromium-headless-shell ||
        info "no Chromium is installed ($why): the test that opens the report's page is skipped here, and fails with CI" \
            "set. Debian: apt-get install chromium-headless-shell; elsewhere FASTSSL_BROWSER=/path/to/chrome names one"
}

install_cluster() { # for tests/scale, which starts two hosts with sshd and Slurm: about 20 MB
    local packages=(openssh-server pdsh openmpi-bin slurm-wlm munge iproute2) name missing=() PATH=$PATH:/usr/sbin:/sbin
    for name in sshd pdsh mpirun slurmctld slurmd sbatch munged ip; do
        command -v "$name" >/dev/null || missing+=("$name")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    # With systemd, installing them would start an SSH server and Slurm's daemons on this machine.
    why="systemd would start their services"
    [ ! -d /run/systemd/system ] && install_for_tests "${packages[@]}" ||
        info "${missing[*]}: not installed ($why): the tests of launches on several hosts are skipped here, and fail with" \
            "CI set. Debian: apt-get install ${packages[*]}"
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
    if [[ ",${EXTRAS:-test}," == *,test,* ]]; then install_browser; install_cluster; fi
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
