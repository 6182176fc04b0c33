#!/bin/sh
# Check the shared libraries and tools that no Python package brings; install them where that is possible without asking.
set -eu

packages=""
need_library() { ldconfig -p | grep -q "$1" || packages="$packages $2"; }
need_library libOSMesa.so libosmesa6   # MuJoCo without a GPU
need_library libEGL.so.1 libegl1       # MuJoCo on a GPU
need_library libGL.so.1 libgl1
need_library libnuma.so.1 libnuma1     # vLLM on a CPU
need_library libgthread-2.0.so.0 libglib2.0-0  # OpenCV
command -v g++ >/dev/null || packages="$packages g++"

[ -n "$packages" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "setup: installing$packages"
    apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
else
    echo "setup: system packages are missing; run as root: apt-get install -y$packages" >&2
    exit 1
fi
