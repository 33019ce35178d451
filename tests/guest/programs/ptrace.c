/*
 * ptrace: single steps counted to the instruction, system calls traced and changed, breakpoints by int3 and by debug
 * registers, registers set to wild values, attaching to a running program.
 */
#include "common.h"
#include <elf.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>

extern char step_first[], step_last[], count_function[], behind_count_function[];
static volatile long watched[4], counter;

static struct user_regs_struct registers_of(pid_t child)
{
	struct user_regs_struct registers;

	CHECK(!ptrace(PTRACE_GETREGS, child, NULL, &registers), "registers of %d", child);
	return registers;
}

static void wait_stopped(pid_t child, int number)
{
	int status = status_of(child);

	CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == number, "status %#x, not a stop by %d", status, number);
}

static void resume(enum __ptrace_request how, pid_t child, int number)
{
	CHECK(!ptrace(how, child, NULL, (void *)(long)number), "request %d", how);
}

/* A child that stops first and then does `work`. */
static pid_t traced(void (*work)(void))
{
	pid_t child = fork();

	if (!child) {
		CHECK(!ptrace(PTRACE_TRACEME, 0, NULL, NULL), "PTRACE_TRACEME");
		raise(SIGSTOP);
		work();
		_exit(0);
	}
	wait_stopped(child, SIGSTOP);
	return child;
}

static void finish(pid_t child)
{
	resume(PTRACE_CONT, child, 0);
	must_succeed(child);
}

static void __attribute__((noinline)) loop(void)
{
	/* 1 + 2 * 40 instructions, and 3 that are special. */
	__asm__ volatile("	sub $128, %%rsp\n"
			 "step_first:\n"
			 "	mov $40, %%ecx\n"
			 "1:	dec %%ecx\n"
			 "	jnz 1b\n"
			 "	pushf\n"
			 "	pop %%rax\n"
			 "	cpuid\n"
			 "step_last:\n"
			 "	add $128, %%rsp\n" ::
				 : "rax", "rbx", "rcx", "rdx", "memory", "cc");
}

/* From one label to the other there are 84 instructions; each step is one. */
static long steps(void)
{
	pid_t child = traced(loop);
	bool inside = false;
	long count = 0;

	for (long i = 0; i < 100000; i++) {
		uint64_t rip = registers_of(child).rip;

		if (rip == (uint64_t)step_first)
			inside = true;
		if (rip == (uint64_t)step_last)
			break;
		CHECK(!inside || (rip >= (uint64_t)step_first && rip < (uint64_t)step_last), "a step to %#lx", rip);
		count += inside;
		resume(PTRACE_SINGLESTEP, child, 0);
		wait_stopped(child, SIGTRAP);
	}
	CHECK(count == 84, "%ld steps for 84 instructions", count);
	finish(child);
	return count;
}

static void call_and_fault(void)
{
	char *memory = pages(1, PROT_READ | PROT_WRITE);

	for (int i = 0; i < 3; i++)
		syscall(SYS_getppid);
	*(volatile char *)memory = 1;
	raise(SIGUSR1);
}

static void nothing(int number, siginfo_t *info, void *context)
{
	(void)number, (void)info, (void)context;
	counter++;
}

/* Steps through system calls, a page fault and a signal handler to the end: a step may not be lost or run away. */
static long steps_to_the_end(void)
{
	handle(SIGUSR1, nothing, 0);
	pid_t child = traced(call_and_fault);
	long count = 0;

	for (int number = 0;; count++) {
		resume(PTRACE_SINGLESTEP, child, number);
		int status = status_of(child);

		if (WIFEXITED(status)) {
			CHECK(WEXITSTATUS(status) == 0, "status %#x", status);
			break;
		}
		CHECK(WIFSTOPPED(status), "status %#x", status);
		number = WSTOPSIG(status) == SIGTRAP ? 0 : WSTOPSIG(status);
		CHECK(number == 0 || number == SIGUSR1, "signal %d", number);
		CHECK(count < 20000, "it never ends");
	}
	CHECK(count > 100, "only %ld steps", count);
	return count;
}

static void calls(void)
{
	for (int i = 0; i < 10; i++) {
		CHECK(syscall(SYS_getppid) == 4242, "the tracer's result");
		CHECK(syscall(SYS_getuid, 11, 22, 33) == 77, "the tracer's call");
	}
	_exit(0);
}

