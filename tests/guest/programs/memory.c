/*
 * mmap, mprotect, munmap, mremap and madvise at random on a window of pages, against a model: what a page holds, and
 * whether it may be read or written. A stale translation shows as a wrong value, or as a fault that does not come.
 */
#include "common.h"

#define PAGES 192

enum { UNMAPPED, NONE, READ, WRITE };

static char *window;
static uint8_t state[PAGES];
static uint64_t stamp[PAGES];
static uint64_t next_stamp = 1;
static long operations, faults, comparisons;
static sigjmp_buf back;
static volatile int fault_code;
static volatile uintptr_t fault_address;

static void on_fault(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	fault_code = info->si_code;
	fault_address = (uintptr_t)info->si_addr;
	siglongjmp(back, 1);
}

/* Reads and writes page `i` and compares with the model. */
static void probe(size_t i)
{
	volatile uint64_t *word = (volatile uint64_t *)(window + i * PAGE + 8 * (i % 500));
	volatile uint64_t value = 0;

	fault_code = 0;
	if (!sigsetjmp(back, 0))
		value = *word;
	if (state[i] <= NONE) {
		int wanted = state[i] == NONE ? SEGV_ACCERR : SEGV_MAPERR;

		CHECK(fault_code == wanted, "reading page %zu in state %d gave code %d, value %#lx", i, state[i], fault_code, value);
		CHECK(fault_address == (uintptr_t)word, "fault at %#lx instead of %p", fault_address, (void *)word);
		faults++;
		return;
	}
	CHECK(!fault_code, "reading page %zu in state %d gave code %d", i, state[i], fault_code);
	CHECK(value == stamp[i], "page %zu holds %#lx, not %#lx, after %ld operations", i, value, stamp[i], operations);
	comparisons++;
	if (!sigsetjmp(back, 0)) {
		*word = next_stamp;
		CHECK(state[i] == WRITE, "writing page %zu in state %d did not fault", i, state[i]);
		stamp[i] = next_stamp++;
	} else {
		CHECK(state[i] == READ && fault_code == SEGV_ACCERR, "writing page %zu in state %d gave code %d", i, state[i],
		      fault_code);
		faults++;
	}
}

