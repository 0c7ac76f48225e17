from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from sylva_compile.kernels.observe import observe, observing

Seen = list[tuple[Tensor, Tensor, Tensor, bool, Tensor | None]]


def listener_of(seen: Seen) -> Callable[[Tensor, Tensor, Tensor, bool, Tensor | None], None]:
    def listen(weight: Tensor, lhs: Tensor, rhs: Tensor, activation_is_lhs: bool, offsets: Tensor | None) -> None:
        seen.append((weight, lhs, rhs, activation_is_lhs, offsets))

    return listen


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(7, 3).to(dtype), torch.randn(7, 4).to(dtype), torch.randn(3, 4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(observe, (*operands(dtype), False))


def test_opcheck_strided_and_without_tokens() -> None:
    torch.library.opcheck(observe, (torch.randn(3, 7).t(), torch.randn(4, 7).t(), torch.randn(4, 3).t(), True))
    experts = torch.randn(2, 3, 4), False, torch.tensor([2, 7], dtype=torch.int32)
    torch.library.opcheck(observe, (torch.randn(7, 3), torch.randn(7, 4), *experts))
    torch.library.opcheck(observe, (torch.randn(0, 3), torch.randn(0, 4), torch.randn(3, 4), False))


def test_shows_weight_and_operands_and_returns_a_zero_of_the_weights_dtype() -> None:
    lhs, rhs, weight = operands()
    seen: Seen = []
    with observing(listener_of(seen)):
        zero = observe(lhs, rhs, weight.double(), True)
    [(_, first, second, activation_is_lhs, offsets)] = seen
    assert (zero.shape, zero.dtype, zero.item()) == ((), torch.float64, 0.0)
    assert torch.equal(first, lhs)
    assert torch.equal(second, rhs)
    assert activation_is_lhs is True
    assert offsets is None


def test_shows_where_the_tokens_of_experts_end() -> None:
    lhs, rhs, _ = operands()
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    seen: Seen = []
    with observing(listener_of(seen)):
        observe(lhs, rhs, torch.randn(3, 3, 4), False, ends)
    assert seen[0][4] is ends


def test_the_listener_gets_the_very_weight() -> None:
    # The tracer finds out by identity which layer it was, so a view or a copy would not do.
    lhs, rhs, weight = operands()
    seen: Seen = []
    with observing(listener_of(seen)):
        observe(lhs, rhs, weight, False)
    assert seen[0][0].data_ptr() == weight.data_ptr()
    assert seen[0][0] is weight


def test_nobody_listens_outside_the_context() -> None:
    lhs, rhs, weight = operands()
    seen: Seen = []
    with observing(listener_of(seen)):
        pass
    observe(lhs, rhs, weight, False)
    assert not seen


def test_an_error_inside_ends_the_listening() -> None:
    lhs, rhs, weight = operands()
    seen: Seen = []

    def fail() -> None:
        with observing(listener_of(seen)):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    observe(lhs, rhs, weight, False)
    assert not seen


def test_every_listener_hears_and_each_leaves_alone() -> None:
    lhs, rhs, weight = operands()
    outer: Seen = []
    inner: Seen = []
    with observing(listener_of(outer)):
        with observing(listener_of(inner)):
            observe(lhs, rhs, weight, False)
        observe(lhs, rhs, weight, False)
    assert (len(outer), len(inner)) == (2, 1)


def test_fake_tensors_are_not_shown() -> None:
    seen: Seen = []
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in operands()]
    with observing(listener_of(seen)), mode:
        zero = observe(*fakes, False)
    assert zero.shape == ()
    assert not seen
