/* Calls every function of the C interface on a real agent, and ends with 1 at the first line that does not hold.
 *
 *     interface ADDRESS ADD_MODEL ECHO_MODEL IMAGE IMAGE SEEING_MODEL THINGS
 *
 * It writes "restart" and waits for a line when the agent shall be killed and started again.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "vaccel_guest.h"

#define FILE_BYTES_MAX 65536

#define HOLDS(what)                                                                                                    \
    do {                                                                                                               \
        if (!(what)) {                                                                                                 \
            printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #what);                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* The same, and what the guest says about it. */
#define RETURNS(guest, expected, call)                                                                                 \
    do {                                                                                                               \
        int returned = (call);                                                                                         \
        if (returned != (expected)) {                                                                                  \
            printf("%s:%d: %d from %s: %s: %s\n", __FILE__, __LINE__, returned, #call, vaccel_guest_reason(guest),     \
                   vaccel_guest_message(guest));                                                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* A byte that nothing here writes, to see what was left alone. */
#define UNTOUCHED 0xa5
#define SET_UNTOUCHED(place) memset(&(place), UNTOUCHED, sizeof(place))

struct content {
    unsigned char data[FILE_BYTES_MAX];
    size_t length;
};

static struct content add_model, echo_model, images[2], seeing_model, things;
static _Alignas(64) unsigned char memory[VACCEL_GUEST_MEMORY + 64];

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000 + (uint64_t)time.tv_nsec / 1000000;
}

static void load(struct content *content, const char *path)
{
    FILE *file = fopen(path, "rb");
    HOLDS(file);
    content->length = fread(content->data, 1, sizeof content->data, file);
    HOLDS(content->length > 0 && feof(file));
    fclose(file);
}

static int untouched(const void *place, size_t length)
{
    const unsigned char *bytes = place;
    while (length > 0 && bytes[length - 1] == UNTOUCHED)
        length--;
    return length == 0;
}

static int is_reason(const vaccel_guest *guest, const char *reason)
{
    return strcmp(vaccel_guest_reason(guest), reason) == 0 && strlen(vaccel_guest_message(guest)) > 0;
}

static void a_guest_fits_in_its_memory(void)
{
    const char *address = "tcp://127.0.0.1:1";
    size_t size = 0;
    while (!vaccel_guest_init(memory, size, address))
        size += 8;
    printf("a guest takes %lu of %d bytes\n", (unsigned long)size, VACCEL_GUEST_MEMORY);
    HOLDS(size <= VACCEL_GUEST_MEMORY - 64);
    for (int skipped = 0; skipped < 64; skipped++) {
        unsigned char *guest = (unsigned char *)vaccel_guest_init(memory + skipped, VACCEL_GUEST_MEMORY, address);
        HOLDS(guest >= memory + skipped && guest + size <= memory + skipped + VACCEL_GUEST_MEMORY);
    }
    SET_UNTOUCHED(memory);
    HOLDS(vaccel_guest_init(memory, size, address));
    HOLDS(untouched(memory + size, sizeof memory - size));
}

static void what_is_no_guest_is_refused(void)
{
    const char *none[] = { "", "tcp://", "tcp://localhost:1", "unix://", "vsock://2", "http://1.2.3.4:5", "\xff://1:1" };
    vaccel_guest_resource resource = { "" };
    for (size_t at = 0; at < sizeof none / sizeof *none; at++)
        HOLDS(!vaccel_guest_init(memory, sizeof memory, none[at]));
    HOLDS(!vaccel_guest_init(NULL, VACCEL_GUEST_MEMORY, "tcp://127.0.0.1:1"));
    HOLDS(!vaccel_guest_init_io(memory, sizeof memory, NULL));
    HOLDS(vaccel_guest_init(memory, sizeof memory, NULL));
    vaccel_guest_set_token(NULL, "token");
    vaccel_guest_set_deadline_ms(NULL, 1);
    vaccel_guest_set_repeatable(NULL, 1);
    vaccel_guest_set_sigpipe_ignored(NULL, 1);
    vaccel_guest_choose(NULL, NULL, NULL);
    vaccel_guest_wish(NULL, 1);
    vaccel_guest_set_shared_bytes(NULL, 1);
    vaccel_guest_set_awake(NULL, 1);
    vaccel_guest_set_reply_type(NULL, VACCEL_GUEST_F16);
    HOLDS(!vaccel_guest_share(NULL, 1));
    vaccel_guest_attend(NULL);
    HOLDS(vaccel_guest_open(NULL) == EINVAL && vaccel_guest_close(NULL) == EINVAL);
    HOLDS(vaccel_guest_renew(NULL) == EINVAL && vaccel_guest_noop(NULL, NULL) == EINVAL);
    HOLDS(vaccel_guest_about(NULL, NULL) == EINVAL);
    HOLDS(vaccel_guest_classify(NULL, NULL, NULL, 0, NULL, 0, NULL, NULL) == EINVAL);
    HOLDS(vaccel_guest_run(NULL, &resource, NULL, 0, NULL, 0, NULL, 0, NULL) == EINVAL);
    HOLDS(vaccel_guest_register(NULL, VACCEL_GUEST_DATA, NULL, 0, &resource) == EINVAL);
    HOLDS(vaccel_guest_unregister(NULL, &resource) == EINVAL);
    HOLDS(!vaccel_guest_reason(NULL) && !vaccel_guest_message(NULL));
    HOLDS(!vaccel_guest_may_have_run(NULL) && !vaccel_guest_session_lost(NULL));
    HOLDS(vaccel_guest_retry_after_ms(NULL) == 0);
}

static void the_agent_tells_what_it_is(vaccel_guest *guest)
{
    struct {
        vaccel_guest_info info;
        unsigned char behind[16];
    } place;
    SET_UNTOUCHED(place);
    RETURNS(guest, 0, vaccel_guest_about(guest, &place.info));
    HOLDS(strcmp(place.info.version, "0.1.0") == 0);
    HOLDS(strlen(place.info.tenant) > 0);
    HOLDS(strncmp(place.info.operations, "noop image_classification model_run ", 36) == 0);
    HOLDS(strstr(place.info.engines, "tract"));
    HOLDS(place.info.message_bytes_max == 32 << 20 && place.info.session_lease_ms == 30000);
    HOLDS(untouched(place.behind, sizeof place.behind));
    RETURNS(guest, 0, vaccel_guest_about(guest, NULL));
}

static void an_empty_call_says_how_long_it_took(vaccel_guest *guest)
{
    struct {
        vaccel_guest_timings timings;
        unsigned char behind[16];
    } place;
    SET_UNTOUCHED(place);
    RETURNS(guest, 0, vaccel_guest_noop(guest, &place.timings));
    HOLDS(place.timings.queue_us < 60000000 && place.timings.run_us < 60000000 && place.timings.batch_size <= 16);
    HOLDS(untouched(place.behind, sizeof place.behind));
    RETURNS(guest, 0, vaccel_guest_noop(guest, NULL));
    RETURNS(guest, 0, vaccel_guest_renew(guest));
    vaccel_guest_attend(guest);
}

static void images_get_labels(vaccel_guest *guest)
{
    vaccel_guest_bytes both[VACCEL_GUEST_ITEMS_MAX + 1];
    vaccel_guest_label labels[6 * VACCEL_GUEST_ITEMS_MAX + 1];
    vaccel_guest_timings timings;
    vaccel_guest_resource unknown;
    size_t found = 77;
    for (size_t at = 0; at <= VACCEL_GUEST_ITEMS_MAX; at++) {
        both[at].data = images[at % 2].data;
        both[at].length = images[at % 2].length;
    }
    SET_UNTOUCHED(labels);
    /* 7 places are 3 for each of 2 images, and one too many. */
    RETURNS(guest, 0, vaccel_guest_classify(guest, NULL, both, 2, labels, 7, &found, &timings));
    HOLDS(found == 6 && timings.batch_size >= 1);
    for (size_t at = 0; at < found; at++) {
        HOLDS(labels[at].image == at / 3 && labels[at].index < 10);
        HOLDS(labels[at].probability >= 0 && labels[at].probability <= 1 && strlen(labels[at].name) > 2);
        HOLDS(at % 3 == 0 || labels[at - 1].probability >= labels[at].probability);
    }
    HOLDS(labels[0].index == 2 && strcmp(labels[0].name, "two") == 0 && labels[0].probability > 0.9f);
    HOLDS(labels[3].index == 6 && strcmp(labels[3].name, "six") == 0);
    HOLDS(untouched(labels + found, sizeof labels - found * sizeof *labels));
    RETURNS(guest, 0, vaccel_guest_classify(guest, NULL, both, 1, labels, 1, NULL, NULL));
    RETURNS(guest, 0, vaccel_guest_classify(guest, NULL, both, VACCEL_GUEST_ITEMS_MAX, labels, 80, &found, NULL));
    HOLDS(found == 80 && labels[79].image == 15);
    /* One call finds at most 80, the same number of each image. */
    RETURNS(guest, 0, vaccel_guest_classify(guest, NULL, both, VACCEL_GUEST_ITEMS_MAX, labels, 96, &found, NULL));
    HOLDS(found == 80);

    RETURNS(guest, EINVAL, vaccel_guest_classify(guest, NULL, both, 17, labels, 17, &found, &timings));
    HOLDS(found == 0 && is_reason(guest, "BAD_ARGUMENT"));
    RETURNS(guest, EINVAL, vaccel_guest_classify(guest, NULL, both, 0, labels, 1, &found, NULL));
    RETURNS(guest, EINVAL, vaccel_guest_classify(guest, NULL, NULL, 1, labels, 1, &found, NULL));
    RETURNS(guest, EINVAL, vaccel_guest_classify(guest, NULL, both, 2, labels, 1, &found, NULL));
    RETURNS(guest, EINVAL, vaccel_guest_classify(guest, NULL, both, 1, NULL, 1, &found, NULL));
    both[0].data = NULL;
    RETURNS(guest, EINVAL, vaccel_guest_classify(guest, NULL, both, 1, labels, 1, &found, NULL));
    both[0].data = "no image";
    both[0].length = 8;
    RETURNS(guest, EINVAL, vaccel_guest_classify(guest, NULL, both, 1, labels, 1, &found, NULL));
    HOLDS(is_reason(guest, "BAD_ARGUMENT") && !vaccel_guest_session_lost(guest));
    HOLDS(vaccel_guest_retry_after_ms(guest) == 0);
    memset(&unknown, 'a', sizeof unknown);
    RETURNS(guest, ENOENT, vaccel_guest_classify(guest, &unknown, both + 1, 1, labels, 1, &found, NULL));
    HOLDS(is_reason(guest, "NOT_FOUND") && !vaccel_guest_session_lost(guest));
}

/* A red square and a green one. */
static void things_in_images_have_places(vaccel_guest *guest)
{
    vaccel_guest_file file = {"seer.onnx", seeing_model.data, seeing_model.length};
    vaccel_guest_resource model;
    vaccel_guest_bytes image = {things.data, things.length}, none = {"no image", 8}, null = {NULL, 1};
    vaccel_guest_detection detections[65];
    vaccel_guest_timings timings;
    size_t found = 77;
    RETURNS(guest, 0, vaccel_guest_register(guest, VACCEL_GUEST_MODEL, &file, 1, &model));
    SET_UNTOUCHED(detections);
    RETURNS(guest, 0, vaccel_guest_detect(guest, &model, &image, 0, detections, 65, &found, &timings));
    HOLDS(found == 2 && timings.batch_size >= 1);
    for (size_t at = 0; at < found; at++) {
        const vaccel_guest_detection *thing = detections + at;
        int is_red = strcmp(thing->label.name, "red") == 0;
        HOLDS(is_red == (thing->label.index == 0) && thing->label.image == 0 && thing->label.probability == 1);
        HOLDS(is_red || strcmp(thing->label.name, "green") == 0);
        HOLDS(thing->left == (is_red ? 16 : 0) && thing->right == thing->left + 8);
        HOLDS(thing->top == (is_red ? 8 : 24) && thing->bottom == thing->top + 8);
    }
    HOLDS(untouched(detections + found, sizeof detections - found * sizeof *detections));
    RETURNS(guest, 0, vaccel_guest_detect(guest, &model, &image, 0.5f, detections, 1, NULL, NULL));
    RETURNS(guest, EINVAL, vaccel_guest_detect(guest, &model, &image, 2, detections, 1, &found, NULL));
    HOLDS(found == 0 && is_reason(guest, "BAD_ARGUMENT"));
    RETURNS(guest, EINVAL, vaccel_guest_detect(guest, &model, &image, 0, detections, 0, &found, NULL));
    RETURNS(guest, EINVAL, vaccel_guest_detect(guest, &model, &image, 0, NULL, 1, &found, NULL));
    RETURNS(guest, EINVAL, vaccel_guest_detect(guest, NULL, &image, 0, detections, 1, &found, NULL));
    HOLDS(strstr(vaccel_guest_message(guest), "image_detection") != NULL);
    RETURNS(guest, EINVAL, vaccel_guest_detect(guest, &model, NULL, 0, detections, 1, &found, NULL));
    RETURNS(guest, EINVAL, vaccel_guest_detect(guest, &model, &null, 0, detections, 1, &found, NULL));
    RETURNS(guest, EINVAL, vaccel_guest_detect(guest, &model, &none, 0, detections, 1, &found, NULL));
    RETURNS(guest, 0, vaccel_guest_unregister(guest, &model));
    RETURNS(guest, ENOENT, vaccel_guest_detect(guest, &model, &image, 0, detections, 1, &found, NULL));
}

static void registering(vaccel_guest *guest, vaccel_guest_resource *model)
{
    struct {
        vaccel_guest_resource resource;
        unsigned char behind[16];
    } place;
    vaccel_guest_file files[VACCEL_GUEST_FILES_MAX + 1];
    for (size_t at = 0; at <= VACCEL_GUEST_FILES_MAX; at++) {
        static const char *const names[] = { "0", "1", "2", "3", "4", "5", "6", "7", "8" };
        files[at].name = names[at];
        files[at].data = images[at % 2].data;
        files[at].length = 100 + at;
    }
    SET_UNTOUCHED(place);
    RETURNS(guest, 0,
            vaccel_guest_register(guest, VACCEL_GUEST_DATA, files, VACCEL_GUEST_FILES_MAX, &place.resource));
    HOLDS(strlen(place.resource.name) == 64 && strspn(place.resource.name, "0123456789abcdef") == 64);
    HOLDS(untouched(place.behind, sizeof place.behind));
    RETURNS(guest, 0, vaccel_guest_unregister(guest, &place.resource));
    RETURNS(guest, ENOENT, vaccel_guest_unregister(guest, &place.resource));
    HOLDS(is_reason(guest, "NOT_FOUND") && !vaccel_guest_session_lost(guest));
    RETURNS(guest, EINVAL, vaccel_guest_unregister(guest, NULL));
    RETURNS(guest, 0, vaccel_guest_register(guest, VACCEL_GUEST_LIBRARY, files, 1, NULL));
    RETURNS(guest, EINVAL, vaccel_guest_register(guest, VACCEL_GUEST_DATA, files, 9, &place.resource));
    RETURNS(guest, EINVAL, vaccel_guest_register(guest, VACCEL_GUEST_DATA, files, 0, &place.resource));
    RETURNS(guest, EINVAL, vaccel_guest_register(guest, VACCEL_GUEST_DATA, NULL, 1, &place.resource));
    RETURNS(guest, EINVAL, vaccel_guest_register(guest, 0, files, 1, &place.resource));
    RETURNS(guest, EINVAL, vaccel_guest_register(guest, 4, files, 1, &place.resource));
    files[0].name = "\xff";
    RETURNS(guest, EINVAL, vaccel_guest_register(guest, VACCEL_GUEST_DATA, files, 1, &place.resource));
    /* Bytes that are not there are no empty file. */
    files[1].data = NULL;
    RETURNS(guest, EINVAL, vaccel_guest_register(guest, VACCEL_GUEST_DATA, files + 1, 1, &place.resource));
    HOLDS(is_reason(guest, "BAD_ARGUMENT"));
    files[1].length = 0;
    RETURNS(guest, 0, vaccel_guest_register(guest, VACCEL_GUEST_DATA, files + 1, 1, &place.resource));

    files[2].name = "model.onnx";
    files[2].data = add_model.data;
    files[2].length = add_model.length;
    RETURNS(guest, 0, vaccel_guest_register(guest, VACCEL_GUEST_MODEL, files + 2, 1, model));
}

static void a_model_runs(vaccel_guest *guest, const vaccel_guest_resource *model)
{
    static const int64_t shape[] = { 3, 2, 1, 1, 1, 1, 1, 1, 1 };
    static const float x[] = { 1, 2, 3, 4, 5, 6 }, expected[] = { 2, 4, 4, 6, 6, 8 };
    static const char *const names[] = { "y", "z" };
    float y[8];
    vaccel_guest_input input = { "x", VACCEL_GUEST_F32, 2, shape, x, sizeof x };
    vaccel_guest_output outputs[2];
    vaccel_guest_timings timings;
    SET_UNTOUCHED(outputs);
    SET_UNTOUCHED(y);
    outputs[0].data = y;
    outputs[0].size = sizeof y;
    RETURNS(guest, 0, vaccel_guest_run(guest, model, &input, 1, names, 1, outputs, 1, &timings));
    HOLDS(outputs[0].data == y && outputs[0].size == sizeof y && outputs[0].length == sizeof x);
    HOLDS(outputs[0].dtype == VACCEL_GUEST_F32 && outputs[0].rank == 2);
    HOLDS(outputs[0].shape[0] == 3 && outputs[0].shape[1] == 2);
    HOLDS(memcmp(y, expected, sizeof expected) == 0);
    HOLDS(untouched(y + 6, sizeof y - sizeof expected) && untouched(outputs + 1, sizeof *outputs));
    input.name = NULL;
    RETURNS(guest, 0, vaccel_guest_run(guest, model, &input, 1, NULL, 0, outputs, 1, NULL));
    vaccel_guest_set_reply_type(guest, VACCEL_GUEST_F16);
    RETURNS(guest, 0, vaccel_guest_run(guest, model, &input, 1, NULL, 0, outputs, 1, NULL));
    HOLDS(outputs[0].dtype == VACCEL_GUEST_F16 && outputs[0].length == sizeof x / 2);
    HOLDS(memcmp(y, (uint16_t[]){ 0x4000, 0x4400, 0x4400, 0x4600, 0x4600, 0x4800 }, sizeof x / 2) == 0);
    vaccel_guest_set_reply_type(guest, VACCEL_GUEST_F64);
    RETURNS(guest, EINVAL, vaccel_guest_run(guest, model, &input, 1, NULL, 0, outputs, 1, NULL));
    HOLDS(strstr(vaccel_guest_message(guest), "reply_type"));
    vaccel_guest_set_reply_type(guest, -1);

    outputs[0].size = sizeof x - 1;
    RETURNS(guest, EINVAL, vaccel_guest_run(guest, model, &input, 1, NULL, 0, outputs, 1, NULL));
    HOLDS(strstr(vaccel_guest_message(guest), "24 bytes") && vaccel_guest_may_have_run(guest));
    HOLDS(outputs[0].length == sizeof x);
    outputs[0].data = NULL;
    outputs[0].size = sizeof x;
    RETURNS(guest, EINVAL, vaccel_guest_run(guest, model, &input, 1, NULL, 0, outputs, 1, NULL));
    outputs[0].data = y;
    RETURNS(guest, EINVAL, vaccel_guest_run(guest, model, &input, 1, names + 1, 1, outputs, 1, NULL));
    RETURNS(guest, EINVAL, vaccel_guest_run(guest, model, NULL, 1, NULL, 0, outputs, 1, NULL));
    RETURNS(guest, EINVAL, vaccel_guest_run(guest, NULL, &input, 1, NULL, 0, outputs, 1, NULL));
    RETURNS(guest, EINVAL, vaccel_guest_run(guest, model, &input, 17, NULL, 0, outputs, 1, NULL));
    input.rank = 9;
    RETURNS(guest, EINVAL, vaccel_guest_run(guest, model, &input, 1, NULL, 0, outputs, 1, NULL));
    input.rank = 2;
    input.dtype = -VACCEL_GUEST_F32;
    RETURNS(guest, EINVAL, vaccel_guest_run(guest, model, &input, 1, NULL, 0, outputs, 1, NULL));
    input.dtype = VACCEL_GUEST_F64;
    RETURNS(guest, EINVAL, vaccel_guest_run(guest, model, &input, 1, NULL, 0, outputs, 1, NULL));
    HOLDS(is_reason(guest, "BAD_ARGUMENT"));
}

static void operations_go_by_number(vaccel_guest *guest)
{
    static const float a[4] = { 1, 2, 3, 4 }, b[4] = { 5, 6, 7, 8 };
    static const uint8_t vectoradd = 21, none = 24;
    float c[4] = { 0, 0, 0, 0 };
    vaccel_guest_timings timings;
    vaccel_guest_arg read[3] = {
        { VACCEL_GUEST_ARG_UINT8, &vectoradd, 1 },
        { VACCEL_GUEST_ARG_FLOAT32_ARRAY, a, sizeof a },
        { VACCEL_GUEST_ARG_FLOAT32_ARRAY, b, sizeof b },
    };
    vaccel_guest_arg_out write = { VACCEL_GUEST_ARG_FLOAT32_ARRAY, NULL, 0, c, sizeof c, 0 };
    RETURNS(guest, 0, vaccel_guest_genop(guest, read, 3, &write, 1, &timings));
    HOLDS(write.length == sizeof c && c[0] == 6 && c[3] == 12 && timings.batch_size == 1);
    write.size = 15;
    RETURNS(guest, EINVAL, vaccel_guest_genop(guest, read, 3, &write, 1, NULL));
    write.size = sizeof c;
    RETURNS(guest, EINVAL, vaccel_guest_genop(guest, read, 2, &write, 1, NULL));
    HOLDS(strstr(vaccel_guest_message(guest), "read[2]"));
    RETURNS(guest, EINVAL, vaccel_guest_genop(guest, read, 17, &write, 1, NULL));
    RETURNS(guest, EINVAL, vaccel_guest_genop(guest, NULL, 1, &write, 1, NULL));
    read[0].data = &none;
    RETURNS(guest, ENOTSUP, vaccel_guest_genop(guest, read, 1, NULL, 0, NULL));
    HOLDS(is_reason(guest, "UNKNOWN_OPERATION"));
    RETURNS(NULL, EINVAL, vaccel_guest_genop(NULL, read, 1, NULL, 0, NULL));
}

/* By memory that the guest has by itself, by memory it asked for, and without any. */
static void long_data_lies_in_memory(vaccel_guest *guest, const vaccel_guest_resource *model)
{
    enum { COUNT = 20000 };
    static const int64_t shape[] = { COUNT / 2, 2 };
    static const uint8_t vectoradd = 21;
    static float own[COUNT], sum[COUNT];
    const vaccel_guest_file file = { "model.onnx", add_model.data, add_model.length };
    vaccel_guest_input input = { "x", VACCEL_GUEST_F32, 2, shape, own, sizeof own };
    vaccel_guest_output output = { .data = sum, .size = sizeof sum };
    vaccel_guest_arg read[3] = {
        { VACCEL_GUEST_ARG_UINT8, &vectoradd, 1 },
        { VACCEL_GUEST_ARG_FLOAT32_ARRAY, own, sizeof own },
        { VACCEL_GUEST_ARG_FLOAT32_ARRAY, own, sizeof own },
    };
    vaccel_guest_arg_out write = { VACCEL_GUEST_ARG_FLOAT32_ARRAY, NULL, 0, sum, sizeof sum, 0 };
    float *shared;
    for (int at = 0; at < COUNT; at++)
        own[at] = at % 1000;
    for (int round = 0; round < 8; round++) {
        /* Two rounds each with memory of its own, with memory that was asked for, with the next such, and without. */
        if (round == 2 || round == 4) {
            HOLDS((shared = vaccel_guest_share(guest, sizeof own)));
            memcpy(shared, own, sizeof own);
            input.data = read[1].data = shared;
        } else if (round == 6) {
            RETURNS(guest, 0, vaccel_guest_close(guest));
            vaccel_guest_set_shared_bytes(guest, 0);
            RETURNS(guest, 0, vaccel_guest_register(guest, VACCEL_GUEST_MODEL, &file, 1, NULL));
            input.data = read[1].data = own;
        }
        RETURNS(guest, 0, vaccel_guest_run(guest, model, &input, 1, NULL, 0, &output, 1, NULL));
        HOLDS(output.length == sizeof sum && sum[0] == 1 && sum[COUNT - 1] == 999 + 2);
        RETURNS(guest, 0, vaccel_guest_genop(guest, read, 3, &write, 1, NULL));
        HOLDS(write.length == sizeof sum && sum[1] == 2 && sum[COUNT - 1] == 2 * 999);
    }
    HOLDS(!vaccel_guest_share(guest, (size_t)1 << 50));
    HOLDS(is_reason(guest, "UNUSABLE"));
}

static void engines_are_chosen(vaccel_guest *guest)
{
    RETURNS(guest, 0, vaccel_guest_close(guest));
    vaccel_guest_choose(guest, "abacus", NULL);
    RETURNS(guest, EINVAL, vaccel_guest_open(guest));
    HOLDS(is_reason(guest, "BAD_ARGUMENT") && strstr(vaccel_guest_message(guest), "abacus"));
    vaccel_guest_choose(guest, "tract", "");
    RETURNS(guest, 0, vaccel_guest_open(guest));
    RETURNS(guest, 0, vaccel_guest_open(guest));
    vaccel_guest_choose(guest, NULL, NULL);
    vaccel_guest_wish(guest, 2);
    RETURNS(guest, 0, vaccel_guest_close(guest));
    RETURNS(guest, EPERM, vaccel_guest_open(guest));
    HOLDS(is_reason(guest, "DISABLED") && strstr(vaccel_guest_message(guest), "GPU"));
    vaccel_guest_wish(guest, 0);
    RETURNS(guest, 0, vaccel_guest_close(guest));
    RETURNS(guest, 0, vaccel_guest_close(guest));
}

static void an_agent_that_was_restarted_knows_no_session(vaccel_guest *guest)
{
    vaccel_guest_resource model;
    vaccel_guest_file file = { NULL, echo_model.data, echo_model.length };
    static const int64_t shape[] = { 1 };
    float x = 5, y = 0;
    vaccel_guest_input input = { "", VACCEL_GUEST_F32, 1, shape, &x, sizeof x };
    vaccel_guest_output output = { &y, sizeof y, 0, 0, 0, { 0 } };
    RETURNS(guest, EINVAL, vaccel_guest_register(guest, VACCEL_GUEST_MODEL, &file, 1, &model));
    file.name = "echo.onnx";
    RETURNS(guest, 0, vaccel_guest_register(guest, VACCEL_GUEST_MODEL, &file, 1, &model));
    RETURNS(guest, 0, vaccel_guest_run(guest, &model, &input, 1, NULL, 0, &output, 1, NULL));
    HOLDS(x == y && output.rank == 1 && output.shape[0] == 1);
    puts("restart");
    fflush(stdout);
    HOLDS(getchar() == '\n');
    RETURNS(guest, ENOENT, vaccel_guest_run(guest, &model, &input, 1, NULL, 0, &output, 1, NULL));
    HOLDS(vaccel_guest_session_lost(guest) && is_reason(guest, "NOT_FOUND"));
    RETURNS(guest, 0, vaccel_guest_register(guest, VACCEL_GUEST_MODEL, &file, 1, &model));
    y = 0;
    RETURNS(guest, 0, vaccel_guest_run(guest, &model, &input, 1, NULL, 0, &output, 1, NULL));
    HOLDS(x == y);
}

/* === agents that are none === */

static struct sockaddr_un place_of(const char *address)
{
    struct sockaddr_un place;
    memset(&place, 0, sizeof place);
    place.sun_family = AF_UNIX;
    strncpy(place.sun_path, address + strlen("unix://"), sizeof place.sun_path - 1);
    return place;
}

static int listen_at(const char *address)
{
    struct sockaddr_un place = place_of(address);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    HOLDS(fd >= 0 && bind(fd, (struct sockaddr *)&place, sizeof place) == 0 && listen(fd, 8) == 0);
    return fd;
}

static void silence_is_late_and_an_end_is_no_signal(const char *address)
{
    char silent[200], closed[200];
    uint64_t begun, took;
    vaccel_guest *guest;
    pid_t child;
    int fd;
    snprintf(silent, sizeof silent, "%s.silent", address);
    snprintf(closed, sizeof closed, "%s.closed", address);
    fd = listen_at(silent);
    guest = vaccel_guest_init(memory, sizeof memory, silent);
    vaccel_guest_set_deadline_ms(guest, 300);
    begun = now();
    RETURNS(guest, ETIMEDOUT, vaccel_guest_noop(guest, NULL));
    took = now() - begun;
    HOLDS(took >= 290 && took < 20000);
    HOLDS(is_reason(guest, "DEADLINE"));
    vaccel_guest_close(guest);
    close(fd);

    fd = listen_at(closed);
    child = fork();
    if (child == 0)
        for (;;)
            close(accept(fd, NULL, NULL));
    guest = vaccel_guest_init(memory, sizeof memory, closed);
    vaccel_guest_set_deadline_ms(guest, 300);
    for (int at = 0; at < 4; at++) {
        int returned = vaccel_guest_noop(guest, NULL);
        HOLDS(returned == ECONNREFUSED || returned == ETIMEDOUT);
    }
    HOLDS(kill(child, SIGKILL) == 0);
    close(fd);
    RETURNS(guest, ECONNREFUSED, vaccel_guest_noop(guest, NULL));
    HOLDS(is_reason(guest, "UNREACHABLE") && !vaccel_guest_may_have_run(guest));
}

/* === a program's own way to move bytes === */

struct own {
    const char *address;
    int fd;
    size_t most; /* bytes that one call moves */
    unsigned connects, closes, moves;
};

static void own_close(void *context)
{
    struct own *own = context;
    if (own->fd >= 0) {
        close(own->fd);
        own->closes++;
    }
    own->fd = -1;
}

static int own_connect(void *context, uint64_t until)
{
    struct own *own = context;
    struct sockaddr_un place = place_of(own->address);
    /* A time to come, or just over. */
    HOLDS(until + 60000 > now() && until < now() + 61000);
    own_close(own);
    own->fd = socket(AF_UNIX, SOCK_STREAM, 0);
    own->connects++;
    if (own->fd >= 0 && connect(own->fd, (struct sockaddr *)&place, sizeof place) == 0)
        return 0;
    own_close(own);
    return -ECONNREFUSED;
}

/* What a transfer returns; every third finds that nothing can be moved, though something could. */
static int stalls(struct own *own)
{
    return ++own->moves % 3 == 0;
}

static ptrdiff_t own_write(void *context, const void *data, size_t length)
{
    struct own *own = context;
    ssize_t count;
    HOLDS(length > 0);
    if (stalls(own))
        return VACCEL_GUEST_AGAIN;
    count = send(own->fd, data, length < own->most ? length : own->most, MSG_NOSIGNAL | MSG_DONTWAIT);
    return count < 0 ? (errno == EAGAIN ? VACCEL_GUEST_AGAIN : -errno) : count;
}

static ptrdiff_t own_read(void *context, void *data, size_t length)
{
    struct own *own = context;
    ssize_t count;
    HOLDS(length > 0);
    if (stalls(own))
        return VACCEL_GUEST_AGAIN;
    count = recv(own->fd, data, length < own->most ? length : own->most, MSG_DONTWAIT);
    return count < 0 ? (errno == EAGAIN ? VACCEL_GUEST_AGAIN : -errno) : count;
}

static int own_wait(void *context, int write, uint64_t until)
{
    struct own *own = context;
    struct pollfd asked = { own->fd, (short)(write ? POLLIN | POLLOUT : POLLIN), 0 };
    uint64_t time = now();
    if (poll(&asked, 1, until > time ? (int)(until - time) : 0) < 0)
        return -errno;
    return (asked.revents & (POLLIN | POLLHUP | POLLERR) ? VACCEL_GUEST_READABLE : 0) |
           (asked.revents & POLLOUT ? VACCEL_GUEST_WRITABLE : 0);
}

static uint64_t own_now(void *context)
{
    HOLDS(((struct own *)context)->address);
    return now();
}

static void a_program_moves_bytes_itself(const char *address)
{
    static const size_t mosts[] = { 1, 7, 4096, (size_t)-1 };
    struct own own = { address, -1, 0, 0, 0, 0 };
    vaccel_guest_io io = { &own, own_connect, own_write, own_read, own_wait, own_close, own_now };
    vaccel_guest *guest;
    for (size_t at = 0; at < sizeof mosts / sizeof *mosts; at++) {
        vaccel_guest_resource model;
        own.most = mosts[at];
        own.connects = own.closes = 0;
        guest = vaccel_guest_init_io(memory, sizeof memory, &io);
        HOLDS(guest && own.connects == 0);
        registering(guest, &model);
        a_model_runs(guest, &model);
        operations_go_by_number(guest);
        RETURNS(guest, 0, vaccel_guest_close(guest));
        /* An output that finds no place ends the connection, and nothing else does. */
        HOLDS(own.connects == 2 && own.closes == 2 && own.fd == -1);
    }
    own.address = "unix:///nobody";
    vaccel_guest_set_deadline_ms(guest, 100);
    RETURNS(guest, ECONNREFUSED, vaccel_guest_noop(guest, NULL));
    HOLDS(is_reason(guest, "UNREACHABLE") && !vaccel_guest_may_have_run(guest) && own.fd == -1);
}

int main(int argc, char **argv)
{
    vaccel_guest_resource model;
    vaccel_guest *guest;
    HOLDS(argc == 8);
    load(&add_model, argv[2]);
    load(&echo_model, argv[3]);
    load(&images[0], argv[4]);
    load(&images[1], argv[5]);
    load(&seeing_model, argv[6]);
    load(&things, argv[7]);
    a_guest_fits_in_its_memory();
    what_is_no_guest_is_refused();
    guest = vaccel_guest_init(memory, sizeof memory, argv[1]);
    HOLDS(guest);
    vaccel_guest_set_token(guest, "nobody asks for it");
    vaccel_guest_set_token(guest, NULL);
    the_agent_tells_what_it_is(guest);
    an_empty_call_says_how_long_it_took(guest);
    images_get_labels(guest);
    things_in_images_have_places(guest);
    registering(guest, &model);
    a_model_runs(guest, &model);
    long_data_lies_in_memory(guest, &model);
    engines_are_chosen(guest);
    an_agent_that_was_restarted_knows_no_session(guest);
    vaccel_guest_set_repeatable(guest, 1);
    an_empty_call_says_how_long_it_took(guest);
    RETURNS(guest, 0, vaccel_guest_close(guest));
    silence_is_late_and_an_end_is_no_signal(argv[1]);
    a_program_moves_bytes_itself(argv[1]);
    puts("everything holds");
    return 0;
}
