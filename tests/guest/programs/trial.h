/*
 * Executes a few bytes as code and tells which signal came of it. The bytes are followed by int3; all general registers
 * point into scratch memory, but for RCX, which is 2.
 */
#pragma once
#include "common.h"
#include <asm/prctl.h>

#define SCRATCH 0x200000000000UL /* its low 16 bits are a null selector */
#define CODE 0x200010000000UL

struct trial {
	int number, code;
	uint64_t address, rip, flags, rax;
};

struct trial trial_seen;
uint64_t trial_stack_pointer, trial_target, trial_thread_base;
void trial_run(void), trial_landing(void);

__asm__(".text\n"
	"trial_run:\n"
	"	push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
	"	mov %rsp, trial_stack_pointer(%rip)\n"
	"	movabs $0x200000008000, %rax\n"
	"	mov %rax, %rbx; mov %rax, %rdx; mov %rax, %rsi; mov %rax, %rdi; mov %rax, %rbp; mov %rax, %rsp\n"
	"	mov %rax, %r8; mov %rax, %r9; mov %rax, %r10; mov %rax, %r11; mov %rax, %r12; mov %rax, %r13\n"
	"	mov %rax, %r14; mov %rax, %r15; mov $2, %ecx\n"
	"	jmp *trial_target(%rip)\n"
	"trial_landing:\n"
	"	fninit\n"
	"	pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
	"	ret\n");

static void trial_caught(int number, siginfo_t *info, void *context)
{
	ucontext_t *state = context;
	long ignored;

	/* The bytes may have changed the base of FS, which the C library needs. */
	__asm__ volatile("syscall"
			 : "=a"(ignored)
			 : "a"(SYS_arch_prctl), "D"(ARCH_SET_FS), "S"(trial_thread_base)
			 : "rcx", "r11", "memory");
	trial_seen = (struct trial){number,
				    info->si_code,
				    (uint64_t)info->si_addr,
				    (uint64_t)state->uc_mcontext.gregs[REG_RIP],
				    (uint64_t)state->uc_mcontext.gregs[REG_EFL],
				    (uint64_t)state->uc_mcontext.gregs[REG_RAX]};
	state->uc_mcontext.gregs[REG_RIP] = (long long)trial_landing;
	state->uc_mcontext.gregs[REG_RSP] = (long long)trial_stack_pointer;
	state->uc_mcontext.gregs[REG_EFL] = 0x202;
	state->uc_mcontext.gregs[REG_CSGSFS] = 0x002b000000000033; /* CS, GS, FS, SS */
}

static inline void trial_prepare(void)
{
	static const int numbers[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE, SIGSYS, SIGALRM};
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;

	use_signal_stack();
	for (size_t i = 0; i < EVERY(numbers); i++)
		handle(numbers[i], trial_caught, SA_ONSTACK);
	CHECK(mmap((void *)SCRATCH, 16 * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0) == (void *)SCRATCH, "scratch");
	CHECK(mmap((void *)CODE, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, flags, -1, 0) == (void *)CODE, "code");
	CHECK(!syscall(SYS_arch_prctl, ARCH_GET_FS, &trial_thread_base), "arch_prctl");
}

static inline struct trial trial(const uint8_t *bytes, size_t length)
{
	memset((void *)CODE, 0xcc, 256);
	memcpy((void *)(CODE + 64), bytes, length);
	memset((void *)(SCRATCH + 0x8000), 0, 64);
	memset(&trial_seen, 0, sizeof trial_seen);
	trial_target = CODE + 64;
	trial_run();
	return trial_seen;
}

static inline const char *signal_name(int number)
{
	switch (number) {
	case SIGSEGV:
		return "SEGV";
	case SIGBUS:
		return "BUS";
	case SIGILL:
		return "ILL";
	case SIGTRAP:
		return "TRAP";
	case SIGFPE:
		return "FPE";
	case SIGSYS:
		return "SYS";
	case SIGALRM:
		return "ALRM";
	default:
		return "none";
	}
}
