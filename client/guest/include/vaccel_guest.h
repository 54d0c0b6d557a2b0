/* vaccel-guest: calls a vaccel agent from a guest with nothing but a socket.
 *
 * No threads, no allocation, no global state, no signal. A guest lies in memory the caller gives and belongs to one
 * thread at a time. Functions that can fail return 0 or a positive errno of Linux; vaccel_guest_reason and
 * vaccel_guest_message then say more. Instead of a guest that could not be made, NULL is refused with EINVAL; NULL for an
 * array whose count is not 0 too.
 *
 * Build the library once for your platform (size is what the profile is for):
 *
 *     cargo rustc -p vaccel-guest --profile guest --no-default-features --features capi --crate-type staticlib
 *
 * and link target/guest/libvaccel_guest.a; with --crate-type cdylib it is target/guest/libvaccel_guest.so.
 */
#ifndef VACCEL_GUEST_H
#define VACCEL_GUEST_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes that one guest takes, whatever their alignment. */
#define VACCEL_GUEST_MEMORY 32768

/* Most images of one classification, and tensors that go into or come out of one run. */
#define VACCEL_GUEST_ITEMS_MAX 16
/* Most files of one resource. */
#define VACCEL_GUEST_FILES_MAX 8
/* Most axes of a tensor. */
#define VACCEL_GUEST_RANK_MAX 8

typedef struct vaccel_guest vaccel_guest;

/* Element types of tensors. */
enum {
    VACCEL_GUEST_BOOL = 1,
    VACCEL_GUEST_U8 = 2,
    VACCEL_GUEST_I8 = 3,
    VACCEL_GUEST_U16 = 4,
    VACCEL_GUEST_I16 = 5,
    VACCEL_GUEST_U32 = 6,
    VACCEL_GUEST_I32 = 7,
    VACCEL_GUEST_U64 = 8,
    VACCEL_GUEST_I64 = 9,
    VACCEL_GUEST_F16 = 10,
    VACCEL_GUEST_BF16 = 11,
    VACCEL_GUEST_F32 = 12,
    VACCEL_GUEST_F64 = 13,
    VACCEL_GUEST_BYTES = 14 /* each element: its length in 4 bytes, little-endian, and the bytes */
};

/* Kinds of resources. */
enum { VACCEL_GUEST_MODEL = 1, VACCEL_GUEST_DATA = 2, VACCEL_GUEST_LIBRARY = 3 };

typedef struct {
    const void *data;
    size_t length;
} vaccel_guest_bytes;

typedef struct {
    const char *name; /* a label such as "model.onnx" */
    const void *data;
    size_t length;
} vaccel_guest_file;

/* The name of a resource, made from its content: 64 hexadecimal digits and a NUL. Where a model is asked for, it may be
 * the name by which the host's repository has one, which needs no registering: at most 64 bytes and a NUL. */
typedef struct {
    char name[65];
} vaccel_guest_resource;

/* A class an image may show. */
typedef struct {
    uint32_t image;    /* which of the images, from 0 */
    uint32_t index;    /* which class */
    float probability; /* from 0 to 1 */
    char name[65];     /* of the class, cut off where it is longer */
} vaccel_guest_label;

/* A thing in an image, and where it is: in pixels of the image, from its upper left corner. */
typedef struct {
    vaccel_guest_label label;
    float left, top, right, bottom;
} vaccel_guest_detection;

/* A tensor that goes in: dense, row-major, little-endian. */
typedef struct {
    const char *name; /* of the model's input; NULL or "" for its place in the list */
    int dtype;
    size_t rank;
    const int64_t *shape;
    const void *data;
    size_t length; /* in bytes */
} vaccel_guest_input;

/* A tensor that comes out. data and size are the caller's, the rest is filled in. */
typedef struct {
    void *data;    /* where the elements go */
    size_t size;   /* bytes there are for them */
    size_t length; /* bytes that came; more than size, where there was no place for so many */
    int dtype;
    size_t rank;
    int64_t shape[VACCEL_GUEST_RANK_MAX];
} vaccel_guest_output;

