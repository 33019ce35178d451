/* Signals: nested, on their own stack, during system calls, queued, mending faults, jumping out, in a storm. */
#include "common.h"

static const int chain[] = {SIGUSR1, SIGUSR2, SIGHUP, SIGWINCH, SIGURG, SIGCONT};
static volatile long depth, deepest, handled;

static void on_chain(int number, siginfo_t *info, void *context)
{
	volatile uint64_t local[32];
	unsigned long here = (unsigned long)depth;

	(void)context;
	CHECK(info->si_signo == number && number == chain[here], "signal %d at depth %lu", number, here);
	for (size_t i = 0; i < EVERY(local); i++)
		local[i] = here * 1000 + i;
	depth++;
	if (depth > deepest)
		deepest = depth;
	if (here + 1 < EVERY(chain))
		raise(chain[here + 1]);
	for (size_t i = 0; i < EVERY(local); i++)
		CHECK(local[i] == here * 1000 + i, "a local variable of a handler changed");
	depth--;
	handled++;
}

static long nested(void)
{
	handled = deepest = 0;
	for (size_t i = 0; i < EVERY(chain); i++)
		handle(chain[i], on_chain, 0);
	raise(chain[0]);
	CHECK(depth == 0 && deepest == (long)EVERY(chain) && handled == deepest, "%ld handlers ran", handled);
	return handled;
}

static char *signal_stack;

static void on_own_stack(int number, siginfo_t *info, void *context)
{
	char here;
	stack_t current;

	(void)info, (void)context;
	CHECK(&here >= signal_stack && &here < signal_stack + 16 * PAGE, "handler not on its own stack");
	CHECK(!sigaltstack(NULL, &current) && current.ss_flags == SS_ONSTACK, "flags %#x", current.ss_flags);
	handled++;
	if (number == SIGUSR1)
		raise(SIGUSR2);
}

static long own_stack(void)
{
	stack_t current;

	handled = 0;
	CHECK(!sigaltstack(NULL, &current), "sigaltstack");
	signal_stack = current.ss_sp;
	handle(SIGUSR1, on_own_stack, SA_ONSTACK);
	handle(SIGUSR2, on_own_stack, SA_ONSTACK);
	raise(SIGUSR1);
	CHECK(handled == 2, "%ld handlers", handled);
	return handled;
}

static volatile long ticks;

static void on_tick(int number, siginfo_t *info, void *context)
{
	(void)number, (void)info, (void)context;
	ticks++;
}

static long interrupted_calls(void)
{
	int ends[2];
	char byte;
	struct timespec second = {1, 0}, left = {0, 0};
	sigset_t none;
	long before;

	sigemptyset(&none);
	CHECK(!pipe(ends), "pipe");
	handle(SIGALRM, on_tick, 0);
	interval(ITIMER_REAL, 3000);
	before = ticks;
	CHECK(read(ends[0], &byte, 1) < 0 && errno == EINTR && ticks > before, "read was not interrupted");
	before = ticks;
	CHECK(nanosleep(&second, &left) < 0 && errno == EINTR && ticks > before, "nanosleep was not interrupted");
	/* All of it and the timer's slack, if it was interrupted at once. */
	CHECK((double)left.tv_sec + 1e-9 * (double)left.tv_nsec < 1.001, "%ld.%09ld s left", left.tv_sec, left.tv_nsec);
	before = ticks;
	CHECK(sigsuspend(&none) < 0 && errno == EINTR && ticks > before, "sigsuspend was not interrupted");

	/* With SA_RESTART the read goes on until there is something to read. */
	handle(SIGALRM, on_tick, SA_RESTART);
	pid_t child = fork();
	if (!child) {
		struct timespec pause = {0, 12000000};

		interval(ITIMER_REAL, 0);
		nanosleep(&pause, NULL);
		_exit(write(ends[1], "x", 1) != 1);
	}
	before = ticks;
	CHECK(read(ends[0], &byte, 1) == 1 && byte == 'x' && ticks > before, "read was not restarted");
	must_succeed(child);
	interval(ITIMER_REAL, 0);
	close(ends[0]);
	close(ends[1]);
	return 4;
}

static char *broken;
static volatile int expected_code;

static void mend(int number, siginfo_t *info, void *context)
{
	char *page = (char *)((uintptr_t)info->si_addr & ~(PAGE - 1));
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;

	(void)context;
	CHECK(number == SIGSEGV && info->si_code == expected_code, "signal %d, code %d", number, info->si_code);
	CHECK(page >= broken && page < broken + 8 * PAGE, "address %p", info->si_addr);
	if (info->si_code == SEGV_ACCERR)
		CHECK(!mprotect(page, PAGE, PROT_READ | PROT_WRITE), "mprotect");
	else
		CHECK(mmap(page, PAGE, PROT_READ | PROT_WRITE, flags, -1, 0) == page, "mmap");
	handled++;
}

