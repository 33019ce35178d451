/* fork, vfork, clone and execve in loops; arguments and environment checked; files that are no programs. */
#include "common.h"
#include <elf.h>
#include <spawn.h>
#include <sys/stat.h>

extern char **environ;
static char self[PATH_MAX];

static long forks(void)
{
	for (int i = 0; i < 50; i++) {
		volatile int value = i;
		pid_t child = fork();

		if (!child) {
			value += 100;
			_exit(value == i + 100 ? i : 255);
		}
		int status = status_of(child);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == i && value == i, "status %#x, value %d", status, value);
	}
	return 50;
}

static long vforks(void)
{
	for (int i = 0; i < 30; i++) {
		static volatile int written;
		pid_t child = vfork();

		if (!child) {
			written = i + 1; /* in the parent's memory */
			_exit(7);
		}
		CHECK(written == i + 1, "the child wrote elsewhere");
		int status = status_of(child);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7, "status %#x", status);
	}
	return 30;
}

/* This program again, as `--check`: it compares its own words with what they must be. */
static void be_checked(int argc, char **argv)
{
	CHECK(argc > 4, "%d words", argc);
	int count = atoi(argv[2]), length = atoi(argv[3]);

	CHECK(argc == count + 4, "%d words instead of %d", argc, count + 4);
	for (int i = 0; i < count; i++) {
		CHECK((int)strlen(argv[4 + i]) == length, "word %d", i);
		for (int j = 0; j < length; j++)
			CHECK(argv[4 + i][j] == 'a' + (i + j) % 26, "byte %d of word %d", j, i);
	}
	CHECK(!strcmp(getenv("OF_THE_PARENT"), argv[2]), "the environment");
	exit(42);
}

static long executes(void)
{
	static const int counts[] = {1, 3, 200}, lengths[] = {1, 300, 3000};

	for (size_t n = 0; n < EVERY(counts); n++) {
		char **words = calloc((size_t)counts[n] + 5, sizeof *words), number[2][16], variable[32];
		char *environment[] = {variable, "TORTURE_GUEST=1", NULL};

		snprintf(number[0], 16, "%d", counts[n]);
		snprintf(number[1], 16, "%d", lengths[n]);
		snprintf(variable, 32, "OF_THE_PARENT=%d", counts[n]);
		words[0] = self, words[1] = "--check", words[2] = number[0], words[3] = number[1];
		for (int i = 0; i < counts[n]; i++) {
			words[4 + i] = malloc((size_t)lengths[n] + 1);
			for (int j = 0; j < lengths[n]; j++)
				words[4 + i][j] = (char)('a' + (i + j) % 26);
			words[4 + i][lengths[n]] = 0;
		}
		for (volatile int how = 0; how < 3; how++) {
			pid_t child;

			if (how == 2)
				CHECK(!posix_spawn(&child, self, NULL, NULL, words, environment), "posix_spawn");
			else
				child = how ? vfork() : fork();
			if (!child) {
				execve(self, words, environment);
				_exit(1);
			}
			int status = status_of(child);
			CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 42, "status %#x", status);
		}
		for (int i = 0; i < counts[n]; i++)
			free(words[4 + i]);
		free(words);
	}
	return 3 * EVERY(counts);
}

static int with_clone(void *argument)
{
	*(volatile long *)argument += 1;
	return 5;
}

static long clones(void)
{
	static char stack[65536] __attribute__((aligned(16)));
	static volatile long shared;
	static const int flags[] = {0, CLONE_VM, CLONE_VM | CLONE_FILES | CLONE_FS, CLONE_FILES, CLONE_NEWUTS | CLONE_NEWPID};

	for (size_t i = 0; i < EVERY(flags); i++) {
		if (flags[i] & CLONE_NEWPID && geteuid())
			continue;
		long before = shared;
		pid_t child = clone(with_clone, stack + sizeof stack, flags[i] | SIGCHLD, (void *)(uintptr_t)&shared);

		CHECK(child > 0, "clone with flags %#x", flags[i]);
		int status = status_of(child);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 5, "status %#x", status);
		CHECK(shared == before + !!(flags[i] & CLONE_VM), "memory with flags %#x", flags[i]);
	}
	return EVERY(flags);
}

