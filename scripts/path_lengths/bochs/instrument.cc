// A trace of the instructions executed in VMX root operation, between marks that the program under test sets.
//
// File `trace.bin`: 64-bit words. Bits 47:0 the linear address of an instruction; bit 48 it ran with CPL 3; 49 it is
// a near call, 50 a near return, 51 VMREAD, 52 VMWRITE, 53 it has a LOCK prefix, 54 IRET, SYSRET or SYSCALL,
// 55 VMLAUNCH or VMRESUME.
// Bit 63 marks an event instead: bits 62:60 say which (1 interrupt, 2 VM exit, 3 mark, 4 exception), bits 31:0 its
// vector, reason or number. A 32-bit OUT to port 0x8900 is a mark: 0xFFFFFFFF ends the tracing, any other value
// begins it. Bytes that go to port 0x8901 are written to the file `guest.out`.
#include "bochs.h"
#include "cpu/cpu.h"
#include "cpu/decoder/ia_opcodes.h"
#include <stdio.h>
#include <stdlib.h>

#if BX_INSTRUMENTATION

enum { MARK_PORT = 0x8900, TEXT_PORT, MARK = 3 };

bool path_tracing = false;
static FILE *trace, *text;

static void open_for_writing(FILE **file, const char *name)
{
  if (!*file && !(*file = fopen(name, "wb"))) {
    perror(name);
    exit(1);
  }
}

static void put(Bit64u word)
{
  open_for_writing(&trace, "trace.bin");
  fwrite(&word, sizeof word, 1, trace);
}

void path_event(unsigned kind, Bit64u value)
{
  put((Bit64u) 1 << 63 | (Bit64u) kind << 60 | (value & 0xFFFFFFFF));
}

void path_port(unsigned port, unsigned value)
{
  if (port == TEXT_PORT) {
    open_for_writing(&text, "guest.out");
    fputc(value & 0xFF, text);
    if ((value & 0xFF) == '\n')
      fflush(text);
  }
  if (port != MARK_PORT)
    return;
  path_event(MARK, value);
  path_tracing = value != 0xFFFFFFFF;
  if (!path_tracing)
    fflush(trace);
}

static unsigned kind_of(const bxInstruction_c *i)
{
  switch (i->getIaOpcode()) {
    case BX_IA_CALL_Jq: case BX_IA_CALL_Eq: return 1 << 1;
    case BX_IA_RET_Op64: case BX_IA_RET_Op64_Iw: return 1 << 2;
    case BX_IA_VMREAD_EqGq: return 1 << 3;
    case BX_IA_VMWRITE_GqEq: return 1 << 4;
    case BX_IA_IRET_Op64: case BX_IA_SYSRET: case BX_IA_SYSCALL: return 1 << 6;
    case BX_IA_VMLAUNCH: case BX_IA_VMRESUME: return 1 << 7;
    default: return i->getLock() ? 1 << 5 : 0;
  }
}

void path_instruction(unsigned cpu, bxInstruction_c *i)
{
  if (BX_CPU(cpu)->in_vmx_guest)
    return;
  Bit64u flags = kind_of(i) | (BX_CPU(cpu)->user_pl ? 1 : 0);
  put((BX_CPU(cpu)->prev_rip & 0xFFFFFFFFFFFF) | flags << 48);
}

#endif
