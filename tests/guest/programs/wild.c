/*
 * Programs in wild states: jumps to where nothing is, stack pointers that are none, and returns from signal handlers to
 * bad selectors, instruction pointers and flags. Each ends in a signal, which finds its handler on its own stack.
 * An address of the kernel that is mapped is only ever a stack pointer here, and never used as one.
 */
#include "trial.h"

enum { KEEP = -1 };
#define ANY 0
#define USUAL (CODE + 64)
#define LOW_CODE 0x10000000UL
#define NOTHING_THERE 0xffffeb0000000000UL /* a hole in the kernel's half */
#define NON_CANONICAL 0x4000123400000000UL

static const struct state {
	const char *name;
	int number; /* the signal; 0: SIGSEGV, SIGILL, SIGBUS or SIGTRAP */
	uint64_t rip, rsp;
	int cs, ss;
	uint64_t flags;
	const char *code; /* at USUAL; int3 if there is none */
} states[] = {
	{"nothing wild", SIGTRAP, USUAL, SCRATCH + 0x8000, KEEP, KEEP, 0x202, NULL},
	{"rip non-canonical", SIGSEGV, NON_CANONICAL, SCRATCH + 0x8000, KEEP, KEEP, 0x202, NULL},
	{"rip first non-canonical", SIGSEGV, 0x800000000000, SCRATCH + 0x8000, KEEP, KEEP, 0x202, NULL},
	{"rip behind the last page", SIGSEGV, 0x7ffffffff000, SCRATCH + 0x8000, KEEP, KEEP, 0x202, NULL},
	{"rip 0", SIGSEGV, 0, SCRATCH + 0x8000, KEEP, KEEP, 0x202, NULL},
	{"rip in a hole of the upper half", SIGSEGV, NOTHING_THERE, SCRATCH + 0x8000, KEEP, KEEP, 0x202, NULL},
	{"rip -1", SIGSEGV, -1UL, SCRATCH + 0x8000, KEEP, KEEP, 0x202, NULL},
	{"rip of the vsyscall page", SIGSEGV, 0xffffffffff600000, SCRATCH + 0x8000, KEEP, KEEP, 0x202, NULL},
	{"rip and rsp in a hole", SIGSEGV, NOTHING_THERE, NOTHING_THERE + 64, KEEP, KEEP, 0x202, NULL},
	{"rip in a hole, rsp 0", SIGSEGV, NOTHING_THERE, 0, KEEP, KEEP, 0x202, NULL},
	{"rip in a hole, rsp -1", SIGSEGV, NOTHING_THERE, -1UL, KEEP, KEEP, 0x202, NULL},
	{"rip in data", SIGSEGV, SCRATCH + 64, SCRATCH + 0x8000, KEEP, KEEP, 0x202, NULL},
	{"rsp 0", SIGTRAP, USUAL, 0, KEEP, KEEP, 0x202, NULL},
	{"rsp non-canonical", SIGTRAP, USUAL, NON_CANONICAL, KEEP, KEEP, 0x202, NULL},
	{"rsp -8", SIGTRAP, USUAL, -8UL, KEEP, KEEP, 0x202, NULL},
	{"rsp in a hole", SIGTRAP, USUAL, NOTHING_THERE, KEEP, KEEP, 0x202, NULL},
	{"rsp in the kernel's text", SIGTRAP, USUAL, 0xffffffff81000100, KEEP, KEEP, 0x202, NULL},
	{"rsp 0, cli", SIGSEGV, USUAL, 0, KEEP, KEEP, 0x202, "\xfa"},
	{"rsp 0, ud2", SIGILL, USUAL, 0, KEEP, KEEP, 0x202, "\x0f\x0b"},
	{"rsp non-canonical, cli", SIGSEGV, USUAL, NON_CANONICAL, KEEP, KEEP, 0x202, "\xfa"},
	{"rsp in a hole, cli", SIGSEGV, USUAL, NOTHING_THERE, KEEP, KEEP, 0x202, "\xfa"},
	{"rsp in the kernel's text, cli", SIGSEGV, USUAL, 0xffffffff81000100, KEEP, KEEP, 0x202, "\xfa"},
	{"rsp 0, page fault", SIGSEGV, USUAL, 0, KEEP, KEEP, 0x202, "\x8a\x04\x25\x10\x20\x30\x40"},
	{"rsp in a hole, page fault", SIGSEGV, USUAL, NOTHING_THERE, KEEP, KEEP, 0x202, "\x8a\x04\x25\x10\x20\x30\x40"},
	{"rsp non-canonical, page fault", SIGSEGV, USUAL, NON_CANONICAL, KEEP, KEEP, 0x202, "\x8a\x04\x25\x10\x20\x30\x40"},
	/* getppid */
	{"rsp 0, system call", SIGTRAP, USUAL, 0, KEEP, KEEP, 0x202, "\xb8\x6e\x10\x20\x30\x0f\x05"},
	{"rsp in a hole, system call", SIGTRAP, USUAL, NOTHING_THERE, KEEP, KEEP, 0x202, "\xb8\x6e\x10\x20\x30\x0f\x05"},
	{"rsp non-canonical, system call", SIGTRAP, USUAL, NON_CANONICAL, KEEP, KEEP, 0x202, "\xb8\x6e\x10\x20\x30\x0f\x05"},
	/* an endless loop, ended by SIGALRM, until when timer interrupts come */
	{"rsp 0, preempted", SIGALRM, USUAL, 0, KEEP, KEEP, 0x202, "\xeb\xfe"},
	{"rsp non-canonical, preempted", SIGALRM, USUAL, NON_CANONICAL, KEEP, KEEP, 0x202, "\xeb\xfe"},
	{"rsp in a hole, preempted", SIGALRM, USUAL, NOTHING_THERE, KEEP, KEEP, 0x202, "\xeb\xfe"},
	{"rsp in the kernel's text, preempted", SIGALRM, USUAL, 0xffffffff81000100, KEEP, KEEP, 0x202, "\xeb\xfe"},
	{"cs 0", SIGSEGV, USUAL, SCRATCH + 0x8000, 0, KEEP, 0x202, NULL},
	{"cs of the kernel", SIGSEGV, USUAL, SCRATCH + 0x8000, 0x10, KEEP, 0x202, NULL},
	{"cs of data", SIGSEGV, USUAL, SCRATCH + 0x8000, 0x2b, KEEP, 0x202, NULL},
	{"cs in a local table", SIGSEGV, USUAL, SCRATCH + 0x8000, 0x07, KEEP, 0x202, NULL},
	{"cs of the task segment", SIGSEGV, USUAL, SCRATCH + 0x8000, 0x40, KEEP, 0x202, NULL},
	{"cs behind the table", SIGSEGV, USUAL, SCRATCH + 0x8000, 0xfffb, KEEP, 0x202, NULL},
	{"cs 0 and rip non-canonical", SIGSEGV, NON_CANONICAL, SCRATCH + 0x8000, 0, KEEP, 0x202, NULL},
	{"cs of the kernel and rip in a hole", SIGSEGV, NOTHING_THERE, SCRATCH + 0x8000, 0x10, KEEP, 0x202, NULL},
	{"ss 0", SIGSEGV, USUAL, SCRATCH + 0x8000, KEEP, 0, 0x202, NULL},
	{"ss of the kernel", SIGSEGV, USUAL, SCRATCH + 0x8000, KEEP, 0x18, 0x202, NULL},
	{"ss of code", ANY, USUAL, SCRATCH + 0x8000, KEEP, 0x33, 0x202, NULL},
	{"ss in a local table", SIGSEGV, USUAL, SCRATCH + 0x8000, KEEP, 0x07, 0x202, NULL},
	{"ss behind the table", SIGSEGV, USUAL, SCRATCH + 0x8000, KEEP, 0xfffb, 0x202, NULL},
	{"ss 0, rsp 0", SIGSEGV, USUAL, 0, KEEP, 0, 0x202, NULL},
	{"flags: interrupts off", SIGTRAP, USUAL, SCRATCH + 0x8000, KEEP, KEEP, 0x2, NULL},
	{"flags: IOPL 3", SIGTRAP, USUAL, SCRATCH + 0x8000, KEEP, KEEP, 0x3202, NULL},
	{"flags: IOPL 3 and out", SIGSEGV, USUAL, SCRATCH + 0x8000, KEEP, KEEP, 0x3202, "\xe6\x64"},
	{"flags: nested task", SIGTRAP, USUAL, SCRATCH + 0x8000, KEEP, KEEP, 0x4202, NULL},
	{"flags: virtual 8086", SIGTRAP, USUAL, SCRATCH + 0x8000, KEEP, KEEP, 0x20202, NULL},
	{"flags: virtual interrupts", SIGTRAP, USUAL, SCRATCH + 0x8000, KEEP, KEEP, 0x180202, NULL},
	{"flags: trap", SIGTRAP, USUAL, SCRATCH + 0x8000, KEEP, KEEP, 0x302, "\x90\x90\x90"},
	{"flags: resume and trap", SIGTRAP, USUAL, SCRATCH + 0x8000, KEEP, KEEP, 0x10302, "\x90\x90\x90"},
	{"flags: trap, rip in a hole", ANY, NOTHING_THERE, SCRATCH + 0x8000, KEEP, KEEP, 0x302, NULL},
	{"flags: trap, rip non-canonical", ANY, NON_CANONICAL, SCRATCH + 0x8000, KEEP, KEEP, 0x302, NULL},
	{"flags: alignment check and a misaligned read", SIGBUS, USUAL, SCRATCH + 0x8000, KEEP, KEEP, 0x40202,
	 "\x48\xb8\x03\x80\x00\x00\x00\x20\x00\x00\x8b\x00"},
	{"flags: alignment check and a page fault", SIGSEGV, USUAL, SCRATCH + 0x8000, KEEP, KEEP, 0x40202,
	 "\x8a\x04\x25\x10\x20\x30\x40"},
	{"flags: all", ANY, USUAL, SCRATCH + 0x8000, KEEP, KEEP, -1UL, NULL},
	/* 32-bit code: it may run or be refused; its system calls do nothing but come back or fail */
	{"32-bit int3", ANY, LOW_CODE, LOW_CODE + 0x800, 0x23, KEEP, 0x202, "\xcc"},
	{"32-bit int 0x80", ANY, LOW_CODE, LOW_CODE + 0x800, 0x23, KEEP, 0x202, "\xb8\xff\xff\xff\x7f\xcd\x80"},
	{"32-bit syscall", ANY, LOW_CODE, LOW_CODE + 0x800, 0x23, KEEP, 0x202, "\xb8\xff\xff\xff\x7f\x0f\x05"},
	{"32-bit sysenter", ANY, LOW_CODE, LOW_CODE + 0x800, 0x23, KEEP, 0x202, "\xb8\xff\xff\xff\x7f\x0f\x34"},
	{"32-bit push, pop, inc", ANY, LOW_CODE, LOW_CODE + 0x800, 0x23, KEEP, 0x202, "\x40\x50\x58"},
	{"32-bit cli", ANY, LOW_CODE, LOW_CODE + 0x800, 0x23, KEEP, 0x202, "\xfa"},
	{"32-bit page fault", ANY, LOW_CODE, LOW_CODE + 0x800, 0x23, KEEP, 0x202, "\xa1\x10\x20\x30\x40"},
	{"32-bit preempted", ANY, LOW_CODE, LOW_CODE + 0x800, 0x23, KEEP, 0x202, "\xeb\xfe"},
	{"32-bit and rip high", ANY, USUAL, LOW_CODE + 0x800, 0x23, KEEP, 0x202, NULL},
	{"32-bit and rip in a hole", ANY, NOTHING_THERE, LOW_CODE + 0x800, 0x23, KEEP, 0x202, NULL},
};

