"""Write the tables of figures in README.md and docs/ from the newest results in `benchmarks/results`.

python -m benchmarks.readme_tables                     rewrites the tables between the markers
python -m benchmarks.readme_tables --check             exits with an error if a table is out of date
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.command import parser_of
from benchmarks.memory_arithmetic import card_table, quantised_table, trace_table, training_table
from benchmarks.report import markdown
from benchmarks.scaling import cell, megabytes

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "benchmarks" / "results"

_PLACE = re.compile(r"(?P<begin><!-- table: (?P<name>[^\n]+?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)

VARIANTS = {
    "frozen": "frozen model",
    "sylva": "sylva_compile",
    "lora": "LoRA (PEFT), compiled",
    "lora eager": "LoRA (PEFT), eager",
    "full": "full fine-tuning, compiled",
}
MOVING = {
    "frozen": "frozen model",
    "fixed": "blocks that stay",
    "random": "moving, at random",
    "sketch": "moving, by a sketch",
    "fixed, columns": "blocks that stay, columns",
    "random, columns": "moving, columns",
    "all layers": "all layers",
    "layers": "layers",
}


def newest(benchmark: str, **settings: Any) -> dict[str, Any]:
    """Return the latest result of `benchmark` with these settings. Raises LookupError if there is none."""
    rows = [json.loads(path.read_text()) for path in RESULTS.glob(f"{benchmark}-*.json")]
    fitting = [row for row in rows if settings.items() <= row["settings"].items()]
    if not fitting:
        raise LookupError(f"No result of {benchmark} with {settings}; run python -m benchmarks.{benchmark}.")
    return max(fitting, key=lambda row: str(row["date"]))


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _ratio(value: int | None, floor: int | None) -> str:
    return "–" if value is None or floor is None else f"{value / floor:.3f}"


def step_table() -> str:
    """Return the table of steps on the CPU, at the default shapes; a dash marks a value that an older result lacks."""
    row = newest("step", device="cpu", hidden=1024, tokens=1024, block_size=64, sparsity=0.98)
    floor = row["results"]["frozen"]
    rows = [
        [
            VARIANTS[name],
            _count(found["trainable"]),
            f"{found['step_ms']['median']:.0f}",
            f"{found['of_floor']:.3f}",
            *(_ratio(found.get(name), floor.get(name)) for name in ("saved_bytes", "peak_bytes")),
            f"{found['compile_s']:.1f}" if "compile_s" in found else "–",
            _count(found.get("break_even_steps")),
        ]
        for name, found in row["results"].items()
    ]
    columns = [
        "variant",
        "trainable",
        "ms",
        "of the floor",
        "saved, of the floor",
        "peak, of the floor",
        "compiling, s",
        "won back after",
    ]
    alone = row["results"]["sylva"]
    share = ""
    if "sddmm_ms" in alone:
        share = (
            f"SDDMM alone takes {alone['sddmm_ms']:.1f} ms of the step, {alone['sddmm_of_floor']:.1%} of the floor. "
        )
    note = (
        f"{share}Measured on {row['machine']['processor']}, {row['machine']['threads']} threads, torch "
        f"{row['machine']['versions']['torch']}, {row['date'][:10]}."
    )
    return f"{markdown(columns, rows)}\n\n{note}"


def gpu_table() -> str:
    """Return the table of steps of one LLaMA-7B layer on a GPU, at two batch sizes."""
    at = {
        tokens: newest("step", device="cuda", hidden=4096, tokens=tokens, block_size=64, sparsity=0.98)
        for tokens in (2048, 8192)
    }
    rows = []
    for name in at[2048]["results"]:
        row = [VARIANTS[name], _count(at[2048]["results"][name]["trainable"])]
        for found in at.values():
            ours, floor = found["results"][name], found["results"]["frozen"]
            row += [f"{ours['step_ms']['median']:.1f}", f"{ours['of_floor']:.3f}"]
            row += [_ratio(ours.get(key), floor.get(key)) for key in ("saved_bytes", "peak_bytes")]
        rows.append(row)
    columns = ["variant", "trainable"]
    for tokens in at:
        columns += [f"{tokens:,} tokens: ms", "of the floor", "saved, of it", "peak, of it"]
    machine = at[2048]["machine"]
    shares = " and ".join(f"{found['results']['sylva']['sddmm_of_floor']:.1%}" for found in at.values())
    note = (
        f"SDDMM alone takes {shares} of the floor. Measured on one {machine['gpu']}, torch "
        f"{machine['versions']['torch']}, Triton {machine['versions']['triton']}, {at[2048]['date'][:10]}."
    )
    return f"{markdown(columns, rows)}\n\n{note}"


def saved_table() -> str:
    """Return the table of bytes saved for the backward, at the default shapes."""
    row = newest("saved_activations", hidden=512, layers=4, tokens=1024, block_size=64)
    floor = row["results"]["frozen"]["saved_bytes"]
    rows = [
        [
            VARIANTS[name].removesuffix(", compiled"),
            _count(found["trainable"]),
            f"{found['saved_bytes'] / 2**20:.1f}",
            f"{found['saved_bytes'] / floor:.3f}",
        ]
        for name, found in row["results"].items()
    ]
    return markdown(["variant", "trainable", "MiB", "of the floor"], rows)


def moving_table() -> str:
    """Return the table of steps with blocks that move and layers that are drawn, at two budgets."""
    at = [newest("moving", device="cpu", hidden=1024, tokens=1024, sparsity=sparsity) for sparsity in (0.95, 0.8)]
    rows = []
    for name, title in MOVING.items():
        row = [title]
        for found in at:
            ours, floor = found["results"].get(name), found["results"]["frozen"]
            row += ["–"] * 3 if ours is None else [f"{ours['step_ms']['median']:.0f}", f"{ours['of_floor']:.3f}"]
            row += [] if ours is None else [_ratio(ours["peak_bytes"], floor["peak_bytes"])]
        rows.append(row)
    columns = ["variant"]
    for found in at:
        columns += [f"{1 - found['settings']['sparsity']:.0%} of blocks: ms", "of the floor", "peak, of it"]
    machine = at[0]["machine"]
    note = (
        f"Measured on {machine['processor']}, {machine['threads']} threads, torch {machine['versions']['torch']}, "
        f"{' and '.join(sorted({found['date'][:10] for found in at}))}."
    )
    return f"{markdown(columns, rows)}\n\n{note}"


SCALED = {"15 Gbit/s": (8, 64, 1024), "100 Gbit/s": (8, 64, 1024), "NVLink": (8,)}
"""The numbers of processes in the table, by link."""


def scaling_table() -> str:
    """Return the table of computed steps of LLaMA-7B's layers on several GPUs; their compute comes from a kept run."""
    row = newest("scaling", kept="step-20261126T011020", layers=32)
    rows = []
    for name, found in row["results"].items():
        steps = [cell(found["step_ms"][link][str(count)]) for link, counts in SCALED.items() for count in counts]
        rows.append([name, f"{found['compute_ms']:.0f}", megabytes(found), *steps])
    columns = ["method", "compute, ms", "MB sent, of 8"]
    columns += [f"{link}: {count:,}" for link, counts in SCALED.items() for count in counts]
    return f"{markdown(columns, rows)}\n\nCompute: {row['settings']['origin']}."


