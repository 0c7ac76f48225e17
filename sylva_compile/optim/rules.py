"""Update rules, each as the equations of its paper, from which kernels are generated.

A rule is over elements or over blocks. Over elements, `p` is the parameter, `g` its gradient and `t` the number of the
step, which starts at 1. Over blocks, `P` and `G` are a block and its gradient as matrices, `height` by `width`.
Equations run in order, like a program: a state on the right of an equation has the value that the last equation before
it assigned. Expressions that depend on no element, such as Adam's bias corrections, are computed once a parameter and
step, in float64.

A rule that has the name of a torch optimizer follows that optimizer: its states have the same names and meanings, so
that checkpoints of either load into the other (torch's ignores `born`, the ages of blocks that have moved). An option
that changes the equations (amsgrad, Nesterov) makes another rule; an option that is a number (the learning rate) is a
symbol.

**To add a rule**, write its equations. Signum (Bernstein et al., 2018, "signSGD", algorithm 2) steps by the sign of the
momentum:

>>> import sympy as sp
>>> import torch
>>> from sylva_compile.kernels.step.lowering import Rule, g, p
>>> from sylva_compile.optim.optimizer import GeneratedOptimizer
>>> lr, beta, m = sp.symbols("lr beta m", real=True)
>>> signum = Rule(
...     "Signum",
...     equations=((m, beta * m + (1 - beta) * g), (p, p - lr * sp.sign(m))),
...     states=((m, "momentum_buffer"),),
...     hyperparameters=((lr, "lr"), (beta, "beta")),
... )
>>> class Signum(GeneratedOptimizer):
...     def __init__(self, params, lr=1e-4, beta=0.9, **options):
...         super().__init__(params, {"lr": lr, "beta": beta}, **options)
...
...     def rule(self, group):
...         return signum

That is all: `GeneratedOptimizer` supplies the kernel, param groups, schedulers, checkpoints, clipping, GradScaler and
the write-through into dense weights.

>>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
>>> weight.grad = torch.tensor([0.5, 0.0, -2.0])
>>> optimizer = Signum([weight], lr=0.25)
>>> optimizer.step()
>>> weight.tolist()
[0.75, 1.0, 1.25]
>>> print(signum)
Signum
    m = beta*m + g*(1 - beta)
    p = -lr*sign(m) + p

**A rule over blocks** is written in matrix symbols, with sums, products, powers, transposes, elementwise products and
traces. A plain symbol on the left is one number for each block. This rule steps each block by its gradient, divided by
the gradient's Frobenius norm:

>>> from sylva_compile.kernels.step.lowering import G, P
>>> norm = sp.Symbol("norm", real=True)
>>> normalised = Rule(
...     "Normalised",
...     equations=((norm, sp.sqrt(sp.Trace(G.T * G))), (P, P - lr * G / norm)),
...     states=(),
...     hyperparameters=((lr, "lr"),),
... )
>>> class Normalised(GeneratedOptimizer):
...     def __init__(self, params, lr=1e-3, **options):
...         super().__init__(params, {"lr": lr}, **options)
...
...     def rule(self, group):
...         return normalised
>>> blocks = torch.nn.Parameter(torch.zeros(1, 2, 2))
>>> blocks.grad = torch.tensor([[[3.0, 0.0], [4.0, 0.0]]])
>>> Normalised([blocks], lr=0.5).step()
>>> blocks.tolist()
[[[-0.30000001192092896, 0.0], [-0.4000000059604645, 0.0]]]

Such a rule steps parameters `[n, b, b]` alone. Where a block reaches over the edge of its weight, `height` and `width`
are those of the part inside; the kernels keep the rest at zero.
"""

import functools

import sympy as sp

from sylva_compile.kernels.step.lowering import Equation, G, P, Repeat, Rule, g, height, p, t, width

_lr, _eps, _decay = sp.symbols("lr eps weight_decay", real=True)
_beta1, _beta2, _alpha, _mu, _tau = sp.symbols("beta1 beta2 alpha mu tau", real=True)
_m, _v, _top, _c, _mean, _denominator = sp.symbols("m v v_max c g_mean denominator", real=True)
_BETAS = ((_lr, "lr"), (_beta1, ("betas", 0)), (_beta2, ("betas", 1)), (_decay, "weight_decay"))


def _ascent(maximize: bool) -> tuple[tuple[sp.Symbol, sp.Expr], ...]:
    return ((g, -g),) if maximize else ()


@functools.cache
def adam(*, decoupled: bool, amsgrad: bool = False, maximize: bool = False) -> Rule:
    """Return Adam (Kingma and Ba, 2015, algorithm 1), AdamW if `decoupled` (Loshchilov and Hutter, 2019, algorithm 2).

    `amsgrad` is that of Reddi et al. (2018) in torch's form: the largest v so far, before its bias correction.
    """
    decay = (p, p * (1 - _lr * _decay)) if decoupled else (g, g + _decay * p)
    second = _top if amsgrad else _v
    correction1, correction2 = 1 - _beta1**t, 1 - _beta2**t
    equations = (
        *_ascent(maximize),
        decay,
        (_m, _m + (1 - _beta1) * (g - _m)),
        (_v, _beta2 * _v + (1 - _beta2) * g**2),
        *(((_top, sp.Max(_top, _v)),) if amsgrad else ()),
        (p, p - _lr / correction1 * _m / (sp.sqrt(second) / sp.sqrt(correction2) + _eps)),
    )
    states = ((_m, "exp_avg"), (_v, "exp_avg_sq"), *(((_top, "max_exp_avg_sq"),) if amsgrad else ()))
    return Rule("AdamW" if decoupled else "Adam", equations, states, (*_BETAS, (_eps, "eps")))


