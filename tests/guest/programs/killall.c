/* kill(-1, SIGKILL): everything but the first process and this one ends, again and again. Only in a machine. */
#include "common.h"
#include <pthread.h>

static void *busy(void *argument)
{
	(void)argument;
	for (;;)
		sched_yield();
	return NULL;
}

static long kill_everything(void)
{
	enum { CHILDREN = 12 };

	for (int i = 0; i < CHILDREN; i++) {
		pid_t child = fork();

		if (!child) {
			pthread_t thread;
			int ends[2];
			char byte;

			if (i % 3 == 0) { /* more than one thread */
				pthread_create(&thread, NULL, busy, NULL);
				pthread_create(&thread, NULL, busy, NULL);
			}
			if (i % 4 == 1 && !pipe(ends)) /* asleep in a call */
				(void)!read(ends[0], &byte, 1);
			if (i % 4 == 2) /* faulting */
				for (;;) {
					char *memory = pages(64, PROT_READ | PROT_WRITE);
					memset(memory, 1, 64 * PAGE);
					munmap(memory, 64 * PAGE);
				}
			if (i % 4 == 3) /* a parent of its own */
				for (;;) {
					pid_t grandchild = fork();
					if (!grandchild)
						_exit(0);
					status_of(grandchild);
				}
			for (;;)
				;
		}
	}
	struct timespec pause = {0, 20000000};
	nanosleep(&pause, NULL);
	CHECK(!kill(-1, SIGKILL), "kill");
	for (int i = 0; i < CHILDREN; i++) {
		int status;

		CHECK(wait(&status) > 0 && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "status %#x", status);
	}
	return CHILDREN;
}

int main(int argc, char **argv)
{
	char first[64] = "";
	int file = open("/proc/1/comm", O_RDONLY);

	begin(argc, argv);
	CHECK(file >= 0 && read(file, first, sizeof first - 1) > 0, "the first process");
	/* Twice and once more: on a host this would be the end of the session. */
	CHECK(in_guest() && getpid() != 1 && strncmp(first, "systemd", 7), "this is only for a machine");
	struct stat_of_uname {
		char sysname[65], nodename[65], release[65], version[65], machine[65], domain[65];
	} names;
	CHECK(!syscall(SYS_uname, &names) && !strcmp(names.nodename, "microvm"), "this is only for a machine");
	repeat("killed", 1, kill_everything);
	return end();
}