def slope_table(dtype: str = "float32", threads: Iterable[int] = (1, 2)) -> str:
    """Return the table of SLoPe's products and steps on the CPU, in multiples of the speed of dense ones."""
    row = newest("slope", device="cpu", dtype=dtype, threads=[*threads])
    times = row["results"]["times"]
    at: dict[tuple[str, str, int], list[str]] = {}
    for found in sorted(times, key=lambda found: int(found["threads"])):
        place = (f"{found['in']:,} × {found['out']:,}", found["pattern"], found["tokens"])
        at.setdefault(place, []).extend(f"{found['ratio'][name]:.2f}" for name in ("forward", "input", "step"))
    rows = [[shape, pattern, f"{tokens:,}", *ratios] for (shape, pattern, tokens), ratios in at.items()]
    columns = ["inputs × outputs", "pattern", "tokens"]
    for count in row["settings"]["threads"]:
        columns += [f"{count} thread{'s' if count > 1 else ''}: forward", "input gradient", "step"]
    return f"{markdown(columns, rows)}\n\n{_measured(row)}"


PRUNED = {
    "held": ("training: parameters, gradients, AdamW's states and places", "0.63–0.68"),
    "peak": ("training: peak of a step", "–"),
    "evaluated": ("evaluation of a model that is trained", "–"),
    "inference": ("inference, after `masks.freeze()`", "0.51–0.66"),
    "rank 1/64": ("inference, adapters of 1.56% of the hidden size, folded", "0.62–0.69"),
    "rank 1/16": ("inference, adapters of 6.25% of the hidden size, folded", "0.65–0.71"),
    "inference, bfloat16": ("inference in bfloat16", "–"),
}
"""What is measured, by its name in the results: its title, and SLoPe's own figures for 2:4 on GPUs."""


