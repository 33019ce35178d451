/* Instructions that only a kernel may execute, and such as nobody may: each ends in its signal, again and again. */
#include "trial.h"

#define BYTES(...) .bytes = {__VA_ARGS__}, .length = sizeof((const uint8_t[]){__VA_ARGS__})

static const struct instruction {
	const char *name;
	int number; /* SIGTRAP: it is executed, and the int3 behind it is reached; 0: any of SIGSEGV, SIGILL, SIGTRAP */
	uint8_t bytes[15];
	size_t length;
} instructions[] = {
	{"cli", SIGSEGV, BYTES(0xfa)},
	{"sti", SIGSEGV, BYTES(0xfb)},
	{"hlt", SIGSEGV, BYTES(0xf4)},
	{"in al, dx", SIGSEGV, BYTES(0xec)},
	{"in al, 0x60", SIGSEGV, BYTES(0xe4, 0x60)},
	{"in eax, 0x64", SIGSEGV, BYTES(0xe5, 0x64)},
	{"out dx, al", SIGSEGV, BYTES(0xee)},
	{"out 0x64, al", SIGSEGV, BYTES(0xe6, 0x64)},
	{"out 0x3f8, al", SIGSEGV, BYTES(0x66, 0xba, 0xf8, 0x03, 0xee)},
	{"insb", SIGSEGV, BYTES(0x6c)},
	{"rep outsb", SIGSEGV, BYTES(0xf3, 0x6e)},
	{"mov rax, cr0", SIGSEGV, BYTES(0x0f, 0x20, 0xc0)},
	{"mov rax, cr2", SIGSEGV, BYTES(0x0f, 0x20, 0xd0)},
	{"mov rax, cr3", SIGSEGV, BYTES(0x0f, 0x20, 0xd8)},
	{"mov rax, cr4", SIGSEGV, BYTES(0x0f, 0x20, 0xe0)},
	{"mov rax, cr8", SIGSEGV, BYTES(0x44, 0x0f, 0x20, 0xc0)},
	{"mov cr0, rax", SIGSEGV, BYTES(0x0f, 0x22, 0xc0)},
	{"mov cr2, rax", SIGSEGV, BYTES(0x0f, 0x22, 0xd0)},
	{"mov cr3, rax", SIGSEGV, BYTES(0x0f, 0x22, 0xd8)},
	{"mov cr4, rax", SIGSEGV, BYTES(0x0f, 0x22, 0xe0)},
	{"mov cr1, rax", 0, BYTES(0x0f, 0x22, 0xc8)},
	{"mov rax, dr0", SIGSEGV, BYTES(0x0f, 0x21, 0xc0)},
	{"mov rax, dr7", SIGSEGV, BYTES(0x0f, 0x21, 0xf8)},
	{"mov dr7, rax", SIGSEGV, BYTES(0x0f, 0x23, 0xf8)},
	{"lgdt [rax]", SIGSEGV, BYTES(0x0f, 0x01, 0x10)},
	{"lidt [rax]", SIGSEGV, BYTES(0x0f, 0x01, 0x18)},
	{"lldt ax", SIGSEGV, BYTES(0x0f, 0x00, 0xd0)},
	{"ltr ax", SIGSEGV, BYTES(0x0f, 0x00, 0xd8)},
	{"lmsw ax", SIGSEGV, BYTES(0x0f, 0x01, 0xf0)},
	{"clts", SIGSEGV, BYTES(0x0f, 0x06)},
	{"invlpg [rax]", SIGSEGV, BYTES(0x0f, 0x01, 0x38)},
	{"invd", SIGSEGV, BYTES(0x0f, 0x08)},
	{"wbinvd", SIGSEGV, BYTES(0x0f, 0x09)},
	{"rdmsr", SIGSEGV, BYTES(0x0f, 0x32)},
	{"rdmsr efer", SIGSEGV, BYTES(0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32)},
	{"wrmsr", SIGSEGV, BYTES(0x0f, 0x30)},
	{"wrmsr lstar", SIGSEGV, BYTES(0xb9, 0x82, 0x00, 0x00, 0xc0, 0x0f, 0x30)},
	{"wrmsr tsc deadline", SIGSEGV, BYTES(0xb9, 0xe0, 0x06, 0x00, 0x00, 0x0f, 0x30)},
	{"xsetbv 0", SIGSEGV, BYTES(0x31, 0xc9, 0x0f, 0x01, 0xd1)},
	{"xgetbv 2", SIGSEGV, BYTES(0x0f, 0x01, 0xd0)},
	{"swapgs", SIGSEGV, BYTES(0x0f, 0x01, 0xf8)},
	{"sysretq", SIGSEGV, BYTES(0x48, 0x0f, 0x07)},
	{"sysretl", SIGSEGV, BYTES(0x0f, 0x07)},
	{"sysexit", 0, BYTES(0x0f, 0x35)},
	{"iretq with null selectors", SIGSEGV, BYTES(0x48, 0xcf)},
	{"iretl with null selectors", SIGSEGV, BYTES(0xcf)},
	{"lretq to a null selector", SIGSEGV, BYTES(0x48, 0xcb)},
	{"monitor", 0, BYTES(0x0f, 0x01, 0xc8)},
	{"mwait", 0, BYTES(0x0f, 0x01, 0xc9)},
	{"vmrun", 0, BYTES(0x0f, 0x01, 0xd8)},
	{"vmcall", 0, BYTES(0x0f, 0x01, 0xc1)},
	{"vmmcall", 0, BYTES(0x0f, 0x01, 0xd9)},
	{"vmload", 0, BYTES(0x0f, 0x01, 0xda)},
	{"stgi", 0, BYTES(0x0f, 0x01, 0xdc)},
	{"clgi", 0, BYTES(0x0f, 0x01, 0xdd)},
	{"skinit", 0, BYTES(0x0f, 0x01, 0xde)},
	{"invlpga", 0, BYTES(0x0f, 0x01, 0xdf)},
	{"vmxoff", 0, BYTES(0x0f, 0x01, 0xc4)},
	{"invpcid rax, [rax]", 0, BYTES(0x66, 0x0f, 0x38, 0x82, 0x00)},
	{"stac", 0, BYTES(0x0f, 0x01, 0xcb)},
	{"clac", 0, BYTES(0x0f, 0x01, 0xca)},
	{"encls", 0, BYTES(0x0f, 0x01, 0xcf)},
	{"xsaves [rax]", 0, BYTES(0x0f, 0xc7, 0x28)},
	{"rsm", SIGILL, BYTES(0x0f, 0xaa)},
	{"ud0", SIGILL, BYTES(0x0f, 0xff, 0xc0)},
	{"ud1", SIGILL, BYTES(0x0f, 0xb9, 0xc0)},
	{"ud2", SIGILL, BYTES(0x0f, 0x0b)},
	{"lock nop", SIGILL, BYTES(0xf0, 0x90)},
	{"push es", SIGILL, BYTES(0x06)},
	{"into", SIGILL, BYTES(0xce)},
	{"aam", SIGILL, BYTES(0xd4, 0x0a)},
	{"lcall immediate", SIGILL, BYTES(0x9a, 0, 0, 0, 0, 0x10, 0)},
	{"fifteen prefixes", SIGSEGV, BYTES(0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66)},
	{"int3", SIGTRAP, BYTES(0xcc)},
	{"int1", SIGTRAP, BYTES(0xf1)},
	{"int 0", 0, BYTES(0xcd, 0x00)},
	{"int 1", 0, BYTES(0xcd, 0x01)},
	{"int 2", 0, BYTES(0xcd, 0x02)},
	{"int 3", SIGTRAP, BYTES(0xcd, 0x03)},
	{"int 4", 0, BYTES(0xcd, 0x04)},
	{"int 8", 0, BYTES(0xcd, 0x08)},
	{"int 13", 0, BYTES(0xcd, 0x0d)},
	{"int 14", 0, BYTES(0xcd, 0x0e)},
	{"int 18", 0, BYTES(0xcd, 0x12)},
	{"int 0x80", 0, BYTES(0xcd, 0x80)},
	{"int 0xec", 0, BYTES(0xcd, 0xec)},
	{"int 0xff", 0, BYTES(0xcd, 0xff)},
	{"sysenter", 0, BYTES(0x0f, 0x34)},
	{"mov ss, 0", SIGSEGV, BYTES(0x31, 0xc0, 0x8e, 0xd0)},
	{"mov ss, 0x18", SIGSEGV, BYTES(0xb8, 0x18, 0, 0, 0, 0x8e, 0xd0)},
	{"mov ds, 0x10", SIGSEGV, BYTES(0xb8, 0x10, 0, 0, 0, 0x8e, 0xd8)},
	{"mov ds, 0x18", SIGSEGV, BYTES(0xb8, 0x18, 0, 0, 0, 0x8e, 0xd8)},
	{"mov ds, 0xfff8", SIGSEGV, BYTES(0xb8, 0xf8, 0xff, 0, 0, 0x8e, 0xd8)},
	{"mov es, 7 (local table)", SIGSEGV, BYTES(0xb8, 0x07, 0, 0, 0, 0x8e, 0xc0)},
	{"mov fs, 0x2b", SIGTRAP, BYTES(0xb8, 0x2b, 0, 0, 0, 0x8e, 0xe0)},
	{"mov gs, 0x2b", SIGTRAP, BYTES(0xb8, 0x2b, 0, 0, 0, 0x8e, 0xe8)},
	{"mov ds, 3", SIGTRAP, BYTES(0xb8, 0x03, 0, 0, 0, 0x8e, 0xd8)},
	{"mov cs, ax", SIGILL, BYTES(0x8e, 0xc8)},
	{"retf to the kernel's code segment", SIGSEGV, BYTES(0x6a, 0x10, 0x50, 0x48, 0xcb)},
	{"iretq to the kernel's code segment", SIGSEGV,
	 BYTES(0x6a, 0x18, 0x50, 0x9c, 0x6a, 0x10, 0x50, 0x48, 0xcf)},
	{"read of a non-canonical address", SIGSEGV, BYTES(0x48, 0xc1, 0xe0, 0x05, 0x8b, 0x00)},
	{"jump to a non-canonical address", SIGSEGV, BYTES(0x48, 0xc1, 0xe0, 0x05, 0xff, 0xe0)},
	{"read of 0xffff800000000000", SIGSEGV, BYTES(0x48, 0xb8, 0, 0, 0, 0, 0, 0x80, 0xff, 0xff, 0x8b, 0x00)},
	{"read of 0xffffffffff600000", SIGSEGV, BYTES(0x8b, 0x04, 0x25, 0, 0, 0x60, 0xff)},
	{"call of 0x7ffffffff000", SIGSEGV, BYTES(0x48, 0xb8, 0, 0xf0, 0xff, 0xff, 0xff, 0x7f, 0, 0, 0xff, 0xd0)},
	{"push at stack pointer 0", SIGSEGV, BYTES(0x31, 0xe4, 0x50)},
	{"int3 at stack pointer 0", SIGTRAP, BYTES(0x31, 0xe4, 0xcc)},
	{"ud2 at a non-canonical stack pointer", SIGILL, BYTES(0x48, 0xc1, 0xe4, 0x05, 0x0f, 0x0b)},
	{"push at a non-canonical stack pointer", SIGBUS, BYTES(0x48, 0xc1, 0xe4, 0x05, 0x50)},
	{"cli at a non-canonical stack pointer", SIGSEGV, BYTES(0x48, 0xc1, 0xe4, 0x05, 0xfa)},
	{"division by zero", SIGFPE, BYTES(0x31, 0xc9, 0xf7, 0xf1)},
	{"system call 99999 at a non-canonical stack pointer", 0,
	 BYTES(0x48, 0xc1, 0xe4, 0x05, 0xb8, 0x9f, 0x86, 0x01, 0, 0x0f, 0x05)},
};

