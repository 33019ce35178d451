/*
 * What `microvm bench guest` measures, the same in a machine of ours, under QEMU and on the host: `guestbench N` prints
 * one line of JSON for each figure, with N values. As a first process (under QEMU) it mounts what it needs, takes N
 * from the variable GUESTBENCH, and ends the machine. `guestbench tsc` prints the frequency of the time-stamp counter.
 *
 * Units are in the names. Programs that the file system does not have are named as skipped.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define MOST 100 /* repetitions */

static int repetitions = 5;
static char directory[] = "/tmp/guestbench-XXXXXX";

static double now(void) /* microseconds */
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return 1e6 * (double)time.tv_sec + 1e-3 * (double)time.tv_nsec;
}

static void fail(const char *what)
{
	printf("{\"error\": \"%s: %s\"}\n", what, strerror(errno));
	fflush(stdout);
	_exit(1);
}

static void print(const char *name, const double *values)
{
	printf("{\"name\": \"%s\", \"values\": [", name);
	for (int i = 0; i < repetitions; i++)
		printf("%s%.6g", i ? ", " : "", values[i]);
	puts("]}");
	fflush(stdout);
}

static void measure(const char *name, double (*once)(void), bool warm)
{
	double values[MOST];

	if (warm)
		once();
	for (int i = 0; i < repetitions; i++)
		values[i] = once();
	print(name, values);
}

static void *map(size_t count)
{
	void *memory = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		fail("mmap");
	return memory;
}

static double touch(char *memory, size_t count)
{
	double begin = now();

	for (size_t i = 0; i < count; i++)
		((volatile char *)memory)[i * PAGE] = 1;
	return (now() - begin) / (double)count;
}

/* Memory that the guest has not used before: nothing is given back, so nothing can come again. */
static double page_touch_first(void)
{
	return touch(map(2048), 2048);
}

static double page_touch(void)
{
	char *memory = map(2048);
	double value = touch(memory, 2048);

	munmap(memory, 2048 * PAGE);
	return value;
}

static double getppid_call(void)
{
	double begin = now();

	for (int i = 0; i < 20000; i++)
		syscall(SYS_getppid);
	return (now() - begin) / 20000;
}

static double user_loop(void)
{
	unsigned long sum = 0;
	double begin = now();

	/* In registers: how fast a loop through memory is depends on where the stack lies. */
	for (unsigned long i = 0; i < 200000000; i++)
		__asm__ volatile("" : "+r"(sum) : "r"(i));
	return (now() - begin) / 1e3;
}

static double forks(void)
{
	double begin = now();

	for (int i = 0; i < 100; i++) {
		pid_t child = fork();

		if (!child)
			_exit(0);
		if (waitpid(child, NULL, 0) != child)
			fail("fork");
	}
	return (now() - begin) / 1e5;
}

static double forks_and_executes(void)
{
	double begin = now();

	for (volatile int i = 0; i < 100; i++) {
		int status;
		pid_t child = vfork();

		if (!child) {
			execl("/proc/self/exe", "guestbench", "nop", (char *)NULL);
			_exit(1);
		}
		if (waitpid(child, &status, 0) != child || status)
			fail("vfork and execve");
	}
	return (now() - begin) / 1e5;
}

static double ping_pong(void)
{
	int there[2], back[2];
	char byte = 0;

	if (pipe(there) || pipe(back))
		fail("pipe");
	pid_t child = fork();
	if (!child) {
		for (int i = 0; i < 1000; i++)
			if (read(there[0], &byte, 1) != 1 || write(back[1], &byte, 1) != 1)
				_exit(1);
		_exit(0);
	}
	double begin = now();
	for (int i = 0; i < 1000; i++)
		if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
			fail("pipe");
	double value = (now() - begin) / 1000;

	waitpid(child, NULL, 0);
	close(there[0]), close(there[1]), close(back[0]), close(back[1]);
	return value;
}

static volatile long signals;

static void on_signal(int number)
{
	(void)number;
	signals++;
}

static int compare(const void *left, const void *right)
{
	double difference = *(const double *)left - *(const double *)right;

	return difference < 0 ? -1 : difference > 0;
}

