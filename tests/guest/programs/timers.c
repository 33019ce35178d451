/* Clocks and timers: never early, seldom late, every expiry counted; clocks that never go back. */
#include "common.h"
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/timerfd.h>

static long sleeps(void)
{
	static const long lengths[] = {50000, 100000, 1000000, 3000000};
	long done = 0;

	for (size_t i = 0; i < EVERY(lengths); i++) {
		struct timespec length = {0, lengths[i]};
		double least = 1e9;

		for (int j = 0; j < 4; j++, done++) {
			double begin = now();

			CHECK(!nanosleep(&length, NULL), "nanosleep");
			double took = now() - begin;
			CHECK(took >= 1e-9 * (double)lengths[i], "%ld ns took %.9f s", lengths[i], took);
			least = took < least ? took : least;
		}
		/* At its best, on a machine that others use too, a sleep is at most 3 ms too long. */
		CHECK(least < 1e-9 * (double)lengths[i] + 0.003, "%ld ns never took less than %.9f s", lengths[i], least);
	}
	return done;
}

static long absolute_sleeps(void)
{
	struct timespec target;

	clock_gettime(CLOCK_MONOTONIC, &target);
	for (int i = 0; i < 5; i++) {
		target.tv_nsec += 700000;
		if (target.tv_nsec >= 1000000000) {
			target.tv_nsec -= 1000000000;
			target.tv_sec++;
		}
		CHECK(!clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &target, NULL), "clock_nanosleep");
		CHECK(now() >= (double)target.tv_sec + 1e-9 * (double)target.tv_nsec, "woken early");
	}
	return 5;
}

static long clocks(void)
{
	static const clockid_t ids[] = {CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, CLOCK_BOOTTIME, CLOCK_PROCESS_CPUTIME_ID};
	long done = 0;

	for (size_t i = 0; i < EVERY(ids); i++) {
		struct timespec last = {0, 0}, time;

		for (int j = 0; j < 2000; j++, done++) {
			if (j % 2) /* by the library, or by the kernel itself */
				CHECK(!syscall(SYS_clock_gettime, ids[i], &time), "clock %d", ids[i]);
			else
				CHECK(!clock_gettime(ids[i], &time), "clock %d", ids[i]);
			CHECK(time.tv_sec > last.tv_sec || (time.tv_sec == last.tv_sec && time.tv_nsec >= last.tv_nsec),
			      "clock %d went back from %ld.%09ld to %ld.%09ld", ids[i], last.tv_sec, last.tv_nsec, time.tv_sec,
			      time.tv_nsec);
			last = time;
		}
	}
	return done;
}

static volatile long expired, overrun;
static timer_t timer;

static void on_timer(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	CHECK(info->si_code == SI_TIMER, "code %d", info->si_code);
	expired++;
	overrun += timer_getoverrun(timer);
}

/* A timer of 500 us for 20 ms while the program computes: all expiries are there, as signals or as overruns. */
static long interval_timer(void)
{
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN};
	struct itimerspec interval = {{0, 500000}, {0, 500000}}, off = {0};

	handle(SIGRTMIN, on_timer, SA_RESTART);
	expired = overrun = 0;
	CHECK(!timer_create(CLOCK_MONOTONIC, &event, &timer), "timer_create");
	double begin = now();
	CHECK(!timer_settime(timer, 0, &interval, NULL), "timer_settime");
	while (now() < begin + 0.02)
		random_number();
	CHECK(!timer_settime(timer, 0, &off, NULL), "timer_settime");
	double took = now() - begin;
	long all = expired + overrun, wanted = (long)(took / 0.0005);

	CHECK(all >= 38 && all <= wanted + 1, "%ld expiries (%ld overruns) in %.6f s", all, overrun, took);
	CHECK(expired >= 2, "only %ld signals", expired);
	timer_delete(timer);
	return expired;
}

static long timer_descriptors(void)
{
	int descriptor = timerfd_create(CLOCK_MONOTONIC, 0);
	struct itimerspec interval = {{0, 400000}, {0, 400000}};
	uint64_t sum = 0, count;
	double begin = now();

	CHECK(descriptor >= 0 && !timerfd_settime(descriptor, 0, &interval, NULL), "timerfd");
	while (sum < 20) {
		CHECK(read(descriptor, &count, 8) == 8 && count > 0, "read");
		sum += count;
	}
	double took = now() - begin;
	CHECK(took >= 0.0004 * 20 - 1e-6, "%lu expiries in %.6f s", sum, took);
	CHECK((double)sum <= took / 0.0004 + 1, "%lu expiries in %.6f s", sum, took);
	close(descriptor);
	return (long)sum;
}

static volatile long ticks;

static void on_tick(int number, siginfo_t *info, void *context)
{
	(void)number, (void)info, (void)context;
	ticks++;
}

/* The processor's time is accounted: of a program that computes about all of it, of one that sleeps about nothing. */
static long processor_time(void)
{
	struct timespec begin, end, pause = {0, 30000000};

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &begin);
	nanosleep(&pause, NULL);
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
	double slept = (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
	CHECK(slept < 0.02, "30 ms of sleep used %.6f s", slept);

	ticks = 0;
	handle(SIGPROF, on_tick, SA_RESTART);
	interval(ITIMER_PROF, 10000);
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &begin);
	double used;
	do {
		random_number();
		clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
		used = (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
	} while (used < 0.06);
	interval(ITIMER_PROF, 0);
	CHECK(ticks >= 2 && ticks <= 7, "%ld ticks of 10 ms in 60 ms", ticks);
	return ticks;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	prctl(PR_SET_TIMERSLACK, 1);
	repeat("sleeps", 0.25, sleeps);
	repeat("absolute_sleeps", 0.15, absolute_sleeps);
	repeat("clocks", 0.15, clocks);
	repeat("interval_timer", 0.15, interval_timer);
	repeat("timer_descriptors", 0.15, timer_descriptors);
	repeat("processor_time", 0.15, processor_time);
	return end();
}
