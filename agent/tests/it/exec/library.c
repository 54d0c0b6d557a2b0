/* A guest's library: functions that compute, functions that fail, and functions that try to get out. */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct arg {
    void *buf;
    size_t size;
    uint32_t type, custom;
    bool owned;
};

#define FUNCTION(name) int name(struct arg *read_args, size_t nr_read, struct arg *write_args, size_t nr_write)
#define UNUSED ((void)read_args, (void)nr_read, (void)write_args, (void)nr_write)
#define IN(index) (*(int32_t *)read_args[index].buf)
#define OUT(index) (*(int32_t *)write_args[index].buf)

FUNCTION(add)
{
    if (nr_read != 2 || nr_write != 1 || read_args[0].type != 5 || write_args[0].size != 4)
        return EINVAL;
    OUT(0) = IN(0) + IN(1);
    return 0;
}

/* Of as many bytes as come. */
FUNCTION(reverse)
{
    const unsigned char *from = read_args[0].buf;
    unsigned char *to = write_args[0].buf;
    size_t size = read_args[0].size;
    if (nr_read != 1 || nr_write != 1 || write_args[0].size != size)
        return EINVAL;
    for (size_t index = 0; index < size; index++)
        to[index] = from[size - 1 - index];
    return 0;
}

/* Needs a library of the host's. */
FUNCTION(root)
{
    UNUSED;
    *(double *)write_args[0].buf = cbrt(*(double *)read_args[0].buf);
    return 0;
}

static int32_t calls;

FUNCTION(count)
{
    UNUSED;
    OUT(0) = ++calls;
    return 0;
}

/* Takes as many milliseconds as it is told. */
FUNCTION(nap)
{
    UNUSED;
    usleep((useconds_t)IN(0) * 1000);
    return 0;
}

FUNCTION(fail)
{
    UNUSED;
    return 7;
}

FUNCTION(crash)
{
    UNUSED;
    *(volatile int *)8 = 1;
    return 0;
}

FUNCTION(give_up)
{
    UNUSED;
    abort();
}

FUNCTION(leave)
{
    UNUSED;
    _exit(3);
}

static int deeper(volatile char *above)
{
    volatile char here[4096];
    here[0] = *above;
    return here[0] == 0 ? 0 : deeper(here) + here[0];
}

FUNCTION(recurse)
{
    UNUSED;
    return deeper("x");
}

FUNCTION(overrun)
{
    UNUSED;
    memset(write_args[0].buf, 0xff, 64 << 20);
    return 0;
}

FUNCTION(spin)
{
    UNUSED;
    for (volatile long turn = 0;; turn++)
        ;
}

/* Gives the answer itself, in the agent's own words, and goes on when the agent believes that it is done. */
FUNCTION(go_on)
{
    UNUSED;
    unsigned char answer[] = {0, 0, 0, 0, 0, 1, 2, 3, 4};
    if (write(0, answer, sizeof answer) != sizeof answer)
        return 1;
    return spin(read_args, nr_read, write_args, nr_write);
}

/* Says more than was asked for. */
FUNCTION(babble)
{
    UNUSED;
    static unsigned char noise[1 << 20];
    memset(noise, 0x5a, sizeof noise);
    fcntl(0, F_SETFL, O_NONBLOCK);
    while (write(0, noise, sizeof noise) > 0)
        ;
    return 0;
}

/* Takes all memory there is; tells how many MiB that was. */
FUNCTION(eat)
{
    UNUSED;
    OUT(0) = 0;
    for (unsigned char *piece; (piece = malloc(1 << 20)) != NULL; OUT(0)++)
        memset(piece, 1, 1 << 20);
    return 0;
}

static void *nothing(void *given)
{
    return given;
}

