"""Compare the bytes saved for the backward with a narrow copy for each weight and with one shared narrow copy.

    python -m benchmarks.narrow_saving                     prints the table and writes benchmarks/results/*.json

three readers       query, key and value, each with its own mask, read the output of a frozen product: nothing else in
                    the backward needs this output, and it is expensive to recompute
kept by attention   the output projection reads the output of attention, which attention's own backward needs

Each model is compiled as a frozen model (the floor), with a narrow copy for each weight (a backend without masks knows
no model, and so updates no layouts), and with one shared copy (the usual backend). The last column is the whole
activation.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sylva_compile
from benchmarks.command import parser_of
from benchmarks.report import print_table, write_results
from benchmarks.variants import Variant, saved_bytes


class ThreeReaders(nn.Module):
    """Query, key and value of a projected input."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.project = nn.Linear(hidden, hidden, bias=False)
        self.readers = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Return a scalar, from `x [B, S, hidden]`."""
        x = self.project(x)
        return torch.stack([reader(x).square().mean() for reader in self.readers]).sum()


class KeptByAttention(nn.Module):
    """Self-attention and the output projection behind it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return a scalar, from `x [B, S, hidden]`."""
        heads = x.unflatten(-1, (-1, 64)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(heads, heads, heads)
        return self.out(attended.transpose(1, 2).flatten(2)).square().mean()


CASES = {
    "three readers": (ThreeReaders, [f"readers.{index}.weight" for index in range(3)]),
    "kept by attention": (KeptByAttention, ["out.weight"]),
}


def saved(model: nn.Module, backend: Any, tokens: int, hidden: int) -> int:
    """Return the bytes that one forward pass of `model` saves."""
    torch._dynamo.reset()
    x = torch.randn(tokens // 256, 256, hidden, requires_grad=True)
    compiled = torch.compile(model, backend=backend)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return saved_bytes(Variant("", model, lambda: compiled(x), trained, x))[0]


def measure(hidden: int, tokens: int, block_size: int, columns: int, inner: str) -> dict[str, dict[str, int]]:
    """Return the saved bytes of each case; every mask uses `columns` block columns, chosen at random."""
    results: dict[str, dict[str, int]] = {}
    for case, (make, names) in CASES.items():
        torch.manual_seed(0)
        base = make(hidden).requires_grad_(False)
        grid = hidden // block_size
        maps = {name: torch.zeros(grid, grid, dtype=torch.bool) for name in names}
        for block_map in maps.values():
            block_map[torch.randperm(grid)[:columns], torch.randperm(grid)[:columns]] = True
        found = {"frozen": saved(base, inner, tokens, hidden)}
        for way in ("own copies", "shared copy"):
            model = copy.deepcopy(base)
            masks = sylva_compile.Masks.from_block_maps(model, maps, block_size)
            masks.embed()
            bound = masks if way == "shared copy" else None
            backend = sylva_compile.backend(bound, inner=inner, on_miss="error")  # type: ignore[arg-type]
            found[way] = saved(model, backend, tokens, hidden)
        found["whole activation"] = tokens * hidden * 4
        results[case] = found
    return results


def main(argv: list[str] | None = None) -> dict[str, dict[str, int]]:
    """Measure, print the table and write the results."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--hidden", type=int, default=1024, help="%(default)s")
    parser.add_argument("--tokens", type=int, default=1024, help="in sequences of 256 (%(default)s)")
    parser.add_argument("--block-size", type=int, default=64, help="%(default)s")
    parser.add_argument("--columns", type=int, default=5, help="block columns that a mask uses (%(default)s)")
    parser.add_argument("--inner", choices=["inductor", "aot_eager"], default="inductor", help="%(default)s")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    settings = {key: value for key, value in vars(options).items() if key != "no_write"}
    results = measure(**settings)
    columns = ["MiB", *results["three readers"]]
    rows = [[case, *(f"{value / 2**20:.2f}" for value in row.values())] for case, row in results.items()]
    print_table("Saved for the backward", columns, rows)
    if not options.no_write:
        print(f"written to {write_results('narrow_saving', settings, results)}")
    return results


if __name__ == "__main__":
    main()
