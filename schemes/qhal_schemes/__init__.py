"""Checkpoint formats, written once: `open_checkpoint` turns a folder into specs that run on any device.

A format is one file and one entry point of the group `qhal.schemes`; see `qhal_schemes.base`.
"""

from qhal_schemes.base import CheckpointWarning, MappingScheme, Scheme, SchemeMapping
from qhal_schemes.checkpoint import Checkpoint, open_checkpoint
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.quantize_files import quantize_checkpoint
from qhal_schemes.registry import known_methods
from qhal_schemes.source import TensorEntry, TensorIndex

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointWarning",
    "MappingScheme",
    "Scheme",
    "SchemeMapping",
    "TensorEntry",
    "TensorIndex",
    "known_methods",
    "open_checkpoint",
    "quantize_checkpoint",
]