/* A chain of processes, each the parent of the next, and a crowd at once. */
static long chain(void)
{
	long *count = shared_pages(1);
	pid_t child = fork();

	if (!child) {
		for (int depth = 0; depth < 40; depth++) {
			__atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST);
			pid_t next = fork();

			if (next) {
				int status = status_of(next);
				_exit(status ? 1 : 0);
			}
		}
		_exit(0);
	}
	must_succeed(child);
	CHECK(*count == 40, "%ld of 40", *count);
	pid_t crowd[60];

	for (size_t i = 0; i < EVERY(crowd); i++) {
		crowd[i] = fork();
		if (!crowd[i]) {
			__atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST);
			sched_yield();
			_exit(0);
		}
	}
	for (size_t i = 0; i < EVERY(crowd); i++)
		must_succeed(crowd[i]);
	CHECK(*count == 100, "%ld of 100", *count);
	long result = *count;
	munmap(count, PAGE);
	return result;
}

/* Ends of children: by exit codes, by signals that kill, and by those that leave a core. */
static long deaths(void)
{
	const int numbers[] = {SIGKILL, SIGTERM, SIGSEGV, SIGABRT, SIGILL, SIGFPE, SIGTRAP, SIGBUS, SIGRTMIN};

	for (size_t i = 0; i < EVERY(numbers); i++) {
		pid_t child = fork();

		if (!child) {
			signal(numbers[i], SIG_DFL);
			if (i % 2)
				for (;;)
					pause();
			for (;;)
				;
		}
		kill(child, numbers[i]);
		int status = status_of(child);
		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == numbers[i], "status %#x after signal %d", status, numbers[i]);
	}
	return EVERY(numbers);
}

/* Programs that start in the wild, or are none. */
static long bad_programs(void)
{
	static const uint64_t entries[] = {0,
					   8,
					   0x4000000000000000,
					   0x800000000000,
					   0x7ffffffff000,
					   0xffffeb0000000000,
					   0xffffffffff600000,
					   0xffffffffffffffff};
	char name[] = "/tmp/bad-program-XXXXXX";
	int file = mkstemp(name);
	long done = 0;

	CHECK(file >= 0 && !fchmod(file, 0700), "a file");
	close(file);
	for (size_t i = 0; i < EVERY(entries) + 2; i++) {
		struct {
			Elf64_Ehdr header;
			Elf64_Phdr segment;
			uint8_t code[64];
		} image = {
			{.e_ident = {0x7f, 'E', 'L', 'F', ELFCLASS64, ELFDATA2LSB, EV_CURRENT},
			 .e_type = ET_EXEC,
			 .e_machine = EM_X86_64,
			 .e_version = 1,
			 .e_phoff = sizeof(Elf64_Ehdr),
			 .e_ehsize = sizeof(Elf64_Ehdr),
			 .e_phentsize = sizeof(Elf64_Phdr),
			 .e_phnum = 1},
			{.p_type = PT_LOAD, .p_flags = PF_R | PF_X, .p_vaddr = 0x400000, .p_align = PAGE},
			{0x0f, 0x0b},
		};
		image.segment.p_filesz = image.segment.p_memsz = sizeof image;
		if (i < EVERY(entries))
			image.header.e_entry = entries[i];
		else
			image.header.e_entry = 0x400000 + offsetof(typeof(image), code);
		if (i == EVERY(entries) + 1)
			image.header.e_machine = EM_386, image.header.e_ident[EI_CLASS] = ELFCLASS32;
		file = open(name, O_WRONLY | O_TRUNC);
		CHECK(file >= 0 && write(file, &image, sizeof image) == sizeof image, "the program");
		close(file);
		pid_t child = vfork();

		if (!child) {
			execl(name, name, (char *)NULL);
			_exit(errno == ENOEXEC ? 100 : 101);
		}
		int status = status_of(child);

		if (i < EVERY(entries))
			CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV, "entry %#lx: status %#x", entries[i], status);
		else if (i == EVERY(entries))
			CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGILL, "ud2: status %#x", status);
		else
			CHECK(!WIFEXITED(status) || WEXITSTATUS(status) == 100, "a 32-bit program: status %#x", status);
		done++;
	}
	unlink(name);
	return done;
}

int main(int argc, char **argv)
{
	if (argc > 1 && !strcmp(argv[1], "--check"))
		be_checked(argc, argv);
	begin(argc, argv);
	CHECK(readlink("/proc/self/exe", self, sizeof self - 1) > 0, "the name of this program");
	repeat("forks", 0.15, forks);
	repeat("vforks", 0.1, vforks);
	repeat("executes", 0.2, executes);
	repeat("clones", 0.1, clones);
	repeat("chain", 0.2, chain);
	repeat("deaths", 0.1, deaths);
	repeat("bad_programs", 0.15, bad_programs);
	return end();
}
