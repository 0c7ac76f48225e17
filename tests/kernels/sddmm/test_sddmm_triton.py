"""The Triton kernel, on a GPU where there is one, else in Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined, so the interpreter needs a process of its own: without a GPU,
this file runs itself again with the variable set. To see its cases, run it so by hand.
"""

import json
import os
from collections.abc import Iterator

import pytest
import torch
import triton
from interpreter import run_in_interpreter
from packaging.version import Version
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sylva_compile.kernels.sddmm.configs import MANY, PANELS, TABLE, Config, choose_config, choose_splits, config_key
from sylva_compile.kernels.sddmm.op import sddmm_reference
from sylva_compile.kernels.sddmm.triton_kernel import _sddmm_kernel, sddmm_shared_triton, sddmm_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The oracle's products on a GPU are refused without it while outputs start as NaN, see below.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

needs_triton = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in a process of its own")
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.float16, id="float16"),
    pytest.param(torch.float64, id="float64"),
    pytest.param(torch.bfloat16, id="bfloat16"),
]


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the cases run in this process")
@pytest.mark.skipif(Version(triton.__version__) < Version("3.7"), reason="Triton 3.6 interprets no loop over a tensor")
def test_the_kernel_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


class TestConfigs:
    """The committed table: one choice for each shape, and none made while a model trains."""

    def test_every_entry_is_there_and_no_other(self) -> None:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        wanted = {config_key(dtype, panel, t) for dtype in dtypes for panel in PANELS for t in (MANY, MANY + 1)}
        assert set(json.loads(TABLE.read_text())["configs"]) == wanted

    @pytest.mark.parametrize("b", [8, 16, 24, 32, 33, 64, 96, 128, 200])
    def test_every_block_size_has_a_choice(self, b: int) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for tokens in (0, 1, 5000):
                config = choose_config(dtype, b, tokens)
                assert config.tokens >= 16 and config.warps in (1, 2, 4, 8) and config.stages >= 1

    def test_splits_leave_segments_worth_their_while(self) -> None:
        for blocks, tokens in ((0, 0), (1, 1), (1, 255), (1, 10**6), (10**6, 10**6)):
            splits = choose_splits(blocks, tokens, torch.device(DEVICE))
            assert splits == 1 or tokens // splits >= 256


