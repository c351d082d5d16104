#!/usr/bin/env bash
# Accuracy of an exported model on Ascend 310:
#   bash run_infer_310.sh [MINDIR_PATH] [BACKBONE] [DATASET] [DATA_PATH] [DEVICE_ID(optional, default 0)]
# Labels (preprocess.py), the inference program (built if its sources are newer, or another Lite is named), inference,
# accuracy (postprocess.py). Into the folder of the caller come imagenet_label.json, result_Files/<image>_0.bin (float32
# logits), time_Result/, acc.log, and the log of each step. Arguments after -- go to the inference program. --backend
# mindspore, or the variable BACKEND, takes MindSpore in Python for it instead of the C++ program; INFER_PROGRAM names
# another program.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

wanted="[MINDIR_PATH] [BACKBONE(resnest50, resnest101, resnest200 or resnest269)] [DATASET(imagenet or imagenet2012)] \
[DATA_PATH] [DEVICE_ID(optional)] (--backend lite or mindspore) (-- arguments of the program)"
words=()
backend=${BACKEND:-lite}
while (($#)) && [[ $1 != -- ]]; do
  if [[ $1 == --backend ]]; then
    backend=${2:-}
    shift
  else
    words+=("$1")
  fi
  (($# == 0)) || shift
done
(($# == 0)) || shift # the --
count=${#words[@]}
device=${words[4]:-0}
if ((count < 4 || count > 5)) || ! are_values "$count" "${words[@]}" || ! is_number "$device" ||
  [[ ! $backend =~ ^(lite|mindspore)$ || ! ${words[2],,} =~ ^imagenet(2012)?$ ]]; then
  usage "$wanted"
fi
case ${words[1]} in # the sides that src/<backbone>.py names
  resnest50) resize=256 crop=224 ;;
  resnest101) resize=256 crop=256 ;;
  resnest200) resize=320 crop=320 ;;
  resnest269) resize=416 crop=416 ;;
  *) usage "$wanted" ;;
esac
preparation=(--resize "$resize" --crop "$crop" --interpolation bilinear)
model=$(absolute "${words[0]}")
data=$(absolute "${words[3]}")
[[ -f $model ]] || fail "there is no model $model; export.py makes one"
if [[ -d $data/val ]]; then
  data=$data/val # the program takes the folder that holds the class folders
fi
need_python

sources=$MODEL/ascend310_infer
if [[ -n ${INFER_PROGRAM:-} ]]; then
  program=("$INFER_PROGRAM")
  command -v -- "$INFER_PROGRAM" >/dev/null || fail "INFER_PROGRAM $INFER_PROGRAM is no program that can be run"
elif [[ $backend == mindspore ]]; then
  program=("$PYTHON" "$MODEL/../utils/infer_310.py")
else
  program=("$sources/out/main")
fi
for word in "$@"; do # what would part the results from the labels
  case $word in
    --model_path | --model_path=* | --dataset_path | --dataset_path=* | --output_dir | --output_dir=*)
      fail "${word%%=*} after -- is the script's own; model and images stand before --, results come into this folder"
      ;;
    -h | --help) fail "$word after -- runs nothing; ask the program itself: ${program[*]} --help" ;;
  esac
done

# step NAME COMMAND...: run it with the log NAME.log; if it fails show the end of that and leave with its status.
step() {
  local name=$1 log=$PWD/$1.log status=0
  shift
  begin_log "$log" # here, where its message is seen
  if [[ $name == inference ]]; then
    run_logged "$log" "$@" || status=$?
  else
    run_logged "$log" "$@" >/dev/null 2>&1 || status=$?
  fi
  if ((${#signals[@]})); then
    exit $((status ? status : 130))
  elif ((status == 2)) && [[ $(tail -n 1 -- "$log") == "error: "* ]]; then
    [[ $name == inference ]] || tail -n 1 -- "$log" >&2 # the line says it all
    exit 2
  elif ((status)) && [[ $name != inference || $status != 3 ]]; then # 3: images were skipped, the rest is done
    echo "the last lines of $log:" >&2
    tail -n 15 -- "$log" >&2
    echo "error: $name ended with status $status" >&2
    exit "$status"
  fi
}

# is_current: whether out/main is newer than its sources, and of the Lite that is asked for, if one is.
is_current() {
  local home=${MS_LITE_HOME:-${LITE_HOME:-}}
  [[ -x $sources/out/main ]] || return 1
  [[ -z $home || $(absolute "$home") -ef $(cat -- "$sources/out/lite_home" 2>/dev/null) ]] || return 1
  [[ -z $(find "$sources" \( -path "$sources/out" -o -path "$sources/build" \) -prune \
    -o -type f -newer "$sources/out/main" -print -quit) ]]
}

# Of an earlier run, which must not be taken for this one's.
rm -f acc.log 2>/dev/null || fail "cannot remove $PWD/acc.log; start the script in another folder"
labels=$PWD/imagenet_label.json
step preprocess "$PYTHON" "$MODEL/preprocess.py" --data_path "$data" --output "$labels" --model_path "$model"
if told=$(grep '^preparation: ' "$PWD/preprocess.log"); then # what the model was exported with
  read -ra preparation <<<"${told#*: }"
fi
[[ $backend == mindspore ]] || grep '^warning: ' "$PWD/preprocess.log" >&2 || true # that program says the same

if [[ -z ${INFER_PROGRAM:-} && $backend == lite ]] && ! is_current; then
  step build bash "$sources/build.sh"
  [[ -x ${program[0]} ]] || fail "$sources/build.sh has not made ${program[0]}; see $PWD/build.log"
fi

step inference "${program[@]}" --model_path "$model" --dataset_path "$data" --device_target "${DEVICE_TARGET:-Ascend}" \
  --device_id "$device" --output_dir "$PWD" "${preparation[@]}" "$@"

run_logged "$PWD/acc.log" "$PYTHON" "$MODEL/postprocess.py" --result_dir "$PWD/result_Files" --label_file "$labels"
