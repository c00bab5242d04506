"""Adapters on a quantised base, int8, int4 or nf4, with qwix's arrays and its arithmetic.

An optional module: it needs `pip install 'mora_jax[quantized]'`.
"""

from mora_jax._extras import needs_extra

with needs_extra("quantized", "qwix"):
    from mora_jax.quantized._params import dequantize, dequantize_within, merge, quantize

__all__ = ["dequantize", "dequantize_within", "merge", "quantize"]
