#!/usr/bin/env bash
# Train on DEVICE_NUM (8) Ascend devices of this server: bash run_distribute_train_ascend.sh [RANK_TABLE_FILE] [CONFIG_PATH]
# utils/hccl_tools writes the rank table. With DEVICE_TARGET=CPU, which needs none, "-" may stand in its place.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

are_values 2 "$@" || usage "[RANK_TABLE_FILE] [CONFIG_PATH] (more arguments go to train.py)"
target=${DEVICE_TARGET:-Ascend}
if [[ $1 != - ]]; then
  table=(--rank_table_file "$(absolute "$1")")
elif [[ $target == CPU ]]; then
  table=()
else
  fail "$target devices need a rank table, and - is none; make one with utils/hccl_tools/hccl_tools.py"
fi
run_script train.log train.py --config_path "$(absolute "$2")" --device_target "$target" \
  --device_num "${DEVICE_NUM:-8}" "${table[@]}" "${@:3}"
