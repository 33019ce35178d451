/* Bases of FS and GS and the selectors, across switches, system calls, signals and page faults; TLS of clones. */
#include "common.h"
#include <asm/prctl.h>
#include <sys/auxv.h>

static long get_base(int which)
{
	unsigned long base;

	CHECK(!syscall(SYS_arch_prctl, which, &base), "arch_prctl");
	return (long)base;
}

static uint64_t read_gs(uint64_t offset)
{
	uint64_t value;

	__asm__ volatile("movq %%gs:(%1), %0" : "=r"(value) : "r"(offset));
	return value;
}

static volatile long signals;
static uint64_t *gs_block;

static void check_gs(int number, siginfo_t *info, void *context)
{
	(void)number, (void)info, (void)context;
	CHECK(read_gs(8) == gs_block[1], "GS in a handler");
	signals++;
}

/* Four processes, each with a GS base of its own, preempted, calling and faulting. */
static long bases(void)
{
	pid_t children[4];

	for (uint64_t i = 0; i < 4; i++) {
		children[i] = fork();
		if (!children[i]) {
			gs_block = pages(1, PROT_READ | PROT_WRITE);
			gs_block[1] = 0x1000 + i;
			CHECK(!syscall(SYS_arch_prctl, ARCH_SET_GS, gs_block), "ARCH_SET_GS");
			handle(SIGALRM, check_gs, SA_RESTART);
			interval(ITIMER_REAL, 900 + 50 * (long)i);
			for (int round = 0; round < 200; round++) {
				char *fresh = pages(1, PROT_READ | PROT_WRITE);

				*(volatile char *)fresh = 1;
				CHECK(read_gs(8) == 0x1000 + i, "GS of process %lu", i);
				for (volatile int spin = 0; spin < 3000; spin++)
					;
				if (round % 3 == 0)
					sched_yield();
				CHECK(read_gs(8) == 0x1000 + i, "GS of process %lu", i);
				CHECK(get_base(ARCH_GET_GS) == (long)gs_block, "the base of GS");
				munmap(fresh, PAGE);
			}
			_exit(0);
		}
	}
	for (int i = 0; i < 4; i++)
		must_succeed(children[i]);
	return 4 * 200;
}

/* Bases that the program may not have. */
static long bad_bases(void)
{
	static const uint64_t bad[] = {0x800000000000, 0x7ffffffff000, 0x4000000000000000, 0xffff800000000000, -1UL};

	for (size_t i = 0; i < EVERY(bad); i++)
		CHECK(syscall(SYS_arch_prctl, ARCH_SET_GS, bad[i]) < 0 && errno == EPERM, "GS base %#lx", bad[i]);
	CHECK(syscall(SYS_arch_prctl, ARCH_SET_GS, 0) == 0, "GS base 0");
	return EVERY(bad);
}

/* By instruction, where the processor and the kernel let programs do so: also bases in the kernel's half. */
static long instructions(void)
{
	static const uint64_t values[] = {0x1234, 0x7fffffffe000, 0xffffffff81000000, 0xffffeb0000000000, 0};
	unsigned long features = getauxval(26 /* AT_HWCAP2 */);

	if (!(features & 2))
		return 0;
	for (size_t i = 0; i < EVERY(values); i++) {
		uint64_t found;

		__asm__ volatile("wrgsbase %0" ::"r"(values[i]));
		for (int j = 0; j < 3; j++) {
			sched_yield();
			syscall(SYS_getppid);
		}
		pid_t child = fork();
		if (!child) {
			__asm__ volatile("rdgsbase %0" : "=r"(found));
			_exit(found != values[i]);
		}
		must_succeed(child);
		__asm__ volatile("rdgsbase %0" : "=r"(found));
		CHECK(found == values[i], "GS base %#lx became %#lx", values[i], found);
	}
	return EVERY(values);
}

/* Null selectors may be loaded, and stay loadable; data selectors too. */
static long selectors(void)
{
	static const uint16_t allowed[] = {0, 1, 2, 3, 0x2b};
	uint16_t ds, found;

	__asm__ volatile("mov %%ds, %0" : "=r"(ds));
	for (size_t i = 0; i < EVERY(allowed); i++) {
		__asm__ volatile("mov %0, %%ds; mov %0, %%es" ::"r"(allowed[i]));
		sched_yield();
		__asm__ volatile("mov %%es, %0" : "=r"(found));
		CHECK((found & ~3) == (allowed[i] & ~3), "ES %#x became %#x", allowed[i], found);
	}
	__asm__ volatile("mov %0, %%ds; mov %0, %%es" ::"r"(ds));
	__asm__ volatile("mov %%cs, %0" : "=r"(found));
	CHECK(found == 0x33, "CS is %#x", found);
	__asm__ volatile("mov %%ss, %0" : "=r"(found));
	CHECK(found == 0x2b, "SS is %#x", found);
	return EVERY(allowed);
}

static int in_clone(void *argument)
{
	uint64_t value;

	__asm__ volatile("movq %%fs:16, %0" : "=r"(value));
	return value == (uint64_t)argument ? 3 : 4;
}

/* A clone with thread-local storage of its own. */
static long thread_storage(void)
{
	static char stack[32768] __attribute__((aligned(16)));
	static uint64_t block[512] __attribute__((aligned(64)));

	block[0] = (uint64_t)block, block[2] = 4711;
	pid_t child = clone(in_clone, stack + sizeof stack, CLONE_VM | CLONE_SETTLS | SIGCHLD, (void *)4711, NULL, block);
	CHECK(child > 0, "clone");
	int status = status_of(child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3, "status %#x", status);
	CHECK(get_base(ARCH_GET_FS) != (long)block, "the parent's base changed");
	return 1;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	repeat("bases", 0.4, bases);
	repeat("bad_bases", 0.1, bad_bases);
	repeat("instructions?", 0.2, instructions);
	repeat("selectors", 0.15, selectors);
	repeat("thread_storage", 0.15, thread_storage);
	return end();
}
