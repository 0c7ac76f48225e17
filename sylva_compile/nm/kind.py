"""N:M weights as a `Kind` of embedded weights."""

from torch import Tensor, nn

from sylva_compile.embedded.kind import Kind
from sylva_compile.nm.averaging import check_averaged, is_carried
from sylva_compile.nm.embedding import nm_modules
from sylva_compile.nm.export import unprune
from sylva_compile.nm.kernel_report import kernel_report
from sylva_compile.nm.masks import NMMasks
from sylva_compile.nm.module import VALUES


def carriers(model: nn.Module) -> dict[str, Tensor]:
    """Return the kept values of every pruned weight of `model`, by weight name."""
    return {name: module._parameters[VALUES] for name, module in nm_modules(model).items()}


def _unembed(model: nn.Module) -> None:
    if nm_modules(model):
        unprune(model)


NM = Kind(NMMasks, carriers, is_carried, _unembed, kernel_report, check_averaged)
