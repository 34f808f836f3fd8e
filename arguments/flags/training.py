"""Flags of the model, the updates, precision and memory."""

from pathlib import Path

from arguments.flag import fixed, free, unkept
from arguments.values import MAX_RATE, layers, link, real, recompute, size, switch, whole
from modules.registry import MODELS

MODEL_FLAGS = (
    unkept(
        "--model-name",
        "folder of layer shards, on each rank's disk",
        None,
        Path,
        required=True,
        common=True,
        ranks="own",
    ),
    free(
        "--tokenizer-name",
        "folder or hub name of the tokenizer; default: --model-name",
        ranks="own",
    ),
    fixed("--model-type", "model family", choices=sorted(MODELS), required=True, common=True),
    unkept(
        "--num-layers",
        "layers per stage (the last stage may have fewer); or a list with the number of each "
        "stage, such as 5,3; or auto: the split whose slowest stage has the fewest multiply-adds",
        None,
        layers(auto=True),
        required=True,
        common=True,
    ),
    unkept(
        "--embedding-dim",
        "hidden size; must be the value in config.json",
        None,
        whole(1),
        required=True,
        common=True,
    ),
    unkept(
        "--load-pretrained-model",
        "load the weights in --model-name; false: draw random weights with --seed",
        True,
        switch,
    ),
)

UPDATE_FLAGS = (
    free(
        "--total-steps",
        "number of iterations; --gradient-accumulate-step iterations make one update",
        None,
        whole(1),
        required=True,
        common=True,
    ),
    free(
        "--lr", "learning rate at the end of the warm-up", 1e-5, real(at_most=MAX_RATE), common=True
    ),
    free("--warmup-steps", "updates of linear warm-up", 0, whole(0), common=True),
    free(
        "--lr-schedule",
        "schedule of the learning rate after the warm-up",
        "linear",
        choices=("linear", "cosine", "constant"),
    ),
    free("--min-lr", "learning rate at the end of the schedule", 0.0, real()),
    fixed(
        "--optimizer",
        "adam is AdamW; 8bit-adam needs bitsandbytes",
        "adam",
        choices=("adam", "8bit-adam"),
        common=True,
    ),
    free(
        "--weight-decay",
        "weight decay of matrices; biases and norms have none",
        0.01,
        real(at_most=MAX_RATE),
    ),
    free(
        "--max-grad-norm",
        "largest gradient norm; larger gradients are clipped; inf: no clipping",
        1.0,
        real(positive=True, finite=False),
    ),
    fixed("--seq-length", "tokens of a block", 2048, whole(2), common=True),
    free("--batch-size", "sequences per pipeline and iteration", 8, whole(1), common=True),
    fixed("--micro-batch-size", "sequences per microbatch", 1, whole(1), common=True),
    fixed("--gradient-accumulate-step", "iterations per update", 1, whole(1), common=True),
    fixed("--seed", "seed of data order, dropout and random weights", 42, whole(0)),
    unkept("--train-warmup-steps", "accepted for old scripts; does nothing", None, whole(0)),
)

PRECISION_FLAGS = (
    unkept("--fp16", "compute in fp16, weights and moments in fp32", False, switch, common=True),
    unkept("--bf16", "compute in bf16, weights and moments in fp32", False, switch, common=True),
    free(
        "--recompute",
        "activations of a block that backward computes again: true: all; selective: norms and "
        "activation functions; false: none; auto: the fastest of the three that fits the device's "
        "memory on every stage",
        "auto",
        recompute,
        common=True,
    ),
    free("--use-offload", "keep master weights and moments in host memory", False, switch),
    unkept(
        "--cpu-matmul",
        "library of fp32 matmuls on a CPU: torch's default (MKL) or oneDNN; auto: the library of "
        "the checkpoint, else oneDNN on AMD CPUs with AVX-512 and torch's default on others",
        "auto",
        choices=("auto", "default", "onednn"),
    ),
    fixed(
        "--deterministic",
        "on GPUs: two runs of one command on the same GPUs and versions give the same bits, at a "
        "lower speed; on CPUs it changes nothing, because runs always have the same bits",
        False,
        switch,
    ),
    free("--loss-scale", "fp16: a constant loss scale; 0: dynamic", 0.0, real()),
    free("--initial-loss-scale", "fp16: the first dynamic scale", 32768.0, real(positive=True)),
    free("--min-loss-scale", "fp16: the smallest dynamic scale", 1.0, real(positive=True)),
    free(
        "--loss-scale-window",
        "fp16: updates in a row without overflow before the scale doubles",
        1000,
        whole(1),
    ),
    free("--hysteresis", "fp16: overflows before the scale halves", 2, whole(1)),
    free(
        "--max-skipped-updates",
        "fp16: number of overflows in a row after which the run saves a checkpoint and ends",
        50,
        whole(1),
    ),
    unkept(
        "--plan",
        "print the memory and messages of each stage, then exit; needs only config.json: no "
        "weights, no data, no other rank, and no GPU even with --use-cuda true",
        False,
        switch,
        common=True,
    ),
    unkept(
        "--device-memory",
        "with --plan: the memory of a device, such as 24GB (10^9 bytes) or 24GiB (2^30); if a "
        "stage needs more, the plan lists the flags that help, and the exit status is 1",
        None,
        size,
        metavar="SIZE",
    ),
    unkept(
        "--link",
        "with --plan: the speed of the network links between all ranks, such as 100mbit or, with "
        "a latency, 1gbit,20ms; the plan then says how long an iteration takes",
        None,
        link,
        metavar="RATE",
    ),
    unkept(
        "--measure-memory",
        "at the end, log the peak memory of tensors on each rank and the plan's number; on a CPU, "
        "the run takes longer",
        False,
        switch,
    ),
)