def slope_memory_table() -> str:
    """Return the table of the memory of a model with N:M weights, in multiples of its dense twin's."""
    row = newest("slope_memory", device="cpu")
    found, settings = row["results"], row["settings"]
    rows = []
    for name, (title, published) in PRUNED.items():
        dense = found["dense"][name]
        ratios = (f"{sizes[name] / dense:.3f}" for pattern, sizes in found.items() if pattern != "dense")
        rows.append([title, f"{dense / 2**20:.0f}", *ratios, published])
    columns = ["", "dense, MiB", *(pattern for pattern in found if pattern != "dense"), "SLoPe's own, 2:4"]
    shape = f"{settings['layers']} layers, hidden size {settings['hidden']:,}, MLP {settings['mlp']:,}"
    return f"{markdown(columns, rows)}\n\n{shape}, {settings['tokens']} tokens a step. {_measured(row)}"


def quantised_step_table() -> str:
    """Return the table of steps in an NF4 base on the CPU, at the default shapes."""
    row = newest("quantised", hidden=1024, tokens=1024, block_size=64, sparsity=0.98)
    names = {"frozen": "frozen NF4 model", "sylva": "sylva_compile", "qlora": "QLoRA (PEFT)"}
    rows = [[names[name], *_beside_frozen(found)] for name, found in row["results"].items()]
    return f"{markdown(_BESIDE_FROZEN, rows)}\n\n{_measured(row)}"


def experts_table() -> str:
    """Return the table of steps of two mixtures of experts on the CPU, at the default shapes."""
    row = newest("experts", hidden=512, tokens=1024, block_size=64, sparsity=0.98, dtype="bfloat16")
    names = {"frozen": "frozen", "sylva": "sylva_compile", "frozen eager": "frozen, eager", "lora eager": "PEFT, eager"}
    titles = {"qwen3-moe": "Qwen3-MoE", "mixtral": "Mixtral"}
    rows = [
        [f"{titles[model]}, {names[name]}", *_beside_frozen(found)]
        for model, variants in row["results"].items()
        for name, found in variants.items()
    ]
    return f"{markdown(_BESIDE_FROZEN, rows)}\n\n{_measured(row)}"


_BESIDE_FROZEN = ["variant", "trainable", "ms", "of the floor", "saved, MiB", "of the floor"]


def _beside_frozen(found: dict[str, Any]) -> list[str]:
    """Return the cells of a result of `benchmarks.step.compare_with_frozen`, after its name."""
    return [
        _count(found["trainable"]),
        f"{found['step_ms']['median']:.0f}",
        f"{found['of_floor']:.3f}",
        f"{found['saved_bytes'] / 2**20:.1f}",
        f"{found['saved_of_floor']:.3f}",
    ]


def _measured(row: dict[str, Any]) -> str:
    return (
        f"Measured on {row['machine']['processor']}, torch {row['machine']['versions']['torch']}, {row['date'][:10]}."
    )


TABLES: dict[str, Callable[[], str]] = {
    "step on a GPU": gpu_table,
    "step": step_table,
    "saved activations": saved_table,
    "moving": moving_table,
    "scaling": scaling_table,
    "slope": slope_table,
    "slope in bfloat16": lambda: slope_table("bfloat16", [1]),
    "memory of N:M weights": slope_memory_table,
    "memory of a training": training_table,
    "memory of cards": card_table,
    "memory of quantised bases": quantised_table,
    "step in an NF4 base": quantised_step_table,
    "step of experts": experts_table,
    "memory of a trace": trace_table,
}


def rendered(text: str) -> str:
    """Return `text` with every table between its markers made anew.

    Raises LookupError where `text` asks for a table that there is not.
    """

    def anew(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise LookupError(f"There is no table {match['name']!r}; there are {', '.join(TABLES)}.")
        return f"{match['begin']}{TABLES[match['name']]()}\n{match['end']}"

    return _PLACE.sub(anew, text)


def check_places(texts: Iterable[str]) -> None:
    """Raise LookupError if a table has no place in any of `texts`."""
    found = {match["name"] for text in texts for match in _PLACE.finditer(text)}
    if missing := TABLES.keys() - found:
        raise LookupError(f"No document has a place for the table {min(missing)!r}.")


def main(argv: list[str] | None = None) -> None:
    """Rewrite the documents, or check them."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(argv)
    before = {document: document.read_text() for document in DOCUMENTS}
    check_places(before.values())
    for document, text in before.items():
        after = rendered(text)
        if not options.check:
            document.write_text(after)
        elif after != text:
            name = document.relative_to(ROOT)
            raise SystemExit(f"{name} is behind benchmarks/results; run python -m benchmarks.readme_tables.")


if __name__ == "__main__":
    main()
