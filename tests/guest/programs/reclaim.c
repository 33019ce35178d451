/*
 * More memory than there is: file pages are reclaimed, what was written keeps its contents, a program that takes too
 * much is killed, and so is one that does so in a group of its own. Only in a machine.
 */
#include "common.h"
#include <sys/stat.h>
#include <sys/sysinfo.h>

static void put(const char *path, const char *text)
{
	int file = open(path, O_WRONLY);

	CHECK(file >= 0 && write(file, text, strlen(text)) == (ssize_t)strlen(text), "%s", path);
	close(file);
}

/* Takes memory until it is killed, or has `limit` bytes; what it has must stay what it was. */
static void take(size_t limit)
{
	size_t taken = 0;

	put("/proc/self/oom_score_adj", "1000");
	while (taken < limit) {
		uint64_t *piece = pages(256, PROT_READ | PROT_WRITE);

		for (size_t i = 0; i < 256; i++)
			piece[i * PAGE / 8] = taken + i;
		for (size_t i = 0; i < 256; i++)
			CHECK(piece[i * PAGE / 8] == taken + i, "page %zu", i);
		taken += 256 * PAGE;
	}
	_exit(0);
}

static long out_of_memory(void)
{
	pid_t child = fork();

	if (!child)
		take(1UL << 40);
	int status = status_of(child);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "status %#x", status);
	return 1;
}

/* The same in a control group of 24 MiB; and reading files there, whose pages must go again. */
static long in_a_group(void)
{
	static const char group[] = "/sys/fs/cgroup/torture";
	char path[100];

	if (mkdir(group, 0755) && errno != EEXIST)
		return 0;
	put("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	snprintf(path, sizeof path, "%s/memory.max", group);
	put(path, "25165824");
	snprintf(path, sizeof path, "%s/cgroup.procs", group);
	for (int kill = 0; kill < 2; kill++) {
		pid_t child = fork();

		if (!child) {
			put(path, "0");
			if (kill)
				take(100UL << 20);
			static char buffer[1 << 16];
			for (int round = 0; round < 2; round++) {
				int file = open("/tmp/large", O_RDWR | O_CREAT | O_TRUNC, 0600);

				unlink("/tmp/large");
				for (int i = 0; i < 200; i++) /* 12.5 MiB */
					CHECK(write(file, buffer, sizeof buffer) == sizeof buffer, "write");
				close(file);
			}
			_exit(0);
		}
		int status = status_of(child);
		if (kill)
			CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "status %#x", status);
		else
			CHECK(status == 0, "status %#x", status);
	}
	rmdir(group);
	return 2;
}

/* Memory nearly full, and programs of the image run meanwhile: their pages come and go. */
static long under_pressure(void)
{
	struct sysinfo facts;
	volatile long done = 0;

	CHECK(!sysinfo(&facts), "sysinfo");
	size_t count = facts.freeram * 85 / 100 / PAGE;
	uint64_t *much = pages(count, PROT_READ | PROT_WRITE);

	for (size_t i = 0; i < count; i++)
		much[i * PAGE / 8 + i % 512] = i * 31 + 7;
	for (int i = 0; i < 3; i++, done++) {
		pid_t child = vfork();

		if (!child) {
			execl("/bin/sh", "sh", "-c", "cat /usr/bin/* /usr/lib/x86_64-linux-gnu/*.so* 2>/dev/null | head -c 80000000 | wc -c >/dev/null",
			      (char *)NULL);
			_exit(1);
		}
		must_succeed(child);
	}
	for (size_t i = 0; i < count; i++)
		CHECK(much[i * PAGE / 8 + i % 512] == i * 31 + 7, "page %zu of %zu", i, count);
	munmap(much, count * PAGE);
	return done;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	CHECK(in_guest(), "this is only for a machine");
	put("/proc/self/oom_score_adj", "-1000");
	repeat("out_of_memory", 0.3, out_of_memory);
	repeat("in_a_group?", 0.3, in_a_group);
	repeat("under_pressure", 0.4, under_pressure);
	return end();
}
