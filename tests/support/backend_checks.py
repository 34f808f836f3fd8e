"""Shared tests of all backends' Communicators; each member of a group must call check_group."""

from collections.abc import Sequence

import torch
from torch import Tensor

from comm.communicator import Communicator, Work

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NUMBERS = (*FLOATS, torch.int64, torch.uint8)
DTYPES = (*NUMBERS, torch.bool)
LENGTHS = (0, 1, 3, 4, 1001, 40_003)
BIG = 2**18  # elements: more than a socket's buffers take
CPU = torch.device("cpu")


def values(member: int, length: int, dtype: torch.dtype) -> Tensor:
    """Returns the tensor of `member`, drawn from a seed, so that every process can compute it."""
    generator = torch.Generator().manual_seed(100 * length + member)
    if dtype.is_floating_point:
        return (torch.randn(length, generator=generator) * 10.0**member).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 50, (length,), generator=generator).to(
        dtype
    )


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()


def ordered_sum(size: int, length: int, dtype: torch.dtype) -> Tensor:
    """Returns the sum of all members' tensors, added in the order of the members."""
    total = values(0, length, dtype)
    for member in range(1, size):
        total = total + values(member, length, dtype)
    return total


def check_group(
    group: Communicator, *, sums: Sequence[torch.dtype], device: torch.device = CPU
) -> None:
    """Runs all checks; `sums` lists the dtypes whose sums must equal `ordered_sum` bit for bit."""
    check_collectives(group, sums=sums, device=device)
    check_messages(group, device)
    check_order(group, device)
    check_sum_beside_messages(group, device)
    check_posted_ahead(group, device)


def check_collectives(
    group: Communicator, *, sums: Sequence[torch.dtype], device: torch.device = CPU
) -> None:
    """Runs the checks of collectives, all that replicas need; `sums` is as in `check_group`."""
    check_sums(group, sums, device)
    check_sums_at_root(group, sums, device)
    check_sums_under_way(group, sums[0], device)
    check_broadcast_and_gather(group, device)


def check_pipeline(group: Communicator, device: torch.device = CPU) -> None:
    """Runs the checks of messages between neighbours, all that a pipeline needs."""
    for left in range(group.size - 1):
        if group.rank in (left, left + 1):
            _exchange(group, 2 * left + 1 - group.rank, device)
    check_order(group, device)
    check_posted_ahead(group, device)


