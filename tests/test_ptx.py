"""The executor of PTX itself, on kernels written by hand: its arithmetic, and each thing that it has to refuse."""

import ctypes
import struct
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EXECUTED
from data import source
from torch import Tensor

if not EXECUTED:
    pytest.skip("needs g++", allow_module_level=True)

from bench.gpu_code.ptx.executor import Counts, Kernel, Memory, PtxError

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel({parameters})
{{
.reg .pred %p<16>;
.reg .b16 %rs<16>;
.reg .b32 %r<32>;
.reg .f32 %f<16>;
.reg .b64 %rd<16>;
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
{loads}
{body}
ret;
}}
"""


def kernel(body: str, tensors: int) -> Kernel:
    """A kernel of pointers; thread and block are in %r0 and %r1, the pointers from %rd0 on."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(tensors))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(tensors))
    return Kernel(HEAD.format(parameters=parameters, loads=loads, body=body), "kernel")


def run(
    body: str,
    *tensors: Tensor,
    grid: int = 1,
    threads: int = 32,
    shared: int = 0,
    unwritten: tuple[Tensor, ...] = (),
    **options: Any,
) -> Counts:
    pointers = [ctypes.c_uint64(x.data_ptr()) for x in tensors]
    arguments = (ctypes.c_void_p * max(1, len(pointers)))(*map(ctypes.addressof, pointers))
    memory = Memory()
    for x in unwritten:
        memory.unwritten(x)
    return kernel(body, len(tensors)).launch(
        (grid, 1, 1), (threads, 1, 1), shared, arguments, memory.ranges(tensors), **options
    )


ADDRESS = "mad.wide.u32 %rd10, %r0, 4, %rd0; mad.wide.u32 %rd11, %r0, 4, %rd1; mad.wide.u32 %rd12, %r0, 4, %rd2;"


def compute(instruction: str, a: Tensor, b: Tensor) -> Tensor:
    """instruction of %r3, %r4 and %r5 over pairs of words."""
    out = torch.zeros(len(a), dtype=torch.int32)
    body = (
        f"{ADDRESS} ld.global.b32 %r4, [%rd11]; ld.global.b32 %r5, [%rd12]; {instruction} st.global.b32 [%rd10], %r3;"
    )
    run(body, out, a.view(torch.int32).contiguous(), b.view(torch.int32).contiguous(), threads=len(a))
    return out


SPECIAL = [0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 1e-40, 3.4e38, 65519.9, 65520.0, 1.00390625, 1.01171875, 6e-8]


def floats(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    wild = torch.randint(-(2**31), 2**31, (200,), generator=g).to(torch.int32).view(torch.float32)
    return torch.cat([torch.tensor(SPECIAL), torch.randn(298, generator=g), wild])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_round_as_torch_rounds(dtype: torch.dtype) -> None:
    name, x = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype], floats(0)
    out = compute(f"cvt.rn.{name}.f32 %rs1, %r4; cvt.u32.u16 %r3, %rs1;", x, x).to(torch.int16).view(dtype)
    expected = x.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(out[number].view(torch.int16), expected[number].view(torch.int16))
    back = compute(f"cvt.u16.u32 %rs1, %r4; cvt.f32.{name} %r3, %rs1;", out.view(torch.int16).int(), x)
    assert torch.equal(back.view(torch.float32)[number], expected.float()[number])
    packed = compute(f"cvt.rn.{name}x2.f32 %r3, %r4, %r5;", x, x.flip(0))
    parts = packed.view(torch.int16).view(-1, 2).view(dtype)  # the second operand is the lower half
    assert torch.equal(parts[:, 0].nan_to_num(7), x.flip(0).to(dtype).nan_to_num(7))
    assert torch.equal(parts[:, 1].nan_to_num(7), x.to(dtype).nan_to_num(7))


