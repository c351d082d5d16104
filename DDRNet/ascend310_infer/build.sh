#!/usr/bin/env bash
# Builds out/main: bash build.sh [arguments of cmake, such as -DSANITIZE=ON]
# MS_LITE_HOME (or LITE_HOME) is the unpacked release of MindSpore Lite, or the folder into which its pip wheel has been
# unpacked. out/lite_home keeps which one it was.
set -euo pipefail
home=${MS_LITE_HOME:-${LITE_HOME:-}}
[[ -z $home || $home == /* ]] || home=$PWD/$home
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

fail() {
  echo "error: $1" >&2
  exit 2
}

command -v cmake >/dev/null || fail "no cmake; install it (apt-get install cmake)"
command -v make >/dev/null || fail "no make; install it (apt-get install make)"
[[ -n $home ]] || fail "MS_LITE_HOME is not set; unpack MindSpore Lite, of the release whose MindSpore exported the \
model, and set MS_LITE_HOME to it, or do without: run_infer_310.sh --backend mindspore"
[[ -d $home ]] || fail "MS_LITE_HOME names $home, which is no folder; unpack MindSpore Lite there"
include=
for candidate in runtime:runtime/lib/libmindspore-lite.so \
  mindspore_lite:mindspore_lite/lib/libmindspore-extendrt_python.so .:lib/libmindspore-extendrt_python.so; do
  if [[ -f $home/${candidate%%:*}/include/api/model.h && -f $home/${candidate#*:} ]]; then
    include=$home/${candidate%%:*}
    library=$home/${candidate#*:}
    break
  fi
done
[[ -n $include ]] || fail "$home holds neither a release of MindSpore Lite (runtime/include, \
runtime/lib/libmindspore-lite.so) nor its unpacked wheel (mindspore_lite/include, mindspore_lite/lib); set MS_LITE_HOME"

rm -rf build # of another Lite, compiler or option, perhaps
mkdir build
log=build/configure.log
cmake -S . -B build -G "Unix Makefiles" -DLITE_INCLUDE="$include" -DLITE_LIBRARY="$library" "$@" 2>&1 | tee "$log" || {
  error=$(grep -m 1 '^error: ' "$log") && fail "${error#error: }"
  grep -q 'not able to compile a simple test program' "$log" &&
    fail "the C++ compiler does not compile C++17; install g++ 8 or newer, or set CXX to one"
  grep -q CMAKE_CXX_COMPILER "$log" && fail "no C++ compiler; install g++ 8 or newer (apt-get install g++)"
  echo "the last lines of cmake:" >&2
  tail -n 15 "$log" >&2
  exit 1
}
cmake --build build -j "$(nproc)"
mkdir -p out
cp build/main out/main.part
rm -f out/lite_home # of another Lite, perhaps; after main, so that it never speaks of another one than this
mv out/main.part out/main
(cd -- "$home" && pwd -P) >out/lite_home
