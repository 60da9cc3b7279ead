"""Why checkpoints rotate activations: one loud feature spoils 4-bit activations, a Hadamard rotation spreads it.

y = x W^T = (x R) (W R)^T for an orthogonal R. The weight is rotated once, when it is quantized; x is rotated in every
step, by `ops.hadamard`. qhal keeps R in the layer's spec, so an engine calls the layer as if nothing had happened.
"""

import torch

import qhal
from qhal import Format, Hadamard, LinearSpec, Operand
from qhal.encoding import encode
from qhal.layers import prepare_linear

INT4_WEIGHT, INT4_INPUT = Format.parse("int4.g32*bf16"), Format.parse("int4.row*fp32")


def layer(w: torch.Tensor, rotation: tuple[qhal.Rotation, ...]) -> LinearSpec:
    """W4A4 of a float weight [N, K], in the basis that the rotation gives."""
    turned = (w.double() @ qhal.rotations.matrix(rotation, w.shape[1])).float()
    return LinearSpec(encode(turned, INT4_WEIGHT), input=Operand(INT4_INPUT), rotate_in=rotation, name="down_proj")


def main() -> None:
    ops = qhal.select("cpu_reference")
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 256, generator=g) / 16, torch.randn(8, 256, generator=g)
    x[:, 17] *= 40  # an outlier feature
    exact = x.double() @ w.double().T

    errors = {}
    for name, rotation in {"as it is": (), "Hadamard(256)": (Hadamard(256),)}.items():
        spec = layer(w, rotation)
        y = prepare_linear(spec, ops, dtype=torch.float32)(x)
        errors[name] = float((y - exact).norm() / exact.norm())
        # seen from outside it is the same weight: `effective` folds the rotation back in
        seen = float((spec.effective() - w).norm() / w.norm())
        print(f"{name:14} error of y {errors[name]:.3f}, of the weight {seen:.3f}")
    assert errors["Hadamard(256)"] < errors["as it is"] / 2

    # H / sqrt(n) is its own inverse; on whole numbers the float64 sums of the reference show it without a rounding
    whole = torch.randint(-50, 50, (3, 256), generator=g).float()
    assert torch.equal(ops.hadamard(ops.hadamard(whole, [Hadamard(256)]), [Hadamard(256)]), whole)

    # orders that are no power of two are m * 2^k with a named table; a made-up one is refused with those that exist
    for n, k, table in ((11008, 172, "quarot-172"), (11008, 172, "mine")):
        answer = ops.supports(qhal.HadamardRequest(kinds=(Hadamard(n, k, table).kind,), n=n, x=torch.bfloat16))
        print(f"{n} features with table {table!r}: {answer.level} {answer.reason[:80]}")


if __name__ == "__main__":
    main()
