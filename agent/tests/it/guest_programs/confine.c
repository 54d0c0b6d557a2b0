/* Runs a program on a kernel that has next to nothing: what every guest kernel was seen to have, and 16 MB of addresses.
 *
 *     confine vectored|unvectored PROGRAM ARGUMENT...
 *
 * Whatever else the program asks for kills it with SIGSYS. In "unvectored", readv and writev are not there either.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef __x86_64__
#define ARCHITECTURE AUDIT_ARCH_X86_64
#else
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#endif

#define ADDRESS_BYTES (16 << 20)

#define RULES_MAX 512

/* 32 bits of an argument that must have a value, the others aside. */
struct condition {
    size_t at;
    uint32_t bits, value;
};

#define FIELD(name) offsetof(struct seccomp_data, name)
/* Halves of an argument on machines that store the low one first. */
#define LOW(argument) FIELD(args[argument])
#define HIGH(argument) (FIELD(args[argument]) + 4)
#define ALL 0xffffffffU

static struct sock_filter filter[RULES_MAX];
static unsigned short length;

static void add(uint16_t code, uint8_t otherwise_skip, uint32_t operand)
{
    filter[length++] = (struct sock_filter){ code, 0, otherwise_skip, operand };
}

/* What calls of this number get under all these conditions; other calls go on to the next rule. */
static void rule(long number, uint32_t action, const struct condition *conditions, unsigned count)
{
    add(BPF_LD | BPF_W | BPF_ABS, 0, FIELD(nr));
    add(BPF_JMP | BPF_JEQ | BPF_K, (uint8_t)(3 * count + 1), (uint32_t)number);
    for (unsigned at = 0; at < count; at++) {
        add(BPF_LD | BPF_W | BPF_ABS, 0, (uint32_t)conditions[at].at);
        add(BPF_ALU | BPF_AND | BPF_K, 0, conditions[at].bits);
        add(BPF_JMP | BPF_JEQ | BPF_K, (uint8_t)(3 * (count - at - 1) + 1), conditions[at].value);
    }
    add(BPF_RET | BPF_K, 0, action);
}

static void allow(long number)
{
    rule(number, SECCOMP_RET_ALLOW, NULL, 0);
}

static void refuse(long number, uint32_t error)
{
    rule(number, SECCOMP_RET_ERRNO | error, NULL, 0);
}

static void allow_if(long number, struct condition condition)
{
    rule(number, SECCOMP_RET_ALLOW, &condition, 1);
}

static void allow_if_null(long number, int argument)
{
    struct condition null[] = { { LOW(argument), ALL, 0 }, { HIGH(argument), ALL, 0 } };
    rule(number, SECCOMP_RET_ALLOW, null, 2);
}

static void what_the_library_needs(void)
{
    static const uint32_t families[] = { AF_UNIX, AF_INET, AF_INET6, AF_VSOCK };
    for (unsigned at = 0; at < sizeof families / sizeof *families; at++) {
        struct condition stream[] = { { LOW(0), ALL, families[at] }, { LOW(1), 0xf, SOCK_STREAM } };
        rule(SYS_socket, SECCOMP_RET_ALLOW, stream, 2);
    }
    allow(SYS_connect);
    allow(SYS_read);
    allow(SYS_write);
    allow_if_null(SYS_sendto, 4);
    allow_if_null(SYS_recvfrom, 4);
#ifdef SYS_poll
    allow(SYS_poll);
#else
    allow(SYS_ppoll); /* what poll is where there is none */
#endif
    allow(SYS_close);
    allow(SYS_clock_gettime); /* where it is a call of the kernel */
}

static void what_it_may_try_in_vain(int vectored)
{
    refuse(SYS_setsockopt, ENOPROTOOPT);
    refuse(SYS_sendmsg, ENOTSUP);
    refuse(SYS_recvmsg, ENOTSUP);
    /* What glibc and Rust ask when they start, and do without. */
    refuse(SYS_getrandom, ENOSYS);
    refuse(SYS_set_robust_list, ENOSYS);
    refuse(SYS_rseq, ENOSYS);
    refuse(SYS_sched_getaffinity, ENOSYS);
    refuse(SYS_statx, ENOSYS);
#ifdef SYS_readlink
    refuse(SYS_readlink, ENOENT);
#else
    refuse(SYS_readlinkat, ENOENT);
#endif
    if (vectored) {
        allow(SYS_readv);
        allow(SYS_writev);
    }
    /* For calls that no rule above takes. */
    refuse(SYS_readv, ENOSYS);
    refuse(SYS_writev, ENOSYS);
}

/* Memory, images, an end. */
static void what_the_programs_need(void)
{
    allow(SYS_brk);
    allow(SYS_mmap);
    allow(SYS_munmap);
    allow(SYS_mprotect);
    allow(SYS_madvise);
#ifdef SYS_open
    allow_if(SYS_open, (struct condition){ LOW(1), O_ACCMODE | O_CREAT, O_RDONLY });
#endif
    allow_if(SYS_openat, (struct condition){ LOW(2), O_ACCMODE | O_CREAT, O_RDONLY });
    allow(SYS_fstat); /* Rust asks how long a file is before it reads it */
    allow(SYS_newfstatat);
    allow(SYS_exit);
    allow(SYS_exit_group);
}

/* A filter cannot tell before from after; what is here can do no more than it says. */
static void what_happens_before_main(char **program)
{
    uint64_t path = (uintptr_t)program[0], arguments = (uintptr_t)program;
    /* One start of a program: these pointers are this process's, and nobody's after it. */
    struct condition own[] = {
        { LOW(0), ALL, (uint32_t)path },      { HIGH(0), ALL, (uint32_t)(path >> 32) },
        { LOW(1), ALL, (uint32_t)arguments }, { HIGH(1), ALL, (uint32_t)(arguments >> 32) },
    };
    rule(SYS_execve, SECCOMP_RET_ALLOW, own, 4);
#ifdef SYS_arch_prctl
    allow(SYS_arch_prctl); /* where a thread's own variables are */
#endif
    allow(SYS_set_tid_address); /* how a C library learns the number of its thread */
    allow(SYS_gettid);
    allow_if_null(SYS_prlimit64, 2); /* the limit of the stack is read, not set */
    allow(SYS_rt_sigaction);    /* Rust ignores SIGPIPE, and tells when the stack is used up */
    allow(SYS_sigaltstack);     /* the stack on which Rust would tell */
}

int main(int argc, char **argv)
{
    struct rlimit addresses = { ADDRESS_BYTES, ADDRESS_BYTES }, core = { 0, 0 };
    struct sock_fprog all = { 0, filter };
    if (argc < 3)
        return 2;
    add(BPF_LD | BPF_W | BPF_ABS, 0, FIELD(arch));
    filter[length++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 1, 0);
    add(BPF_RET | BPF_K, 0, SECCOMP_RET_KILL_PROCESS);
    what_the_library_needs();
    what_it_may_try_in_vain(strcmp(argv[1], "vectored") == 0);
    what_the_programs_need();
    what_happens_before_main(argv + 2);
    add(BPF_RET | BPF_K, 0, SECCOMP_RET_KILL_PROCESS);
    all.len = length;
    if (setrlimit(RLIMIT_CORE, &core) || setrlimit(RLIMIT_AS, &addresses) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &all)) {
        perror("confine");
        return 2;
    }
    execve(argv[2], argv + 2, environ);
    return 2;
}
