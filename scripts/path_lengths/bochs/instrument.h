// Instrumentation of Bochs that writes which instructions the host executes; see README.md beside this folder.
// It leaves every hook of Bochs empty but four.
#if BX_INSTRUMENTATION
#undef BX_INSTRUMENTATION
#define BX_INSTRUMENTATION 0
#include "instrument/stubs/instrument.h"
#undef BX_INSTRUMENTATION
#define BX_INSTRUMENTATION 1

class bxInstruction_c;
extern bool path_tracing;
void path_instruction(unsigned cpu, bxInstruction_c *i);
void path_event(unsigned kind, Bit64u value);
void path_port(unsigned port, unsigned value);

#undef BX_INSTR_BEFORE_EXECUTION
#define BX_INSTR_BEFORE_EXECUTION(cpu, i) do { if (path_tracing) path_instruction(cpu, i); } while (0)
#undef BX_INSTR_HWINTERRUPT
#define BX_INSTR_HWINTERRUPT(cpu, vector, cs, rip) do { if (path_tracing) path_event(1, vector); } while (0)
#undef BX_INSTR_VMEXIT
#define BX_INSTR_VMEXIT(cpu, reason, qualification) do { if (path_tracing) path_event(2, reason); } while (0)
#undef BX_INSTR_EXCEPTION
#define BX_INSTR_EXCEPTION(cpu, vector, error) do { if (path_tracing) path_event(4, vector); } while (0)
#undef BX_INSTR_OUTP
#define BX_INSTR_OUTP(port, size, value) path_port(port, value)
#else
#include "instrument/stubs/instrument.h"
#endif
