#!/usr/bin/env bash
# The whole road on a machine without a GPU, in a few minutes: makes a small GPT-NeoX and a corpus,
# cuts the model into layer shards, trains it in 2 pipelines of 2 stages, kills every process
# halfway, resumes, converts back, and looks at the result with plain transformers.
# Everything it makes is in ./quickstart, which is removed at the start.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=example_scripts/venv.sh
source example_scripts/venv.sh
# shellcheck source=example_scripts/ranks.sh
source example_scripts/ranks.sh

# What a cluster's shell may have set is not for this run.
unset GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
export WANDB_MODE=disabled HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

out=quickstart
logs=$out/logs
checkpoints=$out/checkpoints
seq_length=128
total_steps=240
halfway=$((total_steps / 2))
port=$(python -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')

say() { printf '%s\n' "[$((SECONDS / 60)):$(printf %02d $((SECONDS % 60)))] $*"; }

# fail MESSAGE LOG...: shows the ends of the logs and gives up.
fail() {
  printf '%s\n' "quickstart: $1" >&2
  shift
  tail -n 15 "$@" >&2
  exit 1
}

# run LOG COMMAND...: runs it with its output in a log, shown where it fails.
run() {
  local log=$logs/$1.log
  shift
  "$@" >"$log" 2>&1 || fail "$2 failed; the end of $log:" "$log"
}

start_training() {
  local rank
  for rank in 0 1 2 3; do
    python dist_clm_train.py \
      --model-name $out/shards/small-neox --model-type gptneox \
      --num-layers 2 --embedding-dim 192 \
      --world-size 4 --pipeline-group-size 2 --data-group-size 2 \
      --rank $rank --dist-url "tcp://127.0.0.1:$port" --use-cuda false \
      --task-name $out/train.jsonl --seq-length $seq_length \
      --batch-size 4 --micro-batch-size 2 --recompute false \
      --total-steps $total_steps --warmup-steps 10 --lr 3e-3 \
      --evaluation-data $out/held_out.jsonl --evaluation-steps $((halfway / 2)) \
      --checkpoint-path $checkpoints --checkpoint-steps $halfway \
      >>$logs/rank_$rank.log 2>&1 &
  done
}

fail_rank() {
  wait_ranks || true
  fail "a rank failed; the ends of the logs:" $logs/rank_*.log
}

steps_done() {
  if [ -e $checkpoints/metrics.jsonl ]; then wc -l <$checkpoints/metrics.jsonl; else echo 0; fi
}

# Kills all ranks a few steps past the checkpoint, so that there is something to lose.
kill_halfway() {
  until (($(steps_done) >= halfway + 5)); do
    [ "$(jobs -pr | wc -l)" -eq 4 ] || fail_rank
    sleep 0.2
  done
  {
    jobs -pr | xargs kill -KILL
    wait
  } 2>/dev/null # the shell's own report of what it killed
}

rm -rf $out
mkdir -p $logs

say "1. making a small GPT-NeoX in the Hugging Face format, and a corpus"
python example_scripts/quickstart_model.py $out

say "2. cutting the model into layer shards"
run convert_from_hf python convert_from_hf_gptneox.py \
  --model-name $out/hf/small-neox --save-dir $out/shards

say "3. training $total_steps steps in 2 pipelines of 2 stages: 4 processes, logs in $logs"
start_training
kill_halfway
say "4. killed all 4 with SIGKILL after step $(steps_done);" \
  "the same command resumes from the checkpoint of step $(cat $checkpoints/latest)"
start_training
wait_ranks || fail_rank

say "5. converting the last checkpoint back to the Hugging Face format, and verifying it"
run convert_to_hf python convert_to_hf_gptneox.py \
  --ckpt-path $checkpoints --save-path $out/small-neox-trained --verify

say "6. loading it with from_pretrained"
python example_scripts/quickstart_generate.py \
  --model $out/small-neox-trained --held-out $out/held_out.jsonl \
  --metrics $checkpoints/metrics.jsonl --seq-length $seq_length

say "done: the loss curve is $checkpoints/loss.png, the model $out/small-neox-trained"
cat <<'END'
Next, on real GPUs (README.md says which CUDA wheels to install):
  source .venv/bin/activate
  python convert_from_hf_gptneox.py --model-name EleutherAI/gpt-neox-20b \
    --save-dir pretrained_models
  edit the paths in example_scripts/finetune_gptneox.sh, and run it (8 GPUs), or start with
  example_scripts/finetune_gptj.sh (2 GPUs)
END
