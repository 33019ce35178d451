/* Pipes, Unix sockets, descriptors sent over them, splice, epoll and eventfd: every byte is compared. */
#include "common.h"
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	return *state ^= *state << 17;
}

/* Writes a stream of numbers in pieces of odd lengths. */
static void produce(int to, size_t total, uint64_t seed)
{
	static uint8_t buffer[40000];
	size_t sent = 0;

	while (sent < total) {
		size_t length = 1 + next(&seed) % sizeof buffer, done = 0;

		if (length > total - sent)
			length = total - sent;
		for (size_t i = 0; i < length; i++)
			buffer[i] = (uint8_t)((sent + i) * 2654435761U >> 13);
		while (done < length) {
			ssize_t count = write(to, buffer + done, length - done);

			CHECK(count > 0, "write");
			done += (size_t)count;
		}
		sent += length;
	}
}

static void consume(int from, size_t total, uint64_t seed)
{
	static uint8_t buffer[30000];
	size_t received = 0;

	for (;;) {
		ssize_t count = read(from, buffer, 1 + next(&seed) % sizeof buffer);

		CHECK(count >= 0, "read");
		if (!count)
			break;
		for (ssize_t i = 0; i < count; i++)
			CHECK(buffer[i] == (uint8_t)((received + (size_t)i) * 2654435761U >> 13), "byte %zu", received + (size_t)i);
		received += (size_t)count;
	}
	CHECK(received == total, "%zu of %zu bytes", received, total);
}

static long through(int from, int to, size_t total)
{
	pid_t child = fork();

	if (!child) {
		close(from);
		produce(to, total, 12345);
		_exit(0);
	}
	close(to);
	consume(from, total, 777);
	close(from);
	must_succeed(child);
	return (long)total;
}

static long pipes(void)
{
	int ends[2];

	CHECK(!pipe(ends), "pipe");
	return through(ends[0], ends[1], 1 << 20);
}

static long sockets(void)
{
	int ends[2];

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends), "socketpair");
	return through(ends[0], ends[1], 1 << 20);
}

/* From one pipe to another without a copy in the program. */
static long spliced(void)
{
	int first[2], second[2];
	size_t total = 1 << 19;

	CHECK(!pipe(first) && !pipe(second), "pipe");
	pid_t producer = fork();
	if (!producer) {
		close(first[0]), close(second[0]), close(second[1]);
		produce(first[1], total, 99);
		_exit(0);
	}
	pid_t mover = fork();
	if (!mover) {
		close(first[1]), close(second[0]);
		for (ssize_t count = 1; count > 0;) {
			count = splice(first[0], NULL, second[1], NULL, 50000, SPLICE_F_MOVE);
			CHECK(count >= 0, "splice");
		}
		_exit(0);
	}
	close(first[0]), close(first[1]), close(second[1]);
	consume(second[0], total, 5);
	close(second[0]);
	must_succeed(producer);
	must_succeed(mover);
	return (long)total;
}

static long packets(void)
{
	int ends[2];
	static uint8_t buffer[5000];

	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends), "socketpair");
	pid_t child = fork();
	if (!child) {
		for (int i = 0; i < 200; i++) {
			memset(buffer, i, sizeof buffer);
			CHECK(send(ends[1], buffer, (size_t)(1 + i * 20), 0) == 1 + i * 20, "send");
		}
		_exit(0);
	}
	for (int i = 0; i < 200; i++) {
		ssize_t count = recv(ends[0], buffer, sizeof buffer, 0);

		CHECK(count == 1 + i * 20 && buffer[0] == (uint8_t)i && buffer[count - 1] == (uint8_t)i, "packet %d of %zd bytes", i,
		      count);
	}
	must_succeed(child);
	close(ends[0]), close(ends[1]);
	return 200;
}

/* A descriptor goes to another process and works there after its sender has closed it. */
static long descriptors(void)
{
	int ends[2], given[2];
	char control[CMSG_SPACE(sizeof(int))] = {0}, byte = 'd';
	struct iovec vector = {&byte, 1};
	struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends) && !pipe(given), "socketpair");
	pid_t child = fork();
	if (!child) {
		close(given[0]), close(given[1]);
		CHECK(recvmsg(ends[1], &message, 0) == 1, "recvmsg");
		struct cmsghdr *header = CMSG_FIRSTHDR(&message);
		CHECK(header && header->cmsg_type == SCM_RIGHTS, "no descriptor came");
		_exit(write(*(int *)CMSG_DATA(header), "hello", 5) != 5);
	}
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	header->cmsg_level = SOL_SOCKET, header->cmsg_type = SCM_RIGHTS, header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &given[1], sizeof(int));
	CHECK(sendmsg(ends[0], &message, 0) == 1, "sendmsg");
	close(given[1]);
	char words[5];
	CHECK(read(given[0], words, 5) == 5 && !memcmp(words, "hello", 5), "nothing came through the descriptor");
	must_succeed(child);
	close(given[0]), close(ends[0]), close(ends[1]);
	return 1;
}

static long events(void)
{
	int poller = epoll_create1(0), counters[8];
	long seen = 0;

	for (int i = 0; i < 8; i++) {
		struct epoll_event event = {.events = EPOLLIN, .data.u32 = (uint32_t)i};

		counters[i] = eventfd(0, 0);
		CHECK(counters[i] >= 0 && !epoll_ctl(poller, EPOLL_CTL_ADD, counters[i], &event), "epoll_ctl");
	}
	pid_t child = fork();
	if (!child) {
		for (uint64_t i = 0; i < 400; i++)
			CHECK(write(counters[i % 8], &(uint64_t){1}, 8) == 8, "write");
		_exit(0);
	}
	while (seen < 400) {
		struct epoll_event ready[8];
		int count = epoll_wait(poller, ready, 8, 2000);

		CHECK(count > 0, "%ld of 400 events", seen);
		for (int i = 0; i < count; i++) {
			uint64_t value;

			CHECK(read(counters[ready[i].data.u32], &value, 8) == 8, "read");
			seen += (long)value;
		}
	}
	must_succeed(child);
	for (int i = 0; i < 8; i++)
		close(counters[i]);
	close(poller);
	return seen;
}

/* A pipe without a reader: SIGPIPE, or EPIPE; and one without a writer: the end of the file. */
static long broken(void)
{
	int ends[2];

	CHECK(!pipe(ends), "pipe");
	close(ends[0]);
	pid_t child = fork();
	if (!child)
		_exit(write(ends[1], "x", 1) != 1);
	int status = status_of(child);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGPIPE, "status %#x", status);
	signal(SIGPIPE, SIG_IGN);
	CHECK(write(ends[1], "x", 1) < 0 && errno == EPIPE, "no EPIPE");
	signal(SIGPIPE, SIG_DFL);
	close(ends[1]);
	return 2;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	repeat("pipes", 0.2, pipes);
	repeat("sockets", 0.2, sockets);
	repeat("spliced", 0.15, spliced);
	repeat("packets", 0.1, packets);
	repeat("descriptors", 0.1, descriptors);
	repeat("events", 0.15, events);
	repeat("broken", 0.1, broken);
	return end();
}
