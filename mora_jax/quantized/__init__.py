"""Adapters on a quantised base, int8, int4 or nf4, with qwix's arrays and its arithmetic.

The adapted kernels become `qwix.QArray`s, integers and a scale for each tile of them; the adapters
stay as they are. The model needs no change. It is traced on the shapes of floating kernels and run
again, and each product dequantises its kernel for itself, again in its backward pass. No floating
kernel outlives its product.

    config = mora_jax.MoRAConfig(rank=8, placement="activation")
    model = mora_jax.adapt(base_model, config)
    plan = mora_jax.plan(model, tokens)
    params = quantized.quantize(mora_jax.attach(plan, pretrained), plan, "nf4")
    forward = quantized.dequantize_within(model.apply)
    logits = forward({"params": params}, tokens)
    ...  # split, train, save as ever
    params, losses = quantized.merge(params, plan)

Called without `dequantize_within`, a model fails where it first computes with a quantised kernel.

An optional module: it needs `pip install 'mora_jax[quantized]'`.
"""

from mora_jax._compat.extras import needs_extra

with needs_extra("quantized", "qwix"):
    from mora_jax.quantized._params import dequantize, dequantize_within, merge, quantize

__all__ = ["dequantize", "dequantize_within", "merge", "quantize"]
