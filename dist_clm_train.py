"""Trains one rank of a run: parse, check, meet the other ranks, build, train, save.

Exit status: 0 the run is complete; 2 a user's mistake; 75 asked to stop by SIGTERM, SIGINT or
SIGUSR1: what there was to save is saved, the run is not finished, the same command goes on; 1
anything else, among it a stop that was not done within --grace-seconds, or was asked for again.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from arguments.checks import OWN_FLAGS, PROVEN_FLAGS
from arguments.flags import parse_train, train_parser
from arguments.parser import refuse
from comm.lifecycle.exit import report_line
from comm.lifecycle.stop_signals import (
    CLOSING,
    LOADING,
    STOPPED,
    StopAskedError,
    StopListener,
    StopRequest,
)
from comm.rendezvous.dist_url import parse_dist_url
from comm.rendezvous.interface import choose_interface
from comm.rendezvous.job_key import JobKey, is_readable_by_others, read_job_key
from common.text import one_line
from monitor.console import Console
from monitor.logs import setup_logging
from training.startup_checks import LocalResources, check_this_machine

if TYPE_CHECKING:
    import torch

    from comm.liveness.failure_detector import FailureDetector
    from comm.rendezvous.join import Rendezvous
    from comm.topology import Topology

logger = logging.getLogger(__name__)


class End(NamedTuple):
    """How a run came to its end by itself: the exit status, and what to say."""

    status: int
    line: str | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one rank; a user's mistake ends it with one line on stderr and exit status 2."""
    args = parse_train(argv)
    console = setup_logging(args.rank, sys.stdout)
    if args.preview_data is not None:
        preview(args)
        return
    if args.plan:
        plan(args)
        return
    stop = StopRequest()
    listener = StopListener(stop, rank=args.rank, alone=args.world_size == 1)
    machine = check_this_machine(args)
    if machine.problem is not None and args.world_size == 1:
        refuse(machine.problem)
    rendezvous = meet(args, machine, stop)
    run(args, machine, rendezvous, console, stop, listener)


def preview(args: argparse.Namespace) -> None:
    """Prints what the run would train on; the ranks that read no data have nothing to print."""
    if args.rank != 0:
        return
    from training.data import preview_data

    try:
        show(f"{part}\n" for part in preview_data(args, colour=sys.stdout.isatty()))
    except (ValueError, OSError) as error:
        refuse(ValueError(one_line(error)))


def plan(args: argparse.Namespace) -> None:
    """Prints what each stage will need; exit status 1 where that is more than --device-memory."""
    if args.rank != 0:
        return
    from planning.memory.plan import MemoryPlan

    try:
        found = MemoryPlan(args)
        show(found.parts())
        fits = found.fits
    except ValueError as error:
        refuse(error)
    if not fits:
        sys.exit(1)


def show(parts: Iterable[str]) -> None:
    """Prints them one by one, while somebody reads them; ValueError where a disk is full."""
    for part in parts:
        try:
            sys.stdout.write(part)
            sys.stdout.flush()
        except OSError as error:  # what is left in the buffer is not to fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                return  # who reads it has seen enough
            raise ValueError(f"standard output: {error.strerror}") from error


def meet(args: argparse.Namespace, machine: LocalResources, stop: StopRequest) -> Rendezvous:
    """Meets the other ranks, also to report a problem; a world of one opens no socket."""
    from comm.rendezvous.join import Rendezvous, join

    if args.world_size == 1:
        return Rendezvous.alone()
    try:
        key = _job_key(args)
    except ValueError as error:
        refuse(error)  # without it this rank cannot even tell the others
    try:
        interface = machine.interface
        if interface is None:  # the flag is wrong, and the others are to be told
            host, _ = parse_dist_url(args.dist_url)
            interface = choose_interface(flag=None, master_host=host, environ={})
        return join(
            url=args.dist_url,
            rank=args.rank,
            world_size=args.world_size,
            interface=interface,
            facts=_facts(args),
            key=key,
            start=args.start_id,
            join_timeout=args.join_timeout,
            host=False if args.agent_store else None,
            stop=stop,
        )
    except ValueError as error:
        refuse(machine.problem or error)
    except StopAskedError as error:
        report_line(f"rank {args.rank}: {error}")
        sys.exit(STOPPED)
    except (TimeoutError, ConnectionError) as error:
        sys.stderr.write(f"rank {args.rank}: {one_line(error)}\n")
        sys.exit(1)


def _job_key(args: argparse.Namespace) -> JobKey:
    path = args.job_token_file
    key = read_job_key(args.job_id, path)
    if path is not None and is_readable_by_others(path):
        logger.warning("--job-token-file %s: other users may read it: `chmod 600` it", path)
    return key


