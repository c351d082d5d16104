#!/usr/bin/env bash
# Train on one GPU device: bash run_standalone_train_gpu.sh [DEVICE_ID] [CONFIG_PATH]
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

train_standalone GPU "$@"
