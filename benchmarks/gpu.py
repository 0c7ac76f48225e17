"""All checks and benchmarks that need a GPU, in parts; they run from a checkout, without a network.

    python -m benchmarks.gpu                               all parts
    python -m benchmarks.gpu correctness sddmm graphs      some of them
    python -m benchmarks.gpu tune                          measures the table of launches anew; not part of "all"

correctness     the kernel and whole compiled steps in every dtype against float64, before anything is timed
graphs          mode="reduce-overhead": gradients equal those without CUDA graphs, over several steps
training        trace, compile, train, save and load: the same losses as an uncompiled copy's
sddmm           the kernel against its roofline and a GEMM of as many FLOPs
step-2048       the training step at the shapes of a LLaMA-7B layer, bfloat16, 2,048 tokens
step-8192       the same with 8,192 tokens
optimizer       the optimizer's step with write-through at LLaMA-7B's 224 weights
trace           the cost of a trace beside the forward and backward passes, at the width of LLaMA-7B
updates         hierarchies of many layers updated one by one and together, sizes of BERT and of LLaMA-7B
nm              products with N:M sparse weights: all of them against float64, then 2:4 beside dense at many shapes

Needs torch, triton and transformers; without PEFT the LoRA variants are left out.
"""

import copy
import itertools
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor, nn

import sylva_compile
from benchmarks import grouped_updates, optimizer_step, sddmm, slope, step, trace_cost
from benchmarks.command import parser_of
from benchmarks.variants import llama
from sylva_compile.kernels.nm import cuda
from sylva_compile.kernels.nm.choice import choose_kernel
from sylva_compile.kernels.nm_mm import nm_mm, to_dense

LAYER = ["--hidden", "4096", "--mlp", "11008", "--layers", "1", "--length", "1024", "--dtype", "bfloat16"]


def gradients(model: nn.Module, masks: sylva_compile.Masks, x: Tensor) -> dict[str, Tensor]:
    """Run `model`, compiled or not, forward and backward on `x`; return the gradients of the blocks by weight."""
    model.zero_grad(set_to_none=True)
    model(x).float().square().mean().backward()
    found = {name: parameter.grad for name, parameter in zip(masks, masks.parameters(), strict=True)}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def small(dtype: torch.dtype) -> nn.Module:
    """Make a model of two weights whose sizes are no multiples of any block size here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 330), nn.GELU(), nn.Linear(330, 150)).to("cuda", dtype)
    return model.requires_grad_(False)


def masks_of(model: nn.Module, block: int) -> sylva_compile.Masks:
    """Choose a third of the blocks, at random."""
    return sylva_compile.trace_and_mask(model, method="random", sparsity=0.67, block_size=block)


def correctness() -> None:
    """Check kernel and compiled step against float64, in many processes, since compilation takes the longest."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    with ProcessPoolExecutor(min(10, os.cpu_count() or 1), get_context("spawn")) as processes:
        for said in processes.map(check, *zip(*itertools.product(dtypes, (16, 24, 32, 64, 128)), strict=True)):
            print(said)
        for said in processes.map(check_muon, *zip(*itertools.product(MUON_ERRORS, (16, 24, 64, 128)), strict=True)):
            print(said)


def check(dtype: torch.dtype, block: int) -> str:
    """Check one dtype and block size; return a line to print. Raises AssertionError where an error exceeds rounding."""
    for tokens, size, share in ((1, 100, 1.0), (300, 500, 0.3), (5000, 1024, 0.02)):
        sddmm.check(*sddmm.operands(tokens, size, block, share, dtype, "cuda"), block)
    model = small(dtype)
    exact_model = copy.deepcopy(model).double()
    masks = masks_of(model, block)
    exact_masks = sylva_compile.Masks(masks, model=exact_model)
    backend = sylva_compile.backend(masks, on_miss="error")
    exact_masks.embed()
    x = torch.randn(3, 70, 200, device="cuda").to(dtype)
    found = gradients(torch.compile(model, backend=backend), masks, x)
    exact = gradients(exact_model, exact_masks, x.double())
    assert set(found) == set(exact) == set(masks)
    worst = max(float((found[name].double() - exact[name]).norm() / exact[name].norm()) for name in masks)
    assert worst < 16 * max(torch.finfo(dtype).eps, 1e-7), f"{dtype}, b={block}: relative error {worst:.1e}"
    return f"correctness: {dtype}, b={block}: relative error of the step's gradients {worst:.1e}"


