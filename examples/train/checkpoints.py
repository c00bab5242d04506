"""Checkpoints of a training run with Orbax: written beside the training, whole or not there.

    <out>/checkpoints/40/                          step 40, whole: Orbax renames it last
    <out>/checkpoints/60.orbax-checkpoint-tmp/     step 60, killed while it was written

A checkpoint holds arrays by their global shapes, so that it can be restored onto any mesh. Beside
them stand the plan, with each layer's current scheme, and the flags that the losses depend on.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

import mora_jax
from train.state import TrainState


class OtherRunError(ValueError):
    """The checkpoint is of a run with other flags."""


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of one run; a context, which waits for the last one to be whole.

    Attributes:
      directory: where they lie; a path of a file system or of object storage that Orbax knows.
      run: what the losses depend on, by name; as JSON holds it.
      keeps_base: whether the frozen half is saved too, because merges change it.
      keep: how many stay.
      say: takes messages.
    """

    directory: epath.Path
    run: dict[str, Any]
    keeps_base: bool
    keep: int
    say: Callable[[str], None]

    def __enter__(self) -> "Checkpoints":
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._set_torn_ones_aside()
        multihost_utils.sync_global_devices("torn checkpoints are set aside")
        if jax.process_count() > 1:
            # Orbax's threads wait for each other while a step runs. They are to do it through the
            # coordinator: a collective of their own would come between the step's, and not on all
            # processes at the same place.
            flags.FLAGS.mark_as_parsed()
            flags.FLAGS.experimental_orbax_use_distributed_barrier = True
        # Orbax's stubs declare its own policies to be none.
        latest: Any = ocp.training.preservation_policies.LatestN(self.keep)
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=latest,
            cleanup_tmp_directories=True,
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self._checkpointer.close()

    def restore(
        self, shapes: TrainState, shardings: TrainState, plan: mora_jax.Plan | None
    ) -> tuple[int, TrainState, mora_jax.Plan | None] | None:
        """The newest whole checkpoint: (step, state, plan), or None where there is none.

        Args:
          shapes: shapes and dtypes of the state.
          shardings: where it is to lie, on this run's mesh.
          plan: the plan that these two are named by.

        Returns:
          The frozen half of the state is None where there is one that checkpoints do not hold.

        Raises:
          OtherRunError: the run that wrote it had other flags.
        """
        latest = self._checkpointer.latest
        if latest is None:
            return None
        step = latest.step
        saved: Any = self._checkpointer.metadata(step).custom_metadata
        names = sorted(saved["run"].keys() | self.run.keys())
        other = [
            f"  {name}: {saved['run'].get(name)!r} there, {self.run.get(name)!r} here"
            for name in names
            if saved["run"].get(name) != self.run.get(name)
        ]
        if other:
            raise OtherRunError(
                f"{self.directory}/{step} is of a run with other flags:\n" + "\n".join(other) + "\n"
                "Give the flags that it was started with, or another --out."
            )
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        try:
            loaded: Any = self._checkpointer.load(step, self._tree(abstract, plan))
        except Exception as error:
            raise RuntimeError(
                f"{self.directory}/{step} cannot be read: {error!r:.300}. If files are damaged, "
                "rename it, and the run goes back to the checkpoint before it."
            ) from error
        self.say(f"resumed at step {step} of {self.directory}")
        plan = saved["plan"] and mora_jax.Plan.from_json(saved["plan"])
        if plan is not None:
            names = {plain: path for path, plain in plan.plain_paths().items()}
            loaded = mora_jax.rename_leaves(loaded, names)
        frozen = loaded.get("frozen", None if shapes.frozen else {})
        return step, TrainState(loaded["trainable"], loaded["opt_state"], frozen), plan

    def save(self, step: int, state: TrainState, plan: mora_jax.Plan | None) -> None:
        """Begins to save; the arrays may be given up as soon as it returns."""
        latest = self._checkpointer.latest
        if latest is not None and latest.step == step:
            return
        custom = {"run": self.run, "plan": plan and plan.to_json()}
        tree = self._tree(state, plan)
        self._checkpointer.save_async(step, tree, force=True, custom_metadata=custom)

    def _tree(self, state: TrainState, plan: mora_jax.Plan | None) -> dict[str, Any]:
        """What is saved, its names without the schemes, which the plan beside it says."""
        tree = {"trainable": state.trainable, "opt_state": state.opt_state}
        tree |= {"frozen": state.frozen} if self.keeps_base else {}
        return tree if plan is None else mora_jax.rename_leaves(tree, plan.plain_paths())

    def _set_torn_ones_aside(self) -> None:
        for path in sorted(self.directory.iterdir()):
            name, _, suffix = path.name.partition(".")
            if not name.isdigit() or suffix.startswith("torn"):
                continue
            if suffix:
                # Orbax's name for what it has not finished; the Checkpointer deletes it.
                self.say(f"step {name} was being saved when the run ended: not used")
            elif not _is_whole(path):
                aside = path.rename(path.with_name(f"{name}.torn-{time.time_ns()}"))
                self.say(f"step {name} is torn: not used, and renamed to {aside}")


def _is_whole(path: epath.Path) -> bool:
    """Whether a step's directory says of itself that it was written to the end."""
    try:
        metadata = ocp.metadata(path)
    except (ValueError, KeyError, OSError, ocp.errors.InvalidLayoutError):
        return False
    custom = metadata.custom_metadata
    return bool(metadata.commit_timestamp_nsecs) and isinstance(custom, dict) and "run" in custom
