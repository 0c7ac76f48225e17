"""Ways to split a model that leave no blocks in it are refused by name."""

from types import SimpleNamespace

import pytest

from sylva_compile.errors import ArgumentError
from sylva_compile.integrations.distribution import check_distribution


def accelerator(**state: object) -> SimpleNamespace:
    return SimpleNamespace(state=SimpleNamespace(**state))


def plugin(version: int, *, efficient: bool = False) -> SimpleNamespace:
    return SimpleNamespace(fsdp_version=version, cpu_ram_efficient_loading=efficient)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"deepspeed_plugin": object()}, "DeepSpeed lays weights .* use DistributedDataParallel, or FSDP2"),
        ({"fsdp_plugin": plugin(1)}, "FSDP1 lays weights .*; use FSDP2"),
        ({"fsdp_plugin": plugin(2, efficient=True)}, "set cpu_ram_efficient_loading to False"),
    ],
)
def test_what_loses_blocks_is_refused(state: dict[str, object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words) as caught:
        check_distribution(accelerator(**state))
    assert "\n" not in str(caught.value)


def test_the_rest_is_not() -> None:
    check_distribution(accelerator())
    check_distribution(accelerator(deepspeed_plugin=None, fsdp_plugin=None))
    check_distribution(accelerator(fsdp_plugin=plugin(2)))
