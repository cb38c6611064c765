"""Stretches of hypervisor code that personalities share.

Between them the same registers hold: R15 and RSP the vCPU, its general registers saved; all others are free. A
stretch ends in a jump to `skip` (step over the instruction), `reenter`, `inject` (event in RAX, error code in RDX),
`die` (code in RAX, detail in RDX), `schedule`, or `go_on` (as `reenter`, after
interrupts were disabled).
"""
