/* Copy-on-write: parents and children of three generations write pages they share, and everyone keeps their own. */
#include "common.h"
#include <sys/uio.h>

#define COUNT 96

static uint64_t *memory;

static uint64_t *word(size_t page)
{
	return (uint64_t *)((char *)memory + page * PAGE + 8 * (page * 37 % 512));
}

static void compare(const uint64_t *wanted, const char *who)
{
	for (size_t i = 0; i < COUNT; i++)
		CHECK(*(volatile uint64_t *)word(i) == wanted[i], "page %zu of %s holds %#lx, not %#lx", i, who, *word(i), wanted[i]);
}

static void change(uint64_t *wanted, uint64_t tag, int count)
{
	for (int i = 0; i < count; i++) {
		size_t page = random_number() % COUNT;

		wanted[page] = tag << 32 | (uint64_t)(i + 1);
		*(volatile uint64_t *)word(page) = wanted[page];
	}
}

static void generation(int depth, uint64_t tag, uint64_t *wanted)
{
	pid_t children[2];

	for (int i = 0; i < 2 && depth; i++) {
		children[i] = fork();
		CHECK(children[i] >= 0, "fork");
		if (!children[i]) {
			compare(wanted, "a new child");
			generation(depth - 1, tag * 4 + (uint64_t)i + 1, wanted);
			_exit(0);
		}
		change(wanted, tag, 20);
		compare(wanted, "a parent");
	}
	for (int i = 0; i < 6; i++) {
		change(wanted, tag, 15);
		sched_yield();
		compare(wanted, "a process");
	}
	for (int i = 0; i < 2 && depth; i++)
		must_succeed(children[i]);
	compare(wanted, "the end");
}

static long generations(void)
{
	static uint64_t wanted[COUNT];

	memory = pages(COUNT, PROT_READ | PROT_WRITE);
	memset(wanted, 0, sizeof wanted);
	change(wanted, 1, 150);
	generation(2, 1, wanted);
	munmap(memory, COUNT * PAGE);
	return 7;
}

/* Private pages of a file: the file keeps what it has; what is not written follows the file. */
static long files(void)
{
	int file = memfd_create("file", 0);

	CHECK(file >= 0 && !ftruncate(file, 8 * PAGE), "memfd");
	char *both = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	char *private = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);

	CHECK(both != MAP_FAILED && private != MAP_FAILED, "mmap");
	for (size_t i = 0; i < 8; i++)
		both[i * PAGE] = 'a';
	for (size_t i = 0; i < 8; i++)
		CHECK(((volatile char *)private)[i * PAGE] == 'a', "page %zu", i);
	for (size_t i = 0; i < 8; i += 2)
		((volatile char *)private)[i * PAGE] = 'b';
	pid_t child = fork();

	for (size_t i = 0; i < 8; i++)
		CHECK(((volatile char *)private)[i * PAGE] == (i % 2 ? 'a' : 'b'), "page %zu", i);
	if (!child) {
		memset(private, 'c', 8 * PAGE);
		_exit(0);
	}
	must_succeed(child);
	for (size_t i = 0; i < 8; i++) {
		CHECK(((volatile char *)private)[i * PAGE] == (i % 2 ? 'a' : 'b'), "page %zu after the child", i);
		CHECK(((volatile char *)both)[i * PAGE] == 'a', "the file's page %zu", i);
	}
	CHECK(!madvise(private, 8 * PAGE, MADV_DONTNEED), "madvise");
	for (size_t i = 0; i < 8; i++)
		CHECK(((volatile char *)private)[i * PAGE] == 'a', "page %zu is not the file's again", i);
	munmap(both, 8 * PAGE);
	munmap(private, 8 * PAGE);
	close(file);
	return 8;
}

/* The kernel writes for the program, into pages that are shared with a child: read(), and writing another's memory. */
static long by_the_kernel(void)
{
	char *page = pages(2, PROT_READ | PROT_WRITE);
	int ends[2];

	CHECK(!pipe(ends), "pipe");
	memset(page, 'p', 2 * PAGE);
	pid_t child = fork();

	if (!child) {
		raise(SIGSTOP);
		for (size_t i = 0; i < 2 * PAGE; i++)
			if (page[i] != (i < 10 ? 'w' : 'p'))
				_exit(1);
		_exit(0);
	}
	int status;
	CHECK(waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status), "status %#x", status);
	CHECK(write(ends[1], "kernel", 6) == 6 && read(ends[0], page + PAGE - 3, 6) == 6, "pipe");
	CHECK(!memcmp(page + PAGE - 3, "kernel", 6) && page[PAGE + 3] == 'p', "what was read");
	char given[] = "wwwwwwwwww";
	struct iovec local = {given, 10}, remote = {page, 10};

	CHECK(process_vm_writev(child, &local, 1, &remote, 1, 0) == 10, "process_vm_writev");
	CHECK(page[0] == 'p', "it came here too");
	kill(child, SIGCONT);
	must_succeed(child);
	munmap(page, 2 * PAGE);
	close(ends[0]);
	close(ends[1]);
	return 2;
}

/* The zero page: read first, then written; a neighbour stays zero. */
static long zeros(void)
{
	char *some = pages(64, PROT_READ | PROT_WRITE);

	for (size_t i = 0; i < 64; i++)
		CHECK(((volatile char *)some)[i * PAGE] == 0, "page %zu", i);
	for (size_t i = 0; i < 64; i += 3)
		((volatile char *)some)[i * PAGE] = 1;
	for (size_t i = 0; i < 64; i++)
		CHECK(((volatile char *)some)[i * PAGE] == (i % 3 == 0), "page %zu", i);
	munmap(some, 64 * PAGE);
	return 64;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	repeat("generations", 0.5, generations);
	repeat("files", 0.2, files);
	repeat("by_the_kernel", 0.15, by_the_kernel);
	repeat("zeros", 0.15, zeros);
	return end();
}
