"""The formats of positions and values, by the names that configurations know them by."""

import torch

from distopt.compress.elias_fano import EliasFano
from distopt.compress.indices import Block16, IndexFormat, Int32
from distopt.compress.values import Int8, Plain, TwoBit, TwoBitBins, ValueFormat

INDEX_FORMATS: dict[str, IndexFormat] = {"int32": Int32(), "block16": Block16(), "elias-fano": EliasFano()}

VALUE_FORMATS: dict[str, ValueFormat] = {
    "2bit": TwoBit(),
    "2bit-bins": TwoBitBins(),
    "int8": Int8(),
    "fp16": Plain(torch.float16),
    "fp32": Plain(torch.float32),
}
