"""One of two processes that train a tiny Llama together: `python train_two_ranks.py RANK DIRECTORY`."""

import sys

import torch
import torch.distributed as dist
from tiny_models import Case, tiny
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import process_group

import sylva_compile
from sylva_compile import Masks

STEPS = 3


def case_and_masks() -> tuple[Case, Masks]:
    """Make a model with a batch, and masks, equal on every rank."""
    torch.manual_seed(0)
    case = tiny("llama")
    case.model.requires_grad_(False)
    return case, sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.7, block_size=8)


def train(model: nn.Module, masks: Masks, batch: dict[str, torch.Tensor]) -> None:
    """Take a few steps of gradient descent on one batch."""
    optimizer = torch.optim.SGD(masks.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def main(rank: int, directory: str) -> None:
    for how in ("inside", "outside"):
        torch._dynamo.reset()
        case, masks = case_and_masks()
        backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
        model: nn.Module
        if how == "inside":
            case.model.compile(backend=backend)
            model = DistributedDataParallel(case.model)
        else:
            # Small buckets, so that Dynamo splits the graph at their borders; the first must not exceed the others.
            dist._DEFAULT_FIRST_BUCKET_BYTES = 4096
            model = torch.compile(DistributedDataParallel(case.model, bucket_cap_mb=0.01), backend=backend)
        train(model, masks, {key: value[rank::2] for key, value in case.batch.items()})
        assert backend.report().rewritten == len(masks), str(backend.report())
        torch.save(case.model.state_dict(), f"{directory}/{how}{rank}")


if __name__ == "__main__":
    with process_group(int(sys.argv[1]), f"{sys.argv[2]}/store"):
        main(int(sys.argv[1]), sys.argv[2])
