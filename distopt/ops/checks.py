"""The rules for the arguments of the operations, checked on each call: a few microseconds in all.

Every message gives the value, the rule and the remedy. What a payload from the network can break is a DecodeError, what
the caller can break is a ConfigError.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from distopt.errors import ConfigError, DecodeError

MAX_NUMEL = 2**31 - 1  # indices are int32
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATES = (torch.float32, torch.bfloat16, torch.float64)  # float16 overflows where sums of gradients go
SUMS = (torch.float32, torch.float64)
INDICES = (torch.int32,)


def flat(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], *, indexed: bool = True) -> None:
    """1-D, contiguous, one of the dtypes, and, where indices of it are made, not too long for them."""
    if not isinstance(t, Tensor):
        raise ConfigError(f"{name} must be a tensor, got {type(t).__name__}; use torch.as_tensor")
    if t.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ConfigError(
            f"{name} must have dtype {names}, got {str(t.dtype).removeprefix('torch.')}; convert it with .to()"
        )
    if t.layout is not torch.strided:
        raise ConfigError(f"{name} must be dense, got layout {t.layout}; use .to_dense()")
    if t.dim() != 1:
        raise ConfigError(f"{name} must be 1-D, got shape {tuple(t.shape)}; use .view(-1), which shares memory")
    if not t.is_contiguous():
        raise ConfigError(f"{name} must be contiguous, got stride {t.stride(0)}; use .contiguous() and copy back")
    if indexed and t.numel() > MAX_NUMEL:
        raise ConfigError(
            f"{name} must have at most 2^31-1 elements (indices are int32), got {t.numel()}; split it with torch.chunk"
        )


def same_size(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Equal length, equal device."""
    if t.numel() != other.numel():
        raise ConfigError(
            f"{name} must have as many elements as {other_name} ({other.numel()}), got {t.numel()}; "
            "pass the flat views of one parameter"
        )
    same_device(name, t, other_name, other)