def test_maxima_and_comparisons_with_nan() -> None:
    x, y = floats(1), floats(2)
    both = torch.maximum(x, y)
    assert torch.equal(
        compute("max.NaN.f32 %r3, %r4, %r5;", x, y).view(torch.float32).nan_to_num(7), both.nan_to_num(7)
    )
    # torch.fmax gives NaN for one that signals.
    dropped = torch.where(x.isnan(), y, torch.where(y.isnan(), x, both)).nan_to_num(7)
    assert torch.equal(compute("max.f32 %r3, %r4, %r5;", x, y).view(torch.float32).nan_to_num(7), dropped)
    for name, expected in {
        "lt": x < y, "ltu": ~(x >= y), "eq": x == y, "ne": (x < y) | (x > y), "neu": x != y,
        "nan": x.isnan() | y.isnan(), "num": ~(x.isnan() | y.isnan()),
    }.items():  # fmt: skip
        got = compute(f"setp.{name}.f32 %p1, %r4, %r5; selp.b32 %r3, 1, 0, %p1;", x, y)
        assert torch.equal(got != 0, expected), name


def test_whole_numbers() -> None:
    """With .ftz a subnormal number is zero before it is rounded down or up."""
    x = floats(3)
    flushed = torch.where(x.abs() < torch.finfo(torch.float32).tiny, torch.copysign(torch.zeros_like(x), x), x)
    for name, function in {"rni": torch.round, "rzi": torch.trunc, "rmi": torch.floor, "rpi": torch.ceil}.items():
        for ftz, given in (("", x), (".ftz", flushed)):
            got = compute(f"cvt.{name}{ftz}.f32.f32 %r3, %r4;", x, x).view(torch.float32)
            assert torch.equal(got.nan_to_num(7), function(given).nan_to_num(7)), name + ftz


def test_arithmetic_has_one_nan() -> None:
    """inf - inf has its sign set on x86, and a sum that of its first NaN; on a GPU lanes that add up alike agree."""
    x = torch.tensor([np.nan, -np.nan, np.inf, 1.0, np.inf])
    y = torch.tensor([1.0, np.nan, -np.inf, -np.nan, 0.0])
    for instruction in ("add.f32 %r3, %r4, %r5;", "mul.f32 %r3, %r5, %r4;", "fma.rn.f32 %r3, %r4, %r5, %r5;"):
        got = compute(instruction, x, y)
        nan = got.view(torch.float32).isnan()
        assert nan.sum() >= 3
        assert got[nan].unique().numel() == 1, instruction


def test_integers() -> None:
    g = source()
    a, b = (torch.randint(-(2**31), 2**31, (256,), generator=g).to(torch.int32) for _ in range(2))
    x, y = a.long(), b.long()
    u, v = x & 0xFFFFFFFF, y & 0xFFFFFFFF

    def same(instruction: str, expected: Tensor) -> None:
        low = (expected & 0xFFFFFFFF).to(torch.int64)
        assert torch.equal(compute(instruction, a, b).long() & 0xFFFFFFFF, low), instruction

    same("mul.lo.s32 %r3, %r4, %r5;", x * y)
    same("mul.hi.s32 %r3, %r4, %r5;", (x * y) >> 32)
    same("div.s32 %r3, %r4, %r5;", torch.div(x, y, rounding_mode="trunc"))
    same("rem.s32 %r3, %r4, %r5;", torch.fmod(x, y))
    same("div.u32 %r3, %r4, %r5;", torch.div(u, v, rounding_mode="floor"))
    same("bfe.u32 %r3, %r4, 3, 7;", u >> 3 & 127)
    same("bfe.s32 %r3, %r4, 3, 7;", ((u >> 3 & 127) ^ 64) - 64)
    same("shr.s32 %r3, %r4, 40;", x >> 63)
    same("shl.b32 %r3, %r4, 33;", torch.zeros_like(x))
    same("prmt.b32 %r3, %r4, %r5, 0x5140;", u & 0xFF | (v & 0xFF) << 8 | (u >> 8 & 0xFF) << 16 | (v >> 8 & 0xFF) << 24)
    same("shf.l.wrap.b32 %r3, %r4, %r5, 9;", v << 9 | u >> 23)
    same("min.u32 %r3, %r4, %r5;", torch.minimum(u, v))