static const struct state *current;
uint64_t raising_pid;
void raise_here(void);

__asm__("raise_here:\n"
	"	mov raising_pid(%rip), %edi\n"
	"	mov $10, %esi\n" /* SIGUSR1 */
	"	mov $62, %eax\n" /* kill */
	"	syscall\n"
	"	int3\n");

static void go_wild(int number, siginfo_t *info, void *context)
{
	ucontext_t *state = context;
	greg_t *registers = state->uc_mcontext.gregs;
	uint64_t selectors = (uint64_t)registers[REG_CSGSFS];

	(void)number, (void)info;
	if (current->cs != KEEP)
		selectors = (selectors & ~0xffffUL) | (uint64_t)current->cs;
	if (current->ss != KEEP)
		selectors = (selectors & ~(0xffffUL << 48)) | (uint64_t)current->ss << 48;
	registers[REG_CSGSFS] = (greg_t)selectors;
	registers[REG_RIP] = (greg_t)current->rip;
	registers[REG_RSP] = (greg_t)current->rsp;
	registers[REG_EFL] = (greg_t)current->flags;
}

static struct trial run(const struct state *state)
{
	size_t length = state->code ? strlen(state->code) : 0;
	uint8_t code[16];
	bool loops = state->code && !memcmp(state->code, "\xeb\xfe", 2);