MUON_ERRORS = {"float32": 1e-5, "tf32": 1e-2, "bfloat16": 0.1}
"""The largest error of an element of Muon's step, of the largest element, by the precision of its products."""


def check_muon(products: str, block: int) -> str:
    """Check three steps of Muon against float64; return a line to print. Raises AssertionError for a larger error."""
    torch.manual_seed(block)
    values = torch.randn(20, block, block)
    steps = []
    for device, dtype, options in (("cuda", torch.float32, {"products": products}), ("cpu", torch.float64, {})):
        blocks = nn.Parameter(torch.zeros_like(values, device=device, dtype=dtype))
        optimizer = sylva_compile.optim.Muon([blocks], lr=1.0, **options)
        for seed in range(3):
            blocks.grad = (values * (seed + 1)).roll(seed, 0).to(blocks)
            optimizer.step()
        steps.append(blocks.detach().double().cpu())
    found, exact = steps
    worst = float((found - exact).abs().max() / exact.abs().max())
    assert worst < MUON_ERRORS[products], f"Muon, {products}, b={block}: error {worst:.1e}"
    return f"correctness: Muon, products in {products}, b={block}: error of the step {worst:.1e}"


def graphs() -> None:
    """Check that gradients with CUDA graphs equal those without."""
    model = small(torch.bfloat16)
    masks = masks_of(model, 32)
    backend = sylva_compile.backend(masks, on_miss="error")
    inputs = [torch.randn(3, 70, 200, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
    plain = torch.compile(model, backend=backend)
    wanted = [gradients(plain, masks, x) for x in inputs]
    torch._dynamo.reset()
    recorded = torch.compile(model, backend=backend, mode="reduce-overhead")
    for x, expected in zip(inputs, wanted, strict=True):
        torch.compiler.cudagraph_mark_step_begin()
        for name, gradient in gradients(recorded, masks, x).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    print(f"graphs: {len(inputs)} steps under reduce-overhead equal those without")


def training() -> None:
    """Take a compiled small Llama from trace to adapter, and check it against an uncompiled copy on the same steps."""
    torch.manual_seed(0)
    compiled = llama(256, 688, 2).to("cuda")
    ids = torch.randint(0, 1024, (8, 64), device="cuda")
    loader = [{"input_ids": ids, "labels": ids}] * 12
    started = time.perf_counter()
    masks = sylva_compile.trace_and_mask(compiled, loader, sparsity=0.9, block_size=32, num_samples=64, progress=False)
    print(f"training: traced in {time.perf_counter() - started:.1f} s")
    compiled.requires_grad_(False)
    twin, untouched = copy.deepcopy(compiled), copy.deepcopy(compiled)
    twin_masks = sylva_compile.Masks(masks, model=twin)
    compiled.compile(backend=sylva_compile.backend(masks, on_miss="error"))
    losses: list[list[float]] = []
    for model, own in ((compiled, masks), (twin, twin_masks)):
        own.embed()
        optimizer = sylva_compile.AdamW(own.parameters(), lr=1e-3)
        losses.append([])
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.01, losses[0]
    with tempfile.TemporaryDirectory() as folder:
        sylva_compile.save_adapter(compiled, folder)
        sylva_compile.load_adapter(untouched, folder)
    for name in masks:
        torch.testing.assert_close(untouched.get_parameter(f"{name}_blocks"), compiled.get_parameter(f"{name}_blocks"))
    print(f"training: compiled and uncompiled losses agree, {losses[0][0]:.4f} to {losses[0][-1]:.4f}; adapter loads")


def kernel() -> None:
    """Benchmark the kernel at the shapes of a LLaMA-7B layer."""
    for tokens in ("2048", "8192"):
        options = ["--device", "cuda", "--dtypes", "bfloat16", "--tokens", tokens, "--size", "4096"]
        sddmm.main([*options, "--blocks", "64", "128", "--shares", "0.01", "0.02", "0.05"])


def steps(tokens: str) -> None:
    """Benchmark a step of one layer with 2% of its blocks: beside LoRA and full fine-tuning, then beside the floor."""
    for block, names in (("64", []), ("128", ["--names", "frozen", "sylva"])):
        step.main([*LAYER, "--device", "cuda", "--tokens", tokens, "--block-size", block, *names, "--repeats", "40"])
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def optimizer() -> None:
    """Benchmark the optimizers, without torch's compiled step: it takes minutes to compile for so many weights."""
    names = ["torch fused", "torch foreach", "sylva Muon", "batched Muon"]
    optimizer_step.main(["--device", "cuda", "--names", *names])
    # torch's Muon launches kernels for each of 32,000 blocks.
    optimizer_step.main(["--device", "cuda", "--names", "sylva Muon", "torch Muon", "--repeats", "3"])


def trace() -> None:
    """Benchmark a trace of two layers as wide as LLaMA-7B's."""
    shape = ["--hidden", "4096", "--batch", "2", "--length", "1024", "--dtype", "bfloat16"]
    trace_cost.main(["--device", "cuda", *shape, "--memory-hidden", "0", "--rounds", "1", "--batches", "6"])


def updates() -> None:
    """Benchmark updates of the trace's hierarchies, single and grouped; their sums are compared first."""
    for size in ("768", "4096"):
        grouped_updates.main(["--device", "cuda", "--size", size, "--layers", "6", "24"])


def check_products(
    dtype: torch.dtype, n: int, m: int, outputs: int, inputs: int, tokens: int, device: str = "cuda"
) -> None:
    """Check all products of a layer against float64, with and without CUDA graphs, and say which kernel ran."""
    layer = slope.Layer.random((outputs, inputs), n, m, dtype, device)
    x, gradient = (torch.randn(tokens, k, device=device).to(dtype) for k in (inputs, outputs))
    second, weight = layer.second(), layer.dense().double()
    twice = to_dense(second, layer.second_codes, n, m).double().t()
    assert torch.equal(twice, weight.where(twice != 0, 0)) and bool(twice.any())
    recorded = torch.compile(lambda x: nm_mm(x, layer.values, layer.codes, n, m, False), mode="reduce-overhead")
    slope.check(layer.forward(x), x.double() @ weight.t(), dtype)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        slope.check(recorded(x), x.double() @ weight.t(), dtype)
    slope.check(layer.input_gradient(gradient, second), gradient.double() @ twice, dtype)
    slope.check(nm_mm(gradient, layer.values, layer.codes, n, m, True), gradient.double() @ weight, dtype)
    exact = (gradient.double().t() @ x.double()).gather(1, layer.columns())
    slope.check(layer.weight_gradient(gradient, x), exact, dtype)
    if cuda.missing(outputs, inputs, n, m, dtype, x.device) is None:
        operands = layer.values, layer.codes, n, m
        slope.check(cuda.packed_and_multiplied(x, *operands), x.double() @ weight.t(), dtype)
        slope.check(nm_mm(x, *cuda.compress(*operands), n, m, False), x.double() @ weight.t(), dtype)
    choice = choose_kernel(tokens, outputs, inputs, n, m, dtype, device)
    print(f"nm: {n}:{m}, {dtype}, {tokens} x {inputs} x {outputs}: right; {choice.kernel}, {choice.why}")


def nm() -> None:
    """Check N:M products in every dtype, then benchmark 2:4 at the shapes of a LLaMA-7B layer and at smaller ones."""
    print(f"nm: cuSPARSELt {cuda.version()}, compute capability {torch.cuda.get_device_capability()}")
    for dtype, (n, m) in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), ((2, 4), (1, 2), (4, 8), (2, 8))
    ):
        for outputs, inputs, tokens in ((64, 128, 13), (768, 3072, 512), (200, 120, 7)):
            check_products(dtype, n, m, outputs, inputs, tokens)
        torch._dynamo.reset()
    for dtype in ("bfloat16", "float16"):
        shapes = ["1024x1024", "4096x4096", "4096x11008", "11008x4096", "8192x8192"]
        options = ["--device", "cuda", "--dtype", dtype, "--threads", "1", "--repeats", "20"]
        slope.main([*options, "--shapes", *shapes, "--tokens", "512", "2048", "8192"])


PARTS = {
    "correctness": correctness,
    "graphs": graphs,
    "training": training,
    "sddmm": kernel,
    "step-2048": lambda: steps("2048"),
    "step-8192": lambda: steps("8192"),
    "optimizer": optimizer,
    "trace": trace,
    "updates": updates,
    "nm": nm,
}


def main(argv: list[str] | None = None) -> None:
    """Run the named parts, or all."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "tune", []], help="all if left out")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("No CUDA device here; run this on a machine with one.")
    for name in options.parts or PARTS:
        started = time.perf_counter()
        sddmm.tune() if name == "tune" else PARTS[name]()
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