def _facts(args: argparse.Namespace) -> dict[str, str | int | float | bool | None]:
    """The flags that must be the same on all ranks."""
    facts: dict[str, str | int | float | bool | None] = {
        "giving --evaluation-data": args.evaluation_data is not None  # its value is rank 0's alone
    }
    apart = OWN_FLAGS | PROVEN_FLAGS
    for action in train_parser()._actions:
        flag = action.option_strings[0] if action.option_strings else ""
        if flag.startswith("--") and flag not in apart and hasattr(args, action.dest):
            value = getattr(args, action.dest)
            plain = value is None or isinstance(value, (bool, int, float))
            facts[flag] = value if plain else str(value)
    return facts


def run(
    args: argparse.Namespace,
    machine: LocalResources,
    rendezvous: Rendezvous,
    console: Console,
    stop: StopRequest,
    listener: StopListener,
) -> None:
    """Trains among ranks that have met; however it ends, all of them end, each with one line."""
    from comm.communicator import PeerLostError
    from comm.liveness.failure_detector import FailureDetector
    from comm.topology import Topology
    from training.trainer import TrainingStoppedError

    topology = Topology(args.rank, args.pipeline_group_size, args.data_group_size)
    try:
        watch = FailureDetector.connect(rendezvous, topology, stop=stop)
    except (TimeoutError, ConnectionError) as error:
        sys.stderr.write(f"rank {args.rank}: {one_line(error)}\n")
        sys.exit(1)
    listener.link(end=watch.fail, pass_on=watch.pass_on)
    stop.phase = LOADING
    closing = ExitStack()  # what may take a minute, so that the others know of a failure before
    try:
        if machine.problem is not None:
            raise machine.problem
        end = _train(args, topology, rendezvous, watch, console, stop, closing)
    except PeerLostError as error:
        watch.explain(error, last=closing.close)
    except (TrainingStoppedError, OSError) as error:
        watch.fail(1, one_line(error), last=closing.close)
    except ValueError as error:
        watch.fail(2, one_line(error), last=closing.close)
    except Exception as error:
        _fail_with_traceback(watch, error, last=closing.close)
    watch.close()
    if end.line is not None:
        report_line(end.line if args.world_size == 1 else f"rank {args.rank}: {end.line}")
    if end.status:
        sys.exit(end.status)


def _train(
    args: argparse.Namespace,
    topology: Topology,
    rendezvous: Rendezvous,
    watch: FailureDetector,
    console: Console,
    stop: StopRequest,
    closing: ExitStack,
) -> End:
    from transformers.utils import logging as transformers_logging

    from comm.process_groups import create_process_groups
    from training.run import train

    transformers_logging.set_verbosity_error()
    device = choose_device(args, ranks_here=len(rendezvous.ranks_on_this_host))
    fabric = create_process_groups(
        topology,
        rendezvous,
        dist_backend=args.dist_backend,
        dp_backend=args.dp_backend,
        device=device,
        dist_timeout=args.dist_timeout,
        watch=watch,
    )
    if args.check_cluster:
        from planning.cluster.check import check_cluster

        status = check_cluster(
            args, topology=topology, rendezvous=rendezvous, fabric=fabric, device=device
        )
        stop.phase = CLOSING
        fabric.close()
        return End(status)
    stopped = train(
        args,
        topology=topology,
        fabric=fabric,
        device=device,
        nonce=rendezvous.nonce,
        console=console,
        stop=stop,
        closing=closing,
        announce=partial(watch.announce, 1),
    )
    stop.phase = CLOSING
    closing.close()
    fabric.close()
    return End(0) if stopped is None else End(STOPPED, stopped)


def choose_device(args: argparse.Namespace, *, ranks_here: int) -> torch.device:
    """The device that the flags name, and with it the backends left out.

    On a CPU, processes of one machine share its cores unless OMP_NUM_THREADS says otherwise.
    ValueError names a flag that asks for a GPU that is not there.
    """
    import torch

    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda = present > 0 if args.use_cuda is None else args.use_cuda
    if cuda and args.cuda_id >= present:
        flag = f"--cuda-id {args.cuda_id}" if present else f"--use-cuda {args.use_cuda}".lower()
        raise ValueError(f"{flag}: this machine has {present} CUDA devices")
    if cuda:
        args.dist_backend = args.dist_backend or "cupy_nccl"
        args.dp_backend = args.dp_backend or "nccl"
        torch.cuda.set_device(args.cuda_id)
        return torch.device("cuda", args.cuda_id)
    for name in ("dist_backend", "dp_backend"):
        if getattr(args, name) not in (None, "gloo") and args.rank == 0:
            flag = "--" + name.replace("_", "-")
            logger.warning("%s %s needs a GPU: on CPU it is gloo", flag, getattr(args, name))
        setattr(args, name, "gloo")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    return torch.device("cpu")


def _fail_with_traceback(
    watch: FailureDetector, error: Exception, *, last: Callable[[], object]
) -> NoReturn:
    """What nobody foresaw: the traceback for us, one line for the others."""
    traceback.print_exc()
    causes = [error, error.__cause__] if error.__cause__ is not None else [error]
    line = ": ".join(f"{type(one).__name__}: {one_line(one)}" for one in causes)
    watch.fail(1, line, last=last)


if __name__ == "__main__":
    main()
