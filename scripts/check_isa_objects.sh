#!/usr/bin/env bash
# usage: check_isa_objects.sh NM OBJECT...: objects of one instruction set must hold no weak or unique symbol.
set -euo pipefail
nm="$1"
shift
status=0
for object in "$@"; do
  case "$object" in
    *kernels_*)
      if "$nm" "$object" | grep -E ' [WVu] '; then
        echo "$object holds symbols that the linker may share between instruction sets" >&2
        status=1
      fi
      ;;
  esac
done
exit $status