def test_lanes_that_part_meet_again() -> None:
    """Odd lanes make more rounds of a loop; all are there for the shuffle behind it."""
    out = torch.zeros(32, dtype=torch.int32)
    run(
        """
        mad.wide.u32 %rd10, %r0, 4, %rd0;
        mov.b32 %r2, 0;
    again:
        add.s32 %r2, %r2, 1;
        and.b32 %r3, %r0, 3;
        setp.le.s32 %p1, %r2, %r3;
        @%p1 bra again;
        shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;
        st.global.b32 [%rd10], %r4;
        """,
        out,
    )
    assert out.tolist() == [(lane ^ 1) % 4 + 1 for lane in range(32)]


WORD = "mad.wide.u32 %rd10, %r0, 4, %rd0;"
SLOT = "mov.b32 %r2, smem; shl.b32 %r3, %r0, 2; add.s32 %r4, %r2, %r3; xor.b32 %r5, %r3, 128; add.s32 %r5, %r2, %r5;"
REFUSED = {
    "behind the end": (f"{WORD} ld.global.b32 %r2, [%rd10+4];", {}, "thread (31, 0, 0)", "outside of every tensor"),
    "before the start": ("ld.global.b32 %r2, [%rd0+-4];", {}, "thread (0, 0, 0)", "outside of every tensor"),
    "misaligned": ("ld.global.b32 %r2, [%rd0+2];", {}, "line", "not a multiple of 4"),
    "a vector misaligned": ("ld.global.v2.b32 {%r2, %r3}, [%rd0+4];", {}, "line", "not a multiple of 8"),
    "two values to one word": ("st.global.b32 [%rd0], %r0;", {}, "thread (1, 0, 0)", "another value"),
    "two blocks write": ("st.global.b32 [%rd0], 7;", {"grid": 2}, "block", "of this launch"),
    "written and read by blocks": (
        "setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%rd0], 7; @!%p1 ld.global.b32 %r2, [%rd0];",
        {"grid": 2}, "block", "of this launch",
    ),
    "warps without a barrier": (
        f"{SLOT} st.shared.b32 [%r4], %r0; ld.shared.b32 %r6, [%r5];",
        {"threads": 64, "shared": 256}, "thread", "shared byte",
    ),
    "shared memory never written": (f"{SLOT} ld.shared.b32 %r6, [%r4];", {"shared": 128}, "thread", "never written"),
    "behind shared memory": (f"{SLOT} st.shared.b32 [%r4+4], %r0;", {"shared": 128}, "(31, 0, 0)", "outside"),
    "a copy that has not landed": (
        f"{SLOT} cp.async.ca.shared.global [%r4], [%rd0], 4; cp.async.commit_group; ld.shared.b32 %r6, [%r4];",
        {"shared": 128}, "thread", "before its asynchronous copy has landed",
    ),
    "a lane that is not there": (
        "setp.lt.s32 %p1, %r0, 16; @!%p1 ret; shfl.sync.bfly.b32 %r2, %r0, 16, 31, -1;",
        {}, "thread", "does not take part",
    ),
    "barriers apart": (
        "setp.lt.s32 %p1, %r0, 32; @%p1 bar.sync 1; @!%p1 bar.sync 2;", {"threads": 64}, "kernel", "deadlock",
    ),
    "a loop without end": ("again: bra again;", {"most_instructions": 1000}, "kernel", "does not end"),
    "an opcode": ("wgmma.fence.sync.aligned;", {}, "line", "unknown opcode"),
    "a modifier": ("add.sat.s32 %r2, %r0, %r1;", {}, "line", "unknown opcode"),
    "one operand too many": ("add.s32 %r2, %r0, %r1, %r1;", {}, "line", "expected 3 operands"),
    "an undeclared register": ("add.s32 %r2, %r0, %r99;", {}, "line", "unknown register"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """The message says which kernel, instruction and thread."""
    body, options, where, what = REFUSED[name]
    with pytest.raises(PtxError) as error:
        run(body, torch.zeros(32, dtype=torch.int32), **options)
    message = str(error.value)
    assert "kernel" in message
    assert where in message
    assert what in message


def test_a_barrier_orders_warps_and_replicas_are_no_conflict() -> None:
    body = f"{SLOT} st.shared.b32 [%r4], %r0; bar.sync 0; ld.shared.b32 %r6, [%r5]; {WORD} st.global.b32 [%rd10], %r6;"
    out = torch.zeros(64, dtype=torch.int32)
    for seed in range(5):
        run(body, out, threads=64, shared=256, seed=seed)
        assert out.tolist() == [thread ^ 32 for thread in range(64)]
    run("mov.b32 %r2, smem; st.shared.b32 [%r2], 7; bar.sync 0; ld.shared.b32 %r3, [%r2];", out, threads=64, shared=4)


def test_bytes_never_written() -> None:
    x = torch.zeros(32, dtype=torch.int32)
    with pytest.raises(PtxError, match="never written"):
        run(f"{WORD} ld.global.b32 %r2, [%rd10];", x, unwritten=(x,))
    run(f"{WORD} st.global.b32 [%rd10], 1; ld.global.b32 %r2, [%rd10];", x, unwritten=(x,))


TICKET = """
    setp.eq.s32 %p1, %r0, 0;
    mad.wide.u32 %rd10, %r1, 4, %rd0;
    @%p1 st.global.b32 [%rd10], %r1;
    {fence}
    {barrier}
    mov.b32 %r3, 0;
    @%p1 atom.global{order}.add.u32 %r3, [%rd1], 1;
    {fence}
    setp.ne.s32 %p2, %r3, 7;
    @%p2 ret;
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd0];
    ld.global.v4.b32 {{%r8, %r9, %r10, %r11}}, [%rd0+16];
    st.global.b32 [%rd2], %r11;
"""


@pytest.mark.parametrize("order", ["", ".gpu.acq_rel", ".gpu.relaxed"])
@pytest.mark.parametrize("fence", ["", "membar.gl;", "fence.acq_rel.gpu;"])
def test_a_ticket_orders_blocks(order: str, fence: str) -> None:
    """The last of eight blocks reads what the others have stored: by a fence, or by the order of the atomic itself."""
    body = TICKET.format(fence=fence, barrier="", order=order)
    for seed in range(5):
        partial, ticket, out = (torch.zeros(n, dtype=torch.int32) for n in (8, 1, 1))
        if fence or "acq_rel" in order:
            run(body, partial, ticket, out, grid=8, threads=1, seed=seed)
            assert out.item() == 7
            assert ticket.item() == 8
        else:
            with pytest.raises(PtxError, match="race"):
                run(body, partial, ticket, out, grid=8, threads=1, seed=seed)


def test_counts() -> None:
    """Broadcasts are one word, rows of 128 bytes are four sectors, a stride of 32 words is one bank."""
    x = torch.zeros(1024, dtype=torch.int32)
    counts = run(f"{WORD} ld.global.b32 %r2, [%rd10]; ld.global.b32 %r2, [%rd0];", x)
    assert (counts["load_bytes"], counts["load_sectors"]) == (128 + 4, 4 + 1)
    counts = run("mad.wide.u32 %rd10, %r0, 128, %rd0; st.global.b32 [%rd10], 1;", x)
    assert (counts["store_bytes"], counts["store_sectors"]) == (128, 32)
    column = "mov.b32 %r2, smem; shl.b32 %r3, %r0, 7; add.s32 %r4, %r2, %r3; st.shared.b32 [%r4], %r0;"
    assert run(column, x, shared=4096)["conflicts"] == 31
    assert run(f"{SLOT} st.shared.b32 [%r4], %r0;", x, shared=128)["conflicts"] == 0
    assert counts["warps"] == 1
    assert counts["global_store"] == 1


def test_parameters_are_packed_by_their_sizes() -> None:
    text = HEAD.replace("{parameters}", ".param .f32 a, .param .align 8 .b8 b[24], .param .u8 c")
    parsed = Kernel(text.format(loads="", body="ld.param.f32 %f1, [a]; ld.param.u64 %rd1, [b+16];"), "kernel")
    assert parsed.sizes == [4, 24, 1]
    values = [struct.pack("f", 1.5), bytes(24), b"\\1"]
    buffers = [ctypes.create_string_buffer(value, len(value)) for value in values]
    parsed.launch((1, 1, 1), (32, 1, 1), 0, (ctypes.c_void_p * 3)(*map(ctypes.addressof, buffers)), [])