static long mended_faults(void)
{
	handle(SIGSEGV, mend, 0);
	handled = 0;
	broken = pages(8, PROT_READ | PROT_WRITE);
	for (unsigned long i = 0; i < 8; i++)
		*(volatile uint64_t *)(broken + i * PAGE) = i;
	for (int round = 0; round < 3; round++) {
		static const int protection[] = {PROT_NONE, PROT_READ};

		expected_code = SEGV_ACCERR;
		if (round < 2)
			CHECK(!mprotect(broken, 8 * PAGE, protection[round]), "mprotect");
		else
			CHECK(!munmap(broken, 8 * PAGE), "munmap");
		if (round == 2)
			expected_code = SEGV_MAPERR;
		for (unsigned long i = 0; i < 8; i++) {
			*(volatile uint64_t *)(broken + i * PAGE + 8) = i * 7;
			CHECK(*(volatile uint64_t *)(broken + i * PAGE) == (round < 2 ? i : 0), "contents of page %lu", i);
			CHECK(*(volatile uint64_t *)(broken + i * PAGE + 8) == i * 7, "page %lu lost a write", i);
		}
	}
	CHECK(handled == 24, "%ld faults", handled);
	CHECK(!munmap(broken, 8 * PAGE), "munmap");
	signal(SIGSEGV, SIG_DFL);
	return handled;
}

static volatile int next_value;

static void on_queued(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	CHECK(info->si_code == SI_QUEUE && info->si_value.sival_int == next_value, "value %d, not %d",
	      info->si_value.sival_int, next_value);
	next_value++;
}

static long queued(void)
{
	sigset_t set;

	next_value = 0;
	handle(SIGRTMIN + 3, on_queued, 0);
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 3);
	sigprocmask(SIG_BLOCK, &set, NULL);
	for (int i = 0; i < 50; i++)
		CHECK(!sigqueue(getpid(), SIGRTMIN + 3, (union sigval){.sival_int = i}), "sigqueue");
	CHECK(next_value == 0, "delivered while blocked");
	sigprocmask(SIG_UNBLOCK, &set, NULL);
	CHECK(next_value == 50, "%d of 50 delivered", next_value);
	return 50;
}

static void on_division(int number, siginfo_t *info, void *context)
{
	ucontext_t *state = context;

	(void)number;
	CHECK(info->si_code == FPE_INTDIV, "code %d", info->si_code);
	state->uc_mcontext.gregs[REG_RIP] += 3; /* idivq %rcx */
	state->uc_mcontext.gregs[REG_RAX] = 4711;
	handled++;
}

static long divisions(void)
{
	handled = 0;
	handle(SIGFPE, on_division, 0);
	for (int i = 0; i < 100; i++) {
		uint64_t low = 1, high = 0;

		__asm__ volatile("idivq %2" : "+a"(low), "+d"(high) : "c"(0UL));
		CHECK(low == 4711, "a handler's change of RAX was lost");
	}
	CHECK(handled == 100, "%ld signals", handled);
	return handled;
}

static sigjmp_buf back;

static void jump(int number, siginfo_t *info, void *context)
{
	(void)number, (void)info, (void)context;
	siglongjmp(back, 1);
}

static long jumps_out(void)
{
	static volatile long jumped;

	jumped = 0;
	handle(SIGALRM, jump, 0);
	if (sigsetjmp(back, 1))
		jumped++;
	if (jumped < 10) {
		interval(ITIMER_REAL, 700);
		for (;;)
			if (random_number() == 0)
				abort();
	}
	interval(ITIMER_REAL, 0);
	return jumped;
}

static uint64_t __attribute__((noinline)) hash(void)
{
	uint64_t value = 1;

	for (uint64_t i = 0; i < 20000000; i++)
		value = (value ^ i) * 0x100000001b3 + (value >> 29);
	return value;
}

static long storm(void)
{
	static uint64_t right;
	long before = ticks;

	if (!right)
		right = hash();
	handle(SIGALRM, on_tick, SA_RESTART);
	interval(ITIMER_REAL, 300);
	uint64_t found = hash();
	interval(ITIMER_REAL, 0);
	CHECK(found == right, "%#lx, not %#lx, under a storm of signals", found, right);
	CHECK(ticks > before, "no signal came");
	return ticks - before;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	use_signal_stack();
	repeat("nested", 0.1, nested);
	repeat("own_stack", 0.1, own_stack);
	repeat("interrupted_calls", 0.2, interrupted_calls);
	repeat("mended_faults", 0.2, mended_faults);
	repeat("queued", 0.1, queued);
	repeat("divisions", 0.1, divisions);
	repeat("jumps_out", 0.1, jumps_out);
	repeat("storm", 0.1, storm);
	return end();
}
