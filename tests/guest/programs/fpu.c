/*
 * Vector, x87 and mask registers across preemption, system calls, signals and forks: every process has a pattern of its
 * own, loads all registers with it, computes or calls the kernel, and compares.
 */
#include "common.h"
#include <cpuid.h>

struct registers {
	uint8_t vector[32][64];
	uint64_t mask[8];
	uint8_t x87[8][16];
	uint32_t mxcsr;
	uint16_t control;
} __attribute__((aligned(64)));

static int level; /* 0: SSE, 1: AVX, 2: AVX-512 */
static struct registers junk;

static int find_level(void)
{
	uint32_t a, b, c, d, low, high;

	__cpuid(1, a, b, c, d);
	if (!(c & bit_OSXSAVE))
		return 0;
	__asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	if ((low & 6) != 6)
		return 0;
	__cpuid_count(7, 0, a, b, c, d);
	return (low & 0xe6) == 0xe6 && (b & bit_AVX512F) && (b & bit_AVX512BW) ? 2 : 1;
}

/* Emits one instruction for registers 0 to 15 or 16 to 31; %[r] is the struct. */
#define LOW(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define HIGH(X) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31)
#define LOAD_XMM(n) "movdqa 64*" #n "(%[r]), %%xmm" #n "\n"
#define SAVE_XMM(n) "movdqa %%xmm" #n ", 64*" #n "(%[r])\n"
#define LOAD_YMM(n) "vmovdqa 64*" #n "(%[r]), %%ymm" #n "\n"
#define SAVE_YMM(n) "vmovdqa %%ymm" #n ", 64*" #n "(%[r])\n"
#define LOAD_ZMM(n) "vmovdqa64 64*" #n "(%[r]), %%zmm" #n "\n"
#define SAVE_ZMM(n) "vmovdqa64 %%zmm" #n ", 64*" #n "(%[r])\n"
#define MASKS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define LOAD_MASK(n) "kmovq 2048+8*" #n "(%[r]), %%k" #n "\n"
#define SAVE_MASK(n) "kmovq %%k" #n ", 2048+8*" #n "(%[r])\n"
#define LOAD_X87(n) "fldt 2112+16*(7-" #n ")(%[r])\n"
#define SAVE_X87(n) "fstpt 2112+16*" #n "(%[r])\n"
#define CONTROL_LOAD "fninit\n fldcw 2244(%[r])\n ldmxcsr 2240(%[r])\n"
#define CONTROL_SAVE "fnstcw 2244(%[r])\n stmxcsr 2240(%[r])\n"
#define CLOBBERS                                                                                                       \
	"memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",    \
		"xmm12", "xmm13", "xmm14", "xmm15"
#define MIDDLE                                                                                                         \
	"	mov %[r], %%r12\n	mov %[out], %%r13\n	mov %[spin], %%r14\n	mov %[number], %%r15\n"                       \
	"1:	test %%r15, %%r15\n	js 2f\n	mov %%r15, %%rax\n	syscall\n"                                              \
	"2:	dec %%r14\n	jns 2b\n	mov %%r13, %[r]\n"