	/* Zeros are not in these strings but as placeholders. */
	memset((void *)CODE, 0xcc, 256);
	memset((void *)LOW_CODE, 0xcc, 256);
	if (strstr(state->name, "misaligned"))
		length = 12;
	memcpy(code, state->code ? state->code : "", length);
	if (strstr(state->name, "system call"))
		code[2] = code[3] = code[4] = 0;
	memcpy((void *)USUAL, code, length);
	memcpy((void *)LOW_CODE, code, length);
	memset(&trial_seen, 0, sizeof trial_seen);
	current = state;
	trial_target = (uint64_t)raise_here;
	raising_pid = (uint64_t)getpid();
	if (loops)
		interval(ITIMER_REAL, 5000);
	trial_run();
	if (loops)
		interval(ITIMER_REAL, 0);
	return trial_seen;
}

static bool fits(const struct state *state, int number)
{
	if (state->number)
		return number == state->number;
	return number == SIGSEGV || number == SIGILL || number == SIGTRAP || number == SIGBUS || number == SIGALRM;
}

static long all(void)
{
	for (size_t i = 0; i < EVERY(states); i++) {
		struct trial seen = run(&states[i]);

		CHECK(fits(&states[i], seen.number), "%s: signal %d (%s), code %d, rip %#lx, address %#lx", states[i].name,
		      seen.number, signal_name(seen.number), seen.code, seen.rip, seen.address);
		CHECK((seen.flags & 0x3200) == 0x200, "%s: flags %#lx", states[i].name, seen.flags);
	}
	return EVERY(states);
}

