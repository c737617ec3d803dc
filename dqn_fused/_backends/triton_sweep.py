"""Triton: the sweep over the actions of a linear head, multiplied and reduced in one pass."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqn_fused._backends import too_large, triton_launch
from dqn_fused._backends.triton_program import check_sizes
from dqn_fused.head import sweep as tiles
from dqn_fused.head.sweep import Statistics, Sweep
from dqn_fused.head.taken import taken_values
from dqn_fused.kernels import sweep_launch
from dqn_fused.kernels.launch import cdiv
from dqn_fused.kernels.sweep import sweep_combine_kernel, sweep_fwd_kernel

COMBINE_ROWS, COMBINE_SPLITS = 16, 64  # a tile of 8 elements a thread
OPERAND = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
AUX = {"argmax": torch.int32, "soft": torch.float32}  # beside the maximum of a split; of all, an index is int64

# The figures of pays(), of an H100. The ratios of an A100 and a B200 are within a factor of 2, which is all it needs.
FLOPS = {"half": 800e12, "tf32": 400e12, "ieee": 50e12}  # a second, of the library
SHARE = {"half": 0.6, "tf32": 0.6, "tf32x3": 0.2, "ieee": 0.4}  # of the library's, of a Triton kernel; assumed
MEMORY, CACHE = 3e12, 5e12  # bytes a second
LAUNCH = 5e-6  # seconds until torch has issued one more operation
OPERATIONS = {"max": 3, "argmax": 7, "soft": 10}  # of the library's sweep a tile; a mask adds two
PASSES = {"max": 2, "argmax": 2, "soft": 12}  # over a tile, read or written; a mask adds two


def sweep(work: Sweep) -> Statistics:
    """As head.sweep.sweep, in one launch or, where the actions are split, two. The weight is never copied.

    Q-values of half precision are not rounded to it before they are compared. float64 is the library's: it checks
    gradients, and few devices multiply it in tensor cores.
    """
    hidden, weight, bias = work.hidden.resolve_neg(), work.weight.resolve_neg(), work.bias
    if torch.float64 in (hidden.dtype, weight.dtype):
        return tiles.sweep(work)
    check_sizes(*hidden.shape, *weight.shape)
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    bias = None if bias is None else bias.resolve_neg()
    device, (m, D), A, kind = hidden.device, hidden.shape, weight.shape[0], work.kind
    largest = torch.empty(m, dtype=torch.float32, device=device)
    first = torch.empty(m, dtype=torch.int64, device=device) if kind == "argmax" else None
    total = torch.empty_like(largest) if kind == "soft" else None
    taken = None if work.actions is None else taken_values(hidden, weight, bias, work.actions)
    found, aux = Statistics(largest, first, total, taken), total if first is None else first
    if m == 0:
        return found
    itemsize, vec = vectors(hidden, weight)
    scale = _power_of_two(work.temperature)
    with triton_launch.on(device):
        units, precision = units_of(hidden.dtype, interpreted=triton_launch.INTERPRETED)
        plan = sweep_launch.sweep(m, A, D, itemsize, work.mask is not None, units, triton_launch.sms(device))
        check_sizes(plan.row_tiles * plan.splits)
        operand = operand_of(hidden.dtype, triton_launch.INTERPRETED)
        partial, partial_aux = largest, aux
        if plan.splits > 1:
            partial = torch.empty((plan.splits, m), dtype=torch.float32, device=device)
            partial_aux = None if aux is None else torch.empty_like(partial, dtype=AUX[kind])
        triton_launch.run(
            sweep_fwd_kernel, plan.row_tiles * plan.splits,
            partial, partial_aux, hidden, weight, bias, work.mask, m, A, D // vec,
            hidden.stride(0) // vec, weight.stride(0) // vec, weight.stride(1),
            *((None,) if bias is None else bias.stride()), *((None, None) if work.mask is None else work.mask.stride()),
            plan.row_tiles, plan.group, plan.chunk, scale,
            KIND=kind, OPERAND=operand, PRECISION=precision, VEC=vec,
            EVEN=D % plan.features == 0, ONCE=plan.features >= D,
            ROWS=plan.rows, COLUMNS=plan.columns, FEATURES=plan.features,
            num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip
        if plan.splits > 1:
            triton_launch.run(
                sweep_combine_kernel, cdiv(m, COMBINE_ROWS),
                largest, aux, partial, partial_aux, m, plan.splits, scale,
                KIND=kind, ROWS=COMBINE_ROWS, SPLITS=COMBINE_SPLITS, num_warps=4,
            )  # fmt: skip
    return found


def auto_sweep(work: Sweep) -> Statistics:
    """Sweep by the kernel where that pays, else by the library."""
    return sweep(work) if pays(work) else tiles.sweep(work)


def vectors(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    """The larger size of an element, and how many elements are read at once, which divides every row."""
    itemsizes = hidden.element_size(), weight.element_size()
    vec = 16 // min(itemsizes)
    if weight.stride(1) != 1 or any(size % vec for size in (hidden.shape[1], hidden.stride(0), weight.stride(0))):
        vec = 1
    return max(itemsizes), vec


def operand_of(dtype: torch.dtype, interpreted: bool) -> tl.dtype:
    """The dtype that is multiplied; the interpreter cannot multiply bfloat16."""
    return tl.float32 if interpreted else OPERAND[dtype]


def pays(work: Sweep) -> bool:
    """Whether the kernel serves and is likely to be faster than the library: arithmetic, until there is a measurement.

    Both multiply 2 m A D and read the weight once, whichever takes longer; the kernel multiplies at a share of the
    library's rate. The library writes m A Q-values and reads them again, in the cache, and its operations are issued
    for every tile of them: 15 us for the maxima of 2^23. So for the maxima of many rows the kernel is taken up to
    D = 480 in half precision and with one product of tf32, 80 with three and 24 without rounding, and for the soft
    value up to six times that; up to 128 rows always in the former two, since there it is the weight that takes time.
    """
    (m, D), A, itemsize = work.hidden.shape, work.weight.shape[0], work.hidden.element_size()
    if torch.float64 in (work.hidden.dtype, work.weight.dtype) or too_large(max(m, A, D)) is not None:
        return False
    cores = _tensor_cores(work.hidden.device)
    precision = "half" if itemsize == 2 else _precision() if cores else "ieee"
    own = precision if cores else "ieee"
    rate = FLOPS["tf32" if precision == "tf32x3" else precision]  # the library's "high" is tf32, too
    own_rate = SHARE[own] * FLOPS["tf32" if own == "tf32x3" else own]
    masked = 0 if work.mask is None else 2
    multiply, read = 2 * m * A * D / rate, A * D * work.weight.element_size() / MEMORY
    count = cdiv(m, tiles.TILE_ROWS) * cdiv(min(m, tiles.TILE_ROWS) * A, tiles.TILE["cuda"])
    issued = count * (OPERATIONS[work.kind] + masked) * LAUNCH
    library = max(multiply, read) + m * A * itemsize * (PASSES[work.kind] + masked) / CACHE
    return max(multiply * rate / own_rate, read) <= max(library, issued)


def _tensor_cores(device: torch.device) -> bool:
    """Whether Triton multiplies in tensor cores there: it has none of before compute capability 8.0."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _precision() -> str:
    """What torch.set_float32_matmul_precision says: without rounding, three products of tf32 halves, or one product.

    "high" allows 16 bits of the 24; three products have 21. To the library "high" and "medium" are both tf32.
    """
    if torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    try:
        return "tf32x3" if torch.get_float32_matmul_precision() == "high" else "tf32"
    except RuntimeError:  # where fp32_precision itself was set, which has no level between
        return "tf32"


def units_of(dtype: torch.dtype, interpreted: bool) -> tuple[str, str]:
    """The units that multiply, as in sweep_launch.TILES, and the precision of tl.dot."""
    precision = _precision() if dtype is torch.float32 else "ieee"
    if interpreted:
        return "interpreter", precision
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "hip":
        if target.arch < 80:
            return "fma", "ieee"
        units = {"ieee": "fma", "tf32x3": "split", "tf32": "nvidia"}[precision] if dtype is torch.float32 else "nvidia"
        return units, precision
    if target.warp_size == 64:
        return "mfma", "ieee"  # float32 has units of its own, and tf32 none that every MI300 compiler knows
    return "valu" if dtype is torch.float32 else "wmma", "ieee"


def _power_of_two(temperature: float) -> float:
    """The factor of exponents in base 2, which one instruction computes."""
    limits = torch.finfo(torch.float32)
    return min(max(1 / (temperature * math.log(2)), limits.tiny), limits.max)