/* For how long a signal of a 500 us timer takes the processor away from a program that computes: the median of 100. */
static double timer_signal(void)
{
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
	struct itimerspec often = {{0, 500000}, {0, 500000}};
	static double gaps[100];
	timer_t timer;

	signal(SIGALRM, on_signal);
	if (timer_create(CLOCK_MONOTONIC, &event, &timer))
		fail("timer_create");
	signals = 0;
	double begin = now();
	unsigned long first = __builtin_ia32_rdtsc(), last = first;
	if (timer_settime(timer, 0, &often, NULL))
		fail("timer_settime");
	for (long seen = 0; seen < 100;) {
		unsigned long tsc = __builtin_ia32_rdtsc();

		if (signals != seen) { /* it came before the time was read, or after that */
			tsc = __builtin_ia32_rdtsc();
			gaps[seen++] = (double)(tsc - last);
			signals = seen;
		}
		last = tsc;
	}
	double per_tick = (now() - begin) / (double)(__builtin_ia32_rdtsc() - first);
	timer_delete(timer);
	qsort(gaps, 100, sizeof *gaps, compare);
	return gaps[50] * per_tick;
}

static double sleeps(void)
{
	struct timespec length = {0, 100000};
	double begin = now();

	for (int i = 0; i < 200; i++)
		nanosleep(&length, NULL);
	return (now() - begin) / 200;
}

/* ---- programs of the file system ---- */

static int run(char *const *words)
{
	static char *environment[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
				      "HOME=/tmp",
				      "LC_ALL=C",
				      "PYTHONDONTWRITEBYTECODE=1",
				      "GIT_CONFIG_NOSYSTEM=1",
				      NULL};
	posix_spawn_file_actions_t actions;
	int status = -1;
	pid_t child;

	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
	posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
	posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
	putenv(environment[0]);
	if (!posix_spawnp(&child, words[0], &actions, NULL, words, environment))
		waitpid(child, &status, 0);
	posix_spawn_file_actions_destroy(&actions);
	return status;
}

static const struct program {
	const char *name, *prepare;
	char *const words[6];
} programs[] = {
	{"python_ms", NULL, {"python3", "-S", "-c", "print(6*7)", NULL}},
	{"python_modules_ms",
	 NULL,
	 {"python3", "-c",
	  "import json, subprocess, threading\n"
	  "threads = [threading.Thread(target=json.dumps, args=(list(range(100)),)) for _ in range(10)]\n"
	  "[thread.start() for thread in threads]; [thread.join() for thread in threads]",
	  NULL}},
	{"sha256sum_ms", "head -c 67108864 /dev/zero >large", {"sha256sum", "large", NULL}},
	{"gcc_ms",
	 "command -v gcc && { echo '#include <stdio.h>'; for i in $(seq 1 166); do printf "
	 "'int f%d(int x)\\n{\\n\\tfor (int i = 0; i < x; i++)\\n\\t\\tx += i * %d;\\n\\treturn printf(\"%%d\", x);\\n}\\n' $i $i; "
	 "done; echo; echo; echo; } >large.c",
	 {"gcc", "-O1", "-c", "large.c", NULL}},
	{"git_status_ms",
	 "command -v git && mkdir tree && cd tree && for i in $(seq 1 50); do mkdir d$i; for j in $(seq 1 100); do echo $i $j >d$i/$j; "
	 "done; done; git init -q . && git add -A && git -c user.name=a -c user.email=a@b commit -qm 1",
	 {"git", "-C", "tree", "status", "--short", NULL}},
	{"sqlite_ms",
	 NULL,
	 {"python3", "-S", "-c",
	  "import os, sqlite3\n"
	  "if os.path.exists('base'): os.unlink('base')\n"
	  "base = sqlite3.connect('base')\n"
	  "base.execute('create table t(a integer primary key, b text)')\n"
	  "base.executemany('insert into t(b) values (?)', ((str(i) * 5,) for i in range(20000)))\n"
	  "base.commit()\n"
	  "for i in range(100): base.execute('insert into t(b) values (?)', ('x',)); base.commit()\n"
	  "assert base.execute('select count(*) from t').fetchone() == (20100,)",
	  NULL}},
};

static void measure_program(const struct program *program)
{
	double values[MOST];
	char *prepare[] = {"sh", "-ec", (char *)(uintptr_t)program->prepare, NULL};

	if ((program->prepare && run(prepare)) || run(program->words)) {
		printf("{\"name\": \"%s\", \"skipped\": \"the image has no working %s\"}\n", program->name, program->words[0]);
		fflush(stdout);
		return;
	}
	for (int i = 0; i < repetitions; i++) {
		double begin = now();

		if (run(program->words))
			fail(program->name);
		values[i] = (now() - begin) / 1e3;
	}
	print(program->name, values);
}

