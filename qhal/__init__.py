"""qhal: one contract for quantized inference, one implementation per accelerator.

A quantized checkpoint is data (`qhal_schemes`), an accelerator is a `QuantOps`, and the conformance suite proves that
the two mean the same on every device.

    ckpt = qhal_schemes.open_checkpoint(path)
    ops = qhal.select("auto")
    plan = qhal.resolve(ckpt, ops, policy="error")
    layer = ckpt.load_linear("model.layers.0.mlp.down_proj", ops)
    y = layer(x)
"""

from qhal import _identity

_identity.check()

from qhal.blocks import Block  # noqa: E402 - nothing of ours is imported before the identity check
from qhal.caches import AttentionBatch, KVCache, Limits, Plane  # noqa: E402
from qhal.codebooks import CodebookFormat, CodebookSegment, CodebookTensor  # noqa: E402
from qhal.errors import (  # noqa: E402
    BackendError,
    BatchError,
    CheckpointError,
    CommError,
    FormatError,
    InterfaceError,
    NoBackendError,
    PlanError,
    PolicyError,
    QhalError,
    ShardError,
    UnsupportedError,
)
from qhal.formats import Format  # noqa: E402
from qhal.groups import Indexed, Masked, Offsets  # noqa: E402
from qhal.interface import INTERFACE_VERSION, Codec, MemoryStats, QuantOps, Tuned  # noqa: E402
from qhal.layer_formats import Activation, ExpertsFormat, KVFormat, LinearFormat  # noqa: E402
from qhal.plan import Plan, PlanEntry, resolve  # noqa: E402
from qhal.prepared import Prepared, PreparedExperts, PreparedLinear  # noqa: E402
from qhal.requests import (  # noqa: E402
    Arithmetic,
    AttentionRequest,
    CommRequest,
    GemmRequest,
    GroupedRequest,
    HadamardRequest,
    KVRequest,
    NumericsClass,
    QuantizeRequest,
    Request,
    Support,
    VQRequest,
)
from qhal.rotations import Dense, Diagonal, Hadamard, Kronecker, Permutation, Rotation  # noqa: E402
from qhal.rules import Rule  # noqa: E402
from qhal.selection import Available, BackendInfo, Device, Unavailable, backends, select  # noqa: E402
from qhal.specs import ExpertsSpec, KVSpec, LinearSpec, Operand  # noqa: E402
from qhal.tensors import QTensor  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "INTERFACE_VERSION",
    "Activation",
    "Arithmetic",
    "AttentionBatch",
    "AttentionRequest",
    "Available",
    "BackendError",
    "BackendInfo",
    "BatchError",
    "Block",
    "CheckpointError",
    "CodebookFormat",
    "CodebookSegment",
    "CodebookTensor",
    "Codec",
    "CommError",
    "CommRequest",
    "Dense",
    "Device",
    "Diagonal",
    "ExpertsFormat",
    "ExpertsSpec",
    "Format",
    "FormatError",
    "GemmRequest",
    "GroupedRequest",
    "Hadamard",
    "HadamardRequest",
    "Indexed",
    "InterfaceError",
    "KVCache",
    "KVFormat",
    "KVRequest",
    "KVSpec",
    "Kronecker",
    "Limits",
    "LinearFormat",
    "LinearSpec",
    "Masked",
    "MemoryStats",
    "NoBackendError",
    "NumericsClass",
    "Offsets",
    "Operand",
    "Permutation",
    "Plan",
    "PlanEntry",
    "PlanError",
    "Plane",
    "PolicyError",
    "Prepared",
    "PreparedExperts",
    "PreparedLinear",
    "QTensor",
    "QhalError",
    "QuantOps",
    "QuantizeRequest",
    "Request",
    "Rotation",
    "Rule",
    "ShardError",
    "Support",
    "Tuned",
    "Unavailable",
    "UnsupportedError",
    "VQRequest",
    "backends",
    "resolve",
    "select",
]
