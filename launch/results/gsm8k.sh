#!/usr/bin/env bash
# The README's table: every main loss on GSM8K with a real model, through the public commands, then the report.
#   bash launch/results/gsm8k.sh MODEL GSM8K_DIR [RUN ...]      MODEL: a directory or hub id; RUN: sft-full sft dpo kto reward
# GSM8K_DIR holds train.jsonl and model_solutions.jsonl as published. A finished run is kept, an unfinished one goes on.
# About an hour on two CPU cores with a 135 M model.
set -eu
cd "$(dirname "$0")/../.."
model="$1" data="$2"
shift 2
root="${OUTPUT:-runs/gsm8k}"

train() { # name, rows to train on, rows held out, overrides
  name="$1" rows="$2" held_out="$3"
  shift 3
  if [ -d "$root/$name/attempts" ]; then
    python train.py resume="$root/$name"
    return
  fi
  python train.py model.name_or_path="$model" data=gsm8k data.root="$data" \
    "data.train=[{path: '$data', format: gsm8k, split: 'train[:$rows]'}]" \
    "data.eval=[{path: '$data', format: gsm8k, split: 'eval[:$held_out]'}]" \
    train.batch_size=16 train.microbatch_size=4 train.eval_every=null checkpoint.every=10 train.max_length=512 \
    output_root="$root" exp_name="$name" "$@"
}

# A frozen base in bfloat16 is two to three times as fast on a CPU that has it; what is trained stays float32.
lora="peft=lora model.dtype=bfloat16"
for run in ${*:-sft-full sft dpo kto reward}; do
  # shellcheck disable=SC2086
  case "$run" in
    sft-full) train sft-full 240 60 loss=sft train.precision=bfloat16 ;;
    sft) train sft 240 60 loss=sft $lora ;;
    dpo) train dpo 240 60 loss=dpo $lora optim.lr=5e-5 ;;
    kto) train kto 192 60 loss=kto $lora ;;
    reward) train reward 240 60 loss=reward $lora optim.lr=2e-4 ;;
    *) echo "error: no run '$run'; there are sft-full sft dpo kto reward" >&2; exit 2 ;;
  esac
done
python -m halos.report "$root"/*/ --markdown "$root/table.md" --output "$root/report"
