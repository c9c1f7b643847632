"""Names of dtypes in checkpoints, their sizes, and how safetensors stores them. No torch.

A dtype that safetensors readers may not know is stored as its bits, and complex numbers as pairs on
an additional last axis. The manifest has the real name.
"""

from collections.abc import Mapping

_ROWS = (
    ("F64", "float64", 8, "F64"), ("I64", "int64", 8, "I64"), ("U64", "uint64", 8, "U64"),
    ("C64", "complex64", 8, "C64"), ("F32", "float32", 4, "F32"), ("I32", "int32", 4, "I32"),
    ("U32", "uint32", 4, "U32"), ("F16", "float16", 2, "F16"), ("BF16", "bfloat16", 2, "BF16"),
    ("I16", "int16", 2, "I16"), ("U16", "uint16", 2, "U16"), ("I8", "int8", 1, "I8"),
    ("U8", "uint8", 1, "U8"), ("BOOL", "bool", 1, "BOOL"),
    ("F8_E4M3", "float8_e4m3fn", 1, "F8_E4M3"), ("F8_E5M2", "float8_e5m2", 1, "F8_E5M2"),
    ("C128", "complex128", 16, "F64"), ("C32", "complex32", 4, "F16"),
    ("F8_E8M0", "float8_e8m0fnu", 1, "U8"), ("F8_E4M3FNUZ", "float8_e4m3fnuz", 1, "U8"),
    ("F8_E5M2FNUZ", "float8_e5m2fnuz", 1, "U8"), ("F4_E2M1_X2", "float4_e2m1fn_x2", 1, "U8"),
    ("BITS8", "bits8", 1, "U8"), ("BITS1X8", "bits1x8", 1, "U8"), ("BITS2X4", "bits2x4", 1, "U8"),
    ("BITS4X2", "bits4x2", 1, "U8"), ("BITS16", "bits16", 2, "U16"),
    *((f"{kind}{bits}", f"{torch_kind}{bits}", 1, "U8")
      for kind, torch_kind in (("U", "uint"), ("I", "int")) for bits in range(1, 8)),
)  # fmt: skip

DTYPES: Mapping[str, int] = {name: size for name, _, size, _ in _ROWS}
"""Bytes per element of each dtype. F4_E2M1_X2 has two numbers in each; U1 to I7 take one byte."""
TORCH_NAMES: Mapping[str, str] = {name: torch_name for name, torch_name, _, _ in _ROWS}
"""Names of the dtypes in torch. Some are missing in older versions of torch."""
_STORED = {name: stored for name, _, _, stored in _ROWS}


def stored_as(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return dtype and shape in the header of a shard."""
    stored = _STORED[dtype]
    pairs = dtype.startswith("C") and stored != dtype
    return stored, (*shape, 2) if pairs else shape
