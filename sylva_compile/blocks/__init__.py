"""The trainable blocks: masks, and the generated modules that hold blocks inside frozen weights."""
