/*
 * What all programs of this folder share. Each takes the seconds to run as its argument, prints one JSON object of
 * what it counted, and exits with 0; at the first thing that is wrong it says so on standard error and exits with 1.
 * The same binaries run on the host, whose kernel says what is right. No program here may touch addresses of the
 * kernel that are mapped: with the kernel at CPL3, nothing would stop it.
 */
#pragma once
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define PAGE 4096UL
#define EVERY(array) (sizeof(array) / sizeof *(array))

#define CHECK(condition, ...)                                                                                          \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "FAIL %s:%d: %s: ", __FILE__, __LINE__, #condition);                           \
			fprintf(stderr, __VA_ARGS__);                                                                  \
			fprintf(stderr, " (errno %d)\n", errno);                                                       \
			fflush(NULL);                                                                                  \
			_exit(1);                                                                                      \
		}                                                                                                      \
	} while (0)

static double seconds_to_run;
static int reported;

static inline double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* True in a virtual machine of ours: some things are only tried there. */
static inline bool in_guest(void)
{
	return getenv("TORTURE_GUEST") != NULL;
}

static inline void begin(int argc, char **argv)
{
	seconds_to_run = argc > 1 ? atof(argv[1]) : 0.5;
	setvbuf(stdout, NULL, _IOFBF, 1 << 16);
}

static inline void report(const char *name, long count)
{
	printf("%s\"%s\": %ld", reported++ ? ", " : "{", name, count);
}

static inline int end(void)
{
	puts(reported ? "}" : "{}");
	return fflush(stdout) ? 1 : 0;
}

/* Calls a part of the program again and again for its share of the time; reports the sum of what it returns. */
static inline void repeat(const char *name, double share, long (*part)(void))
{
	double until = now() + share * seconds_to_run;
	long sum = 0;

	do
		sum += part();
	while (now() < until);
	report(name, sum);
}

static inline uint64_t random_number(void)
{
	static uint64_t state = 0x9e3779b97f4a7c15;

	state ^= state << 13;
	state ^= state >> 7;
	return state ^= state << 17;
}

static inline void handle(int number, void (*handler)(int, siginfo_t *, void *), int flags)
{
	struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};

	CHECK(!sigaction(number, &action, NULL), "sigaction %d", number);
}

static inline void *pages(size_t count, int protection)
{
	void *memory = mmap(NULL, count * PAGE, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(memory != MAP_FAILED, "mmap of %zu pages", count);
	return memory;
}

static inline void *shared_pages(size_t count)
{
	void *memory = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	CHECK(memory != MAP_FAILED, "mmap of %zu shared pages", count);
	return memory;
}

/* The wait status of a child, which must be there. */
static inline int status_of(pid_t child)
{
	int status;
	pid_t found;

	do
		found = waitpid(child, &status, 0);
	while (found < 0 && errno == EINTR);
	CHECK(found == child, "waitpid %d gave %d", child, found);
	return status;
}

static inline void must_succeed(pid_t child)
{
	int status = status_of(child);

	CHECK(status == 0, "child %d ended with status %#x", child, status);
}

static inline void use_signal_stack(void)
{
	stack_t stack = {.ss_sp = pages(16, PROT_READ | PROT_WRITE), .ss_size = 16 * PAGE};

	CHECK(!sigaltstack(&stack, NULL), "sigaltstack");
}

static inline void interval(int which, long microseconds)
{
	struct itimerval value = {{0, microseconds}, {0, microseconds}};

	CHECK(!setitimer(which, &value, NULL), "setitimer");
}
