"""The errors that the package raises on purpose. Each message says what was found and what to do."""


class SylvaError(Exception):
    """The base class of all errors of this package."""


class ArgumentError(SylvaError, ValueError):
    """An argument is outside the values it may take."""


class UsageError(ArgumentError):
    """Options of the command line do not go together, or one that is needed is missing."""


class InputError(SylvaError, RuntimeError):
    """A model, data or a folder that the command line was given cannot be used."""


class ScopeError(SylvaError, ValueError):
    """The scope matches no weight, or a weight that cannot carry blocks."""


class TraceError(SylvaError, RuntimeError):
    """A trace cannot run: no batches, no loss, no gradient, too little memory, or a checkpoint that does not fit."""


class MaskError(SylvaError, ValueError):
    """Masks are malformed, do not fit the model, or cannot be read from or written to a file."""


class EmbedError(SylvaError, RuntimeError):
    """Blocks cannot be put into a model, taken out of it or trained as it is.

    The model carries other blocks, its tensors were replaced or changed without its modules' knowledge,
    DistributedDataParallel does not average the gradients of the blocks, or tensor parallelism would split a weight.
    """


class RewriteError(SylvaError, RuntimeError):
    """A weight gradient stayed dense although `on_miss="error"` was asked for."""


class AdapterError(SylvaError, RuntimeError):
    """An adapter cannot be written, read, or applied to this model."""


class LostRankError(SylvaError, RuntimeError):
    """Another process of a distributed job has ended, so that the job cannot go on."""


class ReportError(SylvaError, RuntimeError):
    """A report cannot be made or written."""


class NativeCompilerError(SylvaError, RuntimeError):
    """C++ code cannot be compiled on this machine."""


class GradientError(SylvaError, FloatingPointError):
    """A gradient holds NaN or infinity and `nonfinite="raise"` was asked for."""
