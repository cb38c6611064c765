"""The opcode maps: which instruction of the op table stands behind which bytes, with which operands.

SDM: "Opcode Map".
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtsim.cpu import ops as o


@frozen
class Form:
    """What stands behind an opcode: the op, its operands and what the op table calls EXTRA.

    Operands are a letter for where (E r/m, M memory only, R register only, G the reg field, Z the opcode's register,
    A accumulator, I immediate, J relative, O offset, C control and D debug register, S segment register, F far pointer)
    and a letter for the size (b, w, d, q; v operand size; y 32 or, in 64-bit mode, 64 bits; t as v, at most 32 bits;
    s a pseudo-descriptor; p a far pointer; n none).
    `when`: "64" and "legacy" restrict to a mode, "d64" makes 64 bits the operand size in 64-bit mode.
    """

    op: int
    operands: str = ""
    extra: int = 0
    when: str = ""


def _key(code: str) -> tuple[str, int | None, str]:
    """Split 'F3 0F C7 /6' into prefix, opcode text, digit."""
    words = code.split()
    prefix = words.pop(0) if words[0] in ("66", "F2", "F3", "NP") and len(words) > 1 and words[1] == "0F" else ""
    digit = int(words.pop()[1]) if words[-1].startswith("/") else None
    return "".join(words), digit, prefix


def _table(*rows: tuple[str, Form]) -> dict[tuple[str, int | None, str], Form]:
    found: dict[tuple[str, int | None, str], Form] = {}
    for code, form in rows:
        if "+r" in code:
            first = int(code.split("+")[0][-2:], 16)
            for n in range(8):
                found[_key(f"{first + n:02X}")] = form
        else:
            found[_key(code)] = form
    return found


_ARITHMETIC: Final = tuple(
    (f"{8 * kind + low:02X}", Form(o.ARITHMETIC, operands, kind))
    for kind in range(8)
    for low, operands in enumerate(("Eb,Gb", "Ev,Gv", "Gb,Eb", "Gv,Ev", "Ab,Ib", "Av,It"))
)
_GROUP1: Final = tuple(
    (f"{code} /{kind}", Form(o.ARITHMETIC, operands, kind))
    for kind in range(8)
    for code, operands in (("80", "Eb,Ib"), ("81", "Ev,It"), ("83", "Ev,Ib"))
)

ES, CS, SS, DS, FS, GS = range(6)  # segment registers, as VMCS fields are ordered

# fmt: off
FORMS: Final = _table(
    *_ARITHMETIC, *_GROUP1,
    ("06",          Form(o.PUSH_SEGMENT, "", ES, "legacy")),
    ("07",          Form(o.POP_SEGMENT, "", ES, "legacy")),
    ("0E",          Form(o.PUSH_SEGMENT, "", CS, "legacy")),
    ("16",          Form(o.PUSH_SEGMENT, "", SS, "legacy")),
    ("17",          Form(o.POP_SEGMENT, "", SS, "legacy")),
    ("1E",          Form(o.PUSH_SEGMENT, "", DS, "legacy")),
    ("1F",          Form(o.POP_SEGMENT, "", DS, "legacy")),
    ("40+r",        Form(o.ARITHMETIC, "Zv", o.K_INC, "legacy")),
    ("48+r",        Form(o.ARITHMETIC, "Zv", o.K_DEC, "legacy")),
    ("50+r",        Form(o.PUSH_OPERAND, "Zv", 0, "d64")),
    ("58+r",        Form(o.POP_OPERAND, "Zv", 0, "d64")),
    ("62",          Form(o.BOUND, "Gv,Mv", 0, "legacy")),
    ("68",          Form(o.PUSH_OPERAND, "It", 0, "d64")),
    ("6A",          Form(o.PUSH_OPERAND, "Ib", 0, "d64")),
    ("6C",          Form(o.INS, "Yb")),
    ("6D",          Form(o.INS, "Yt")),
    ("6E",          Form(o.OUTS, "Xb")),
    ("6F",          Form(o.OUTS, "Xt")),
    ("84",          Form(o.ARITHMETIC, "Eb,Gb", o.K_TEST)),
    ("85",          Form(o.ARITHMETIC, "Ev,Gv", o.K_TEST)),
    ("86",          Form(o.EXCHANGE, "Eb,Gb")),
    ("87",          Form(o.EXCHANGE, "Ev,Gv")),
    ("88",          Form(o.MOVE, "Eb,Gb")),
    ("89",          Form(o.MOVE, "Ev,Gv")),
    ("8A",          Form(o.MOVE, "Gb,Eb")),
    ("8B",          Form(o.MOVE, "Gv,Ev")),
    ("8C",          Form(o.MOV_FROM_SEGMENT, "Ew,Sw")),
    ("8E",          Form(o.MOV_TO_SEGMENT, "Sw,Ew")),
    ("8F /0",       Form(o.POP_OPERAND, "Ev", 0, "d64")),
    ("90",          Form(o.NOP)),
    ("9A",          Form(o.CALL_FAR, "Fp", 0, "legacy")),
    ("9C",          Form(o.PUSHF, "Nv", 0, "d64")),
    ("9D",          Form(o.POPF, "Nv", 0, "d64")),
    ("A0",          Form(o.MOVE, "Ab,Ob")),
    ("A1",          Form(o.MOVE, "Av,Ov")),
    ("A2",          Form(o.MOVE, "Ob,Ab")),
    ("A3",          Form(o.MOVE, "Ov,Av")),
    ("A4",          Form(o.MOVE_STRING, "Yb")),
    ("A5",          Form(o.MOVE_STRING, "Yv")),
    ("A8",          Form(o.ARITHMETIC, "Ab,Ib", o.K_TEST)),
    ("A9",          Form(o.ARITHMETIC, "Av,It", o.K_TEST)),
    ("B0+r",        Form(o.MOVE, "Zb,Ib")),
    ("B8+r",        Form(o.MOVE, "Zv,Iv")),
    ("C6 /0",       Form(o.MOVE, "Eb,Ib")),
    ("C7 /0",       Form(o.MOVE, "Ev,It")),
    ("CC",          Form(o.INT3)),
    ("CD",          Form(o.INT, "Ib")),
    ("CE",          Form(o.INTO, "", 0, "legacy")),
    ("CA",          Form(o.RET_FAR, "Iw")),
    ("CB",          Form(o.RET_FAR, "Nv")),
    ("CF",          Form(o.IRET, "Nv")),
    ("DB /4",       Form(o.FNINIT, "Rn")),
    ("E4",          Form(o.IN, "Pb,Ib")),
    ("E5",          Form(o.IN, "Pt,Ib")),
    ("E6",          Form(o.OUT, "Pb,Ib")),
    ("E7",          Form(o.OUT, "Pt,Ib")),
    ("EA",          Form(o.JMP_FAR, "Fp", 0, "legacy")),
    ("EC",          Form(o.IN, "Pb")),
    ("ED",          Form(o.IN, "Pt")),
    ("EE",          Form(o.OUT, "Pb")),
    ("EF",          Form(o.OUT, "Pt")),
    ("F1",          Form(o.INT1)),
    ("F4",          Form(o.HLT)),
    ("F6 /0",       Form(o.ARITHMETIC, "Eb,Ib", o.K_TEST)),
    ("F6 /6",       Form(o.DIVIDE, "Eb")),
    ("F7 /0",       Form(o.ARITHMETIC, "Ev,It", o.K_TEST)),
    ("F7 /6",       Form(o.DIVIDE, "Ev")),
    ("FA",          Form(o.CLI)),
    ("FB",          Form(o.STI)),
    ("FE /0",       Form(o.ARITHMETIC, "Eb", o.K_INC)),
    ("FE /1",       Form(o.ARITHMETIC, "Eb", o.K_DEC)),
    ("FF /0",       Form(o.ARITHMETIC, "Ev", o.K_INC)),
    ("FF /1",       Form(o.ARITHMETIC, "Ev", o.K_DEC)),
    ("FF /3",       Form(o.CALL_FAR, "Mp")),
    ("FF /4",       Form(o.JMP_NEAR, "Ev", 0, "d64")),
    ("FF /5",       Form(o.JMP_FAR, "Mp")),
    ("FF /6",       Form(o.PUSH_OPERAND, "Ev", 0, "d64")),
    # 0F
    ("0F 00 /0",    Form(o.SLDT, "Ew")),
    ("0F 00 /1",    Form(o.STR, "Ew")),
    ("0F 00 /2",    Form(o.LLDT, "Ew")),
    ("0F 00 /3",    Form(o.LTR, "Ew")),
    ("0F 00 /4",    Form(o.VERR, "Ew")),
    ("0F 00 /5",    Form(o.VERW, "Ew")),
    ("0F 01 /0",    Form(o.SGDT, "Ms")),
    ("0F 01 /1",    Form(o.SIDT, "Ms")),
    ("0F 01 /2",    Form(o.LGDT, "Ms")),
    ("0F 01 /3",    Form(o.LIDT, "Ms")),
    ("0F 01 /4",    Form(o.SMSW, "Ew")),
    ("0F 01 /6",    Form(o.LMSW, "Ew")),
    ("0F 01 /7",    Form(o.INVLPG, "Mb")),
    ("0F 01 C0",    Form(o.ENCLV)),
    ("0F 01 C1",    Form(o.VMCALL)),
    ("0F 01 C2",    Form(o.VMLAUNCH)),
    ("0F 01 C3",    Form(o.VMRESUME)),
    ("0F 01 C4",    Form(o.VMXOFF)),
    ("0F 01 C5",    Form(o.PCONFIG)),
    ("0F 01 C8",    Form(o.MONITOR, "X0")),
    ("0F 01 C9",    Form(o.MWAIT)),
    ("0F 01 CA",    Form(o.CLAC)),
    ("0F 01 CB",    Form(o.STAC)),
    ("0F 01 CF",    Form(o.ENCLS)),
    ("0F 01 D0",    Form(o.XGETBV)),
    ("0F 01 D1",    Form(o.XSETBV)),
    ("0F 01 D4",    Form(o.VMFUNC)),
    ("0F 01 EE",    Form(o.RDPKRU)),
    ("0F 01 EF",    Form(o.WRPKRU)),
    ("0F 01 F8",    Form(o.SWAPGS, "", 0, "64")),
    ("0F 01 F9",    Form(o.RDTSCP)),
    ("0F 02",       Form(o.LAR, "Gv,Ew")),
    ("0F 03",       Form(o.LSL, "Gv,Ew")),
    ("0F 05",       Form(o.SYSCALL)),
    ("0F 06",       Form(o.CLTS)),
    ("0F 07",       Form(o.SYSRET)),
    ("0F 08",       Form(o.INVD)),
    ("0F 09",       Form(o.WBINVD)),
    ("0F 0B",       Form(o.UD)),
    ("0F 18 /0",    Form(o.TOUCH, "Mb", o.TOUCH_PREFETCH)),
    ("0F 18 /1",    Form(o.TOUCH, "Mb", o.TOUCH_PREFETCH)),
    ("0F 18 /2",    Form(o.TOUCH, "Mb", o.TOUCH_PREFETCH)),
    ("0F 18 /3",    Form(o.TOUCH, "Mb", o.TOUCH_PREFETCH)),
    ("0F 1F /0",    Form(o.NOP, "Ev")),
    ("0F 20",       Form(o.MOV_FROM_CR, "Cy")),
    ("0F 21",       Form(o.MOV_FROM_DR, "Dy")),
    ("0F 22",       Form(o.MOV_TO_CR, "Cy")),
    ("0F 23",       Form(o.MOV_TO_DR, "Dy")),
    ("0F 30",       Form(o.WRMSR)),
    ("0F 31",       Form(o.RDTSC)),
    ("0F 32",       Form(o.RDMSR)),
    ("0F 33",       Form(o.RDPMC)),
    ("0F 34",       Form(o.SYSENTER)),
    ("0F 35",       Form(o.SYSEXIT, "Nv")),
    ("0F 37",       Form(o.GETSEC)),
    ("0F 78",       Form(o.VMREAD, "Ey,Gy")),
    ("0F 79",       Form(o.VMWRITE, "Gy,Ey")),
    ("0F A0",       Form(o.PUSH_SEGMENT, "", FS, "d64")),
    ("0F A1",       Form(o.POP_SEGMENT, "", FS, "d64")),
    ("0F A2",       Form(o.CPUID)),
    ("0F A8",       Form(o.PUSH_SEGMENT, "", GS, "d64")),
    ("0F A9",       Form(o.POP_SEGMENT, "", GS, "d64")),
    ("0F AA",       Form(o.RSM)),
    ("0F AE /0",    Form(o.TOUCH, "Mb", o.TOUCH_FXSAVE)),
    ("0F AE /7",    Form(o.TOUCH, "Mb", o.TOUCH_FLUSH)),
    ("0F B0",       Form(o.EXCHANGE, "Eb,Gb", o.X_COMPARE)),
    ("0F B1",       Form(o.EXCHANGE, "Ev,Gv", o.X_COMPARE)),
    ("0F C0",       Form(o.EXCHANGE, "Eb,Gb", o.X_ADD)),
    ("0F C1",       Form(o.EXCHANGE, "Ev,Gv", o.X_ADD)),
    ("0F C7 /3",    Form(o.XRSTORS, "Mb")),
    ("0F C7 /5",    Form(o.XSAVES, "Mb")),
    ("F3 0F 38 DC", Form(o.LOADIWKEY, "Gy,Ry")),
    ("0F C7 /6",    Form(o.VMPTRLD, "Mq")),
    ("0F C7 /7",    Form(o.VMPTRST, "Mq")),
    ("66 0F C7 /6", Form(o.VMCLEAR, "Mq")),
    ("F3 0F C7 /6", Form(o.VMXON, "Mq")),
    ("66 0F 38 80", Form(o.INVEPT, "Gy,Mn")),
    ("66 0F 38 81", Form(o.INVVPID, "Gy,Mn")),
    ("66 0F 38 82", Form(o.INVPCID, "Gy,Mn")),
)
# one opcode and digit, another instruction where ModRM names a register
REGISTER_FORMS: Final = {
    ("0FC7", 6): Form(o.RDRAND, "Rv"),
    ("0FC7", 7): Form(o.RDSEED, "Rv"),
}
# opcodes whose ModRM byte is part of the opcode where it names a register
MODRM_IS_OPCODE: Final = ("0F01",)
# the same where a prefix decides as well
PREFIXED_REGISTER_FORMS: Final = {
    ("0FAE", 0, "F3"): Form(o.RDFSBASE, "Ry", 0, "64"),
    ("0FAE", 1, "F3"): Form(o.RDGSBASE, "Ry", 0, "64"),
    ("0FAE", 2, "F3"): Form(o.WRFSBASE, "Ry", 0, "64"),
    ("0FAE", 3, "F3"): Form(o.WRGSBASE, "Ry", 0, "64"),
    ("0FAE", 6, "66"): Form(o.TPAUSE, "Rd"),
    ("0FAE", 6, "F2"): Form(o.UMWAIT, "Rd"),
    ("0FAE", 6, "F3"): Form(o.UMONITOR, "Ry"),
}
# instructions on which LOCK is legal, with a memory destination
LOCKABLE: Final = (o.ARITHMETIC, o.EXCHANGE)
# prefix 66 or F3 or F2 makes another instruction of these; the bare form with the prefix is #UD
NO_PREFIX: Final = (
    o.VMREAD, o.VMWRITE, o.VMPTRLD, o.VMPTRST, o.XSAVES, o.XRSTORS, o.VMLAUNCH, o.VMRESUME, o.VMXOFF, o.VMCALL,
    o.XSETBV, o.XGETBV, o.ENCLS, o.ENCLV, o.PCONFIG, o.STAC, o.CLAC, o.RDPKRU, o.WRPKRU,
)
# fmt: on
