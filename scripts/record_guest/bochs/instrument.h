// Instrumentation of Bochs that records a guest in VMX non-root operation; see README.md beside this folder.
// It leaves every hook of Bochs empty but nine.
#if BX_INSTRUMENTATION
#undef BX_INSTRUMENTATION
#define BX_INSTRUMENTATION 0
#include "instrument/stubs/instrument.h"
#undef BX_INSTRUMENTATION
#define BX_INSTRUMENTATION 1

class bxInstruction_c;
void guest_begins(bxInstruction_c *i);
void guest_ends();
void guest_repeats();
void guest_accesses(Bit64u laddr, Bit64u paddr, unsigned size, unsigned rw);
void guest_raises(unsigned vector, unsigned error);
void guest_is_interrupted(unsigned vector);
void guest_exits(unsigned reason, Bit64u qualification);
void guest_tables_change();
void host_port(unsigned port, unsigned value);

#define IN_GUEST(cpu, what) do { if (BX_CPU(cpu)->in_vmx_guest) what; } while (0)

#undef BX_INSTR_BEFORE_EXECUTION
#define BX_INSTR_BEFORE_EXECUTION(cpu, i) IN_GUEST(cpu, guest_begins(i))
#undef BX_INSTR_AFTER_EXECUTION
#define BX_INSTR_AFTER_EXECUTION(cpu, i) IN_GUEST(cpu, guest_ends())
#undef BX_INSTR_REPEAT_ITERATION
#define BX_INSTR_REPEAT_ITERATION(cpu, i) IN_GUEST(cpu, guest_repeats())
#undef BX_INSTR_LIN_ACCESS
#define BX_INSTR_LIN_ACCESS(cpu, lin, phy, len, memtype, rw) IN_GUEST(cpu, guest_accesses(lin, phy, len, rw))
#undef BX_INSTR_EXCEPTION
#define BX_INSTR_EXCEPTION(cpu, vector, error) IN_GUEST(cpu, guest_raises(vector, error))
#undef BX_INSTR_INTERRUPT
#define BX_INSTR_INTERRUPT(cpu, vector) IN_GUEST(cpu, guest_is_interrupted(vector))
#undef BX_INSTR_VMEXIT
#define BX_INSTR_VMEXIT(cpu, reason, qualification) guest_exits(reason, qualification)
#undef BX_INSTR_TLB_CNTRL
#define BX_INSTR_TLB_CNTRL(cpu, what, new_cr3) IN_GUEST(cpu, guest_tables_change())
#undef BX_INSTR_OUTP
#define BX_INSTR_OUTP(port, size, value) host_port(port, value)
#else
#include "instrument/stubs/instrument.h"
#endif