def check_sums(group: Communicator, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    for dtype in dtypes:
        for length in LENGTHS:
            tensor = values(group.rank, length, dtype).to(device)
            group.all_reduce(tensor).wait()
            assert bits(tensor) == bits(ordered_sum(group.size, length, dtype)), (dtype, length)


def check_sums_at_root(
    group: Communicator, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    for dtype in dtypes:
        for root in range(group.size):
            for length in LENGTHS:
                tensor = values(group.rank, length, dtype).to(device)
                group.reduce(tensor, root=root).wait()
                if group.rank == root:
                    expected = ordered_sum(group.size, length, dtype)
                    assert bits(tensor) == bits(expected), (dtype, length)


def check_sums_under_way(group: Communicator, dtype: torch.dtype, device: torch.device) -> None:
    """Checks twenty pending sums; the members with an odd rank wait for them in reverse order."""
    lengths = [LENGTHS[1 + i % (len(LENGTHS) - 1)] for i in range(20)]
    tensors = [(values(group.rank, n, dtype) + i).to(device) for i, n in enumerate(lengths)]
    works = []
    for i, tensor in enumerate(tensors):
        root = i % group.size
        works.append(group.reduce(tensor, root=root) if i % 3 == 0 else group.all_reduce(tensor))
    check_ranks(group, device)  # while the sums are pending
    for i in (range(20), reversed(range(20)))[group.rank % 2]:
        works[i].wait()
    for i, (tensor, n) in enumerate(zip(tensors, lengths, strict=True)):
        if i % 3 or i % group.size == group.rank:
            expected = values(0, n, dtype) + i
            for member in range(1, group.size):
                expected = expected + (values(member, n, dtype) + i)
            assert bits(tensor) == bits(expected), (i, n)


def check_broadcast_and_gather(group: Communicator, device: torch.device) -> None:
    for dtype in DTYPES:
        for root in range(group.size):
            tensor = values(group.rank, 7, dtype).to(device)
            group.broadcast(tensor, root=root)
            assert bits(tensor) == bits(values(root, 7, dtype)), (dtype, root)
        gathered = group.all_gather(values(group.rank, 6, dtype).to(device).view(2, 3))
        assert gathered.shape == (group.size, 2, 3)
        for member in range(group.size):
            assert bits(gathered[member]) == bits(values(member, 6, dtype)), (dtype, member)
    check_ranks(group, device)


def check_ranks(group: Communicator, device: torch.device) -> None:
    """Checks that every member gathers the ranks of all members."""
    gathered = group.all_gather(torch.tensor(group.rank, device=device))
    assert gathered.tolist() == list(range(group.size))


def check_messages(group: Communicator, device: torch.device) -> None:
    """Checks that all pairs of members can exchange messages of every length and dtype."""
    for left in range(group.size):
        for right in range(left + 1, group.size):
            if group.rank in (left, right):
                _exchange(group, left + right - group.rank, device)


def _exchange(group: Communicator, peer: int, device: torch.device) -> None:
    for dtype in DTYPES:
        for length in LENGTHS:
            mine = values(group.rank, length, dtype).to(device)
            received = torch.empty_like(mine)
            works = [group.receive(received, source=peer), group.send(mine, to=peer)]
            for work in works:
                work.wait()
            assert bits(received) == bits(values(peer, length, dtype)), (dtype, length)


def check_order(group: Communicator, device: torch.device) -> None:
    """Checks that members 0 and 1 each get the other's fifty messages in the order of sending."""
    if group.rank >= 2:
        return
    peer = 1 - group.rank
    lengths = [1 + 37 * i % 4096 for i in range(50)]
    sent = [torch.full((n,), float(i), device=device) for i, n in enumerate(lengths)]
    received = [torch.empty_like(tensor) for tensor in sent]
    works = [group.receive(tensor, source=peer) for tensor in received]
    works += [group.send(tensor, to=peer) for tensor in sent]
    for work in reversed(works):
        work.wait()
    assert all((tensor == i).all() for i, tensor in enumerate(received))


def check_sum_beside_messages(group: Communicator, device: torch.device) -> None:
    """Checks that a sum does not disturb pending messages."""
    neighbours = [peer for peer in (group.rank - 1, group.rank + 1) if 0 <= peer < group.size]
    received = {peer: torch.empty(5, device=device) for peer in neighbours}
    works = [group.receive(tensor, source=peer) for peer, tensor in received.items()]
    total = torch.ones(3, device=device)
    group.all_reduce(total).wait()
    assert total.tolist() == [group.size] * 3
    mine = torch.full((5,), float(group.rank), device=device)
    works += [group.send(mine, to=peer) for peer in received]
    for work in works:
        work.wait()
    assert all((tensor == peer).all() for peer, tensor in received.items())


def check_posted_ahead(group: Communicator, device: torch.device) -> None:
    """Checks that sends do not block in a pipeline whose stages first post all receives of a step.

    The first stage starts all its sends before it waits. The middle stages pass each message on,
    and the last stage sends it back. Messages are longer than any buffer between the processes.
    """
    count, last = 6, group.size - 1
    prev = group.rank - 1 if group.rank > 0 else None
    following = group.rank + 1 if group.rank < last else None
    forward, forward_works = _post(group, prev, count, device)
    backward, backward_works = _post(group, following, count, device)
    sends: list[Work] = []
    for i in range(count):
        x = torch.full((BIG,), float(i), device=device)
        if prev is not None:
            forward_works[i].wait()
            x = forward[i] + 1
        if following is not None:
            sends.append(group.send(x, to=following))
        elif prev is not None:
            sends.append(group.send(x * 100, to=prev))
    for i in range(count):
        if following is not None:
            backward_works[i].wait()
            if prev is not None:
                sends.append(group.send(backward[i] + 1, to=prev))
    for work in sends:
        work.wait()
    if prev is None and following is not None:
        expected = [(i + last) * 100.0 + last - 1 for i in range(count)]
        assert [tensor[-1].item() for tensor in backward] == expected
        assert all((tensor == tensor[0]).all() for tensor in backward)


def _post(
    group: Communicator, source: int | None, count: int, device: torch.device
) -> tuple[list[Tensor], list[Work]]:
    if source is None:
        return [], []
    tensors = [torch.empty(BIG, device=device) for _ in range(count)]
    return tensors, [group.receive(tensor, source=source) for tensor in tensors]
