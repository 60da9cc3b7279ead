"""An engine's whole use of qhal: find a device, open a checkpoint, plan, load one layer, multiply.

Runs on any machine in seconds: the checkpoint is a small AWQ model that comes with the tests.
"""

from pathlib import Path

import torch

import qhal
import qhal_schemes

CHECKPOINT = Path(__file__).parent.parent / "tests/golden/awq/autoawq_b4_g128_gemm/checkpoint"


def main() -> None:
    # 1. which devices are there? Nothing heavy is imported to answer that
    for name, info in qhal.backends().items():
        state = qhal.selection.probe(info)
        print(f"{name}: {'usable' if isinstance(state, qhal.Available) else state.reason}")
    ops = qhal.select("cpu_reference")  # an engine says "auto", or what its user asked for

    # 2. what is in the checkpoint? Its configuration and headers are read, no weight is
    ckpt = qhal_schemes.open_checkpoint(CHECKPOINT)
    print(f"{ckpt.method}: {len(ckpt.modules(quantized=True))} quantized modules, activations {ckpt.dtype}")

    # 3. what would run? A path that computes less than the checkpoint means raises PlanError here, before any loading
    plan = qhal.resolve(ckpt, ops, policy="error", m=(1, 64))
    print(plan.explain().splitlines()[3].strip())

    # 4. load: three projections that read the same input become one product
    qkv = ckpt.load_linear([f"model.layers.0.self_attn.{p}_proj" for p in "qkv"], ops)
    x = torch.randn(5, qkv.format.k, generator=torch.Generator().manual_seed(0)).to(ckpt.dtype)
    y = qkv(x)
    print(f"x {tuple(x.shape)} -> y {tuple(y.shape)} {y.dtype}, {qkv.nbytes} bytes on {ops.device}")

    # a fused layer is the layers side by side, bit for bit
    parts = [ckpt.load_linear(f"model.layers.0.self_attn.{p}_proj", ops)(x) for p in "qkv"]
    assert torch.equal(y, torch.cat(parts, -1))


if __name__ == "__main__":
    main()
