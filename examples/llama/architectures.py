"""Which models of Hugging Face `model.py` computes: a Llama's sizes alone do not tell.

Granite, SmolLM3 and many others have the same tensors as a Llama and use them otherwise: they scale
activations, leave out rotations, or look back a limited number of tokens. So config.json's
`model_type` decides, and fields that would change what a Llama computes are refused by name.
"""

from collections.abc import Mapping
from typing import Any

#: model_type -> what its config must say, where its default is another model.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "llama": (),
    # Without them transformers takes a window of 4,096 tokens, and 8 key-value heads.
    "mistral": ("sliding_window", "num_key_value_heads"),
}

#: Field -> the only values that are computed here.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish"),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "use_qk_norm": (False, None),
    "qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "clip_qkv": (None,),
    "no_rope_layers": (None, []),
    "attention_multiplier": (None,),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "logits_scaling": (1, None),
    "logit_scale": (1, None),
    "num_local_experts": (None, 0),
    "quantization_config": (None,),
}

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)


def check_llama(config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, unless `model.py` computes this config.json's model."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type is {kind!r}, another model than is implemented here: "
            f"{', '.join(ARCHITECTURES)}. mora_jax adapts any model; examples/README.md says how."
        )
    # transformers 5 writes both rope fields into one dict, there even where nothing is scaled.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope and rope.get("rope_type", rope.get("type")) != "default":
        raise ValueError(f"config.json: rope_scaling is {rope}, only plain rope is implemented")
    for key, allowed in _ONLY.items():
        if key in config and config[key] not in allowed:
            raise ValueError(
                f"config.json: {key} is {config[key]!r:.200}, only {allowed[0]!r} is implemented"
            )
    if others := set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(
            f"config.json: layer_types has {sorted(others)}, only 'full_attention' is implemented"
        )
    if missing := [key for key in (*_SIZES, *ARCHITECTURES[kind]) if key not in config]:
        raise ValueError(f"config.json of a {kind} lacks {missing[0]!r}; wanted: state it there")
