"""Adapters for PyTorch: in the format of the authors' fork of PEFT, and as PEFT's own LoRA.

    python3 run.py to_pytorch

A `Name` says how PyTorch calls a kernel. Llama and its relatives need none: `peft.LLAMA` is the
default.
"""

import pathlib
import tempfile

import jax.numpy as jnp
from safetensors.numpy import load_file

import mora_jax
from mora_jax import export, peft
from quickstart import CONFIG, Model, make_task, train

NAMES = (peft.KernelName("up/kernel", "mlp.fc_in"), peft.KernelName("down/kernel", "mlp.fc_out"))


def show(directory: pathlib.Path) -> None:
    """Prints the tensors of an adapter's file."""
    for name, tensor in sorted(load_file(directory / "adapter_model.safetensors").items()):
        print(f"  {name} {list(tensor.shape)}")


def main() -> None:
    """Prints the tensors that are written, and what is lost by a projection to LoRA."""
    model = mora_jax.adapt(Model(), CONFIG)
    pretrained, inputs, targets = make_task()
    plan = mora_jax.plan(model, inputs)
    params, _ = train(model, mora_jax.attach(plan, pretrained), plan, inputs, targets)
    with tempfile.TemporaryDirectory() as scratch:
        mora, lora = pathlib.Path(scratch, "mora"), pathlib.Path(scratch, "lora")
        peft.save_adapters(mora, params, plan, names=NAMES)
        print("MoRA, as the authors' code reads it:")
        show(mora)
        loaded, _ = peft.load_adapters(mora, pretrained, names=NAMES)
        same = jnp.array_equal(
            loaded["up"]["mora"]["matrix_sharing"], params["up"]["mora"]["matrix_sharing"]
        )
        print(f"  read back bit for bit: {same}")

        report = export.save_lora(lora, params, plan, rank=8, names=NAMES)
        print("the nearest LoRA, as PEFT reads it:")
        show(lora)
        print(report)


if __name__ == "__main__":
    main()