@functools.cache
def sgd(*, momentum: bool, dampening: bool = False, nesterov: bool = False, maximize: bool = False) -> Rule:
    """Return SGD with momentum (Sutskever et al., 2013) in torch's form: the buffer sums gradients without lr.

    Dampening does not scale the first gradient that enters the buffer.
    """
    equations = [*_ascent(maximize), (g, g + _decay * p)]
    hyperparameters = [(_lr, "lr"), (_decay, "weight_decay")]
    if momentum:
        share = sp.Piecewise((1, t <= 1), (1 - _tau, True)) if dampening else sp.Integer(1)
        equations.append((_m, _mu * _m + share * g))
        hyperparameters.append((_mu, "momentum"))
    if dampening:
        hyperparameters.append((_tau, "dampening"))
    step = g + _mu * _m if nesterov else _m if momentum else g
    equations.append((p, p - _lr * step))
    return Rule("SGD", tuple(equations), ((_m, "momentum_buffer"),) if momentum else (), tuple(hyperparameters))


@functools.cache
def lion(*, maximize: bool = False) -> Rule:
    """Return Lion (Chen et al., 2023, algorithm 2), with decoupled weight decay as in the paper."""
    equations = (
        *_ascent(maximize),
        (_c, _beta1 * _m + (1 - _beta1) * g),
        (p, p * (1 - _lr * _decay) - _lr * sp.sign(_c)),
        (_m, _beta2 * _m + (1 - _beta2) * g),
    )
    return Rule("Lion", equations, ((_m, "exp_avg"),), _BETAS)


@functools.cache
def rmsprop(*, momentum: bool, centered: bool = False, maximize: bool = False) -> Rule:
    """Return RMSprop (Hinton's lecture 6e); `centered` is Graves (2013), equations 38 to 45, in torch's form."""
    equations = [*_ascent(maximize), (g, g + _decay * p), (_v, _alpha * _v + (1 - _alpha) * g**2)]
    states = [(_v, "square_avg")]
    hyperparameters = [(_lr, "lr"), (_decay, "weight_decay"), (_alpha, "alpha"), (_eps, "eps")]
    variance = _v
    if centered:
        equations.append((_mean, _mean + (1 - _alpha) * (g - _mean)))
        states.append((_mean, "grad_avg"))
        variance = _v - _mean**2
    equations.append((_denominator, sp.sqrt(variance) + _eps))
    if momentum:
        equations.append((_m, _mu * _m + g / _denominator))
        states.append((_m, "momentum_buffer"))
        hyperparameters.append((_mu, "momentum"))
    equations.append((p, p - _lr * (_m if momentum else g / _denominator)))
    return Rule("RMSprop", tuple(equations), tuple(states), tuple(hyperparameters))


_norm, _a, _b, _c5 = sp.symbols("norm a b c", real=True)
_M, _U, _X = (sp.MatrixSymbol(name, height, width) for name in ("M", "U", "X"))
_A, _B = (sp.MatrixSymbol(name, width, width) for name in ("A", "B"))


@functools.cache
def muon(*, momentum: bool = True, nesterov: bool, ns_steps: int, scaled: bool) -> Rule:
    """Return Muon (Jordan et al., 2024) over blocks: momentum, then the nearest semi-orthogonal matrix, about.

    The quintic Newton–Schulz iteration moves the singular values of U to about 1. With torch's coefficients and five
    steps, those of 0.002 of U's norm or more end between 0.68 and 1.16; smaller ones stay below. It multiplies by
    `X.T * X` where torch takes `X * X.T` of matrices that are not taller than wide; the results are equal.

    Args:
        momentum: keep a momentum; without it U is the gradient, and the rule has no state.
        nesterov: look ahead along the momentum.
        ns_steps: the number of iterations.
        scaled: multiply the step by `0.2 * sqrt(max(height, width))`, which gives its elements the root mean square of
            AdamW's (Liu et al., 2025, section 2.2); else by `sqrt(max(1, height / width))`, as Jordan does.
    """
    kept: list[Equation] = [(_M, _M + (1 - _mu) * (G - _M)), (_U, _mu * _M + (1 - _mu) * G if nesterov else _M)]
    equations: list[Equation | Repeat] = [
        *(kept if momentum else [(_U, G)]),
        (_norm, sp.sqrt(sp.Trace(_U.T * _U))),
        (_X, _U / sp.Max(_norm, _eps)),
    ]
    equations.append(Repeat(ns_steps, ((_A, _X.T * _X), (_B, _b * _A + _c5 * _A * _A), (_X, _a * _X + _X * _B))))
    size = sp.Float(0.2) * sp.sqrt(sp.Max(height, width)) if scaled else sp.sqrt(sp.Max(1, height / width))
    equations.append((P, (1 - _lr * _decay) * P - _lr * size * _X))
    options = ((_lr, "lr"), *(((_mu, "momentum"),) if momentum else ()), (_decay, "weight_decay"), (_eps, "eps"))
    coefficients = ((_a, ("ns_coefficients", 0)), (_b, ("ns_coefficients", 1)), (_c5, ("ns_coefficients", 2)))
    states = ((_M, "momentum_buffer"),) if momentum else ()
    return Rule("Muon", tuple(equations), states, (*options, *coefficients))