/* What strace does, and results and numbers changed on the way. */
static long system_calls(void)
{
	pid_t child = traced(calls);
	long seen = 0;
	bool inside = false;

	CHECK(!ptrace(PTRACE_SETOPTIONS, child, NULL, (void *)PTRACE_O_TRACESYSGOOD), "options");
	for (;;) {
		resume(PTRACE_SYSCALL, child, 0);
		int status = status_of(child);

		if (WIFEXITED(status)) {
			CHECK(WEXITSTATUS(status) == 0, "status %#x", status);
			break;
		}
		CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == (SIGTRAP | 0x80), "status %#x", status);
		struct user_regs_struct registers = registers_of(child);

		inside = !inside;
		if (inside && registers.orig_rax == SYS_getuid) {
			CHECK(registers.rax == (unsigned long long)-ENOSYS, "rax %#llx before the call", registers.rax);
			CHECK(registers.rdi == 11 && registers.rsi == 22 && registers.rdx == 33, "arguments");
			registers.orig_rax = -1ULL; /* no call at all */
			CHECK(!ptrace(PTRACE_SETREGS, child, NULL, &registers), "registers");
		} else if (!inside && registers.orig_rax == -1ULL) {
			registers.rax = 77;
			CHECK(!ptrace(PTRACE_SETREGS, child, NULL, &registers), "registers");
			seen++;
		} else if (!inside && registers.orig_rax == SYS_getppid) {
			CHECK((long)registers.rax == getpid(), "getppid gave %lld", registers.rax);
			registers.rax = 4242;
			CHECK(!ptrace(PTRACE_SETREGS, child, NULL, &registers), "registers");
			seen++;
		}
	}
	CHECK(seen == 20, "%ld calls", seen);
	return seen;
}

static void __attribute__((noinline)) count_many(void)
{
	for (int i = 0; i < 30; i++) {
		__asm__ volatile("count_function:\n	nop\nbehind_count_function:\n" ::: "memory");
		watched[1] = i;
		counter++;
	}
	CHECK(counter == 30, "%ld rounds", counter);
}

/* int3 over an instruction, stepped over with the original byte in place, as debuggers do. */
static long soft_breakpoints(void)
{
	counter = 0;
	pid_t child = traced(count_many);
	long word = ptrace(PTRACE_PEEKTEXT, child, count_function, NULL), hits = 0;

	CHECK((word & 0xff) == 0x90, "text %#lx", word);
	for (;;) {
		CHECK(!ptrace(PTRACE_POKETEXT, child, count_function, (word & ~0xffL) | 0xcc), "text");
		resume(PTRACE_CONT, child, 0);
		int status = status_of(child);

		if (WIFEXITED(status)) {
			CHECK(WEXITSTATUS(status) == 0, "status %#x", status);
			break;
		}
		CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP, "status %#x", status);
		struct user_regs_struct registers = registers_of(child);

		CHECK(registers.rip == (uint64_t)count_function + 1, "rip %#llx", registers.rip);
		registers.rip--;
		CHECK(!ptrace(PTRACE_SETREGS, child, NULL, &registers), "registers");
		CHECK(!ptrace(PTRACE_POKETEXT, child, count_function, word), "text");
		resume(PTRACE_SINGLESTEP, child, 0);
		wait_stopped(child, SIGTRAP);
		CHECK(registers_of(child).rip == (uint64_t)behind_count_function, "a step over the breakpoint");
		hits++;
	}
	CHECK(hits == 30, "%ld hits", hits);
	CHECK(((uint8_t *)count_function)[0] == 0x90, "the breakpoint is in the parent too");
	return hits;
}

/* Debug registers: execution (kind 0) or writes (kind 1, 8 bytes). 0 where the kernel refuses them. */
static long debug_registers(int kind)
{
	size_t offset = offsetof(struct user, u_debugreg);

	counter = 0;
	pid_t child = traced(count_many);
	void *address = kind ? (void *)(uintptr_t)&watched[1] : count_function;
	long hits = 0;

	if (ptrace(PTRACE_POKEUSER, child, offset, address) ||
	    ptrace(PTRACE_POKEUSER, child, offset + 7 * 8, kind ? 0x90001L : 1L)) {
		finish(child);
		return 0;
	}
	for (;;) {
		resume(PTRACE_CONT, child, 0);
		int status = status_of(child);

		if (WIFEXITED(status)) {
			CHECK(WEXITSTATUS(status) == 0, "status %#x", status);
			break;
		}
		CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP, "status %#x", status);
		if (!kind)
			CHECK(registers_of(child).rip == (uint64_t)count_function, "rip");
		CHECK(ptrace(PTRACE_PEEKUSER, child, offset + 6 * 8, NULL) & 1, "DR6 does not tell");
		hits++;
	}
	CHECK(hits == 30, "%ld hits of 30", hits);
	return hits;
}

static long execution_breakpoints(void)
{
	return debug_registers(0);
}

static long watchpoints(void)
{
	return debug_registers(1);
}

static void spin(void)
{
	for (;;)
		counter++;
}