static void everything(bool with_programs)
{
	prctl(PR_SET_TIMERSLACK, 1);
	/* In a process that ends: the others shall not carry its memory. */
	pid_t child = fork();
	if (!child) {
		measure("page_touch_first_us", page_touch_first, false);
		_exit(0);
	}
	waitpid(child, NULL, 0);
	measure("page_touch_us", page_touch, true);
	measure("getppid_us", getppid_call, true);
	measure("user_loop_ms", user_loop, false);
	measure("fork_ms", forks, true);
	measure("fork_exec_ms", forks_and_executes, true);
	measure("pingpong_us", ping_pong, true);
	measure("timer_signal_us", timer_signal, false);
	measure("nanosleep_us", sleeps, true);
	if (!with_programs)
		return;
	if (!mkdtemp(directory) || chdir(directory))
		fail("a directory in /tmp");
	for (size_t i = 0; i < sizeof programs / sizeof *programs; i++)
		measure_program(&programs[i]);
}

/* ---- as the first process of a machine of QEMU's ---- */

static void mount_on(const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
	mkdir(target, 0755);
	if (mount(source, target, type, flags, data))
		fail(target);
}

static void become_first(void)
{
	mount_on("dev", "/dev", "devtmpfs", 0, NULL);
	int console = open("/dev/console", O_RDWR);

	if (console >= 0)
		for (int i = 0; i < 3; i++)
			dup2(console, i);
	puts("guestbench: here"); /* what boot_ms ends with */
	fflush(stdout);
	mount_on("/dev/vda", "/image", "erofs", MS_RDONLY, NULL);
	mount_on("memory", "/writable", "tmpfs", 0, NULL);
	mkdir("/writable/upper", 0755);
	mkdir("/writable/work", 0755);
	mount_on("overlay", "/root", "overlay", 0, "lowerdir=/image,upperdir=/writable/upper,workdir=/writable/work");
	mount_on("/dev", "/root/dev", NULL, MS_MOVE, NULL);
	mount_on("proc", "/root/proc", "proc", 0, NULL);
	mount_on("sys", "/root/sys", "sysfs", 0, NULL);
	mount_on("memory", "/root/tmp", "tmpfs", 0, NULL);
	/* This program must be found by execve under the new root too. */
	int from = open("/init", O_RDONLY), to = open("/root/tmp/guestbench", O_WRONLY | O_CREAT, 0755);
	static char buffer[1 << 16];
	ssize_t count;

	while ((count = read(from, buffer, sizeof buffer)) > 0)
		if (write(to, buffer, (size_t)count) != count)
			fail("a copy");
	close(from);
	close(to);
	if (chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
		fail("the root");
	char number[16];

	snprintf(number, sizeof number, "%d", repetitions);
	pid_t child = fork();
	if (!child) {
		execl("/tmp/guestbench", "guestbench", number, (char *)NULL);
		fail("execve");
	}
	waitpid(child, NULL, 0);
	puts("guestbench: done");
	fflush(stdout);
	reboot(RB_AUTOBOOT);
	for (;;)
		pause();
}

/* How fast the time-stamp counter of this machine is, in kHz: QEMU's guests see it, and cannot find out themselves. */
static double tsc_frequency(void)
{
	double begin = now();
	unsigned long first = __builtin_ia32_rdtsc();

	usleep(200000);
	return 1e3 * (double)(__builtin_ia32_rdtsc() - first) / (now() - begin);
}

int main(int argc, char **argv)
{
	bool first = getpid() == 1;
	const char *number = first ? getenv("GUESTBENCH") : argc > 1 ? argv[1] : NULL;

	if (argc > 1 && !strcmp(argv[1], "nop"))
		return 0;
	if (argc > 1 && !strcmp(argv[1], "tsc"))
		return printf("%.0f\n", tsc_frequency()) < 0;
	if (number)
		repetitions = atoi(number);
	if (repetitions < 1 || repetitions > MOST)
		repetitions = 5;
	if (first)
		become_first();
	everything(!(argc > 2 && !strcmp(argv[2], "without-programs")));
	return 0;
}
