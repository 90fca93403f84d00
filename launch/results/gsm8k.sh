#!/usr/bin/env bash
# The table of launch/results/README.md: the main losses on GSM8K with a real model, through the public commands, then the report.
#   bash launch/results/gsm8k.sh MODEL GSM8K_DIR [RUN ...]      MODEL: a directory or hub id; RUN: dpo reward kto sft sft-full
# GSM8K_DIR holds train.jsonl and model_solutions.jsonl as published. A finished run is kept, an unfinished one resumes.
# About two hours on one CPU core with a 135 M model; half of that on two cores with OMP_NUM_THREADS=1 and two lists of RUNs.
set -eu
cd "$(dirname "$0")/../.."
. launch/python.sh
model="$1" data="$2"
shift 2
root="${OUTPUT:-runs/gsm8k}"

train() { # name, number of evaluation rows, overrides
  name="$1" num_eval="$2"
  shift 2
  if [ -d "$root/$name/attempts" ]; then
    python train.py resume="$root/$name"
    return
  fi
  python train.py model.name_or_path="$model" data=gsm8k data.root="$data" \
    "data.eval=[{path: '$data', format: gsm8k, split: 'eval[:$num_eval]'}]" \
    train.batch_size=16 train.microbatch_size=4 train.eval_every=null checkpoint.every=10 train.max_length=512 \
    output_root="$root" exp_name="$name" "$@"
}

dtype="$(fast_dtype)"
lora="peft=lora model.dtype=$dtype"
for run in ${*:-dpo reward kto sft sft-full}; do
  # shellcheck disable=SC2086
  case "$run" in
    dpo) train dpo 183 loss=dpo train.steps=50 $lora optim.lr=5e-5 ;;
    reward) train reward 183 loss=reward train.steps=60 $lora optim.lr=2e-4 ;;
    # Three in five solutions are wrong: the weight balances right and wrong, as KTO's paper recommends.
    kto) train kto 120 loss=kto train.steps=48 $lora optim.lr=5e-5 loss.desirable_weight=1.6 ;;
    sft) train sft 120 loss=sft train.steps=30 $lora ;;
    sft-full) train sft-full 120 loss=sft train.steps=15 train.precision=$dtype ;;
    *) echo "error: no run '$run'; there are dpo reward kto sft sft-full" >&2; exit 2 ;;
  esac
done
python -m halos.report $(dirname "$root"/*/config.yaml) --markdown "$root/table.md" --output "$root/report"
