#!/usr/bin/env bash
# Checks types by mypy.  setup.py installs kernels/, data_prep/ and configs/ inside the package fastssl, where mypy finds
# them by the links of build/types.
#   tools/types.sh VENV
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rm -rf build/types
mkdir -p build/types/fastssl
for path in fastssl/*.py fastssl/*/ kernels data_prep configs; do
    [ -L "build/types/fastssl/$(basename "$path")" ] || ln -s "../../../${path%/}" build/types/fastssl/
done
"$1/bin/python" -m mypy build/types/fastssl bench |
    sed -E "s,^build/types/fastssl/(kernels|data_prep|configs)/,\1/,; s,^build/types/,,"