def random(tokens: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """`[tokens, width]` with NaN between its elements, so that an address which is a little off shows."""
    values = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    apart = torch.full((tokens + 2, width + 3), torch.nan, dtype=dtype)
    apart[1 : tokens + 1, 1 : width + 1] = values
    return apart.to(DEVICE)[1 : tokens + 1, 1 : width + 1]


@pytest.fixture(autouse=True)
def _outputs_start_as_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(lhs: Tensor, rhs: Tensor, positions: Tensor, b: int, tolerance: float = 1e-6) -> None:
    compare(sddmm_triton(lhs, rhs, positions.to(DEVICE), b), lhs, rhs, positions, b, tolerance)


def compare(found: Tensor, lhs: Tensor, rhs: Tensor, positions: Tensor, b: int, tolerance: float = 1e-6) -> None:
    expected = sddmm_reference(lhs.double(), rhs.double(), positions.to(DEVICE), b)
    assert found.dtype == (torch.float64 if lhs.dtype == torch.float64 else torch.float32)
    assert found.is_contiguous()
    # Both read the same operands and sum in float32 or wider; where both are exactly zero, beyond the edges, so must
    # the difference be.
    magnitude = sddmm_reference(lhs.double().abs(), rhs.double().abs(), positions.to(DEVICE), b)
    error = (found.double() - expected).abs()
    assert bool((error <= tolerance * magnitude).all()), error.max()


@pytest.mark.skipif(INTERPRETED, reason="compiles for a GPU that need not be there")
class TestGeneratedCode:
    """The code that Triton generates from the kernel for a Hopper GPU, on any machine."""

    @pytest.mark.parametrize("weights", [1, 3])
    @pytest.mark.parametrize("key", ["bfloat16/64/few", "bfloat16/128/few", "float16/16/few", "float32/32/few"])
    def test_loads_are_wide_and_tiles_fit(self, key: str, weights: int) -> None:
        dtype, panel, _ = key.split("/")
        config = choose_config(getattr(torch, dtype), int(panel), 0)
        constants: dict[str, object] = {"WEIGHTS": weights, "BLOCK": int(panel), "PANEL": int(panel), "EXACT": True}
        constants |= {"TOKENS": config.tokens, "LONG": False, "WIDEN": False, "PRECISION": "tf32"}
        constants |= {"lhs_column_stride": 1, "rhs_column_stride": 1}
        element = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
        types = {"lhs0": element, "lhs1": element, "lhs2": element, "rhs": element}
        types |= {f"positions{w}": "*i64" for w in range(3)} | {f"out{w}": "*fp32" for w in range(3)}
        names = _sddmm_kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        varied = {"tokens", "splits", "blocks0", "blocks1", "blocks2"}
        aligned = [(index,) for index, name in enumerate(names) if name not in constants and name not in varied]
        source = ASTSource(_sddmm_kernel, signature, constants, {at: [["tt.divisibility", 16]] for at in aligned})
        launch = {"num_warps": config.warps, "num_stages": config.stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
        assert compiled.metadata.shared <= 227 * 1024
        # 16 bytes a load, straight into shared memory while the tensor cores work on the tile before.
        assert "cp.async.cg" in compiled.asm["ptx"]
        assert "mma" in compiled.asm["ptx"]


@needs_triton
class TestKernel:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("b", [8, 16, 24, 32, 64, 128])
    def test_block_sizes_and_dtypes_with_remainders(self, b: int, dtype: torch.dtype) -> None:
        m, n = 2 * b + 3, b + b // 2 + 1
        positions = torch.tensor([[0, 0, 1, 2], [0, 1, 0, 1]])
        check(random(70, m, dtype, 0), random(70, n, dtype, 1), positions, b)

    @pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65])
    def test_tokens_around_the_tile(self, tokens: int) -> None:
        check(
            random(tokens, 20, torch.float32, 0),
            random(tokens, 20, torch.float32, 1),
            torch.tensor([[0, 1], [1, 0]]),
            16,
        )

    @pytest.mark.parametrize("turned", ["lhs", "rhs", "both"])
    def test_transposed_operands(self, turned: str) -> None:
        lhs, rhs = random(33, 20, torch.float32, 0), random(33, 41, torch.float32, 1)
        if turned != "rhs":
            lhs = lhs.t().contiguous().t()
        if turned != "lhs":
            rhs = rhs.t().contiguous().t()
        check(lhs, rhs, torch.tensor([[0, 0, 1], [0, 2, 1]]), 16)

    def test_an_operand_with_stride_zero(self) -> None:
        lhs = torch.arange(20.0, device=DEVICE).expand(33, 20)
        check(lhs, random(33, 20, torch.float32, 1), torch.tensor([[0, 1], [0, 1]]), 16)

    def test_one_block(self) -> None:
        check(random(5, 16, torch.float32, 0), random(5, 16, torch.float32, 1), torch.tensor([[0], [0]]), 16)

    def test_no_block(self) -> None:
        nothing = torch.zeros(2, 0, dtype=torch.int64)
        assert sddmm_triton(random(5, 16, torch.float32, 0), random(5, 16, torch.float32, 1), nothing, 16).shape == (
            0,
            16,
            16,
        )

    def test_every_block_in_any_order(self) -> None:
        positions = torch.ones(3, 4).nonzero().t().flip(1)
        check(random(40, 43, torch.float32, 0), random(40, 50, torch.float32, 1), positions, 16)

    def test_block_larger_than_the_matrix(self) -> None:
        check(random(9, 3, torch.float32, 0), random(9, 5, torch.float32, 1), torch.tensor([[0], [0]]), 32)

    def test_one_row_by_one_column(self) -> None:
        # Triton compiles the number 1 into the kernel, so a size of one takes another path.
        check(random(1, 1, torch.float32, 0), random(1, 1, torch.float32, 1), torch.tensor([[0], [0]]), 8)

    def test_positions_that_are_a_view(self) -> None:
        positions = torch.tensor([[0, 1], [0, 2], [1, 0]]).t()
        assert not positions.is_contiguous()
        check(random(9, 40, torch.float32, 0), random(9, 40, torch.float32, 1), positions, 16)

    def test_tf32_asked_for_through_torchs_new_switch(self) -> None:
        # Once this one is used, torch refuses to tell the state of the old switch, `allow_tf32`.
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            # A GPU cuts both operands to ten bits after the first.
            check(random(9, 40, torch.float32, 0), random(9, 40, torch.float32, 1), torch.tensor([[0], [1]]), 16, 2e-3)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    @pytest.mark.parametrize("splits", [2, 3, 7])
    @pytest.mark.parametrize("tokens", [1, 64, 130, 200])
    def test_splits_of_the_tokens(self, splits: int, tokens: int) -> None:
        # Some of these segments are empty: their part of the sum is zero, not whatever was in memory.
        lhs, rhs = random(tokens, 40, torch.float32, 0), random(tokens, 40, torch.float32, 1)
        positions = torch.tensor([[0, 1, 2], [2, 1, 0]])
        config = Config(tokens=32, warps=4, stages=2)
        results = [
            sddmm_shared_triton([lhs], rhs, [positions.to(DEVICE)], 16, config=config, splits=splits)[0]
            for _ in range(2)
        ]
        compare(results[0], lhs, rhs, positions, 16)
        assert torch.equal(*results)

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("splits", [1, 2])
    def test_weights_that_share_an_activation(self, count: int, splits: int) -> None:
        rhs = random(70, 41, torch.bfloat16, 9)
        lhs = [random(70, 20 + 17 * w, torch.bfloat16, w) for w in range(count)]
        positions = [torch.ones(-(-left.shape[1] // 16), 3).nonzero().t()[:, w:] for w, left in enumerate(lhs)]
        positions[count // 2] = positions[count // 2][:, :0]
        on_device = [at.to(DEVICE) for at in positions]
        found = sddmm_shared_triton(lhs, rhs, on_device, 16, splits=splits)
        assert len(found) == count
        for result, left, at in zip(found, lhs, positions, strict=True):
            compare(result, left, rhs, at, 16)

    def test_weights_whose_gradients_lie_differently(self) -> None:
        rhs = random(33, 41, torch.float32, 9)
        lhs = [random(33, 20, torch.float32, 0), random(33, 36, torch.float32, 1).t().contiguous().t()]
        positions = [torch.tensor([[0, 1], [0, 2]]), torch.tensor([[2], [1]])]
        found = sddmm_shared_triton(lhs, rhs, [at.to(DEVICE) for at in positions], 16)
        for result, left, at in zip(found, lhs, positions, strict=True):
            compare(result, left, rhs, at, 16)

    @pytest.mark.parametrize("b", [16, 32])
    def test_no_remainder_at_all(self, b: int) -> None:
        check(
            random(64, 3 * b, torch.float32, 0), random(64, 2 * b, torch.float32, 1), torch.tensor([[0, 2], [1, 0]]), b
        )

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    def test_infinities_stay_inside_the_matrix(self) -> None:
        lhs, rhs = random(9, 20, torch.float32, 0), random(9, 20, torch.float32, 1)
        lhs[:, 17], rhs[:, 18] = torch.inf, torch.inf
        found = sddmm_triton(lhs, rhs, torch.tensor([[1], [1]], device=DEVICE), 16)[0]
        assert not found[4:].any() and not found[:, 4:].any()
        assert not torch.isfinite(found[1, 2])

    def test_strides_beyond_32_bits(self) -> None:
        # Two tokens, 2^31 elements apart: the bytes between are never touched, so they cost no memory.
        apart = 2**31 + 16
        if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 3 * apart:
            pytest.skip("needs 6 GB of the GPU")
        torch.use_deterministic_algorithms(False)
        buffer = torch.empty(apart + 32, dtype=torch.float16, device=DEVICE)
        lhs = buffer.as_strided((2, 32), (apart, 1))
        lhs.copy_(random(2, 32, torch.float16, 0))
        check(lhs, random(2, 32, torch.float16, 1), torch.tensor([[1, 0], [0, 1]]), 16)
