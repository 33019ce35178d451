/*
 * Every opcode of one to three bytes, with several prefixes and register operands, as an instruction of a program: each
 * ends in a signal, if only in that of the int3 behind it. `opcodes 1 list` prints them, to compare two kernels: bytes,
 * signal, code, length. Hypervisors differ in a few: they execute what the processor does not know, or refuse `int`.
 */
#include "trial.h"

struct result {
	uint8_t bytes[8], length, number;
	int16_t code, rip;
};

static struct result *results;
static size_t count;

static void add(const uint8_t *bytes, size_t length)
{
	struct result *result = &results[count++];

	memcpy(result->bytes, bytes, length);
	result->length = (uint8_t)length;
}

static void enumerate(void)
{
	static const uint8_t prefixes[] = {0, 0x66, 0xf2, 0xf3, 0x48};
	static const uint8_t operands[] = {0xc0, 0xc8, 0xd0, 0xd8, 0xe0, 0xe8, 0xf0, 0xf8};

	for (size_t prefix = 0; prefix < EVERY(prefixes); prefix++) {
		for (int opcode = 0; opcode < 1024; opcode++) {
			uint8_t bytes[8];
			size_t length = 0;
			int map = opcode / 256;

			if (prefixes[prefix])
				bytes[length++] = prefixes[prefix];
			if (map >= 1)
				bytes[length++] = 0x0f;
			if (map == 2)
				bytes[length++] = 0x38;
			if (map == 3)
				bytes[length++] = 0x3a;
			bytes[length++] = (uint8_t)opcode;
			bool all = map == 1 && (bytes[length - 1] <= 1 || bytes[length - 1] == 0xae || bytes[length - 1] == 0xc7);
			if (map == 0 && bytes[length - 1] == 0x0f)
				continue;
			/* As they are (an operand of 0xcc), and with each register; some with all operands that are registers. */
			add(bytes, length);
			if (map >= 2 && prefix > 1)
				continue;
			for (int operand = 0; operand < (all ? 64 : map >= 2 ? 1 : 8); operand++) {
				bytes[length] = all ? (uint8_t)(0xc0 + operand) : operands[operand];
				add(bytes, length + 1);
			}
		}
	}
	for (int vector = 0; vector < 256; vector++)
		add((uint8_t[]){0xcd, (uint8_t)vector}, 2);
}

/* In children: an instruction may take from a program what it needs to go on. */
static void execute(void)
{
	size_t *at = shared_pages(1);

	for (*at = 0; *at < count; ++*at) {
		pid_t child = fork();

		if (!child) {
			for (; *at < count; ++*at) {
				struct result *result = &results[*at];

				interval(ITIMER_REAL, 0);
				struct trial seen = trial(result->bytes, result->length);
				__asm__ volatile("cld\n	ldmxcsr %0" ::"m"((const uint32_t){0x1f80}));
				result->number = (uint8_t)seen.number;
				result->code = (int16_t)seen.code;
				result->rip = seen.rip - CODE < PAGE ? (int16_t)(seen.rip - CODE - 64) : 9999;
			}
			_exit(0);
		}
		int status = status_of(child);
		if (!status)
			break;
		CHECK(*at < count, "the child died behind the end: %#x", status);
		results[*at].number = (uint8_t)(100 + (WIFSIGNALED(status) ? WTERMSIG(status) : 99));
	}
	munmap(at, PAGE);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	results = shared_pages(256);
	enumerate();
	CHECK(count * sizeof *results <= 256 * PAGE, "%zu results", count);
	trial_prepare();
	double until = now() + seconds_to_run;
	long sum = 0;
	do {
		execute();
		sum += (long)count;
	} while (now() < until);
	long by_number[256] = {0};
	for (size_t i = 0; i < count; i++) {
		by_number[results[i].number]++;
		CHECK(results[i].number, "no signal for instruction %zu", i);
		if (argc > 2) {
			for (int j = 0; j < results[i].length; j++)
				printf("%02x", results[i].bytes[j]);
			printf(" %s%d %d %d\n", results[i].number >= 100 ? "died " : signal_name(results[i].number), results[i].number,
			       results[i].code, results[i].rip);
		}
	}
	if (argc > 2)
		return 0;
	report("executed", sum);
	report("SIGSEGV", by_number[SIGSEGV]);
	report("SIGILL", by_number[SIGILL]);
	report("SIGTRAP", by_number[SIGTRAP]);
	report("others?", (long)count - by_number[SIGSEGV] - by_number[SIGILL] - by_number[SIGTRAP]);
	return end();
}