/* Load from `r`, wait for `spin` steps of a loop behind system call `number` (none if negative), save to `out`. */
#define ROUND(LOAD, SAVE)                                                                                              \
	__asm__ volatile(LOAD MIDDLE SAVE                                                                              \
			 : [r] "+r"(r)                                                                                 \
			 : [out] "r"(out), [spin] "r"(spin), [number] "r"(number)                                      \
			 : "rax", "rcx", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", CLOBBERS)

static void round_trip(const struct registers *r, struct registers *out, long spin, long number)
{
	if (level == 2)
		ROUND(CONTROL_LOAD LOW(LOAD_ZMM) HIGH(LOAD_ZMM) MASKS(LOAD_MASK) MASKS(LOAD_X87),
		      LOW(SAVE_ZMM) HIGH(SAVE_ZMM) MASKS(SAVE_MASK) MASKS(SAVE_X87) CONTROL_SAVE "vzeroupper\n");
	else if (level == 1)
		ROUND(CONTROL_LOAD LOW(LOAD_YMM) MASKS(LOAD_X87), LOW(SAVE_YMM) MASKS(SAVE_X87) CONTROL_SAVE "vzeroupper\n");
	else
		ROUND(CONTROL_LOAD LOW(LOAD_XMM) MASKS(LOAD_X87), LOW(SAVE_XMM) MASKS(SAVE_X87) CONTROL_SAVE);
	static const uint32_t usual = 0x1f80;

	__asm__ volatile("fninit\n ldmxcsr %0" ::"m"(usual));
}

static void fill(struct registers *r, uint64_t seed)
{
	static const int bytes[] = {16, 32, 64};

	_Static_assert(offsetof(struct registers, mask) == 2048, "");
	_Static_assert(offsetof(struct registers, x87) == 2112, "");
	_Static_assert(offsetof(struct registers, mxcsr) == 2240, "");
	_Static_assert(offsetof(struct registers, control) == 2244, "");
	memset(r, 0, sizeof *r);
	for (int i = 0; i < (level == 2 ? 32 : 16); i++)
		for (int j = 0; j < bytes[level]; j++)
			r->vector[i][j] = (uint8_t)(seed * 31 + (uint64_t)i * 7 + (uint64_t)j * 3);
	for (int i = 0; i < 8; i++) {
		long double value = (long double)seed * 1.25L + i;

		if (level == 2)
			r->mask[i] = seed * 0x0101010101010101 + (uint64_t)i;
		memcpy(r->x87[i], &value, 10);
	}
	r->mxcsr = 0x1f80 | (uint32_t)(seed % 4) << 13; /* rounding */
	r->control = (uint16_t)(0x037f | (seed % 4) << 10);
}

static volatile long signals;

static void spoil(int number, siginfo_t *info, void *context)
{
	static struct registers ignored;

	(void)number, (void)info, (void)context;
	round_trip(&junk, &ignored, 10, -1);
	signals++;
}

/* One process: returns its rounds, or exits with 1 when a register changed. */
static long process(uint64_t seed, double until)
{
	static struct registers given, found;
	static const long numbers[] = {-1, SYS_getppid, SYS_sched_yield, -1};
	long rounds = 0;

	fill(&given, seed);
	do {
		memset(&found, 0, sizeof found);
		round_trip(&given, &found, 2000 + (long)(random_number() % 60000), numbers[rounds % 4]);
		found.mxcsr &= ~0x3fU; /* flags of inexact results are not kept apart */
		if (memcmp(&given, &found, sizeof given)) {
			for (size_t i = 0; i < sizeof given; i++)
				if (((uint8_t *)&given)[i] != ((uint8_t *)&found)[i]) {
					fprintf(stderr, "process %lu, round %ld: byte %zu of the registers is %#x, not %#x\n", seed,
						rounds, i, ((uint8_t *)&found)[i], ((uint8_t *)&given)[i]);
					break;
				}
			_exit(1);
		}
		rounds++;
	} while (now() < until);
	return rounds;
}

static long together(double until, bool with_signals)
{
	long *rounds = shared_pages(1), sum = 0;
	pid_t children[4];

	for (int i = 0; i < 4; i++) {
		children[i] = fork();
		if (!children[i]) {
			if (with_signals) {
				handle(SIGALRM, spoil, SA_RESTART);
				interval(ITIMER_REAL, 500 + 100 * i);
			}
			rounds[i] = process((uint64_t)i + 3, until);
			interval(ITIMER_REAL, 0);
			rounds[4 + i] = signals;
			_exit(0);
		}
	}
	for (int i = 0; i < 4; i++) {
		must_succeed(children[i]);
		CHECK(rounds[i] > 0, "process %d did nothing", i);
		sum += rounds[i];
	}
	if (with_signals)
		report("signals", rounds[4] + rounds[5] + rounds[6] + rounds[7]);
	munmap(rounds, PAGE);
	return sum;
}

/* A handler that changes vector registers in its frame changes those of the interrupted code. */
static void change_frame(int number, siginfo_t *info, void *context)
{
	ucontext_t *state = context;
	uint8_t *area = (uint8_t *)state->uc_mcontext.fpregs;
	uint64_t *features = (uint64_t *)(area + 512);

	(void)number, (void)info;
	memset(area + 160 + 16 * 5, 0xa5, 16); /* xmm5 */
	if (level >= 1) {
		CHECK(features[0] & 4, "a frame without AVX state: %#lx", features[0]);
		memset(area + 576 + 16 * 5, 0x5a, 16); /* the upper half of ymm5, in standard format */
	}
	signals++;
}

static long changed_frames(void)
{
	static struct registers given, found;

	handle(SIGUSR1, change_frame, 0);
	fill(&given, 77);
	signals = 0;
	for (int i = 0; i < 50; i++) {
		register long pid __asm__("rdi") = getpid();
		register long number __asm__("rsi") = SIGUSR1;
		const struct registers *r = &given;
		struct registers *out = &found;

		__asm__ volatile("" ::"r"(pid), "r"(number));
		/* kill(getpid(), SIGUSR1) with the registers loaded */
		if (level >= 1)
			__asm__ volatile(LOW(LOAD_YMM) "syscall\n mov %[out], %[r]\n" LOW(SAVE_YMM) "vzeroupper\n"
					 : [r] "+r"(r)
					 : [out] "r"(out), "a"(SYS_kill), "r"(pid), "r"(number)
					 : "rcx", "r11", CLOBBERS);
		else
			__asm__ volatile(LOW(LOAD_XMM) "syscall\n mov %[out], %[r]\n" LOW(SAVE_XMM)
					 : [r] "+r"(r)
					 : [out] "r"(out), "a"(SYS_kill), "r"(pid), "r"(number)
					 : "rcx", "r11", CLOBBERS);
		CHECK(signals == i + 1, "the signal did not come at once");
		for (int j = 0; j < (level >= 1 ? 32 : 16); j++) {
			uint8_t wanted = j < 16 ? 0xa5 : 0x5a;

			CHECK(found.vector[5][j] == wanted, "byte %d of register 5 is %#x", j, found.vector[5][j]);
			CHECK(found.vector[6][j] == given.vector[6][j], "byte %d of register 6 changed", j);
		}
	}
	return signals;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	level = find_level();
	report("level", level);
	fill(&junk, 99);
	report("rounds", together(now() + 0.45 * seconds_to_run, false));
	report("rounds_with_signals", together(now() + 0.45 * seconds_to_run, true));
	repeat("changed_frames", 0.1, changed_frames);
	return end();
}
