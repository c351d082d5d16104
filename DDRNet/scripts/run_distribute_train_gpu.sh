#!/usr/bin/env bash
# Train on the DEVICE_NUM (8) GPUs of this server: bash run_distribute_train_gpu.sh [CONFIG_PATH]
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

are_values 1 "$@" || usage "[CONFIG_PATH] (more arguments go to train.py)"
run_script train.log train.py --config_path "$(absolute "$1")" --device_target "${DEVICE_TARGET:-GPU}" \
  --device_num "${DEVICE_NUM:-8}" "${@:2}"
