"""A plain Flax linen Llama: the model and greedy generation.

There is no MoRA in this file, and that is its point: `mora_jax.adapt` takes the model as it is, and
`generate` takes the adapted model as it takes the base. Every linear layer is an `nn.Dense` under
its Hugging Face name, and `nn.scan` stacks the layers, so one compiled layer serves them all.

Shape letters: B batch, T tokens, S slots of the key-value cache (S = T without one), P prompt,
D features, N query heads, K key-value heads, H features of a head, L layers, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from llama.architectures import check_llama

Params = Mapping[str, Any]
Cache = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama. Hashable, so a model that holds one can be a static argument of jit."""

    vocab_size: int
    features: int
    hidden_features: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_features: int
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the dict of a Hugging Face config.json; ValueError for what is not implemented."""
        check_llama(config)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        num_heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            features=config["hidden_size"],
            hidden_features=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_features=config.get("head_dim") or config["hidden_size"] // num_heads,
            rope_theta=rope.get("rope_theta") or config.get("rope_theta", 10000.0),
            norm_epsilon=config["rms_norm_eps"],
            tie_embeddings=config.get("tie_word_embeddings", False),
        )

    def to_hf(self) -> dict[str, Any]:
        """The dict of a Hugging Face config.json that `from_hf` reads these sizes from."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.features,
            "intermediate_size": self.hidden_features,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_features,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_epsilon,
            "tie_word_embeddings": self.tie_embeddings,
        }


def rotary_angles(positions: Array, features: int, theta: float) -> Array:
    """Angles `position * theta ** (-2j / H)`: [B, T] -> [B, T, 1, H/2], the 1 for the heads."""
    frequencies = theta ** (-np.arange(0, features, 2, dtype=np.float32) / features)
    return positions.astype(jnp.float32)[..., None, None] * frequencies[None, None, None, :]


def rotate(x: Array, angles: Array) -> Array:
    """Rotates feature j with feature j + H/2: [B, T, N, H], [B, T, 1, H/2] -> [B, T, N, H]."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Embed(nn.Embed):
    """Flax's, but for the lookup: rows are cast after it, not the table before it.

    Its gradient adds up a row for each token, thousands for a common one. In 16 bits that loses
    digits, and GPUs cannot add 16 bits in memory: they take turns.
    """

    def __call__(self, inputs: Array) -> Array:
        """[...] int -> [..., D]."""
        return jnp.take(self.embedding, inputs, axis=0).astype(self.dtype)


class _Block(nn.Module):
    """What every part of the model holds, and the two kinds of layer it is built from."""

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def _shared(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, use_bias=False, **self._shared, name=name)

    def _norm(self, name: str) -> nn.RMSNorm:
        return nn.RMSNorm(self.config.norm_epsilon, **self._shared, name=name)


class Attention(_Block):
    """Grouped-query attention: [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Array, angles: Array, mask: Array | None, slot: Array) -> Array:
        """Attends where mask [B, 1, T, S] is True; `slot` is where the T tokens go in the cache.

        Without a mask each token attends to those before it, by flash attention where there is one.
        """
        batch, tokens, features = x.shape

        def project(name: str, heads: int) -> Array:
            y = self._dense(heads * self.config.head_features, name)(x)
            return y.reshape(batch, tokens, heads, self.config.head_features)

        query = rotate(project("q_proj", self.config.num_heads), angles)
        key = rotate(project("k_proj", self.config.num_kv_heads), angles)
        value = project("v_proj", self.config.num_kv_heads)
        key, value = self._cached("key", key, slot), self._cached("value", value, slot)
        # dot_product_attention shares K key-value heads among N query heads by itself.
        flash = "cudnn" if mask is None and _has_flash_attention(query.dtype) else None
        heads = jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=mask is None, implementation=flash
        )
        return self._dense(features, "o_proj")(heads.reshape(batch, tokens, -1))

    def _cached(self, name: str, new: Array, slot: Array) -> Array:
        """Writes [B, T, K, H] into the cache, if there is one, and gives all [B, S, K, H] of it."""
        if not self.has_variable("cache", name):
            return new
        cached = self.get_variable("cache", name)
        cached = jax.lax.dynamic_update_slice_in_dim(cached, new, slot, axis=1)
        self.put_variable("cache", name, cached)
        return cached


