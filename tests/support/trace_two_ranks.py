"""One of two processes that trace a model together: `python trace_two_ranks.py RANK DIRECTORY [failing]`."""

import sys

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from two_ranks import process_group

import sylva_compile
from sylva_compile.curvature import update_queue

METHODS = (("sylva", "greedy"), ("sylva", "gain"), ("sylva", "paper"), ("kfac", "gain"), ("random", "gain"))


def regression(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def model_and_data() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Make a model and batches, equal on every rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 30))
    return model, [(torch.randn(8, 40), torch.randn(8, 30)) for _ in range(4)]


def main(rank: int, directory: str, group: ProcessGroup) -> None:
    model, data = model_and_data()
    # On a GPU updates are queued into groups. Queue them here too, to test that ranks then agree.
    update_queue.GROUP_BYTES_ON_CPU = 2**20
    for method, score in METHODS:
        # Ranks must agree although they start from different seeds.
        torch.manual_seed(rank)
        masks = sylva_compile.trace_and_mask(
            model,
            data[rank::2],
            loss_fn=regression,
            method=method,
            score=score,
            rank=32,
            process_group=group,
            num_samples=32,
            block_size=8,
            sparsity=0.7,
            progress=False,
        )
        masks.save(f"{directory}/{method}-{score}{rank}")


def failing(rank: int, group: ProcessGroup) -> None:
    """Print the errors where the second rank has no data, and where there are fewer samples than ranks."""
    model, data = model_and_data()
    for loader, num_samples in ((data if rank == 0 else [], 32), (data, 1)):
        try:
            sylva_compile.trace_and_mask(
                model,
                loader,
                loss_fn=regression,
                process_group=group,
                num_samples=num_samples,
                block_size=8,
                progress=False,
            )
        except sylva_compile.SylvaError as error:
            print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    with process_group(int(sys.argv[1]), f"{sys.argv[2]}/store") as world:
        if sys.argv[3:] == ["failing"]:
            failing(int(sys.argv[1]), world)
        else:
            main(int(sys.argv[1]), sys.argv[2], world)