/* The same without a stack for the signal: the program is killed. */
static long killed(void)
{
	static const uint64_t pointers[] = {0, NON_CANONICAL, NOTHING_THERE, -8UL, 0xffffffff81000100};

	for (size_t i = 0; i < EVERY(pointers); i++) {
		pid_t child = fork();

		if (!child) {
			signal(SIGSEGV, SIG_DFL);
			handle(SIGUSR1, trial_caught, 0);
			__asm__ volatile("mov %0, %%rsp; mov %1, %%edi; mov $10, %%esi; mov $62, %%eax; syscall; ud2" ::"r"(pointers[i]),
					 "r"(getpid())
					 : "memory");
		}
		int status = status_of(child);
		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV, "rsp %#lx: status %#x", pointers[i], status);
	}
	return EVERY(pointers);
}

int main(int argc, char **argv)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;

	begin(argc, argv);
	trial_prepare();
	handle(SIGUSR1, go_wild, SA_ONSTACK);
	CHECK(mmap((void *)LOW_CODE, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, flags, -1, 0) == (void *)LOW_CODE, "low code");
	if (argc > 2) { /* a list, from the state of this number on */
		for (size_t i = (size_t)atol(argv[2]); i < EVERY(states) && i < (size_t)atol(argc > 3 ? argv[3] : "999"); i++) {
			printf("%3zu %-45s ", i, states[i].name);
			fflush(stdout);
			struct trial seen = run(&states[i]);

			printf("%s %d rip %#lx address %#lx flags %#lx %s\n", signal_name(seen.number), seen.code, seen.rip,
			       seen.address, seen.flags, fits(&states[i], seen.number) ? "" : "UNEXPECTED");
		}
		return 0;
	}
	repeat("states", 0.8, all);
	repeat("killed", 0.2, killed);
	return end();
}
