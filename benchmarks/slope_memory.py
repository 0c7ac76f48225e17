"""The memory of a small Llama with N:M weights beside that of its dense twin, in training and in inference.

    python -m benchmarks.slope_memory                      prints the table and writes benchmarks/results/*.json
    python -m benchmarks.slope_memory --hidden 2048 --mlp 5632 --patterns 2:4

Nothing is computed from shapes: models are trained for two steps, and the bytes of all tensors that live in the process
are counted, each memory once.

* held: parameters, gradients, AdamW's states and places, between a backward pass and `zero_grad`.
* peak: the most during a whole step, with its activations.
* evaluated: a model that was trained and is evaluated as it is, without optimizer and gradients.
* inference: after `masks.freeze()`, in float32 and in bfloat16.
* rank 1/64, 1/16: with adapters of that share of the hidden size, after `fold_low_rank`, in float32.
"""

import argparse
import contextlib
import functools
import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

import sylva_compile
from benchmarks.command import parser_of
from benchmarks.peak import peak_above
from benchmarks.report import print_table, write_results
from benchmarks.variants import llama

Pattern = tuple[int, int]
SHARES = {"rank 1/64": 64, "rank 1/16": 16}
"""The hidden size in multiples of an adapter's rank."""


def living_bytes(device: torch.device) -> int:
    """Return the bytes of all plain tensors of the process on `device`; memory that several share counts once."""
    gc.collect()
    held = {}
    for found in gc.get_objects():
        if type(found) not in (Tensor, nn.Parameter) or found.device.type != device.type:
            continue
        # Tensors that compilers leave behind have no memory, or none of this kind, and raise.
        with contextlib.suppress(RuntimeError):
            storage = found.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def measure(options: argparse.Namespace, pattern: Pattern | None) -> dict[str, int]:
    """Return the bytes of the model pruned by `pattern` (None: dense), by what it is used for."""
    device = torch.device(options.device)
    shape = (options.hidden, options.mlp, options.layers)
    base = living_bytes(device)

    def above() -> int:
        return living_bytes(device) - base

    model = llama(*shape).to(device)
    masks = None if pattern is None else sylva_compile.prune_masks(model, *pattern)
    if masks is not None:
        masks.embed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.arange(options.tokens, device=device)[None] % 100

    train(model, optimizer, ids)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    found = {"held": above()}
    optimizer.zero_grad()
    between = above()
    found["peak"] = between + peak_above(functools.partial(train, model, optimizer, ids), device)[1]
    optimizer.zero_grad()
    del optimizer
    found["evaluated"] = above()
    if masks is not None:
        masks.freeze()
    found["inference"] = above()
    model.to(torch.bfloat16)
    found["inference, bfloat16"] = above()
    del model, masks
    for name, share in SHARES.items():
        found[name] = folded(above, shape, pattern, share, device)
    return found


def train(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    """Run one step."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()


def folded(
    above: Callable[[], int], shape: tuple[int, int, int], pattern: Pattern | None, share: int, device: torch.device
) -> int:
    """Return the bytes of a model whose adapters are folded; those of the dense model have none."""
    model = llama(*shape).to(device)
    if pattern is not None:
        sylva_compile.prune_masks(model, *pattern).embed()
        sylva_compile.add_low_rank(model, shape[0] // share)
        sylva_compile.fold_low_rank(model)
    return above()


def options_of(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""

    def pattern(text: str) -> Pattern:
        n, m = map(int, text.split(":"))
        return n, m

    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--hidden", type=int, default=1024, help="%(default)s")
    parser.add_argument("--mlp", type=int, default=2816, help="%(default)s")
    parser.add_argument("--layers", type=int, default=2, help="%(default)s")
    parser.add_argument("--tokens", type=int, default=128, help="of a step (%(default)s)")
    parser.add_argument("--patterns", nargs="+", type=pattern, default=[(2, 4), (1, 4), (2, 8)], help="n:m")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="%(default)s")
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, dict[str, int]]:
    """Measure, print the table and write the results; return the bytes by pattern and use."""
    options = options_of(argv)
    results = {"dense": measure(options, None)}
    for n, m in options.patterns:
        results[f"{n}:{m}"] = measure(options, (n, m))
    print_table(
        "Memory of a model with N:M weights, in multiples of the dense one's",
        ["", *results],
        [
            [name, f"{dense / 2**20:.1f} MiB", *(f"{found[name] / dense:.3f}" for found in list(results.values())[1:])]
            for name, dense in results["dense"].items()
        ],
    )
    if not options.no_write:
        settings = {key: value for key, value in vars(options).items() if key != "no_write"}
        print(f"written to {write_results('slope_memory', settings, results)}")
    return results


if __name__ == "__main__":
    main()