static int try(long attempt)
{
    struct sockaddr nobody = {.sa_family = AF_UNIX};
    struct rlimit most = {RLIM_INFINITY, RLIM_INFINITY};
    struct stat stats;
    char *arguments[] = {"/bin/true", NULL}, place[64];
    struct iovec own = {place, sizeof place}, others = {(void *)0x1000, sizeof place};
    pthread_t thread;
    switch (attempt) {
    case 0: return open("/etc/passwd", O_RDONLY);
    case 1: return open("/proc/self/maps", O_RDONLY);
    case 2: return open("/tmp/of-a-guest", O_CREAT | O_RDWR, 0600);
    case 3: return stat("/etc/passwd", &stats);
    case 4: return access("/etc/passwd", F_OK);
    case 5: return socket(AF_INET, SOCK_STREAM, 0);
    case 6: return socket(AF_UNIX, SOCK_STREAM, 0);
    case 7: return socket(AF_NETLINK, SOCK_RAW, 0);
    case 8: return (int)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    case 9: return (int)syscall(SYS_clone3, NULL, 0);
    case 10: return execv(arguments[0], arguments);
    case 11: return kill(getppid(), 0);
    case 12: return kill(-1, 0);
    case 13: return (int)ptrace(PTRACE_ATTACH, getppid(), 0, 0);
    case 14: return pthread_create(&thread, NULL, nothing, NULL) == 0 ? 0 : -1;
    case 15: return prctl(PR_SET_DUMPABLE, 1);
    case 16: return prctl(PR_SET_PDEATHSIG, 0);
    case 17: return setrlimit(RLIMIT_AS, &most);
    case 18: return chroot("..");
    case 19: return chdir("/proc/1");
    case 20: return unshare(CLONE_NEWUSER);
    case 21: return (int)syscall(SYS_memfd_create, "m", 0);
    case 22: return (int)syscall(SYS_io_uring_setup, 8, NULL);
    case 23: return (int)syscall(SYS_bpf, 0, NULL, 0);
    case 24: return (int)syscall(SYS_userfaultfd, 0);
    case 25: return (int)syscall(SYS_perf_event_open, NULL, 0, -1, -1, 0);
    case 26: return (int)process_vm_readv(getppid(), &own, 1, &others, 1, 0);
    case 27: return (int)syscall(SYS_pidfd_open, getppid(), 0);
    case 28: return dup(0);
    case 29: return connect(0, &nobody, sizeof nobody);
    case 30: return (int)syscall(SYS_recvmsg, 0, NULL, 0);
    case 31: return (int)syscall(SYS_setitimer, 0, NULL, NULL);
    case 32: return sched_setaffinity(0, 0, NULL);
    case 33: return setpriority(PRIO_PROCESS, 0, -5);
    case 34: return shm_open("/of-a-guest", O_CREAT | O_RDWR, 0600);
    case 35: return (int)syscall(SYS_keyctl, 0, 0, 0, 0, 0);
    case 36: return (int)syscall(SYS_mount, "none", "/", "tmpfs", 0, NULL);
    case 37: return pipe((int *)place);
    case 38: return (int)syscall(SYS_add_key, NULL, NULL, NULL, 0, 0);
    case 39: return open(".", O_RDONLY | O_DIRECTORY);
    case 40: return open("/", O_PATH);
    case 41: return madvise((void *)((uintptr_t)place & ~4095UL), 4096, MADV_MERGEABLE);
    case 42: return madvise((void *)((uintptr_t)place & ~4095UL), 4096, MADV_HWPOISON);
    case 43: return (int)syscall(SYS_seccomp, 0, 0, NULL);
    default: return -2;
    }
}

/* What each attempt came to: 0 when it failed, 1 when it did not; and when there are no more, 2. */
FUNCTION(escape)
{
    if (nr_read != 1 || nr_write != 1)
        return EINVAL;
    int outcome = try(IN(0));
    OUT(0) = outcome == -1 ? 0 : outcome == -2 ? 2 : 1;
    return 0;
}

/* What was within reach when the library was loaded: a bit for each attempt that did not fail. */
static int32_t reached;

__attribute__((constructor)) static void when_loaded(void)
{
    static const long attempts[] = {0, 1, 2, 5, 6, 8, 10, 11, 13, 15, 16, 17, 18, 20, 21, 26, 36, 40, 41};
    for (size_t index = 0; index < sizeof attempts / sizeof *attempts; index++)
        if (try(attempts[index]) != -1)
            reached |= 1 << index;
}

FUNCTION(reached_when_loaded)
{
    UNUSED;
    OUT(0) = reached;
    return 0;
}
