"""Small linen models, and what adapting one gives."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

import mora_jax


class Block(nn.Module):
    """Two layers of different width, and a residual."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.gelu(nn.Dense(24, name="up", dtype=x.dtype)(x))
        return x + nn.Dense(x.shape[-1], name="down", dtype=x.dtype)(y), None


class Network(nn.Module):
    """A little of everything: a Dense, stacked layers, attention, a norm."""

    stacked: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="embed", dtype=x.dtype)(x)
        if self.stacked:
            layers = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            x, _ = layers(name="layers")(x, None)
        x = nn.LayerNorm(name="norm", dtype=x.dtype)(x)
        return nn.MultiHeadDotProductAttention(2, name="attention", dtype=x.dtype)(x, x)


class Small(nn.Module):
    """Two layers and a norm: quick to compile, for what does not depend on the model."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="embed", dtype=x.dtype)(x)
        x = nn.LayerNorm(name="norm", dtype=x.dtype)(x)
        return nn.Dense(12, name="head", dtype=x.dtype)(x)


@functools.cache
def initialized(module, shape, dtype):
    """New parameters as NumPy arrays, which no test can donate: most want the same ones."""
    params = jax.jit(module.init)(jax.random.key(0), jnp.ones(shape, dtype))["params"]
    return jax.device_get(params)


def adapted_network(inputs, *, key=None, module=None, **config):
    """(base model, its params, adapted model, plan, params with new adapters)."""
    base = module or Network()
    pretrained = jax.tree.map(jnp.array, initialized(base, inputs.shape, inputs.dtype))
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(**{"rank": 2, **config}))
    plan = mora_jax.plan(model, inputs)
    return base, pretrained, model, plan, mora_jax.attach(plan, pretrained, key=key)
