/* Threads: mutexes, condition variables, barriers, raw futexes, thread-local storage, cancellation and timeouts. */
#include "common.h"
#include <linux/futex.h>
#include <pthread.h>

#define THREADS 6

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static volatile long guarded;
static __thread uint64_t own;

static void start(pthread_t *threads, size_t count, void *(*body)(void *))
{
	for (size_t i = 0; i < count; i++)
		CHECK(!pthread_create(&threads[i], NULL, body, (void *)i), "thread %zu", i);
}

static void join(pthread_t *threads, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		void *result;

		CHECK(!pthread_join(threads[i], &result) && result == (void *)i, "thread %zu", i);
	}
}

static void *add(void *argument)
{
	uint64_t index = (uint64_t)argument;

	for (uint64_t i = 0; i < 2000; i++) {
		own = index * 1000000 + i;
		pthread_mutex_lock(&mutex);
		long value = guarded;
		if (i % 64 == 0)
			sched_yield();
		guarded = value + 1;
		pthread_mutex_unlock(&mutex);
		CHECK(own == index * 1000000 + i, "thread-local storage of thread %lu", index);
	}
	return argument;
}

static long mutexes(void)
{
	pthread_t threads[THREADS];

	guarded = 0;
	start(threads, THREADS, add);
	join(threads, THREADS);
	CHECK(guarded == THREADS * 2000, "%ld additions", guarded);
	return guarded;
}

static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static volatile long turn;

static void *pass_on(void *argument)
{
	long index = (long)argument;

	for (int i = 0; i < 100; i++) {
		pthread_mutex_lock(&mutex);
		while (turn % THREADS != index)
			pthread_cond_wait(&condition, &mutex);
		turn++;
		pthread_cond_broadcast(&condition);
		pthread_mutex_unlock(&mutex);
	}
	return argument;
}

static long conditions(void)
{
	pthread_t threads[THREADS];

	turn = 0;
	start(threads, THREADS, pass_on);
	join(threads, THREADS);
	CHECK(turn == THREADS * 100, "%ld turns", turn);
	return turn;
}

static pthread_barrier_t barrier;
static volatile long arrived;

static void *meet(void *argument)
{
	for (long i = 1; i <= 50; i++) {
		__atomic_add_fetch(&arrived, 1, __ATOMIC_SEQ_CST);
		pthread_barrier_wait(&barrier);
		CHECK(arrived == i * THREADS, "%ld arrived in round %ld", arrived, i);
		pthread_barrier_wait(&barrier);
	}
	return argument;
}

static long barriers(void)
{
	pthread_t threads[THREADS];

	arrived = 0;
	pthread_barrier_init(&barrier, NULL, THREADS);
	start(threads, THREADS, meet);
	join(threads, THREADS);
	pthread_barrier_destroy(&barrier);
	return arrived;
}

static long futex(volatile uint32_t *word, int operation, uint32_t value, const struct timespec *timeout)
{
	return syscall(SYS_futex, word, operation, value, timeout, NULL, 0);
}

/* A futex between processes, in shared memory: strictly in turns. */
static long shared_futexes(void)
{
	volatile uint32_t *word = shared_pages(1);
	pid_t child = fork();
	uint32_t mine = child ? 0 : 1, rounds = 300;

	for (uint32_t i = 0; i < rounds; i++) {
		uint32_t value;

		while ((value = __atomic_load_n(word, __ATOMIC_SEQ_CST)) % 2 != mine)
			futex(word, FUTEX_WAIT, value, NULL);
		__atomic_store_n(word, value + 1, __ATOMIC_SEQ_CST);
		futex(word, FUTEX_WAKE, 1, NULL);
	}
	if (!child)
		_exit(0);
	must_succeed(child);
	CHECK(*word == 2 * rounds, "%u turns", *word);
	munmap((void *)(uintptr_t)word, PAGE);
	return 2 * rounds;
}

/* A wait that nobody ends takes its time, and not less. */
static long timeouts(void)
{
	volatile uint32_t word = 0;
	struct timespec limit = {0, 2000000};
	double begin = now();

	CHECK(futex(&word, FUTEX_WAIT_PRIVATE, 0, &limit) < 0 && errno == ETIMEDOUT, "no timeout");
	CHECK(now() - begin >= 0.002, "only %.6f s", now() - begin);
	CHECK(futex(&word, FUTEX_WAIT_PRIVATE, 1, &limit) < 0 && errno == EAGAIN, "another value");
	return 2;
}

static void *sleep_long(void *argument)
{
	(void)argument;
	for (;;)
		pause();
	return NULL;
}

static long cancelled(void)
{
	pthread_t threads[THREADS];

	start(threads, THREADS, sleep_long);
	for (int i = 0; i < THREADS; i++) {
		void *result;

		CHECK(!pthread_cancel(threads[i]), "cancel");
		CHECK(!pthread_join(threads[i], &result) && result == PTHREAD_CANCELED, "join");
	}
	return THREADS;
}

static void *short_life(void *argument)
{
	volatile char stack[8000];

	memset((void *)(uintptr_t)stack, (int)(long)argument, sizeof stack);
	own = (uint64_t)argument;
	sched_yield();
	CHECK(own == (uint64_t)argument && stack[7999] == (char)(long)argument, "another thread's memory");
	return argument;
}

static long created(void)
{
	pthread_t threads[40];

	start(threads, EVERY(threads), short_life);
	join(threads, EVERY(threads));
	return EVERY(threads);
}

/* Threads that change the mappings of each other's memory; all see every change. */
static char *volatile region;
static volatile bool stop;

static void *look(void *argument)
{
	uint64_t last = 0;

	while (!stop) {
		uint64_t value = *(volatile uint64_t *)(region + PAGE * (uint64_t)argument);

		CHECK(value >= last, "thread %lu saw %lu after %lu", (uint64_t)argument, value, last);
		last = value;
		sched_yield();
	}
	return argument;
}

static long changed_under_threads(void)
{
	pthread_t threads[3];

	region = pages(3, PROT_READ | PROT_WRITE);
	stop = false;
	start(threads, 3, look);
	for (uint64_t i = 1; i <= 100; i++) {
		char *fresh = pages(3, PROT_READ | PROT_WRITE);

		for (size_t page = 0; page < 3; page++)
			*(uint64_t *)(fresh + page * PAGE) = i;
		CHECK(mremap(fresh, 3 * PAGE, 3 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, region) == region, "mremap");
		if (i % 10 == 0)
			sched_yield();
	}
	stop = true;
	join(threads, 3);
	munmap(region, 3 * PAGE);
	return 100;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	repeat("mutexes", 0.2, mutexes);
	repeat("conditions", 0.15, conditions);
	repeat("barriers", 0.1, barriers);
	repeat("shared_futexes", 0.15, shared_futexes);
	repeat("timeouts", 0.1, timeouts);
	repeat("cancelled", 0.1, cancelled);
	repeat("created", 0.1, created);
	repeat("changed_under_threads", 0.1, changed_under_threads);
	return end();
}