static bool fits(const struct instruction *instruction, int number)
{
	if (instruction->number)
		return number == instruction->number;
	return number == SIGSEGV || number == SIGILL || number == SIGTRAP;
}

static long all(void)
{
	for (size_t i = 0; i < EVERY(instructions); i++) {
		const struct instruction *instruction = &instructions[i];
		struct trial seen = trial(instruction->bytes, instruction->length);

		CHECK(fits(instruction, seen.number), "%s: signal %d (%s), code %d, rip %#lx, address %#lx",
		      instruction->name, seen.number, signal_name(seen.number), seen.code, seen.rip, seen.address);
		/* A trap points behind the int3, but for int1 in a machine whose hypervisor reports it before. */
		if (seen.number == SIGTRAP && instruction->bytes[0] != 0xf1)
			CHECK(seen.rip > CODE + 64 && seen.rip <= CODE + 64 + 32, "%s: rip %#lx", instruction->name, seen.rip);
		CHECK((seen.flags & 0x3200) == 0x200, "%s: flags %#lx", instruction->name, seen.flags);
	}
	return EVERY(instructions);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	trial_prepare();
	if (argc > 2) { /* a list, from the instruction of this number on */
		for (size_t i = (size_t)atol(argv[2]); i < EVERY(instructions); i++) {
			printf("%3zu ", i);
			fflush(stdout);
			struct trial seen = trial(instructions[i].bytes, instructions[i].length);

			printf("%-50s %s %d rip+%ld address %#lx %s\n", instructions[i].name, signal_name(seen.number), seen.code,
			       (long)(seen.rip - CODE - 64), seen.address, fits(&instructions[i], seen.number) ? "" : "UNEXPECTED");
		}
		return 0;
	}
	repeat("instructions", 1, all);
	return end();
}
