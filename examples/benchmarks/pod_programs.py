"""What pod.py compiles, of shapes alone: pods, models for them, the programs of one method."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mora_jax
from benchmarks.layers import LLAMA_3_8B, TINY
from llama.mesh import BATCH_AXES, param_shardings
from llama.model import Llama
from mora_jax import sharding
from mora_jax._merging import remora as _remora

Shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Pod:
    """Chips to compile for.

    Attributes:
      topology: its name to `jax.experimental.topologies`, or None for devices of the CPU.
      chips: how many.
      memory_gb: of one chip.
    """

    topology: str | None
    chips: int
    memory_gb: float


#: v5p pods are named after their TensorCores, of which a chip has two.
PODS = {
    "v5e-64": Pod("v5e:8x8", 64, 16),
    "v5p-128": Pod("v5p:4x4x4", 64, 95),
    "v6e-256": Pod("v6e:16x16", 256, 32),
    "cpu-8": Pod(None, 8, 16),
}

MODELS = {
    "8b": dataclasses.replace(LLAMA_3_8B, vocab_size=128256, num_layers=32),
    "70b": dataclasses.replace(
        LLAMA_3_8B,
        vocab_size=128256,
        features=8192,
        hidden_features=28672,
        num_layers=80,
        num_heads=64,
    ),
    "tiny": dataclasses.replace(TINY, vocab_size=256),
}

#: Parts of heads and hidden features; the other chips are parts of the batch and of every kernel.
TENSOR = {"8b": 4, "70b": 8, "tiny": 2}


def make_mesh(pod: Pod, data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of the pod's chips with the axes of examples/llama/mesh.py."""
    sizes = (data, fsdp, tensor)
    if pod.topology is None:
        devices = np.asarray(jax.devices()).reshape(sizes)
    else:
        topology = topologies.get_topology_desc(pod.topology, "tpu")
        # An axis may be a part of a ring: 32 x 8 on 16 x 16 chips.
        devices = mesh_utils.create_device_mesh(
            sizes, topology.devices, allow_split_physical_axes=True
        )
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def placed(tree: Any, sharding: Any) -> Any:
    """The tree's arrays as shapes that lie as the sharding, or the tree of them, says."""
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(lambda a, s: Shape(a.shape, a.dtype, sharding=s), tree, sharding)


class Variant:
    """The programs of one method: a frozen base, with adapters or (the frozen baseline) without.

    Attributes:
      plan: what was adapted, None for the frozen baseline.
      arguments: (trainable, optimizer state, scale, frozen, tokens), all shapes.
    """

    def __init__(
        self,
        base: Llama,
        config: mora_jax.MoRAConfig | None,
        mesh: Mesh,
        tokens: Shape,
        split: str | None = None,
    ):
        """Makes shapes alone; to be called within the mesh and its rules."""
        everywhere = NamedSharding(mesh, P())
        draw = lambda tokens: base.init(jax.random.key(0), tokens)
        shapes = jax.eval_shape(draw, tokens)["params"]
        places = param_shardings(shapes, mesh)
        frozen = placed(shapes, places)
        trainable, self.model, self.plan = {}, base, None
        if config is not None:
            plan = mora_jax.plan(mora_jax.adapt(base, config), tokens)
            plan = self.plan = sharding.on_mesh(plan, frozen, BATCH_AXES)
            self.model = mora_jax.adapt(base, plan)
            attach = lambda params: mora_jax.attach(plan, params, key=jax.random.key(1))
            full = jax.eval_shape(attach, frozen)
            whole = placed(full, sharding.param_shardings(plan, frozen, split=split))
            trainable, _ = mora_jax.split(whole, plan)
            places = jax.tree.map(lambda a: a.sharding, trainable)
        self.optimizer = optax.adamw(2e-4)
        shapes = jax.eval_shape(self.optimizer.init, trainable)
        state = placed(shapes, sharding.optimizer_shardings(self.optimizer, trainable, places))
        scale = Shape((), jnp.float32, sharding=everywhere)
        self.arguments = (trainable, state, scale, frozen, tokens)

    def loss(self, trainable, scale, frozen, tokens):
        """Mean cross-entropy of each token but the first."""
        params = frozen if self.plan is None else mora_jax.join(trainable, frozen)

        def scaled(call, args, kwargs, context):
            # The gradient of this factor asks for that of all embedded tokens.
            value = call(*args, **kwargs)
            embeds = context.module.name == "embed_tokens" and context.method_name == "__call__"
            return value * scale.astype(value.dtype) if embeds else value

        with nn.intercept_methods(scaled):
            logits: Any = self.model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def forward(self) -> Any:
        """The forward pass as training runs it: its transpose holds what the backward needs."""
        trainable, _, scale, frozen, tokens = self.arguments

        def run(trainable, scale, frozen, tokens):
            return jax.vjp(lambda t, s: self.loss(t, s, frozen, tokens), trainable, scale)

        return jax.jit(run).lower(trainable, scale, frozen, tokens)

    def step(self) -> Any:
        """One step; the adapters and their optimizer's state are donated."""

        def run(trainable, state, scale, frozen, tokens):
            value, (gradients, slope) = jax.value_and_grad(self.loss, (0, 1))(
                trainable, scale, frozen, tokens
            )
            updates, state = self.optimizer.update(gradients, state, trainable)
            return optax.apply_updates(trainable, updates), state, value, slope

        trainable, state, scale, *_ = self.arguments
        places = jax.tree.map(lambda a: a.sharding, (trainable, state, scale, scale))
        run = jax.jit(run, donate_argnums=(0, 1), out_shardings=places)
        return run.lower(*self.arguments)

    def merge(self) -> tuple[Any, Any]:
        """`merge_and_reset`, and where its results should lie: where its inputs did."""
        assert self.plan is not None
        trainable, state, _, frozen, _ = self.arguments
        leaves = _remora.flatten(mora_jax.join(trainable, frozen))
        paths = (*self.plan.kernel_paths(), *self.plan.adapter_leaves())
        changing = {path: leaves[path] for path in paths}
        found = _remora.find_adapter_state(state, self.plan.adapter_leaves(), starts_known=True)
        flat = jax.tree.leaves(state)
        resetting = {str(index): flat[index] for index in (*found.moments, *found.counts)}
        key = jax.eval_shape(lambda: jax.random.key(0))
        places = tuple(
            tuple((path, leaf.sharding) for path, leaf in leaves.items())
            for leaves in (changing, resetting)
        )
        lowered = _remora._restart_donating.lower(changing, resetting, key, self.plan, places)
        return lowered, jax.tree.map(lambda a: a.sharding, (changing, resetting))
