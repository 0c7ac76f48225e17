"""Common parts of the kinds of embedded weights: trained values that stand in or beside the weights of a model.

There are two kinds: square blocks inside of frozen dense weights (`sylva_compile.blocks`), and the kept values of N:M
sparse weights (`sylva_compile.nm`). Another kind is one more folder, which offers:

* masks: a subclass of `BoundMasks`, with `bind`, `embed`, `parameters`, `summary`, `save` and `load`. `MaskFile` writes
  and reads their file;
* ordinary leaf Parameters for the trained values, so that clipping, accumulation, DistributedDataParallel and every
  optimizer need no support. They are float32 or wider whatever the model is converted to: `stay_wide`;
* modules whose class is a generated subclass, `generated_class`: torch's `_apply`, `state_dict`, `load_state_dict`,
  `copy` and `pickle` see the model as it was before it was embedded;
* a `Kind`: what compiling, running and merging ask of the weights. `sylva_compile.compiler.kinds` lists all kinds;
* refusals of what would train nothing or another thing, where it is done: DistributedDataParallel that wraps the model
  too early or with `mixed_precision=` (`wrapping`), processes with other masks, split weights, optimizers that hold
  parameters from before.

Not every kind keeps two copies of one value. Blocks do, and so have `sync`, `push`, `pull`, `is_synced` and
`step_target`; N:M values are in one place, and what the input gradient needs is gathered from them in every backward
pass. Only `sylva_compile.optim` and adapters ask for these, and only of blocks: to any optimizer, N:M values are plain
parameters, and their files are state dicts.
"""