/* Types of the arguments of generic operations, vAccel's. */
enum {
    VACCEL_GUEST_ARG_RAW = 0,
    VACCEL_GUEST_ARG_INT8 = 1,
    VACCEL_GUEST_ARG_INT8_ARRAY = 2,
    VACCEL_GUEST_ARG_INT16 = 3,
    VACCEL_GUEST_ARG_INT16_ARRAY = 4,
    VACCEL_GUEST_ARG_INT32 = 5,
    VACCEL_GUEST_ARG_INT32_ARRAY = 6,
    VACCEL_GUEST_ARG_INT64 = 7,
    VACCEL_GUEST_ARG_INT64_ARRAY = 8,
    VACCEL_GUEST_ARG_UINT8 = 9,
    VACCEL_GUEST_ARG_UINT8_ARRAY = 10,
    VACCEL_GUEST_ARG_UINT16 = 11,
    VACCEL_GUEST_ARG_UINT16_ARRAY = 12,
    VACCEL_GUEST_ARG_UINT32 = 13,
    VACCEL_GUEST_ARG_UINT32_ARRAY = 14,
    VACCEL_GUEST_ARG_UINT64 = 15,
    VACCEL_GUEST_ARG_UINT64_ARRAY = 16,
    VACCEL_GUEST_ARG_FLOAT32 = 17,
    VACCEL_GUEST_ARG_FLOAT32_ARRAY = 18,
    VACCEL_GUEST_ARG_FLOAT64 = 19,
    VACCEL_GUEST_ARG_FLOAT64_ARRAY = 20,
    VACCEL_GUEST_ARG_BOOL = 21,
    VACCEL_GUEST_ARG_BOOL_ARRAY = 22,
    VACCEL_GUEST_ARG_CHAR = 23,
    VACCEL_GUEST_ARG_CHAR_ARRAY = 24,
    VACCEL_GUEST_ARG_UCHAR = 25,
    VACCEL_GUEST_ARG_UCHAR_ARRAY = 26,
    VACCEL_GUEST_ARG_STRING = 27,
    VACCEL_GUEST_ARG_BUFFER = 28,
    VACCEL_GUEST_ARG_CUSTOM = 29
};

/* An argument that goes in: little-endian; a string with its NUL. */
typedef struct {
    uint32_t type;
    const void *data;
    size_t length;
} vaccel_guest_arg;

/* An argument that comes out. before is what it is before the operation, where that counts; it may be NULL, and must not
 * be data. length is filled in. */
typedef struct {
    uint32_t type;
    const void *before;
    size_t before_length;
    void *data;    /* where it goes */
    size_t size;   /* of it, in bytes */
    size_t length; /* bytes that came, or that there was no place for */
} vaccel_guest_arg_out;

/* Where the agent spent its time. */
typedef struct {
    uint64_t queue_us; /* waiting for a place to compute, in microseconds */
    uint64_t run_us;   /* computing, in microseconds */
    uint32_t batch_size;
} vaccel_guest_timings;

/* What the agent is. */
typedef struct {
    char version[33];
    char tenant[129];     /* who it takes this guest for */
    char operations[1025]; /* their names, with spaces between */
    char engines[129];    /* those it has, with spaces between */
    uint64_t message_bytes_max;
    uint64_t session_lease_ms;
} vaccel_guest_info;

/* What read and write return when nothing can be moved now; any other negative number is -errno. */
#define VACCEL_GUEST_AGAIN (-11)

/* What wait returns, added up; 0 when the time is over. */
#define VACCEL_GUEST_READABLE 1
#define VACCEL_GUEST_WRITABLE 2

/* Your own way to move bytes, for guests without sockets. Times are milliseconds of a clock that never goes back. None
 * of the functions may be NULL. */
typedef struct {
    void *context;
    /* Opens a connection, after closing any; 0, or -errno. */
    int (*connect)(void *context, uint64_t until);
    /* Writes some bytes and returns how many. */
    ptrdiff_t (*write)(void *context, const void *data, size_t length);
    /* Reads some bytes and returns how many, 0 at the end. */
    ptrdiff_t (*read)(void *context, void *data, size_t length);
    /* Waits until something can be read, or (with write != 0) written, or the clock shows until. */
    int (*wait)(void *context, int write, uint64_t until);
    /* Closes the connection, if there is one. */
    void (*close)(void *context);
    /* What the clock shows. Before a connection is tried again this is called until some milliseconds are over: on a
     * machine where others run only when asked to, ask here. */
    uint64_t (*now)(void *context);
} vaccel_guest_io;

/* Makes a guest in memory. The address is vsock://CID:PORT, unix://PATH, unix://@NAME or tcp://IP:PORT; NULL for the one
 * the library was built with. Nothing is sent yet. NULL when the address is none or the memory too small. */
vaccel_guest *vaccel_guest_init(void *memory, size_t size, const char *address);

/* The same over your own way to move bytes; io is copied, its context is not. */
vaccel_guest *vaccel_guest_init_io(void *memory, size_t size, const vaccel_guest_io *io);

/* The token that an agent on TCP may want; at most 256 bytes of it. */
void vaccel_guest_set_token(vaccel_guest *guest, const char *token);

/* How long each later call may take, connecting included; a minute when not said. */
void vaccel_guest_set_deadline_ms(vaccel_guest *guest, uint32_t deadline_ms);

/* Whether later calls may be run twice when the connection breaks under them. */
void vaccel_guest_set_repeatable(vaccel_guest *guest, int repeatable);

/* Says whether this program ignores SIGPIPE (signal(SIGPIPE, SIG_IGN)). If it does, requests go with write and with
 * writev, many pieces in one; if not, or when not said, with one send for each piece, which raises no signal. */
void vaccel_guest_set_sigpipe_ignored(vaccel_guest *guest, int ignored);

/* Engine and device of later sessions; NULL or "" for the agent's choice. */
void vaccel_guest_choose(vaccel_guest *guest, const char *engine, const char *device);

/* Kinds of engines that later sessions wish for, in vAccel's bits of plugin types (CPU 1, GPU 2, FPGA 4, SOFTWARE 8,
 * TENSORFLOW 16, TORCH 32, JETSON 64, GENERIC 128, DEBUG 256); any of them will do, and 0 is no wish. One that is absent
 * is an error. */