def _has_flash_attention(dtype: DTypeLike) -> bool:
    return jax.default_backend() == "gpu" and jnp.dtype(dtype).itemsize == 2


class MLP(_Block):
    """Gated feed-forward: [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies it to each token."""
        gate = self._dense(self.config.hidden_features, "gate_proj")(x)
        up = self._dense(self.config.hidden_features, "up_proj")(x)
        return self._dense(self.config.features, "down_proj")(nn.silu(gate) * up)


class Layer(_Block):
    """One decoder layer, in the form that `nn.scan` wants: [B, T, D] -> ([B, T, D], None)."""

    @nn.compact
    def __call__(
        self, x: Array, angles: Array, mask: Array | None, slot: Array
    ) -> tuple[Array, None]:
        """Takes the arguments of `Attention`."""
        # Where the activations lie on a mesh; nothing without `nn.logical_axis_rules`.
        x = nn.with_logical_constraint(x, ("batch", "length", "features"))
        attention = Attention(self.config, **self._shared, name="self_attn")
        mlp = MLP(self.config, **self._shared, name="mlp")
        x = x + attention(self._norm("input_layernorm")(x), angles, mask, slot)
        return x + mlp(self._norm("post_attention_layernorm")(x)), None


class Llama(_Block):
    """Tokens to logits.

    Attributes:
      config: the sizes.
      dtype: of the computation; norms, rotary angles and softmax are float32 inside.
      param_dtype: of the parameters that `init` makes.
      remat: recompute each layer in the backward pass instead of keeping its activations.
      unrolled: layers of their own, `layers_0`, `layers_1`, ..., instead of a stack in a scan, so
        that each can have an adapter of its own size. Slower to compile, and without a cache.
      unroll: how many layers of the stack a turn of the scan takes, as in `jax.lax.scan`. With all
        of them there is no loop, and what a layer keeps need not go through a stack: faster to run,
        slower to compile. The parameters are the same, other than those of `unrolled`.
    """

    remat: bool = False
    unrolled: bool = False
    unroll: int = 1

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        mask: Array | None = None,
        segments: Array | None = None,
        last: bool = False,
    ) -> Array:
        """Gives, at each token, the logits of the token after it.

        If the variables hold a collection "cache" (`empty_cache`), which must then be mutable, the
        tokens continue those of the cache.

        Args:
          tokens: [B, T] int.
          positions: [B, T] int, the rotary positions; by default the number of real tokens before.
          mask: [B, T] bool, False at padding on either side; by default all tokens are real.
          segments: [B, T] int, instead of a mask: a token attends within its segment, a run of one
            number, and positions restart in each.
          last: gives the logits of the last token alone; all of a long prompt's can be too large.

        Returns:
          [B, T, V] float32, or [B, 1, V]; what stands at padding means nothing.

        Raises:
          ValueError: segments with a mask or a cache.
        """
        config, shared, length = self.config, self._shared, tokens.shape[1]
        real = jnp.ones(tokens.shape, bool) if mask is None else mask
        slot = jnp.zeros((), jnp.int32)
        if self.has_variable("cache", "real"):
            slot, cached = self.get_variable("cache", "slot"), self.get_variable("cache", "real")
            real = jax.lax.dynamic_update_slice_in_dim(cached, real, slot, axis=1)
            self.put_variable("cache", "slot", slot + length)
            self.put_variable("cache", "real", real)
        slots = slot + jnp.arange(length)
        attend = None  # Whole sequences without a cache: causal is all that attention need know.
        if mask is not None or self.has_variable("cache", "real"):
            causal = jnp.arange(real.shape[1])[None, :] <= slots[:, None]
            attend = causal[None, None] & real[:, None, None, :]
        if segments is not None:
            if attend is not None:
                raise ValueError("segments go with neither a mask nor a cache")
            same = segments[:, :, None] == segments[:, None, :]
            attend = (same & jnp.tri(length, dtype=bool))[:, None]
            starts = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
            starts = jax.lax.cummax(jnp.where(starts, slots, 0), axis=1)
            positions = slots - starts if positions is None else positions
        if positions is None:
            positions = (jnp.cumsum(real, axis=1) - 1).clip(0)[:, slots]
        angles = rotary_angles(positions, config.head_features, config.rope_theta)

        embed = Embed(config.vocab_size, config.features, **shared, name="embed_tokens")
        x = embed(tokens)
        for number in range(config.num_layers if self.unrolled else 0):
            layer = nn.remat(Layer) if self.remat else Layer
            x, _ = layer(config, **shared, name=f"layers_{number}")(x, angles, attend, slot)
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False) if self.remat else Layer,  # scan prevents CSE itself
            variable_axes={"params": 0, "cache": 0},
            split_rngs={True: True},  # all streams, so that each layer draws numbers of its own
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=config.num_layers,
            unroll=self.unroll,
        )
        if not self.unrolled:
            x, _ = layers(config, **shared, name="layers")(x, angles, attend, slot)
        x = self._norm("norm")(x[:, -1:] if last else x)
        head = embed.attend if config.tie_embeddings else self._dense(config.vocab_size, "lm_head")
        return head(x).astype(jnp.float32)


