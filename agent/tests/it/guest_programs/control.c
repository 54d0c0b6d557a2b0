/* Asks the kernel for one thing, to see whether it may: `control NAME`. Exit code 0 when it was given, 3 when it was
 * refused. */
#define _GNU_SOURCE

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static long ask(const char *name)
{
    char byte = 0;
    struct iovec piece = { &byte, 0 };
    struct msghdr message = { .msg_iov = &piece, .msg_iovlen = 1 };
    struct sockaddr nowhere = { .sa_family = AF_UNIX };
    int word = 0, on = 1;
    if (strcmp(name, "nothing") == 0)
        return 0;
    if (strcmp(name, "epoll") == 0)
        return epoll_create1(0);
    if (strcmp(name, "eventfd") == 0)
        return eventfd(0, 0);
    if (strcmp(name, "futex") == 0)
        return syscall(SYS_futex, &word, 1 /* wake */, 1, NULL, NULL, 0);
    if (strcmp(name, "thread") == 0)
        return fork() == 0 ? (_exit(0), 0) : 0;
    if (strcmp(name, "getrandom") == 0)
        return getrandom(&byte, 1, 0);
    if (strcmp(name, "netlink") == 0)
        return socket(AF_NETLINK, SOCK_RAW, 0);
    if (strcmp(name, "datagram") == 0)
        return socket(AF_INET, SOCK_DGRAM, 0);
    if (strcmp(name, "sendto") == 0)
        return sendto(1, &byte, 0, 0, &nowhere, sizeof nowhere) < 0 && errno != ENOTSOCK ? -1 : 0;
    if (strcmp(name, "exec") == 0)
        return execve("/nothing", (char *[]){ NULL }, NULL) < 0 && errno != ENOENT ? -1 : 0;
    if (strcmp(name, "sendmsg") == 0)
        return sendmsg(1, &message, 0) < 0 && errno == ENOTSUP ? -1 : 0;
    if (strcmp(name, "setsockopt") == 0)
        return setsockopt(1, SOL_SOCKET, SO_RCVTIMEO, &on, sizeof on) < 0 && errno == ENOPROTOOPT ? -1 : 0;
    if (strcmp(name, "writev") == 0)
        return writev(1, &piece, 1);
    return -1;
}

int main(int argc, char **argv)
{
    return argc > 1 && ask(argv[1]) >= 0 ? 0 : 3;
}
