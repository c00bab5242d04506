"""Decoder layers of Llama-3-8B's shape, and the training step that the benchmarks time.

No embeddings and no head: what is timed is the layers, where all adapters are. The gradient of the
layers' input is asked for as well, so that every layer goes back as it does inside a whole model.

Shape letters: B batch, T tokens of a sequence, D features.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

import mora_jax
from llama.model import Layer, LlamaConfig, rotary_angles

LLAMA_3_8B = LlamaConfig(
    vocab_size=0,
    features=4096,
    hidden_features=14336,
    num_layers=8,
    num_heads=32,
    num_kv_heads=8,
    head_features=128,
    rope_theta=500000.0,
)

#: Sizes that any machine runs at once.
TINY = dataclasses.replace(
    LLAMA_3_8B,
    features=64,
    hidden_features=160,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_features=16,
)


class Layers(nn.Module):
    """A stack of decoder layers, unrolled or scanned: [B, T, D] -> [B, T, D]."""

    config: LlamaConfig
    remat: bool = False
    scan: bool = False
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Causal attention over T tokens, no cache, no padding."""
        config, slot = self.config, jnp.zeros((), jnp.int32)
        positions = jnp.arange(x.shape[1])[None]
        angles = rotary_angles(positions, config.head_features, config.rope_theta)
        options = {"dtype": self.dtype, "param_dtype": self.dtype}
        if self.scan:
            layers = nn.scan(
                nn.remat(Layer, prevent_cse=False) if self.remat else Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                length=config.num_layers,
            )
            return layers(config, **options, name="layers")(x, angles, None, slot)[0]
        layer = nn.remat(Layer) if self.remat else Layer
        for index in range(config.num_layers):
            x, _ = layer(config, **options, name=f"layers_{index}")(x, angles, None, slot)
        return x


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is timed: a base model, or one with adapters.

    Attributes:
      name: as printed.
      config: how it is adapted; None is the frozen baseline.
      path: "module", as a linen model; "function", the model's `apply` as a function of parameters;
        "merge", by `mora_jax.merge` within the step, which any code could do.
    """

    name: str
    config: mora_jax.MoRAConfig | None
    path: str = "module"


def make_layers(tiny: bool, **options: Any) -> Layers:
    """The stack that is timed: bfloat16, or float32 on a CPU, which cannot run all of it so."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return Layers(TINY if tiny else LLAMA_3_8B, dtype=dtype, **options)


def make_step(base: Layers, variant: Variant, x: Array | jax.ShapeDtypeStruct):
    """(step, plan): step takes (trainable, optimizer state, frozen, x) and gives the new two."""
    optimizer = optax.adamw(2e-4)
    forward, plan = _forward(base, variant, x)

    def loss(trainable, x, frozen):
        params = trainable["params"]
        params = frozen if plan is None else mora_jax.join(params, frozen)
        return jnp.square(jnp.asarray(forward(params, x), jnp.float32)).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, state, frozen, x):
        value, (gradients, dx) = jax.value_and_grad(loss, (0, 1))(trainable, x, frozen)
        updates, state = optimizer.update(gradients, state, trainable)
        # One number of the input's gradient keeps all of it from being dropped as unused.
        return optax.apply_updates(trainable, updates), state, value, dx[0, 0, 0]

    return step, plan, optimizer


def _forward(base: Layers, variant: Variant, x: Any) -> tuple[Any, mora_jax.Plan | None]:
    """(function of parameters and inputs, plan)."""

    def apply(params, x, model=base):
        return model.apply({"params": params}, x)

    if variant.config is None:
        return apply, None
    if variant.path == "module":
        model = mora_jax.adapt(base, variant.config)
        return functools.partial(apply, model=model), mora_jax.plan(model, x)
    forward = mora_jax.adapt(apply, variant.config)
    shapes = jax.eval_shape(lambda: base.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype)))
    plan = mora_jax.plan(forward, shapes["params"], x)
    if variant.path == "merge":
        return lambda params, x: apply(mora_jax.merge(params, plan), x), plan
    return forward, plan


def make_params(base: Layers, x: jax.ShapeDtypeStruct) -> Any:
    """Random parameters of the base model, made on the device."""
    return jax.jit(lambda: base.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype))["params"])()
