#!/usr/bin/env bash
# Fine-tunes GPT-NeoX-20B on one machine with 8 GPUs.
# A pipeline of 8 stages with 6 layers each, 2 in the last. Edit the paths, then run it in the
# project's environment (source .venv/bin/activate). Additional arguments override the flags here,
# for example `--total-steps 10` for a trial. The same command resumes from the last checkpoint.
# With LAUNCHER=torchrun, torchrun starts the ranks; otherwise this script starts each process.
#
# Before: python convert_from_hf_gptneox.py --model-name EleutherAI/gpt-neox-20b \
#           --save-dir pretrained_models
# After:  python convert_to_hf_gptneox.py --ckpt-path model_checkpoints/gptneox-test/2000 \
#           --save-path GPT-NeoX-fine-tuned --n-stages 8 --n-layer-per-stage 6
#
# With --fp16, weights, gradients, masters and Adam's moments take 18 bytes per parameter. They take
# 12 with --optimizer 8bit-adam; --use-offload moves 12 of the 18 to host memory.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=example_scripts/ranks.sh
source example_scripts/ranks.sh

export GLOO_SOCKET_IFNAME=lo # consistent with --net-interface
export NCCL_SOCKET_IFNAME=lo # consistent with --net-interface
export WANDB_NAME=gptneox-test # the run's name at Weights & Biases

flags=(
  --model-name pretrained_models/EleutherAI_gpt-neox-20b
  --tokenizer-name pretrained_models/EleutherAI_gpt-neox-20b
  --model-type gptneox
  --num-layers 6
  --embedding-dim 6144
  --load-pretrained-model true
  --pipeline-group-size 8
  --data-group-size 1
  --net-interface lo
  --task-name "data/first.jsonl:0.6,data/second.jsonl:0.4"
  --seq-length 2048
  --batch-size 32
  --micro-batch-size 1
  --gradient-accumulate-step 1
  --fp16
  --optimizer adam
  --lr 1e-5
  --warmup-steps 10
  --total-steps 2000
  --checkpoint-path "model_checkpoints/$WANDB_NAME"
  --checkpoint-steps 500
  --dp-backend nccl
  --dp-mode allreduce
  --pp-mode gpipe
  --profiling no-profiling
)

case "${LAUNCHER:-shell}" in
  shell)
    ranks=(--dist-url tcp://127.0.0.1:7033 --world-size 8)
    for rank in {0..7}; do
      python dist_clm_train.py "${flags[@]}" "${ranks[@]}" "$@" --rank "$rank" --cuda-id "$rank" &
    done
    wait_ranks
    ;;
  torchrun) # passes SIGTERM on, gives the ranks 300 s to save, and returns 1
    exec torchrun --nproc-per-node 8 --shutdown-timeout 300 dist_clm_train.py "${flags[@]}" "$@"
    ;;
  *)
    echo "LAUNCHER is $LAUNCHER; set it to shell or torchrun" >&2
    exit 2
    ;;
esac