/* Registers that cannot be: refused, or the end of the child alone. */
static long wild_registers(void)
{
	static const struct {
		unsigned long rip, rsp, cs, ss, flags;
	} wild[] = {
		{0x4000000000000000, 0, 0, 0, 0},
		{0xffffeb0000000000, 0, 0, 0, 0},
		{-1UL, 0, 0, 0, 0},
		{0x800000000000, 0, 0, 0, 0},
		{0, 0, 0, 0, 0},
		{0xffffeb0000000000, 0xffffeb0000001000, 0, 0, 0},
		{0, 0, 0x10, 0, 0},
		{0, 0, 0x13, 0x1b, 0},
		{0, 0, 0xfffb, 0, 0},
		{0, 0, 0, 0xfffb, 0},
		{0x4000000000000000, 0, 0, 0, 0x37fd7},
	};
	long done = 0;

	for (size_t i = 0; i < EVERY(wild); i++) {
		for (int step = 0; step < 2; step++) {
			pid_t child = traced(spin);
			struct user_regs_struct registers = registers_of(child);

			registers.rip = wild[i].cs || wild[i].ss ? registers.rip : wild[i].rip;
			registers.rsp = wild[i].rsp ? wild[i].rsp : registers.rsp;
			registers.cs = wild[i].cs ? wild[i].cs : registers.cs;
			registers.ss = wild[i].ss ? wild[i].ss : registers.ss;
			registers.eflags |= wild[i].flags;
			registers.orig_rax = -1ULL;
			if (ptrace(PTRACE_SETREGS, child, NULL, &registers)) {
				CHECK(errno == EIO, "refused");
				kill(child, SIGKILL);
				int status = status_of(child);
				CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "status %#x", status);
				done++;
				continue;
			}
			resume(step ? PTRACE_SINGLESTEP : PTRACE_CONT, child, 0);
			int status = status_of(child);
			int number = WIFSTOPPED(status) ? WSTOPSIG(status) : 0;

			CHECK(number == SIGSEGV || number == SIGTRAP || number == SIGBUS, "state %zu: status %#x", i, status);
			kill(child, SIGKILL);
			status = status_of(child);
			CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "status %#x", status);
			done++;
		}
	}
	return done;
}

/* A running child is attached to, looked at, and let go; it goes on. */
static long attach(void)
{
	volatile long *shared = shared_pages(1);
	pid_t child = fork();

	if (!child)
		for (;;)
			(*shared)++;
	for (int i = 0; i < 10; i++) {
		CHECK(!ptrace(PTRACE_ATTACH, child, NULL, NULL), "attach");
		wait_stopped(child, SIGSTOP);
		long value = *shared;

		CHECK(registers_of(child).rip, "rip");
		CHECK(*shared == value, "it runs while it is stopped");
		CHECK(!ptrace(PTRACE_DETACH, child, NULL, NULL), "detach");
		for (double until = now() + 1; *shared == value;)
			CHECK(now() < until, "it does not go on");
	}
	kill(child, SIGKILL);
	CHECK(WIFSIGNALED(status_of(child)), "killed");
	munmap((void *)(uintptr_t)shared, PAGE);
	return 10;
}

static void load_and_stop(void)
{
	uint64_t given[2] = {0x1122334455667788, 0x99aabbccddeeff00}, found[2];

	__asm__ volatile("	movdqu %1, %%xmm7\n"
			 "	int3\n"
			 "	movdqu %%xmm7, %0\n"
			 : "=m"(found)
			 : "m"(given)
			 : "xmm7");
	_exit(found[0] == 0x4711 && found[1] == given[1] ? 0 : 1);
}

/* Vector registers through the whole extended state, read and changed. */
static long vector_registers(void)
{
	static uint8_t area[16384] __attribute__((aligned(64)));
	pid_t child = traced(load_and_stop);
	struct iovec vector = {area, sizeof area};

	resume(PTRACE_CONT, child, 0);
	wait_stopped(child, SIGTRAP);
	CHECK(!ptrace(PTRACE_GETREGSET, child, (void *)NT_X86_XSTATE, &vector), "extended state");
	uint64_t *xmm7 = (uint64_t *)(area + 160 + 16 * 7);

	CHECK(xmm7[0] == 0x1122334455667788, "xmm7 is %#lx", xmm7[0]);
	xmm7[0] = 0x4711;
	CHECK(!ptrace(PTRACE_SETREGSET, child, (void *)NT_X86_XSTATE, &vector), "extended state");
	finish(child);
	return 1;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	repeat("steps", 0.15, steps);
	repeat("steps_to_the_end", 0.15, steps_to_the_end);
	repeat("system_calls", 0.1, system_calls);
	repeat("soft_breakpoints", 0.1, soft_breakpoints);
	repeat("attach", 0.1, attach);
	repeat("vector_registers", 0.1, vector_registers);
	repeat("execution_breakpoints?", 0.1, execution_breakpoints);
	repeat("watchpoints?", 0.1, watchpoints);
	repeat("wild_registers", 0.1, wild_registers);
	return end();
}
