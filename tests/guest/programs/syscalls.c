/*
 * The edge of the system-call interface: numbers that are none, x32, the vsyscall page, pointers into nowhere and into
 * the kernel, registers, seccomp, and what is left out of this kernel (local descriptor tables, port rights).
 */
#include "common.h"
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/uio.h>

static long raw(long number, long one, long two, long three)
{
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(one), "S"(two), "d"(three) : "rcx", "r11", "memory");
	return result;
}

static long numbers(void)
{
	static const uint64_t none[] = {1000,	     0x1ff,	   99999,	 0x7fffffff,	 0x80000000,	     0xffffffff,
					0xffffffffffffffff, 0x8000000000000000, 0x123400000000, 0x4000000000000000};
	static const uint64_t x32[] = {SYS_getpid, SYS_write, 512, 520, 545, 0x3fffffff};

	for (size_t i = 0; i < EVERY(none); i++) {
		long result = raw((long)none[i], 0, 0, 0);

		/* The kernel looks at the lower half of RAX, as a signed number. */
		bool real = (uint32_t)none[i] == 0;
		CHECK(result == (real ? -EFAULT : -ENOSYS) || (real && result <= 0), "call %#lx gave %ld", none[i], result);
	}
	for (size_t i = 0; i < EVERY(x32); i++) {
		long result = raw((long)(0x40000000 | x32[i]), 0, 0, 0);

		CHECK(result == -ENOSYS, "x32 call %#lx gave %ld", x32[i], result);
	}
	return EVERY(none) + EVERY(x32);
}

static long pointers(void)
{
	static const uint64_t bad[] = {8,
				       0x7ffffffff000,
				       0x7fffffffffff,
				       0x800000000000,
				       0x4000000000000000,
				       0xffff800000000000,
				       0xffff888000000000,
				       0xffffffff81000000,
				       0xffffffffff600000,
				       0xffffffffffffffff};
	int ends[2], null = open("/dev/null", O_WRONLY), zero = open("/dev/zero", O_RDONLY);
	long done = 0;

	CHECK(!pipe(ends) && null >= 0 && zero >= 0, "files");
	for (size_t i = 0; i < EVERY(bad); i++) {
		void *pointer = (void *)bad[i];
		struct iovec vector = {pointer, 64};

		CHECK(raw(SYS_write, ends[1], (long)pointer, 64) == -EFAULT, "write from %p", pointer);
		CHECK(raw(SYS_read, zero, (long)pointer, 64) == -EFAULT, "read to %p", pointer);
		CHECK(raw(SYS_writev, ends[1], (long)&vector, 1) == -EFAULT, "writev from %p", pointer);
		CHECK(raw(SYS_writev, ends[1], (long)pointer, 1) == -EFAULT, "writev of a vector at %p", pointer);
		CHECK(raw(SYS_pipe, (long)pointer, 0, 0) == -EFAULT, "pipe at %p", pointer);
		CHECK(raw(SYS_open, (long)pointer, 0, 0) == -EFAULT, "open of %p", pointer);
		CHECK(raw(SYS_execve, (long)pointer, 0, 0) == -EFAULT, "execve of %p", pointer);
		CHECK(raw(SYS_clock_gettime, CLOCK_REALTIME, (long)pointer, 0) == -EFAULT, "clock_gettime to %p", pointer);
		CHECK(raw(SYS_rt_sigprocmask, SIG_BLOCK, (long)pointer, 0) < 0, "sigprocmask of %p", pointer);
		CHECK(raw(SYS_futex, (long)pointer, 1, 1) < 0, "futex at %p", pointer);
		done += 10;
	}
	/* Half of it is there: the call takes what it can, or nothing. */
	char *edge = pages(2, PROT_READ | PROT_WRITE);

	CHECK(!munmap(edge + PAGE, PAGE), "munmap");
	memset(edge, 'x', PAGE);
	long result = raw(SYS_read, zero, (long)(edge + PAGE - 100), 200);
	CHECK(result == 100 || result == -EFAULT, "a read over the edge gave %ld", result);
	CHECK(edge[PAGE - 101] == 'x' && edge[PAGE - 100] == 0, "it wrote the wrong place");
	result = raw(SYS_write, ends[1], (long)(edge + PAGE - 100), 200);
	CHECK(result == 100 || result == -EFAULT, "a write over the edge gave %ld", result);
	munmap(edge, PAGE);
	close(ends[0]);
	close(ends[1]);
	close(null);
	close(zero);
	return done + 2;
}

