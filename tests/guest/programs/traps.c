/* Traps that a program sets for itself: the trap flag, int3, int1; flags that must not survive into the kernel. */
#include "common.h"

static volatile long traps, other_traps;
static volatile uintptr_t first, last;

static void on_trap(int number, siginfo_t *info, void *context)
{
	ucontext_t *state = context;
	uintptr_t rip = (uintptr_t)state->uc_mcontext.gregs[REG_RIP];

	(void)number;
	if (info->si_code == TRAP_TRACE && rip >= first && rip <= last)
		traps++;
	else
		other_traps++;
}

/* With the trap flag set by the program itself, each of 20 instructions traps, and so does the popf that clears it. */
static long trap_flag(void)
{
	extern char tf_first[], tf_last[];

	handle(SIGTRAP, on_trap, 0);
	traps = other_traps = 0;
	first = (uintptr_t)tf_first, last = (uintptr_t)tf_last;
	__asm__ volatile("	sub $128, %%rsp\n"
			 "	pushf\n"
			 "	orq $0x100, (%%rsp)\n"
			 "	popf\n"
			 "tf_first:\n"
			 "	.rept 20\n	nop\n	.endr\n"
			 "	pushf\n"
			 "	andq $~0x100, (%%rsp)\n"
			 "	popf\n"
			 "tf_last:\n"
			 "	nop\n"
			 "	add $128, %%rsp\n" ::
				 : "memory", "cc");
	/* nop 20, pushf, and, popf: the trap comes after each; the one after popf (which clears it) comes too. */
	CHECK(traps == 23 && other_traps == 0, "%ld traps, %ld elsewhere", traps, other_traps);
	return traps;
}

/* The trap flag over a system call: the kernel does not trap; the program does, behind it. */
static long trap_flag_over_call(void)
{
	extern char call_first[], call_last[];
	long result = SYS_getppid;

	handle(SIGTRAP, on_trap, 0);
	traps = other_traps = 0;
	first = (uintptr_t)call_first, last = (uintptr_t)call_last;
	__asm__ volatile("	sub $128, %%rsp\n"
			 "	pushf\n"
			 "	orq $0x100, (%%rsp)\n"
			 "	popf\n"
			 "call_first:\n"
			 "	syscall\n"
			 "	pushf\n"
			 "	andq $~0x100, (%%rsp)\n"
			 "	popf\n"
			 "call_last:\n"
			 "	nop\n"
			 "	add $128, %%rsp\n"
			 : "+a"(result)::"memory", "cc", "rcx", "r11");
	CHECK(result == getppid(), "getppid gave %ld", result);
	/* Behind pushf, and, popf; behind the system call itself only if the kernel came back by iretq. */
	CHECK(traps >= 3 && traps <= 4 && other_traps == 0, "%ld traps, %ld elsewhere", traps, other_traps);
	return traps;
}

/* The trap flag over an instruction that faults: the page fault first, the trap once it is done. */
static long trap_flag_over_fault(void)
{
	extern char fault_first[], fault_last[];
	char *memory = pages(4, PROT_READ | PROT_WRITE);

	handle(SIGTRAP, on_trap, 0);
	traps = other_traps = 0;
	first = (uintptr_t)fault_first, last = (uintptr_t)fault_last;
	__asm__ volatile("	sub $128, %%rsp\n"
			 "	pushf\n"
			 "	orq $0x100, (%%rsp)\n"
			 "	popf\n"
			 "fault_first:\n"
			 "	movb $1, (%0)\n"
			 "	movb $2, 4096(%0)\n"
			 "	movb $3, 8192(%0)\n"
			 "	pushf\n"
			 "	andq $~0x100, (%%rsp)\n"
			 "	popf\n"
			 "fault_last:\n"
			 "	nop\n"
			 "	add $128, %%rsp\n" ::"r"(memory)
			 : "memory", "cc");
	CHECK(traps == 6 && other_traps == 0, "%ld traps, %ld elsewhere", traps, other_traps);
	CHECK(memory[0] == 1 && memory[PAGE] == 2 && memory[2 * PAGE] == 3, "a write was lost");
	munmap(memory, 4 * PAGE);
	return traps;
}

static volatile uintptr_t breakpoint_rip;

static void on_breakpoint(int number, siginfo_t *info, void *context)
{
	ucontext_t *state = context;

	(void)number;
	CHECK(info->si_code == SI_KERNEL, "code %d", info->si_code);
	breakpoint_rip = (uintptr_t)state->uc_mcontext.gregs[REG_RIP];
	traps++;
}

static long breakpoints(void)
{
	extern char behind_int3[], behind_long_int3[];

	handle(SIGTRAP, on_breakpoint, 0);
	traps = 0;
	for (int i = 0; i < 50; i++) {
		__asm__ volatile("	int3\nbehind_int3%=:\n	.globl behind_int3\n	.set behind_int3, behind_int3%=\n" ::
					 : "memory");
		CHECK(traps == 2 * i + 1 && breakpoint_rip == (uintptr_t)behind_int3, "rip %#lx", breakpoint_rip);
		__asm__ volatile(
			"	.byte 0xcd, 3\nlong%=:\n	.globl behind_long_int3\n	.set behind_long_int3, long%=\n" ::
				: "memory");
		CHECK(traps == 2 * i + 2 && breakpoint_rip == (uintptr_t)behind_long_int3, "rip %#lx", breakpoint_rip);
	}
	return traps;
}

