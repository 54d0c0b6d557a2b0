/* A guest in C: sends images to the agent and prints what each shows.
 *
 *     classify [ADDRESS] IMAGE...
 *
 * An IMAGE of - is standard input. Without ADDRESS it is taken from the environment (VACCEL_RPC_ADDRESS, then
 * VACCEL_RPC_ADDR), then from -DVACCEL_ADDRESS='"..."' when this was compiled, then from the library; a
 * token from VACCEL_TOKEN, milliseconds a call may take from VACCEL_DEADLINE_MS. Exit codes: 0 all images have a label,
 * 1 something failed, 2 wrong usage.
 *
 * It prints with write(2): the printf of some C libraries needs more of a kernel than some unikernels have. All its
 * memory is static.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vaccel_guest.h"

#ifndef VACCEL_ADDRESS
#define VACCEL_ADDRESS NULL
#endif

/* Longest image. */
#ifndef IMAGE_BYTES_MAX
#define IMAGE_BYTES_MAX (1 << 20)
#endif

static unsigned char memory[VACCEL_GUEST_MEMORY];
static unsigned char image[IMAGE_BYTES_MAX];

static void put(int fd, const char *text)
{
    size_t left = strlen(text);
    while (left > 0) {
        ssize_t count = write(fd, text, left);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return;
        text += count;
        left -= (size_t)count;
    }
}

/* One line in pieces on standard error. */
static void complain(const char *what, const char *why, const char *more)
{
    put(2, "classify: ");
    put(2, what);
    put(2, ": ");
    put(2, why);
    put(2, *more ? ": " : "");
    put(2, more);
    put(2, "\n");
}

/* A number from 0 to 1 with four places. */
static void put_probability(float probability)
{
    char text[] = "0.0000";
    unsigned places = (unsigned)(probability * 10000.0f + 0.5f);
    text[0] = (char)('0' + places / 10000 % 10);
    for (int at = 5; at > 1; at--, places /= 10)
        text[at] = (char)('0' + places % 10);
    put(1, text);
}

/* Reads a file to the image's place; its length, or -1. */
static long read_image(const char *name)
{
    int is_input = strcmp(name, "-") == 0;
    int fd = is_input ? 0 : open(name, O_RDONLY);
    size_t length = 0;
    const char *failure = fd < 0 ? "cannot be opened" : NULL;
    while (!failure) {
        /* The end shows in a read for which there is room. */
        ssize_t count = length < sizeof image ? read(fd, image + length, sizeof image - length) : -1;
        if (count == 0)
            break;
        if (count > 0)
            length += (size_t)count;
        else if (length == sizeof image)
            failure = "larger than IMAGE_BYTES_MAX of this program";
        else if (errno != EINTR)
            failure = "cannot be read";
    }
    if (fd > 0)
        close(fd);
    if (failure)
        complain(name, failure, "");
    return failure ? -1 : (long)length;
}

static int classify(vaccel_guest *guest, const char *name)
{
    vaccel_guest_bytes bytes = { image, 0 };
    vaccel_guest_label label;
    size_t found = 0;
    long length = read_image(name);
    if (length < 0)
        return 1;
    bytes.length = (size_t)length;
    if (vaccel_guest_classify(guest, NULL, &bytes, 1, &label, 1, &found, NULL) != 0) {
        complain(name, vaccel_guest_reason(guest), vaccel_guest_message(guest));
        return 1;
    }
    if (found == 0) {
        complain(name, "no label", "");
        return 1;
    }
    put(1, name);
    put(1, ": ");
    put(1, label.name);
    put(1, " ");
    put_probability(label.probability);
    put(1, "\n");
    return 0;
}

/* The value of a variable that is there and not empty. */
static const char *variable(const char *name)
{
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}

/* Decimal digits; strtoul is larger than this program. */
static uint32_t number(const char *digits)
{
    uint32_t number = 0;
    for (; *digits >= '0' && *digits <= '9' && number < 100000000; digits++)
        number = number * 10 + (uint32_t)(*digits - '0');
    return number;
}

int main(int argc, char **argv)
{
    const char *address = VACCEL_ADDRESS;
    const char *token = variable("VACCEL_TOKEN"), *deadline = variable("VACCEL_DEADLINE_MS");
    vaccel_guest *guest;
    int failed = 0, at = 1, ignored = signal(SIGPIPE, SIG_IGN) != SIG_ERR;
    if (argc > 1 && strstr(argv[1], "://"))
        address = argv[at++];
    else if (variable("VACCEL_RPC_ADDRESS"))
        address = variable("VACCEL_RPC_ADDRESS");
    else if (variable("VACCEL_RPC_ADDR"))
        address = variable("VACCEL_RPC_ADDR");
    if (at >= argc) {
        put(2, "usage: classify [ADDRESS] IMAGE...\n");
        return 2;
    }
    guest = vaccel_guest_init(memory, sizeof memory, address);
    if (!guest) {
        complain(address ? address : "the library's address",
                 "expected vsock://CID:PORT, unix://PATH, unix://@NAME or tcp://IP:PORT", "");
        return 2;
    }
    /* Large images then go with fewer system calls. */
    vaccel_guest_set_sigpipe_ignored(guest, ignored);
    if (deadline)
        vaccel_guest_set_deadline_ms(guest, number(deadline));
    /* A classification that is run twice takes time and does nothing else. */
    vaccel_guest_set_repeatable(guest, 1);
    if (token)
        vaccel_guest_set_token(guest, token);
    for (; at < argc; at++)
        failed |= classify(guest, argv[at]);
    /* What this leaves behind, the agent frees by itself. */
    vaccel_guest_close(guest);
    return failed;
}