/* All registers but RAX, RCX and R11 live through a call; RCX and R11 are the program's own RIP and flags, or garbage. */
static long registers(void)
{
	static uint64_t before[12], after[12];

	for (int i = 0; i < 12; i++)
		before[i] = random_number();
	__asm__ volatile("	push %%rbp\n	push %%rbx\n"
			 "	mov %[b], %%rax\n"
			 "	mov 0(%%rax), %%rbx\n	mov 8(%%rax), %%rdx\n	mov 16(%%rax), %%rsi\n	mov 24(%%rax), %%rdi\n"
			 "	mov 32(%%rax), %%rbp\n	mov 40(%%rax), %%r8\n	mov 48(%%rax), %%r9\n	mov 56(%%rax), %%r10\n"
			 "	mov 64(%%rax), %%r12\n	mov 72(%%rax), %%r13\n	mov 80(%%rax), %%r14\n	mov 88(%%rax), %%r15\n"
			 "	mov $110, %%eax\n	syscall\n"
			 "	lea %[a], %%rax\n"
			 "	mov %%rbx, 0(%%rax)\n	mov %%rdx, 8(%%rax)\n	mov %%rsi, 16(%%rax)\n	mov %%rdi, 24(%%rax)\n"
			 "	mov %%rbp, 32(%%rax)\n	mov %%r8, 40(%%rax)\n	mov %%r9, 48(%%rax)\n	mov %%r10, 56(%%rax)\n"
			 "	mov %%r12, 64(%%rax)\n	mov %%r13, 72(%%rax)\n	mov %%r14, 80(%%rax)\n	mov %%r15, 88(%%rax)\n"
			 "	pop %%rbx\n	pop %%rbp\n"
			 : [a] "=m"(after)
			 : [b] "r"(before), "m"(before)
			 : "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
	CHECK(!memcmp(before, after, sizeof before), "a register changed");
	return 1;
}

static sigjmp_buf back;
static volatile int seen_code, seen_number;
static volatile uintptr_t seen_address;

static void on_fault(int number, siginfo_t *info, void *context)
{
	(void)context;
	seen_number = number;
	seen_code = info->si_code;
	seen_address = (uintptr_t)info->si_addr;
	siglongjmp(back, 1);
}

/* The last instruction below the end of the address space is a system call: it returns to where nothing can be. */
static long last_instruction(void)
{
	uint8_t *page = mmap((void *)0x7fffffffe000, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	if (page == MAP_FAILED) /* the stack may be there */
		return 1;
	CHECK(page == (void *)0x7fffffffe000, "mapped at %p", (void *)page);
	page[PAGE - 2] = 0x0f;
	page[PAGE - 1] = 0x05;
	handle(SIGSEGV, on_fault, SA_NODEFER);
	seen_number = 0;
	if (!sigsetjmp(back, 1))
		__asm__ volatile("jmp *%0" ::"r"(page + PAGE - 2), "a"(SYS_getppid) : "rcx", "r11", "memory");
	CHECK(seen_number == SIGSEGV, "signal %d", seen_number);
	munmap(page, PAGE);
	return 1;
}

static long vsyscall(void)
{
	static const uint64_t entries[] = {0xffffffffff600000, 0xffffffffff600400, 0xffffffffff600800};

	handle(SIGSEGV, on_fault, SA_NODEFER);
	for (size_t i = 0; i < EVERY(entries); i++) {
		seen_number = 0;
		if (!sigsetjmp(back, 1))
			((long (*)(long *))entries[i])(NULL);
		else
			CHECK(seen_number == SIGSEGV, "signal %d", seen_number);
	}
	return EVERY(entries);
}

static long left_out(void)
{
	char table[16] = {0};

	if (!in_guest())
		return 1;
	CHECK(raw(SYS_modify_ldt, 0, (long)table, sizeof table) == -ENOSYS, "modify_ldt");
	CHECK(raw(SYS_iopl, 3, 0, 0) == -ENOSYS, "iopl");
	CHECK(raw(SYS_ioperm, 0x60, 1, 1) == -ENOSYS, "ioperm");
	return 3;
}

#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define NUMBER BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr))
#define ON(number, action)                                                                                             \
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1), BPF_STMT(BPF_RET | BPF_K, action)

static volatile long traps;
static volatile int trapped_number;

static void on_trap(int number, siginfo_t *info, void *context)
{
	ucontext_t *state = context;

	(void)number;
	CHECK(info->si_code == 1 /* SYS_SECCOMP */, "code %d", info->si_code);
	CHECK(info->si_arch == AUDIT_ARCH_X86_64, "architecture %#x", info->si_arch);
	trapped_number = info->si_syscall;
	state->uc_mcontext.gregs[REG_RAX] = 4242;
	traps++;
}

static long seccomp(void)
{
	struct sock_filter filter[] = {
		NUMBER,
		ON(SYS_getppid, SECCOMP_RET_ERRNO | 33),
		ON(SYS_getuid, SECCOMP_RET_TRAP),
		ON(SYS_getgid, SECCOMP_RET_KILL_PROCESS),
		ALLOW,
	};
	struct sock_fprog program = {EVERY(filter), filter};
	pid_t child = fork();

	if (!child) {
		CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges");
		CHECK(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), "seccomp");
		handle(SIGSYS, on_trap, 0);
		for (int i = 0; i < 20; i++) {
			CHECK(raw(SYS_getppid, 0, 0, 0) == -33, "no error");
			CHECK(raw(SYS_getuid, 0, 0, 0) == 4242 && traps == i + 1, "no trap");
			CHECK(trapped_number == SYS_getuid, "trapped %d", trapped_number);
			CHECK(raw(SYS_getpid, 0, 0, 0) == getpid(), "a call that is allowed");
		}
		/* A grandchild has the filter too. */
		pid_t grandchild = fork();
		if (!grandchild)
			_exit(raw(SYS_getppid, 0, 0, 0) != -33);
		must_succeed(grandchild);
		raw(SYS_getgid, 0, 0, 0);
		_exit(0);
	}
	int status = status_of(child);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS, "status %#x", status);
	child = fork();
	if (!child) {
		CHECK(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT), "strict mode");
		raw(SYS_getpid, 0, 0, 0);
		_exit(0);
	}
	status = status_of(child);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "status %#x", status);
	return 62;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	repeat("numbers", 0.1, numbers);
	repeat("pointers", 0.2, pointers);
	repeat("registers", 0.2, registers);
	repeat("last_instruction", 0.1, last_instruction);
	repeat("left_out", 0.05, left_out);
	repeat("seccomp", 0.25, seccomp);
	repeat("vsyscall", 0.1, vsyscall);
	return end();
}
