"""One mixture-of-experts layer: fp8 experts from a checkpoint, tokens that choose two of four, and expert parallelism.

The layer is compared, bit for bit, with its definition written out: quantize, multiply, activate, quantize, multiply,
weigh.
"""

from pathlib import Path

import torch

import qhal
import qhal_schemes

CHECKPOINT = Path(__file__).parent.parent / "tests/golden/compressed_tensors/moe_qwen3_fp8_dynamic/checkpoint"
PREFIX = "model.layers.0.mlp.experts"


def main() -> None:
    ops = qhal.select("cpu_reference")
    ckpt = qhal_schemes.open_checkpoint(CHECKPOINT)
    f = ckpt.experts_format(PREFIX)
    print(f"{f.experts} experts, gate_up {f.gate_up.weight} [{f.gate_up.n}, {f.gate_up.k}], input {f.gate_up.input}")

    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, f.gate_up.k, generator=g).bfloat16()
    weights, ids = torch.softmax(torch.randn(6, f.experts, generator=g), -1).topk(2)  # the router is the engine's
    layer = ckpt.load_experts(PREFIX, ops)
    y = layer(x, qhal.Indexed(ids.int(), weights))

    # the definition: Q(x) are the bits of `quantize`; products exact, act(gate) * up rounded once to bf16, and so on
    spec = ckpt.experts_spec(PREFIX)
    first, second = spec.gate_up.weight.dequantize().double(), spec.down.weight.dequantize().double()

    def quantized(t: torch.Tensor) -> torch.Tensor:
        return ops.quantize(t, f.gate_up.input).dequantize().double()

    by_hand = torch.zeros(6, f.down.n, dtype=torch.float64)
    for token in range(6):
        for e, share in zip(ids[token].tolist(), weights[token].double(), strict=True):
            gate, up = (quantized(x[token : token + 1]) @ first[e].T).chunk(2, -1)
            hidden = (torch.nn.functional.silu(gate) * up).bfloat16()
            by_hand[token] += share * (quantized(hidden) @ second[e].T)[0]
    assert torch.equal(y, by_hand.bfloat16())
    print("equal to the definition, bit for bit:", tuple(y.shape), y.dtype)

    # expert parallelism: each rank holds two experts; -1 marks a pair that another rank computes and contributes zero
    parts = []
    for rank in range(2):
        local = ids - 2 * rank
        local = torch.where((local >= 0) & (local < 2), local, -1)
        part = ckpt.load_experts(PREFIX, ops, experts=(2 * rank, 2))
        parts.append(part(x, qhal.Indexed(local.int(), weights)).double())
    # each part, and the whole, was rounded once to bf16: half a unit in the last place is at most 2^-8 of the value
    bound = 2**-8 * (parts[0].abs() + parts[1].abs() + y.double().abs())
    assert bool(((parts[0] + parts[1] - y.double()).abs() <= bound).all())
    print("two ranks of two experts each: the same within the rounding of the parts")


if __name__ == "__main__":
    main()