static void on_int1(int number, siginfo_t *info, void *context)
{
	ucontext_t *state = context;
	uint8_t *rip = (uint8_t *)state->uc_mcontext.gregs[REG_RIP];

	(void)number;
	CHECK(info->si_code == TRAP_BRKPT || info->si_code == TRAP_TRACE, "code %d", info->si_code);
	if (*rip == 0xf1) /* some hypervisors report it before it is executed */
		state->uc_mcontext.gregs[REG_RIP]++;
	traps++;
}

static long int1(void)
{
	handle(SIGTRAP, on_int1, 0);
	traps = 0;
	for (int i = 0; i < 50; i++)
		__asm__ volatile(".byte 0xf1" ::: "memory");
	CHECK(traps == 50, "%ld traps", traps);
	return traps;
}

/*
 * Flags that would harm a kernel at the program's privilege level: alignment checks, the direction flag, nested task.
 * Set in the program, while it faults, calls and is preempted; they are still there afterwards, and nothing breaks.
 */
static long __attribute__((noinline)) with_flags(uint64_t flags, char *memory)
{
	uint64_t found;
	long result = SYS_getppid;

	__asm__ volatile("	sub $128, %%rsp\n"
			 "	pushf\n"
			 "	orq %[flags], (%%rsp)\n"
			 "	popf\n"
			 "	movq $1, (%[memory])\n" /* a page fault */
			 "	syscall\n"
			 "	movq $2, 4096(%[memory])\n"
			 "	mov $3000000, %%ecx\n" /* long enough for a timer interrupt */
			 "1:	dec %%ecx\n"
			 "	jnz 1b\n"
			 "	pushf\n"
			 "	pop %[found]\n"
			 "	pushf\n"
			 "	andq $~0x44500, (%%rsp)\n"
			 "	popf\n"
			 "	cld\n"
			 "	add $128, %%rsp\n"
			 : [found] "=&r"(found), "+a"(result)
			 : [flags] "r"(flags), [memory] "r"(memory)
			 : "memory", "cc", "rcx", "r11");
	flags &= ~0x4000UL; /* no program needs the flag for nested tasks: losing it is allowed, dying of it is not */
	CHECK((found & flags) == flags, "flags %#lx became %#lx", flags, found);
	CHECK((found & 0x3000) == 0, "the I/O privilege level is not 0: %#lx", found);
	CHECK(found & 0x200, "interrupts are off: %#lx", found);
	CHECK(result == getppid(), "getppid gave %ld", result);
	CHECK(*(volatile uint64_t *)memory == 1 && *(volatile uint64_t *)(memory + PAGE) == 2, "a write was lost");
	return 1;
}

static volatile long ticks;

static void on_tick(int number, siginfo_t *info, void *context)
{
	uint64_t flags;

	(void)number, (void)info, (void)context;
	__asm__ volatile("pushf; pop %0" : "=r"(flags));
	CHECK((flags & 0x500) == 0, "a handler began with flags %#lx", flags);
	ticks++;
}

static long flags_kept(void)
{
	static const uint64_t sets[] = {0x400, 0x40000, 0x4000, 0x200000, 0x40400, 0x44400};
	long done = 0;

	handle(SIGALRM, on_tick, SA_RESTART);
	for (int with_timer = 0; with_timer < 2; with_timer++) {
		interval(ITIMER_REAL, with_timer ? 400 : 0);
		for (size_t i = 0; i < EVERY(sets); i++) {
			/* The C code of a handler may be misaligned, so alignment checks are for the first pass. */
			if (with_timer && sets[i] & 0x40000)
				continue;
			char *memory = pages(2, PROT_READ | PROT_WRITE);

			done += with_flags(sets[i], memory);
			munmap(memory, 2 * PAGE);
		}
	}
	interval(ITIMER_REAL, 0);
	return done;
}

/* popf and iretq cannot raise the I/O privilege level or switch interrupts off. */
static long forbidden_flags(void)
{
	uint64_t found;

	__asm__ volatile("	sub $128, %%rsp\n"
			 "	pushf\n"
			 "	orq $0x3000, (%%rsp)\n"
			 "	andq $~0x200, (%%rsp)\n"
			 "	popf\n"
			 "	pushf\n"
			 "	pop %0\n"
			 "	add $128, %%rsp\n"
			 : "=r"(found)::"memory", "cc");
	CHECK((found & 0x3200) == 0x200, "popf left %#lx", found);
	__asm__ volatile("	sub $128, %%rsp\n"
			 "	mov %%ss, %%eax\n"
			 "	lea (%%rsp), %%rcx\n"
			 "	push %%rax\n"
			 "	push %%rcx\n"
			 "	pushf\n"
			 "	orq $0x3000, (%%rsp)\n"
			 "	andq $~0x200, (%%rsp)\n"
			 "	mov %%cs, %%eax\n"
			 "	push %%rax\n"
			 "	lea 1f(%%rip), %%rax\n"
			 "	push %%rax\n"
			 "	iretq\n"
			 "1:	pushf\n"
			 "	pop %0\n"
			 "	add $128, %%rsp\n"
			 : "=&r"(found)::"memory", "cc", "rax", "rcx");
	CHECK((found & 0x3200) == 0x200, "iretq left %#lx", found);
	return 2;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	repeat("trap_flag", 0.15, trap_flag);
	repeat("trap_flag_over_call", 0.15, trap_flag_over_call);
	repeat("trap_flag_over_fault", 0.15, trap_flag_over_fault);
	repeat("breakpoints", 0.15, breakpoints);
	repeat("int1", 0.1, int1);
	repeat("flags_kept", 0.2, flags_kept);
	repeat("forbidden_flags", 0.1, forbidden_flags);
	return end();
}
