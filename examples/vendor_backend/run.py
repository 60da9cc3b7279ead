"""Use the backend of this folder as an engine would, and ask the conformance suite about it.

Install it first, beside qhal: `pip install --no-deps --no-build-isolation ./examples/vendor_backend`
"""

import torch

import qhal
from qhal import Format, GemmRequest, Operand
from qhal.encoding import encode
from qhal_conformance.operations import catalogue
from qhal_conformance.runner import run_cases

INT8 = Format.parse("int8.row*fp32")


def main() -> None:
    if "acme" not in qhal.backends():
        raise SystemExit("acme is not installed: pip install --no-deps --no-build-isolation ./examples/vendor_backend")
    ops = qhal.select("acme")
    print(f"selected {ops.name}; it has {', '.join(qhal.selection.operations(ops))}")

    # one product, against the reference: the codes of x are equal bit for bit, the sums within their class
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 64, generator=g).bfloat16(), encode(torch.randn(32, 64, generator=g), INT8)
    request = GemmRequest(w=INT8, n=32, k=64, x=(INT8,))
    results = []
    for one in (ops, qhal.select("cpu_reference")):
        weight = one.prepare(w, request, inputs=[Operand(INT8)])
        assert one.restore(weight).equal(w)
        results.append(one.gemm(x, weight))
    assert ops.quantize(x, INT8).equal(encode(x, INT8))
    print("largest difference from the reference:", float((results[0] - results[1]).abs().max()))

    # what it does not do, it says
    refused = ops.supports(GemmRequest(w=Format.parse("int4_g32"), n=32, k=64, x=(Format("bf16"),)))
    print(f"int4: {refused.level}, {refused.reason}")

    # the suite, on everything that is claimed: a filter has no verdict, but a wrong claim would fail
    records = run_cases(
        ops, [c for c in catalogue(0) if c.subject in (str(INT8), f"{INT8}~{INT8}")], lambda record: None
    )
    counts: dict[str, int] = {}
    for record in records:
        counts[str(record.outcome.status.value)] = counts.get(str(record.outcome.status.value), 0) + 1
    print("conformance:", counts)
    assert set(counts) == {"pass", "unsupported"} and counts["pass"] >= 15


if __name__ == "__main__":
    main()
