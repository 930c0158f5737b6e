/* Hides VNNI, AMX and, where HIDE is "avx512", AVX-512 from whatever reads CPUID in this process: CPUID then faults, and
   the fault is answered with those bits cleared. Loaded by LD_PRELOAD; the process ends with 77 where that cannot be. */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef ARCH_SET_CPUID
#define ARCH_SET_CPUID 0x1012
#endif
#define BIT(n) (1u << (n))

static int without_avx512;

static long allow(unsigned long cpuid) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, cpuid); }

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    uint8_t *code = (uint8_t *)registers[REG_RIP];
    uint32_t leaf = registers[REG_RAX], subleaf = registers[REG_RCX], a, b, c, d;
    allow(1);
    if (code[0] != 0x0f || code[1] != 0xa2) {
        /* A real fault: it comes again, and ends the process. */
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(subleaf));
    allow(0);
    if (leaf == 7 && subleaf == 0) {
        c &= ~BIT(11);                          /* AVX512_VNNI */
        d &= ~(BIT(22) | BIT(24) | BIT(25));    /* AMX */
        if (without_avx512) {
            b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
            c &= ~(BIT(1) | BIT(6) | BIT(12) | BIT(14));
            d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(23));
        }
    } else if (leaf == 7 && subleaf == 1) {
        a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23)); /* AVX_VNNI, AVX512_BF16, AMX_FP16, AVX_IFMA */
        d &= ~(BIT(4) | BIT(5) | BIT(8) | BIT(10));  /* AVX_VNNI_INT8 and _INT16, AMX_COMPLEX */
    }
    registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
    const char *what = getenv("HIDE");
    struct sigaction action;
    without_avx512 = what && !strcmp(what, "avx512");
    memset(&action, 0, sizeof action);
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    if (sigaction(SIGSEGV, &action, 0) || allow(0)) _exit(77);
}
