#!/usr/bin/env bash
# Online rounds with a real model: does the reward rise?
#   bash launch/results/online_smollm2.sh MODEL arithmetic          GRPO on the bundled arithmetic; the reward is computed
#   bash launch/results/online_smollm2.sh MODEL gsm8k GSM8K_DIR     DPO on GSM8K's prompts; the reward is that of a model
#                                                                   trained first on right and wrong solutions
# MODEL: a directory, a .gguf or a hub id of SmolLM2-135M-Instruct; GSM8K_DIR as for gsm8k.sh. Finished runs are kept,
# others resume. About an hour each on one core, which is enough to see arithmetic improve, and too short to train a useful reward
# model: give it more steps on a GPU.
set -eu
cd "$(dirname "$0")/../.."
[ "$#" -ge 2 ] && { [ "$2" != gsm8k ] || [ "$#" -eq 3 ]; } || { sed -n '3,5s/^# \{0,1\}//p' launch/results/online_smollm2.sh >&2; exit 2; }
. launch/python.sh
use_venv ""
model="$1" part="$2" root="${OUTPUT:-runs/results/online-smollm2}" dtype="$(fast_dtype)"

go() { # name, overrides
  name="$1"
  shift
  python train.py output_root="$root" exp_name="$name" train.max_length=512 checkpoint.every=10 resume=auto "$@"
}

rounds="loss=online online.carry_optimizer=true schedule=constant peft=lora model.dtype=$dtype"
case "$part" in
  arithmetic)
    go sft loss=sft data=arithmetic model.name_or_path="$model" train.steps=8 train.batch_size=16 train.microbatch_size=8 \
      train.precision="$dtype" "data.eval=[{path: arithmetic, split: 'eval[:100]'}]"
    # shellcheck disable=SC2086
    go grpo $rounds online.loss=grpo data=arithmetic model.name_or_path="$root/sft/FINAL" \
      online.rounds=4 online.prompts_per_round=32 online.samples_per_prompt=8 online.eval_prompts=150 \
      online.sampler.max_new_tokens=24 train.batch_size=64 train.microbatch_size=16 optim.lr=2e-4
    ;;
  gsm8k)
    data="$3"
    go reward loss=reward data=gsm8k data.root="$data" "data.eval=[{path: '$data', format: gsm8k, split: 'eval[:48]'}]" \
      model.name_or_path="$model" model.dtype="$dtype" peft=lora train.steps=16 train.batch_size=8 train.microbatch_size=4 \
      train.eval_every=null optim.lr=2e-4
    # shellcheck disable=SC2086
    go dpo $rounds online.loss=dpo data=gsm8k data.root="$data" "data.eval=[{path: '$data', format: gsm8k, split: 'eval[:32]'}]" \
      model.name_or_path="$model" online.scorer.name=reward_model online.scorer.model="$root/reward/FINAL" \
      online.rounds=2 online.prompts_per_round=16 online.samples_per_prompt=4 online.eval_prompts=16 online.kl_samples=16 \
      online.sampler.max_new_tokens=96 train.batch_size=8 train.microbatch_size=4 optim.lr=1e-4
    ;;
  *) echo "error: no part '$part'; there are arithmetic gsm8k" >&2; exit 2 ;;
esac