def empty_cache(config: LlamaConfig, batch: int, slots: int, dtype: DTypeLike) -> Cache:
    """The collection "cache" before the first token: room for `slots` tokens in each sequence."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_features)
    return {
        "slot": jnp.zeros((), jnp.int32),  # the next to write, the same in every sequence
        "real": jnp.zeros((batch, slots), bool),
        "layers": {"self_attn": {name: jnp.zeros(shape, dtype) for name in ("key", "value")}},
    }


def generate(
    model: Llama,
    params: Params,
    prompts: Array | np.ndarray,
    prompt_mask: Array | np.ndarray,
    max_new_tokens: int,
    *,
    end_token: int | None = None,
) -> Array:
    """Continues each prompt greedily; compiles once per model, shape and number of tokens.

    Args:
      model: a `Llama`, or a wrapped one that is called alike; hashable, as it is static under jit.
      params: its parameters.
      prompts: [B, P] int, padded on the left, so that each prompt ends where its answer begins.
      prompt_mask: [B, P] bool, False at the padding.
      max_new_tokens: how many tokens to give.
      end_token: a sequence that has produced it repeats it to the end.

    Returns:
      [B, max_new_tokens] int32.

    Raises:
      ValueError: a prompt is padded on the right.
    """
    if not np.asarray(prompt_mask)[:, -1].all():
        raise ValueError("prompt_mask is False in its last column: pad the prompts on the left")
    return _generate(model, params, prompts, prompt_mask, max_new_tokens, end_token)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "end_token"))
def _generate(model, params, prompts, prompt_mask, max_new_tokens, end_token) -> Array:
    def advance(cache: Cache, tokens: Array, mask: Array | None) -> tuple[Cache, Array]:
        variables = {"params": params, "cache": cache}
        logits, updated = model.apply(variables, tokens, mask=mask, last=True, mutable=["cache"])
        return updated["cache"], logits[:, 0].argmax(-1).astype(jnp.int32)

    def step(carry: tuple[Cache, Array], _: None) -> tuple[tuple[Cache, Array], Array]:
        cache, last = carry
        cache, token = advance(cache, last[:, None], None)
        if end_token is not None:
            token = jnp.where(last == end_token, end_token, token)
        return (cache, token), token

    batch, length = prompts.shape
    cache = empty_cache(model.config, batch, length + max_new_tokens, model.dtype)
    cache, first = advance(cache, prompts, prompt_mask)
    _, rest = jax.lax.scan(step, (cache, first), length=max_new_tokens - 1)
    return jnp.concatenate([first[:, None], rest.T], axis=1)