static void operate(void)
{
	static const int protections[] = {0, PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE};
	size_t from = random_number() % PAGES, count = 1 + random_number() % 24;
	int wanted = NONE + (int)(random_number() % 3);

	if (from + count > PAGES)
		count = PAGES - from;
	char *start = window + from * PAGE;
	size_t length = count * PAGE;
	bool mapped = true;

	for (size_t i = from; i < from + count; i++)
		mapped = mapped && state[i] != UNMAPPED;
	operations++;
	switch (random_number() % 8) {
	case 0:
	case 1: { /* new pages, of zeros, over whatever is there */
		int populate = random_number() % 2 ? MAP_POPULATE : 0;
		void *got = mmap(start, length, protections[wanted], MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | populate, -1, 0);

		CHECK(got == start, "mmap");
		memset(state + from, wanted, count);
		memset(stamp + from, 0, count * sizeof *stamp);
		break;
	}
	case 2:
		CHECK(!munmap(start, length), "munmap");
		memset(state + from, UNMAPPED, count);
		memset(stamp + from, 0, count * sizeof *stamp);
		break;
	case 3:
	case 4:
	case 5:
		if (!mapped)
			break;
		CHECK(!mprotect(start, length, protections[wanted]), "mprotect");
		memset(state + from, wanted, count);
		break;
	case 6:
		if (!mapped)
			break;
		CHECK(!madvise(start, length, MADV_DONTNEED), "madvise");
		memset(stamp + from, 0, count * sizeof *stamp);
		break;
	case 7: { /* one page goes to the place of another, whose own is lost */
		size_t to = random_number() % PAGES;
		if (state[from] == UNMAPPED || to == from)
			break;
		char *target = window + to * PAGE;

		/* its word has another place in the page */
		if (state[from] >= READ && 8 * (from % 500) != 8 * (to % 500) && stamp[from]) {
			CHECK(!mprotect(start, PAGE, PROT_READ | PROT_WRITE), "mprotect");
			*(uint64_t *)(start + 8 * (to % 500)) = stamp[from];
			CHECK(!mprotect(start, PAGE, protections[state[from]]), "mprotect");
		} else if (stamp[from]) {
			break;
		} else if (state[from] >= READ) {
			CHECK(!mprotect(start, PAGE, PROT_READ | PROT_WRITE), "mprotect");
			*(uint64_t *)(start + 8 * (to % 500)) = 0;
			CHECK(!mprotect(start, PAGE, protections[state[from]]), "mprotect");
		} else {
			break;
		}
		CHECK(mremap(start, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target, "mremap");
		state[to] = state[from];
		stamp[to] = stamp[from];
		state[from] = UNMAPPED;
		stamp[from] = 0;
		break;
	}
	}
	probe(from);
	probe(from + count - 1);
	for (int i = 0; i < 6; i++)
		probe(random_number() % PAGES);
}

static long churn(void)
{
	struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
	long before = comparisons;

	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	for (int i = 0; i < 200; i++)
		operate();
	for (size_t i = 0; i < PAGES; i++)
		probe(i);
	return comparisons - before;
}

/* One file twice in memory: what is written at one address is read at the other, while mappings come and go. */
static long aliases(void)
{
	int file = memfd_create("aliases", 0);
	uint64_t *one, *two;
	long done = 0;

	CHECK(file >= 0 && !ftruncate(file, 16 * PAGE), "memfd");
	one = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	for (int round = 0; round < 8; round++) {
		two = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
		CHECK(one != MAP_FAILED && two != MAP_FAILED && one != two, "mmap");
		for (size_t i = 0; i < 16 * PAGE / 8; i += 64) {
			((volatile uint64_t *)one)[i] = next_stamp;
			CHECK(((volatile uint64_t *)two)[i] == next_stamp, "the other address shows an old value");
			((volatile uint64_t *)two)[i] = ++next_stamp;
			CHECK(((volatile uint64_t *)one)[i] == next_stamp++, "the first address shows an old value");
			done += 2;
		}
		CHECK(!munmap(two, 16 * PAGE), "munmap");
	}
	munmap(one, 16 * PAGE);
	close(file);
	return done;
}

/* Huge pages where the kernel gives them: written, split by mprotect and by a hole, and compared. */
static long huge(void)
{
	size_t length = 6UL << 20;
	char *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	long done = 0;

	CHECK(memory != MAP_FAILED, "mmap");
	madvise(memory, length, MADV_HUGEPAGE);
	for (size_t i = 0; i < length; i += PAGE)
		*(volatile uint64_t *)(memory + i) = i + 1;
	CHECK(!mprotect(memory + (2UL << 20) + 3 * PAGE, PAGE, PROT_READ), "mprotect");
	CHECK(!madvise(memory + (3UL << 20), 5 * PAGE, MADV_DONTNEED), "madvise");
	for (size_t i = 0; i < length; i += PAGE, done++) {
		uint64_t wanted = i >= 3UL << 20 && i < (3UL << 20) + 5 * PAGE ? 0 : i + 1;
		uint64_t value = *(volatile uint64_t *)(memory + i);

		CHECK(value == wanted, "offset %#zx holds %#lx, not %#lx", i, value, wanted);
	}
	munmap(memory, length);
	return done;
}

/* Code that is written, executed, rewritten and executed again. */
static long code(void)
{
	uint8_t *memory = pages(4, PROT_READ | PROT_WRITE | PROT_EXEC);
	long done = 0;

	for (uint32_t i = 0; i < 200; i++) {
		uint8_t *place = memory + (i % 4) * PAGE + 16 * (i % 13);
		uint32_t (*function)(void) = (uint32_t(*)(void))(void *)place;

		place[0] = 0xb8; /* mov eax, i */
		memcpy(place + 1, &i, 4);
		place[5] = 0xc3;
		CHECK(function() == i, "old code was executed");
		if (i % 20 == 0) {
			CHECK(!mprotect(memory, 4 * PAGE, PROT_READ | PROT_EXEC), "mprotect");
			CHECK(function() == i, "wrong code after mprotect");
			CHECK(!mprotect(memory, 4 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC), "mprotect");
		}
		done++;
	}
	/* Without the right to execute, it must not. */
	fault_code = 0;
	CHECK(!mprotect(memory, 4 * PAGE, PROT_READ), "mprotect");
	if (!sigsetjmp(back, 0))
		((void (*)(void))(void *)memory)();
	CHECK(fault_code == SEGV_ACCERR, "data was executed: code %d", fault_code);
	munmap(memory, 4 * PAGE);
	return done;
}

/* The stack grows downwards, far and at once, and shrinks by an mmap over its lower part in a thread's stack. */
static long __attribute__((noinline)) grow(int depth)
{
	volatile char frame[3000];

	memset((void *)(uintptr_t)frame, depth, sizeof frame);
	long below = depth ? grow(depth - 1) : 0;

	for (size_t i = 0; i < sizeof frame; i += 100)
		CHECK(frame[i] == (char)depth, "the stack changed at depth %d", depth);
	return below + 1;
}

static long stack(void)
{
	pid_t child = fork();

	if (!child)
		_exit(grow(900) != 901);
	must_succeed(child);
	return 901;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	window = pages(PAGES, PROT_NONE);
	memset(state, NONE, PAGES);
	repeat("churn", 0.5, churn);
	report("operations", operations);
	report("faults", faults);
	repeat("aliases", 0.1, aliases);
	repeat("huge", 0.15, huge);
	repeat("code", 0.15, code);
	repeat("stack", 0.1, stack);
	return end();
}