void vaccel_guest_wish(vaccel_guest *guest, uint32_t hints);

/* Whether later calls that always took the same time are awaited awake, from shortly before their answers on. They are if
 * not said, on Linux; it takes some 4 % of a processor's time. */
void vaccel_guest_set_awake(vaccel_guest *guest, int awake);

/* VACCEL_GUEST_F16 or VACCEL_GUEST_BF16 for half the bytes: outputs of models that are VACCEL_GUEST_F32 come back rounded
 * to that. 0 for outputs as they are. */
void vaccel_guest_set_reply_type(vaccel_guest *guest, int dtype);

/* How many bytes of memory this guest and an agent on its machine may have together, behind a unix socket or TCP; 0 for
 * none. The guest gets it by itself, by recvmsg and mmap, before its second run or generic operation with 32 KiB of data
 * and more, and puts such data there instead of sending it. If not said: 64 MiB, of which what is used takes memory. */
void vaccel_guest_set_shared_bytes(vaccel_guest *guest, size_t size);

/* Memory that the agent has, too: data of runs and generic operations that lies there is neither sent nor copied. NULL
 * where there is none; the same calls do as well with data from anywhere else. A second call gives the first one's memory
 * back, as vaccel_guest_close does. */
void *vaccel_guest_share(vaccel_guest *guest, size_t size);

/* Opens a session. Calls that need one do this by themselves. */
int vaccel_guest_open(vaccel_guest *guest);

/* Ends the session and closes the connection. The memory may then be used for something else. */
int vaccel_guest_close(vaccel_guest *guest);

/* Starts the session's lease anew; every other call does so too. */
int vaccel_guest_renew(vaccel_guest *guest);

/* Answers what the agent has asked between calls. Called more often than every 20 seconds it keeps the connection;
 * without it the next call opens another one. */
void vaccel_guest_attend(vaccel_guest *guest);

/* What the agent is; info may be NULL. */
int vaccel_guest_about(vaccel_guest *guest, vaccel_guest_info *info);

/* Does nothing, all the way to the agent's scheduler and back. timings may be NULL, here and below. */
int vaccel_guest_noop(vaccel_guest *guest, vaccel_guest_timings *timings);

/* Classifies PNG or JPEG files: for each one its label_count / image_count best classes, best first, one image after the
 * other; at most 80 in one call. labels_found is how many there are; it may be NULL. With model NULL the agent's own is
 * used. */
int vaccel_guest_classify(vaccel_guest *guest, const vaccel_guest_resource *model, const vaccel_guest_bytes *images,
                          size_t image_count, vaccel_guest_label *labels, size_t label_count, size_t *labels_found,
                          vaccel_guest_timings *timings);

/* Finds things in a PNG or JPEG file with a model that describes itself: as many as there are places for and at most 64,
 * the most probable first. Those less probable than threshold, or with 0 than the model says, are none.
 * detections_found is how many there are; it may be NULL. With model NULL it is the agent's own for this, if it has one. */
int vaccel_guest_detect(vaccel_guest *guest, const vaccel_guest_resource *model, const vaccel_guest_bytes *image,
                        float threshold, vaccel_guest_detection *detections, size_t detection_count,
                        size_t *detections_found, vaccel_guest_timings *timings);

/* Runs a model. names are the outputs wanted, none for all; each goes to the output of the same number. */
int vaccel_guest_run(vaccel_guest *guest, const vaccel_guest_resource *model, const vaccel_guest_input *inputs,
                     size_t input_count, const char *const *names, size_t name_count, vaccel_guest_output *outputs,
                     size_t output_count, vaccel_guest_timings *timings);

/* Runs any operation by vAccel's number, with the arguments that vAccel's generic operation has: the first one read is a
 * UINT8, the operation's number. At most 16 arguments, read and written together. */
int vaccel_guest_genop(vaccel_guest *guest, const vaccel_guest_arg *read, size_t read_count, vaccel_guest_arg_out *write,
                       size_t write_count, vaccel_guest_timings *timings);

/* Makes the session hold a resource; only what the agent lacks is sent. resource may be NULL. */
int vaccel_guest_register(vaccel_guest *guest, int kind, const vaccel_guest_file *files, size_t file_count,
                          vaccel_guest_resource *resource);

int vaccel_guest_unregister(vaccel_guest *guest, const vaccel_guest_resource *resource);

/* About the last call that failed: the reason's name such as "BAD_ARGUMENT", and a text for people. */
const char *vaccel_guest_reason(const vaccel_guest *guest);
const char *vaccel_guest_message(const vaccel_guest *guest);

/* Whether it may have run; whether the session is lost, and with it its resources; when the agent asks to try again, in
 * milliseconds, 0 when it does not. */
int vaccel_guest_may_have_run(const vaccel_guest *guest);
int vaccel_guest_session_lost(const vaccel_guest *guest);
uint32_t vaccel_guest_retry_after_ms(const vaccel_guest *guest);

#ifdef __cplusplus
}
#endif

#endif
