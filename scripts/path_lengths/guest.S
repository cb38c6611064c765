# The guest of monitor.c: loops over one event each. RDI the count, RSI an argument; OUT to port 0x10 ends a test.
# 64-bit code that runs wherever it is copied to (the label addresses are offsets from guest_start).
	.section .rodata
	.globl guest_start, guest_end
guest_start:
	.macro test name
	.globl test_\name
test_\name:
	.endm
	.macro again label
	dec %rdi
	jnz \label
	jmp done
	.endm

done:	out %al, $0x10
	jmp done

	test vmcall
1:	mov $1000, %eax
	vmcall
	again 1b

	test cpuid			# leaf 0, the first entry of the table
1:	xor %eax, %eax
	xor %ecx, %ecx
	cpuid
	again 1b

	test rdmsr			# RSI the MSR
1:	mov %esi, %ecx
	rdmsr
	again 1b

	test wrmsr			# writes what is there
	mov %esi, %ecx
	rdmsr
	mov %eax, %r8d
	mov %edx, %r9d
1:	mov %esi, %ecx
	mov %r8d, %eax
	mov %r9d, %edx
	wrmsr
	again 1b

	test cr0			# MOV to CR0 with CR0.WP turned, and turned back
1:	mov %cr0, %rax
	xor $0x10000, %rax
	mov %rax, %cr0
	again 1b

	test cr4			# MOV to CR4 with CR4.PSE turned, and turned back
1:	mov %cr4, %rax
	xor $0x10, %rax
	mov %rax, %cr4
	again 1b

	test dr
1:	mov $0x400, %eax
	mov %rax, %dr7
	vmcall				# the next exit, after which MOV DR exits again
	again 1b

	test xsetbv
	xor %ecx, %ecx
	xgetbv
1:	xsetbv
	again 1b

	test wbinvd
1:	wbinvd
	again 1b

	test pause
1:	pause
	again 1b

	test ud
1:	ud2				# its handler skips it
	again 1b

	test out			# RSI the port
	mov %esi, %edx
1:	out %al, %dx
	again 1b

	test in
	mov %esi, %edx
1:	in %dx, %al
	again 1b

	test in_emulated		# the same behind what makes KVM emulate it
	mov %esi, %edx
1:	ud2
	.ascii "kvm"
	in %dx, %al
	again 1b

	test outs
	mov %esi, %edx
1:	lea done(%rip), %rsi
	outsb
	again 1b

	test store			# a store to the same address: device memory
1:	mov %eax, (%rsi)
	again 1b

	test load
1:	mov (%rsi), %eax
	again 1b

	test touch			# a store to each page of a range
1:	mov %rax, (%rsi)
	add $4096, %rsi
	again 1b

	test touch8			# a store to each eighth page of a range
1:	mov %rax, (%rsi)
	add $32768, %rsi
	again 1b

	test read			# a load of each page of a range
1:	mov (%rsi), %rax
	add $4096, %rsi
	again 1b

	test device_pages		# the first load of each page of a range of device memory
1:	mov (%rsi), %eax
	add $4096, %rsi
	again 1b

	test cr3
	mov %cr3, %rax
1:	mov %rax, %cr3
	again 1b

	test cr3_two			# two roots in turn: RSI the other
	mov %cr3, %rax
	mov %rax, %r8
1:	mov %rsi, %cr3
	mov %r8, %cr3
	again 1b

	test invlpg			# the leaf entry at R10 is taken away and written again, and its page, RSI, is touched
1:	mov (%r10), %rax
	mov %rax, %r8
	and $~1, %rax
	mov %rax, (%r10)
	invlpg (%rsi)
	mov %r8, (%r10)
	invlpg (%rsi)
	mov %rax, (%rsi)
	again 1b

	test write_leaf			# the leaf entry at R10 is written, then CR3: it is synchronized
	mov (%r10), %rax
1:	btc $9, %rax
	mov %rax, (%r10)
	mov %cr3, %r8
	mov %r8, %cr3
	mov %rbx, (%rsi)
	again 1b

	test write_leaf_of_64		# the same where 64 pages are mapped
	mov %rsi, %r9
	mov $64, %ecx
1:	mov %rbx, (%r9)
	add $4096, %r9
	dec %ecx
	jnz 1b
	jmp test_write_leaf

	test write_leaves		# 64 leaf entries from R10 on get other pages, then CR3
1:	mov $64, %ecx
	mov %r10, %r9
2:	xorq $0x100000, (%r9)
	add $8, %r9
	dec %ecx
	jnz 2b
	mov %cr3, %r8
	mov %r8, %cr3
	mov %rbx, (%rsi)
	again 1b

	test write_directory		# an entry of a directory, at R10, is written: each store is emulated
	mov (%r10), %rax
1:	btc $9, %rax
	mov %rax, (%r10)
	again 1b

	test true_fault			# pages that the guest's tables do not map: the handler skips 3 bytes
1:	mov (%rsi), %rax
	again 1b

	test halt			# a one-shot timer of the x2APIC, then HLT; RSI the count to wait
	mov $0x80f, %ecx
	mov $0x1ff, %eax
	xor %edx, %edx
	wrmsr				# spurious vector, APIC on
	mov $0x832, %ecx
	mov $0x40, %eax
	wrmsr				# timer, one shot, vector 0x40
	mov $0x83e, %ecx
	mov $0xb, %eax
	wrmsr				# divide by 1
1:	cli
	mov $0x838, %ecx
	mov %esi, %eax
	xor %edx, %edx
	wrmsr
	sti
	hlt
	again 1b

	test self_ipi
	mov $0x80f, %ecx
	mov $0x1ff, %eax
	xor %edx, %edx
	wrmsr
	sti
1:	mov $0x83f, %ecx
	mov $0x41, %eax
	xor %edx, %edx
	wrmsr
	nop
	again 1b

	test apic_msr			# writes of the task priority and reads of the version
	xor %edx, %edx
1:	mov $0x832, %ecx
	mov $0x10040, %eax
	wrmsr
	mov $0x803, %ecx
	rdmsr
	again 1b

	test apic_memory		# the same through the APIC's page
	mov $0xfee00000, %esi
1:	movl $0x10040, 0x320(%rsi)
	mov 0x30(%rsi), %eax
	again 1b

	test send			# an interrupt to the vCPU with APIC ID 1, and HLT until it answers
	mov $0x80f, %ecx
	mov $0x1ff, %eax
	xor %edx, %edx
	wrmsr
1:	cli
	mov $0x830, %ecx
	mov $0x42, %eax
	mov $1, %edx
	wrmsr
	sti
	hlt
	again 1b

	test answer			# the other side of it
	mov $0x80f, %ecx
	mov $0x1ff, %eax
	xor %edx, %edx
	wrmsr
1:	sti
	hlt
	cli
	mov $0x830, %ecx
	mov $0x42, %eax
	xor %edx, %edx
	wrmsr
	again 1b

	test spin
1:	again 1b

	.globl handler_interrupt, handler_ud, handler_fault
handler_interrupt:
	push %rax
	push %rcx
	push %rdx
	mov $0x80b, %ecx
	xor %eax, %eax
	xor %edx, %edx
	wrmsr
	pop %rdx
	pop %rcx
	pop %rax
	iretq
handler_ud:
	addq $2, (%rsp)
	iretq
handler_fault:
	addq $3, 8(%rsp)
	add $8, %rsp
	iretq
guest_end:
	.section .note.GNU-stack, "", @progbits
