#!/usr/bin/env bash
# Four online rounds of DPO and of GRPO, and a live loop of PPO with minibatches and epochs, three seeds each, on the bundled
# arithmetic with a reward computed from the answer: does the accuracy on evaluation problems rise, and how far are the sampler's
# log-probs from the trainer's? It starts from a policy that SFT has trained partially.
#   bash launch/results/online.sh
# About four minutes per run on one core; writes runs/results/online and prints one table for the rounds and one for the live loops.
set -eu
cd "$(dirname "$0")/../.."
. launch/python.sh
use_venv ""
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
root=runs/results/online
start="$root/sft/FINAL"
if [ ! -d "$start" ]; then
  python train.py loss=sft model=tiny data=arithmetic train.steps=100 optim.lr=1e-3 output_root="$root" exp_name=sft
fi

online() { # $1: the loss, then its own settings
  loss="$1"
  shift
  python train.py -m hydra/launcher=accelerate hydra.launcher.max_parallel=1 loss=online online.loss="$loss" \
    model=tiny model.name_or_path="$start" data=arithmetic seed=0,1,2 output_root="$root" exp_name="$loss" \
    online.eval_prompts=400 online.sampler.max_new_tokens=24 online.sampler.batch_size=128 \
    schedule=constant schedule.warmup=0 "$@"
}

online dpo online.rounds=4 online.prompts_per_round=768 online.feedback.pairing=random 'online.overrides=[loss.beta=1]' optim.lr=2e-4 train.batch_size=128
online grpo online.rounds=4 online.prompts_per_round=512 'online.overrides=[loss.advantage_scale=none]' optim.lr=2e-4 train.batch_size=256
online ppo online.steps=16 online.minibatches=4 online.epochs=2 optim.lr=1e-4 train.batch_size=256 train.eval_every=32
python -m halos.report "$root"/dpo/seed-* "$root"/grpo/seed-* --output "$root/rounds" --markdown "$root/rounds/table.md"
python -m halos.report "$root"/ppo/seed-* --output "$root/live" --markdown "$root/live/table.md"
