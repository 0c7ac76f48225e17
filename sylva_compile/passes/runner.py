"""Run graph passes in order, log what each did and how long it took, and dump graphs on request.

TORCH_LOGS="+sylva_compile.passes"      one log line for each pass that changed a graph or is disabled: number, name,
                                        places rewritten, time, and how many nodes of each operator came or went
SYLVA_DUMP_GRAPHS=directory             write the graph before and after each pass, as text
SYLVA_DISABLE_PASSES=name,name          leave passes out (results stay correct, only slower)
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from torch.fx import Graph

log = logging.getLogger("sylva_compile.passes")

Pass = Callable[[Graph], int]
"""Rewrites a graph in place and returns how many places it changed."""


def run_passes(graph: Graph, passes: Mapping[str, Pass]) -> int:
    """Run `passes` over `graph` in their order and return the number of places changed.

    Args:
        graph: graph to rewrite in place.
        passes: the passes by the names that logs, dumps and `SYLVA_DISABLE_PASSES` use.
    """
    disabled = {name.strip() for name in os.environ.get("SYLVA_DISABLE_PASSES", "").split(",")}
    dump = os.environ.get("SYLVA_DUMP_GRAPHS")
    if unknown := disabled - passes.keys() - {""}:
        log.warning("SYLVA_DISABLE_PASSES: no pass is called %s; there are %s.", sorted(unknown), sorted(passes))
    total = 0
    for number, (name, run) in enumerate(passes.items()):
        if name in disabled:
            log.info("pass %d %s: disabled by SYLVA_DISABLE_PASSES", number, name)
            continue
        before = _operators(graph) if log.isEnabledFor(logging.INFO) else Counter()
        if dump:
            _dump(graph, Path(dump), number, name, "before")
        started = time.perf_counter()
        changed = run(graph)
        elapsed = time.perf_counter() - started
        total += changed
        if dump:
            _dump(graph, Path(dump), number, name, "after")
        if changed and log.isEnabledFor(logging.INFO):
            after = _operators(graph)
            difference = {
                name: after[name] - before[name]
                for name in sorted(after.keys() | before.keys())
                if after[name] != before[name]
            }
            log.info("pass %d %s: %d rewritten in %.1f ms, %s", number, name, changed, elapsed * 1e3, difference)
    return total


def _operators(graph: Graph) -> "Counter[str]":
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def _dump(graph: Graph, directory: Path, number: int, name: str, moment: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    serial = len(list(directory.glob("*.txt")))
    (directory / f"{serial:04d}_{number}_{name}_{moment}.txt").write_text(str(graph))