def same_device(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Equal device."""
    if t.device != other.device:
        raise ConfigError(
            f"{name} must be on the device of {other_name} ({other.device}), got {t.device}; "
            f"move it with .to({other_name}.device)"
        )


def count(k: int, numel: int) -> None:
    """K in [0, numel]."""
    if not isinstance(k, int):
        raise ConfigError(f"k must be an int in [0, {numel}], got {k!r} ({type(k).__name__}); use int(k)")
    if not 0 <= k <= numel:
        raise ConfigError(f"k must be in [0, {numel}], the number of elements, got {k}; use min(k, numel)")


def segment_table(segments: Tensor, count: int, grad: Tensor) -> None:
    """An int64 table of three columns on the device of grad; what its rows say is checked by `segment_rows`."""
    if not isinstance(segments, Tensor) or segments.dtype is not torch.int64:
        found = segments.dtype if isinstance(segments, Tensor) else type(segments).__name__
        raise ConfigError(f"segments must be an int64 tensor, got {found}; use torch.tensor(rows, dtype=torch.int64)")
    if segments.dim() != 2 or segments.shape[1] != 3 or not segments.is_contiguous():
        raise ConfigError(
            f"segments must be contiguous with shape (num_segments, 3), got {tuple(segments.shape)}; a row is "
            "(start in grad, numel, k)"
        )
    if not isinstance(count, int) or count < 0:
        raise ConfigError(f"count must be the sum of all k, got {count!r}; use int(segments[:, 2].sum())")
    same_device("segments", segments, "grad", grad)


def segment_rows(segments: Tensor, count: int, grad_numel: int, state_numel: int) -> None:
    """Rows ascending, inside grad and apart; their numel add up to the states', their k to count."""
    end, covered, selected = 0, 0, 0
    for row, (start, numel, k) in enumerate(segments.tolist()):
        if start < end or numel < 0 or start + numel > grad_numel:
            raise ConfigError(
                f"segments must be ascending, apart and inside grad ({grad_numel} entries), got row {row} from {start} "
                f"with {numel} entries after one that ends at {end}; use the tensors' places in the flat bucket"
            )
        if not 0 <= k <= numel:
            raise ConfigError(f"k of a segment must be in [0, {numel}], got {k} in row {row}; use min(k, numel)")
        end, covered, selected = start + numel, covered + numel, selected + k
    if covered != state_numel:
        raise ConfigError(
            f"the states must have as many entries as the segments ({covered}), got {state_numel}; put the segments' "
            "states one behind the other"
        )
    if selected != count:
        raise ConfigError(f"count must be the sum of all k ({selected}), got {count}; use int(segments[:, 2].sum())")


def parameter_places(
    update: Tensor, starts: Sequence[int], buffers: Sequence[Tensor], parameters: Sequence[Tensor]
) -> None:
    """Every parameter inside update, dense in memory, and with a flat buffer of its size and of the dtype of update."""
    if not len(starts) == len(buffers) == len(parameters):
        raise ConfigError(
            "starts, buffers and parameters must have one entry per parameter, got "
            f"{len(starts)}, {len(buffers)} and {len(parameters)}; pass the lists of one bucket"
        )
    for start, buffer, parameter in zip(starts, buffers, parameters, strict=True):
        flat("a buffer", buffer, (update.dtype,), indexed=False)
        numel = parameter.numel()
        if buffer.numel() != numel or not 0 <= start <= update.numel() - numel:
            raise ConfigError(
                f"a parameter must lie inside update ({update.numel()} entries) and have a buffer of its size, got one "
                f"of {numel} entries from {start} with a buffer of {buffer.numel()}; use its place in the flat bucket"
            )
        if parameter.dtype not in FLOATS or parameter.dtype.itemsize > update.dtype.itemsize:
            raise ConfigError(
                f"a parameter must be floating point and not wider than update ({update.dtype}), got "
                f"{parameter.dtype}; pass an update of its dtype"
            )
        if not is_dense_in_memory(parameter):
            raise ConfigError(
                f"a parameter must be dense in memory, got stride {parameter.stride()} for shape "
                f"{tuple(parameter.shape)}; pass .contiguous()"
            )


def is_dense_in_memory(tensor: Tensor) -> bool:
    """Whether the tensor's entries fill one stretch of memory, in whatever order."""
    if tensor.is_contiguous():  # the usual case, and asked for every parameter in every step
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def rows(out: Tensor, rows: Sequence[Tensor], weights: Sequence[float]) -> None:
    """At least one row, all like out and of one dtype, with one weight each."""
    if not rows or len(rows) != len(weights):
        raise ConfigError(
            f"there must be rows, and one weight for each, got {len(rows)} rows and {len(weights)} weights; zero_() "
            "makes an empty sum"
        )
    first = rows[0]
    for i, row in enumerate(rows):
        name = f"rows[{i}]"
        flat(name, row, FLOATS if out.dtype is torch.float64 else FLOATS[:3], indexed=False)
        same_size(name, row, "out", out)
        if row.dtype != first.dtype:
            raise ConfigError(f"rows must have one dtype, got {row.dtype} in {name} beside {first.dtype}; convert them")
        if not is_compiling():
            apart(name, row, "out", out)


def momentum_range(momentum: float) -> None:
    """A number in [0, 1]; NaN is not."""
    if not 0.0 <= momentum <= 1.0:
        raise ConfigError(f"momentum must be in [0, 1], got {momentum}; usual is 0.9")


def apart(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """No shared memory. Not under torch.compile, where tensors have no address."""
    a, b = t.data_ptr(), other.data_ptr()
    if a < b + other.nbytes and b < a + t.nbytes and a and b:
        raise ConfigError(f"{name} and {other_name} must not share memory, got overlapping tensors; clone one of them")


def index_range(indices: Tensor, numel: int) -> None:
    """Every index in [0, numel)."""
    outside = (indices < 0) | (indices >= numel)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise DecodeError(
            f"indices[{at}] must be in [0, {numel}), got {int(indices[at])}; "
            "the payload is damaged or belongs to another tensor, nothing was written"
        )
