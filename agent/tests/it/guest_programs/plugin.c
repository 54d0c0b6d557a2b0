/* A program of vAccel with as much of libvaccel 0.8 as a plugin sees: it loads the plugin, makes every call of it on a
 * real agent, and ends with 1 at the first line that does not hold.
 *
 *     plugin PLUGIN [ADD_MODEL ECHO_MODEL IMAGE LABEL LIBRARY SEEING_MODEL FOLDER]
 *
 * The agent's address is in the environment. It writes "restart" and waits for a line when the agent shall be killed and
 * started again.
 */
#define _GNU_SOURCE

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define HOLDS(what)                                                                                                    \
    do {                                                                                                               \
        if (!(what)) {                                                                                                 \
            printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #what);                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

#define RETURNS(expected, call)                                                                                        \
    do {                                                                                                               \
        int returned = (call);                                                                                         \
        if (returned != (expected)) {                                                                                  \
            printf("%s:%d: %d from %s\n", __FILE__, __LINE__, returned, #call);                                        \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* libvaccel's structures, as its headers have them. */

enum { LIB, DATA, MODEL, KINDS };
enum { LOCAL_FILE, LOCAL_DIR, REMOTE_FILE };
enum { BLOB_FILE, BLOB_BUFFER };
enum { ARG_RAW = 0, ARG_INT32 = 5, ARG_INT64 = 7, ARG_FLOAT64 = 19, ARG_STRING = 27, ARG_BUFFER = 28 };
enum { FPGA_HINT = 4, DEBUG_HINT = 0x100, REMOTE_HINT = 0x4000 };
enum { OPERATIONS = 24 };

struct entry {
    struct entry *next, *prev;
};

struct session {
    int64_t id, remote_id;
    unsigned int hint;
    bool is_virtio;
    char rundir[PATH_MAX];
    struct entry entry, resources[KINDS];
    size_t counts[KINDS];
    pthread_mutex_t lock;
    struct plugin *plugin;
    void *priv;
};

struct blob {
    int type;
    char *name, *path;
    bool path_owned;
    uint8_t *data;
    bool data_owned;
    size_t size;
};

struct resource {
    int64_t id, remote_id;
    int type, path_type;
    char **paths;
    size_t nr_paths;
    char *rundir;
    struct blob **blobs;
    size_t nr_blobs;
    struct entry entry, sessions;
    pthread_mutex_t lock;
    unsigned int refcount;
    void *priv;
};

struct arg {
    void *buf;
    size_t size;
    int type;
    uint32_t custom;
    bool owned;
};

struct node {
    char *name;
    int id;
};

struct status {
    uint8_t code;
    char *message;
};

#define TENSOR(name, rank, axis)                                                                                       \
    struct name {                                                                                                      \
        void *data;                                                                                                    \
        size_t size;                                                                                                   \
        bool owned;                                                                                                    \
        rank nr_dims;                                                                                                  \
        axis *dims;                                                                                                    \
        int data_type;                                                                                                 \
    }

TENSOR(tf, int, int64_t);
TENSOR(tflite, int, int32_t);
TENSOR(torch, int64_t, int64_t);

struct op {
    int type;
    void (*func)(void);
    struct plugin *owner;
};

struct info {
    const char *name, *version, *vaccel_version;
    int (*init)(void);
    int (*fini)(void);
    bool is_virtio;
    int type;
    int (*session_init)(struct session *, uint32_t);
    int (*session_release)(struct session *);
    int (*session_update)(struct session *, uint32_t);
    int (*resource_register)(struct resource *, struct session *);
    int (*resource_unregister)(struct resource *, struct session *);
    int (*resource_sync)(struct resource *, struct session *);
};

struct plugin {
    void *dl_handle;
    struct entry entry;
    struct op *ops[OPERATIONS];
    struct info *info;
};

static struct plugin *plugin;

/* A function that takes these types, by its operation's number. */
#define OP(number, ...) ((int (*)(__VA_ARGS__))plugin->ops[number]->func)

static void load(const char *path)
{
    void *library = dlopen(path, RTLD_LAZY);
    if (library == NULL)
        printf("%s\n", dlerror());
    HOLDS(library != NULL);
    struct plugin **found = dlsym(library, "vaccel_plugin");
    HOLDS(found != NULL);
    plugin = *found;
    const struct info *info = plugin->info;
    HOLDS(info->name && info->version && info->init && info->fini && info->is_virtio);
    HOLDS(strcmp(info->vaccel_version, "0.8.0") == 0 && info->type == REMOTE_HINT && info->session_update == NULL);
    HOLDS(plugin->entry.next == &plugin->entry && plugin->entry.prev == &plugin->entry);
    RETURNS(0, info->init());
    plugin->dl_handle = library;
    for (int type = 0; type < OPERATIONS; type++)
        HOLDS(plugin->ops[type]->type == type && plugin->ops[type]->func && plugin->ops[type]->owner == plugin);
}

static void open_session(struct session *session, uint32_t hints)
{
    memset(session, 0xa5, sizeof *session);
    session->plugin = plugin;
    RETURNS(0, plugin->info->session_init(session, hints));
    HOLDS(session->remote_id > 0);
    session->is_virtio = true;
}

static struct resource from_file(int type, char **path, struct blob *blob, struct blob **blobs)
{
    char *slash = strrchr(*path, '/');
    *blob = (struct blob){.type = BLOB_FILE, .name = slash ? slash + 1 : *path, .path = *path};
    *blobs = blob;
    return (struct resource){
        .id = 1, .type = type, .path_type = LOCAL_FILE, .paths = path, .nr_paths = 1, .blobs = blobs, .nr_blobs = 1};
}

static struct resource from_memory(char *name, void *data, size_t size, struct blob *blob, struct blob **blobs)
{
    *blob = (struct blob){.type = BLOB_BUFFER, .name = name, .data = data, .size = size};
    *blobs = blob;
    return (struct resource){.id = 2, .type = DATA, .path_type = LOCAL_FILE, .blobs = blobs, .nr_blobs = 1};
}

static size_t read_file(const char *path, unsigned char *data, size_t room)
{
    FILE *file = fopen(path, "rb");
    HOLDS(file != NULL);
    size_t length = fread(data, 1, room, file);
    fclose(file);
    HOLDS(length > 0 && length < room);
    return length;
}

static void images(struct session *session, struct session *debug, const char *path, const char *label)
{
    static unsigned char image[65536];
    size_t length = read_file(path, image, sizeof image);
    unsigned char text[64], name[64];
    int (*classify)(struct session *, const void *, unsigned char *, unsigned char *, size_t, size_t, size_t) =
        OP(3, struct session *, const void *, unsigned char *, unsigned char *, size_t, size_t, size_t);
    RETURNS(0, classify(session, image, text, name, length, sizeof text, sizeof name));
    HOLDS(strcmp((char *)text, label) == 0 && name[0] == 0);
    memset(text, 0xa5, sizeof text);
    RETURNS(0, classify(session, image, text, NULL, length, 3, 0));
    HOLDS(strncmp((char *)text, label, 2) == 0 && text[2] == 0 && text[3] == 0xa5);
    RETURNS(0, classify(debug, image, text, name, length, sizeof text, sizeof name));
    HOLDS(strcmp((char *)text, "This is a dummy classification tag!") == 0);
    HOLDS(strcmp((char *)name, "This is a dummy imgname!") == 0);
    RETURNS(EINVAL, classify(session, NULL, text, name, length, sizeof text, sizeof name));
    RETURNS(EINVAL, classify(session, "no image", text, name, 8, sizeof text, sizeof name));
    for (int type = 4; type <= 7; type++) {
        int (*find)(struct session *, const void *, unsigned char *, size_t, size_t) =
            OP(type, struct session *, const void *, unsigned char *, size_t, size_t);
        RETURNS(0, find(debug, image, name, length, sizeof name));
        HOLDS(strcmp((char *)name, "This is a dummy imgname!") == 0);
        RETURNS(EINVAL, find(session, image, name, length, sizeof name));
    }
}

static int files_in(const char *path)
{
    int count = 0;
    DIR *folder = opendir(path);
    HOLDS(folder != NULL);
    for (struct dirent *entry; (entry = readdir(folder));)
        count += entry->d_name[0] != '.';
    closedir(folder);
    return count;
}

/* What a model sees: a picture of it, in a file of the session. */
static void sights(char **model, const char *path, const char *folder)
{
    enum { PICTURES = 16 };
    static struct session session;
    static unsigned char image[65536], picture[65536];
    struct blob blob, *blobs[1];
    size_t length = read_file(path, image, sizeof image);
    char name[PATH_MAX], before[PATH_MAX] = "";
    HOLDS(mkdir(folder, 0700) == 0);
    open_session(&session, 0);
    snprintf(session.rundir, sizeof session.rundir, "%s", folder);
    struct resource resource = from_file(MODEL, model, &blob, blobs);
    RETURNS(0, plugin->info->resource_register(&resource, &session));
    for (int turn = 0; turn < PICTURES + 4; turn++) {
        int (*find)(struct session *, const void *, unsigned char *, size_t, size_t) =
            OP(4 + turn % 4, struct session *, const void *, unsigned char *, size_t, size_t);
        RETURNS(0, find(&session, image, (unsigned char *)name, length, sizeof name));
        HOLDS(strncmp(name, folder, strlen(folder)) == 0 && strcmp(name, before) != 0);
        HOLDS(read_file(name, picture, sizeof picture) > 2 && picture[0] == 0xff && picture[1] == 0xd8);
        HOLDS(files_in(folder) == (turn < PICTURES ? turn + 1 : PICTURES));
        memcpy(before, name, sizeof name);
        RETURNS(EINVAL, find(&session, image, (unsigned char *)name, length, strlen(folder)));
        RETURNS(EINVAL, find(&session, image, NULL, length, 9));
        RETURNS(EINVAL, find(&session, "no image", (unsigned char *)name, 8, sizeof name));
        HOLDS(files_in(folder) == (turn < PICTURES ? turn + 1 : PICTURES));
    }
    /* As libvaccel tries it, before it releases the session. */
    HOLDS(rmdir(folder) == -1 && errno == ENOTEMPTY);
    RETURNS(0, plugin->info->session_release(&session));
    HOLDS(access(folder, F_OK) == -1);
}

/* What a library computes that the program names as a file, or has registered. */
static void libraries(struct session *session, char **path)
{
    int (*exec)(struct session *, const char *, const char *, struct arg *, size_t, struct arg *, size_t) =
        OP(1, struct session *, const char *, const char *, struct arg *, size_t, struct arg *, size_t);
    int (*exec_with)(struct session *, struct resource *, const char *, struct arg *, size_t, struct arg *, size_t) =
        OP(2, struct session *, struct resource *, const char *, struct arg *, size_t, struct arg *, size_t);
    int32_t a = 40, b = 2, sum = 0;
    struct arg read[] = {{.buf = &a, .size = sizeof a, .type = ARG_INT32},
                         {.buf = &b, .size = sizeof b, .type = ARG_INT32}};
    struct arg write[] = {{.buf = &sum, .size = sizeof sum, .type = ARG_INT32}};
    for (int turn = 0; turn < 2; turn++) {
        RETURNS(0, exec(session, *path, "add", read, 2, write, 1));
        HOLDS(sum == 42);
        sum = 0;
    }
    RETURNS(EIO, exec(session, *path, "fail", read, 2, write, 1));
    RETURNS(EINVAL, exec(session, *path, "missing", read, 2, write, 1));
    struct blob blob, *blobs[1];
    struct resource library = from_file(LIB, path, &blob, blobs);
    unsigned char *code = malloc(1 << 20);
    HOLDS(code != NULL);
    blob.size = read_file(*path, code, 1 << 20);
    blob.data = code;
    RETURNS(0, plugin->info->resource_register(&library, session));
    RETURNS(0, exec_with(session, &library, "add", read, 2, write, 1));
    HOLDS(sum == 42);
    RETURNS(0, plugin->info->resource_unregister(&library, session));
    free(code);
}

static void execution(struct session *session, struct session *debug)
{
    int (*exec)(struct session *, const char *, const char *, struct arg *, size_t, struct arg *, size_t) =
        OP(1, struct session *, const char *, const char *, struct arg *, size_t, struct arg *, size_t);
    int32_t in = 7, out = 0;
    struct arg read[] = {{.buf = &in, .size = sizeof in, .type = ARG_INT32}};
    struct arg write[] = {{.buf = &out, .size = sizeof out, .type = ARG_INT32}};
    RETURNS(0, exec(debug, "library", "function", read, 1, write, 1));
    HOLDS(out == 7);
    RETURNS(ENOENT, exec(session, "library", "function", read, 1, write, 1));
    RETURNS(EINVAL, exec(session, NULL, "function", read, 1, write, 1));
    RETURNS(EINVAL, exec(session, "library", "function", NULL, 1, write, 1));
    /* Digits, and whatever lies behind them. */
    struct arg time[] = {{.buf = "2\0x", .size = 4, .type = ARG_RAW}, {.buf = &in, .size = sizeof in, .type = ARG_RAW}};
    RETURNS(0, exec(session, "mbench", "mbench", time, 2, NULL, 0));
    RETURNS(EINVAL, exec(session, "mbench", "mbench", read, 1, NULL, 0));
    read[0].type = 99;
    RETURNS(EINVAL, exec(debug, "library", "function", read, 1, write, 1));
    unsigned char code[] = "no library at all";
    struct blob blob, *blobs[1];
    struct resource library = from_memory("lib.so", code, sizeof code, &blob, blobs);
    library.type = LIB;
    int (*exec_with)(struct session *, struct resource *, const char *, struct arg *, size_t, struct arg *, size_t) =
        OP(2, struct session *, struct resource *, const char *, struct arg *, size_t, struct arg *, size_t);
    read[0].type = ARG_INT32;
    RETURNS(ENOENT, exec_with(debug, &library, "function", read, 1, write, 1));
    RETURNS(0, plugin->info->resource_register(&library, debug));
    in = 8;
    RETURNS(0, exec_with(debug, &library, "function", read, 1, write, 1));
    HOLDS(out == 8);
    RETURNS(0, plugin->info->resource_unregister(&library, debug));
}

static void matrices(struct session *session)
{
    typedef int64_t i;
    int (*sgemm)(struct session *, i, i, i, float, float *, i, float *, i, float, float *, i) =
        OP(17, struct session *, i, i, i, float, float *, i, float *, i, float, float *, i);
    /* Rows are further apart than they are long; the last one ends where its numbers do. */
    float a[] = {1, 2, -1, 3, 4}, b[] = {5, 6, -1, 7, 8}, c[] = {1, 1, 9, 1, 1};
    RETURNS(0, sgemm(session, 2, 2, 2, 1, a, 3, b, 3, 2, c, 3));
    HOLDS(c[0] == 21 && c[1] == 24 && c[2] == 9 && c[3] == 45 && c[4] == 52);
    RETURNS(0, sgemm(session, 2, 2, 2, 2, a, 3, b, 3, 0, c, 3));
    HOLDS(c[0] == 38 && c[1] == 44 && c[2] == 9 && c[3] == 86 && c[4] == 100);
    RETURNS(0, sgemm(session, 0, 2, 2, 1, NULL, 2, b, 3, 0, NULL, 2));
    RETURNS(EINVAL, sgemm(session, 2, 2, 2, 1, a, 1, b, 3, 0, c, 3));
    RETURNS(EINVAL, sgemm(session, -2, 2, 2, 1, a, 3, b, 3, 0, c, 3));
    RETURNS(EINVAL, sgemm(session, INT64_MAX, 2, INT64_MAX, 1, a, INT64_MAX, b, 3, 0, c, 3));
    RETURNS(EINVAL, sgemm(session, 2, 2, 2, 1, NULL, 3, b, 3, 0, c, 3));
    int64_t dims[] = {2, 2};
    float out_a[] = {1, 2, 3, 4}, out_b[] = {5, 6, 7, 8}, out_c[] = {1, 1, 1, 1};
    struct torch of_a = {.data = out_a, .size = sizeof out_a, .nr_dims = 2, .dims = dims, .data_type = 7};
    struct torch of_b = of_a, of_c = of_a, *in[] = {&of_a, &of_b, &of_c}, *out = NULL;
    of_b.data = out_b;
    of_c.data = out_c;
    int (*product)(struct session *, struct torch **, struct torch **, struct torch **, int, int, int, struct torch **) =
        OP(16, struct session *, struct torch **, struct torch **, struct torch **, int, int, int, struct torch **);
    RETURNS(0, product(session, &in[0], &in[1], &in[2], 2, 2, 2, &out));
    const float *result = out->data;
    HOLDS(out->owned && out->nr_dims == 2 && out->dims[1] == 2 && out->data_type == 7 && out->size == 16);
    HOLDS(result[0] == 20 && result[1] == 23 && result[2] == 44 && result[3] == 51);
    free(out->data);
    free(out->dims);
    free(out);
    RETURNS(EINVAL, product(session, &in[0], &in[1], &in[2], 2, 3, 2, &out));
}

static void arrays(struct session *session)
{
    float a[] = {1, 2, 3, 4}, b[] = {5, 6, 7, 8}, c[4], d[4];
    int (*two)(struct session *, float *, float *, float *, size_t) =
        OP(19, struct session *, float *, float *, float *, size_t);
    RETURNS(0, two(session, a, b, c, 4));
    HOLDS(c[0] == 19 && c[1] == 22 && c[2] == 43 && c[3] == 50);
    RETURNS(EINVAL, two(session, a, b, c, 3));
    int (*four)(struct session *, float *, float *, float *, float *, size_t) =
        OP(20, struct session *, float *, float *, float *, float *, size_t);
    RETURNS(0, four(session, a, b, c, d, 4));
    HOLDS(c[0] == 6 && c[3] == 12 && d[0] == 5 && d[3] == 32);
    int (*sum)(struct session *, float *, float *, float *, size_t, size_t) =
        OP(21, struct session *, float *, float *, float *, size_t, size_t);
    RETURNS(0, sum(session, a, b, c, 4, 4));
    HOLDS(c[0] == 6 && c[3] == 12);
    RETURNS(EINVAL, sum(session, a, b, c, 4, 3));
    double data[] = {3, -9, 12, 5}, out[4], least, greatest;
    int (*minmax)(struct session *, const double *, int, int, int, double *, double *, double *) =
        OP(22, struct session *, const double *, int, int, int, double *, double *, double *);
    RETURNS(0, minmax(session, data, 4, -5, 10, out, &least, &greatest));
    HOLDS(least == -9 && greatest == 12 && out[0] == 3 && out[1] == -5 && out[2] == 10 && out[3] == 5);
    RETURNS(EINVAL, minmax(session, data, -1, -5, 10, out, &least, &greatest));
    RETURNS(EINVAL, minmax(session, data, 4, -5, 10, out, NULL, &greatest));
    /* More than a message may have, in and out. */
    enum { MANY = 9 << 20 };
    int(*in) = malloc(MANY * sizeof *in), *copy = calloc(MANY, sizeof *copy);
    HOLDS(in != NULL && copy != NULL);
    for (int index = 0; index < MANY; index++)
        in[index] = index;
    int (*arraycopy)(struct session *, int *, int *, size_t) = OP(18, struct session *, int *, int *, size_t);
    RETURNS(0, arraycopy(session, in, copy, MANY));
    HOLDS(memcmp(in, copy, MANY * sizeof *in) == 0);
    free(in);
    free(copy);
}

static void pixels(struct session *session)
{
    double thresh = 100, maxval = 255, kind = 0;
    int64_t height = 1, width = 4, channels = 1;
    uint8_t image[] = {50, 150, 100, 101}, out[4] = {1, 1, 1, 1};
    struct arg read[] = {
        {.buf = "threshold", .size = 10, .type = ARG_STRING},
        {.buf = "thresh", .size = 7, .type = ARG_STRING},
        {.buf = &thresh, .size = 8, .type = ARG_FLOAT64},
        {.buf = "maxval", .size = 7, .type = ARG_STRING},
        {.buf = &maxval, .size = 8, .type = ARG_FLOAT64},
        {.buf = "type", .size = 5, .type = ARG_STRING},
        {.buf = &kind, .size = 8, .type = ARG_FLOAT64},
        {.buf = &height, .size = 8, .type = ARG_INT64},
        {.buf = &width, .size = 8, .type = ARG_INT64},
        {.buf = &channels, .size = 8, .type = ARG_INT64},
        {.buf = image, .size = sizeof image, .type = ARG_BUFFER},
    };
    struct arg write[] = {{.buf = out, .size = sizeof out, .type = ARG_BUFFER}};
    int (*opencv)(struct session *, struct arg *, int, struct arg *, int) =
        OP(23, struct session *, struct arg *, int, struct arg *, int);
    RETURNS(0, opencv(session, read, 11, write, 1));
    HOLDS(out[0] == 0 && out[1] == 255 && out[2] == 0 && out[3] == 255);
    write[0].size = 3;
    RETURNS(EINVAL, opencv(session, read, 11, write, 1));
    RETURNS(EINVAL, opencv(session, read, -1, write, 1));
}

/* Gives two rows to a model that adds 1 and 2 to each; `run` is one of the families' calls. */
#define TWO_ROWS(family, axis, kind, load, unload, run)                                                                \
    do {                                                                                                               \
        axis dims[] = {2, 2};                                                                                          \
        float numbers[] = {1, 2, 3, 4};                                                                                \
        struct family tensor = {.data = numbers, .size = sizeof numbers, .nr_dims = 2, .dims = dims, .data_type = kind}; \
        struct family *in = &tensor, *out = NULL;                                                                      \
        RETURNS(ENOENT, run);                                                                                          \
        RETURNS(0, load);                                                                                              \
        RETURNS(0, run);                                                                                               \
        HOLDS(out->owned && out->nr_dims == 2 && out->dims[0] == 2 && out->data_type == kind && out->size == 16);      \
        HOLDS(((float *)out->data)[0] == 2 && ((float *)out->data)[3] == 6);                                           \
        free(out->data);                                                                                               \
        free(out->dims);                                                                                               \
        free(out);                                                                                                     \
        out = NULL;                                                                                                    \
        tensor.size = 12;                                                                                              \
        RETURNS(EINVAL, run);                                                                                          \
        tensor.size = sizeof numbers;                                                                                  \
        tensor.data_type = 55;                                                                                         \
        RETURNS(EINVAL, run);                                                                                          \
        tensor.nr_dims = -1;                                                                                           \
        RETURNS(EINVAL, run);                                                                                          \
        in = NULL;                                                                                                     \
        RETURNS(EINVAL, run);                                                                                          \
        HOLDS(out == NULL);                                                                                            \
        RETURNS(0, unload);                                                                                            \
    } while (0)

static int said(int returned, struct status *status)
{
    HOLDS(status->message != NULL && (returned == 0) == (status->code == 0));
    HOLDS(returned == 0 || status->message[0] != 0);
    free(status->message);
    *status = (struct status){0};
    return returned;
}

static void models(struct session *session, struct resource *add)
{
    typedef struct session *s;
    typedef struct resource *r;
    struct status status = {0};
    struct node x = {"x", 0}, y = {"y", 0}, nobody = {"nobody", 0};
    int (*load)(s, r, struct status *) = OP(8, s, r, struct status *);
    int (*unload)(s, r, struct status *) = OP(9, s, r, struct status *);
    int (*run)(s, r, const void *, const struct node *, struct tf **, int, const struct node *, struct tf **, int,
               struct status *) = OP(10, s, r, const void *, const struct node *, struct tf **, int,
                                     const struct node *, struct tf **, int, struct status *);
    TWO_ROWS(tf, int64_t, 1, said(load(session, add, &status), &status), unload(session, add, NULL),
             said(run(session, add, NULL, &x, &in, 1, &y, &out, 1, &status), &status));
    RETURNS(ENOENT, said(unload(session, add, &status), &status));
    struct tf *none = NULL;
    RETURNS(0, load(session, add, NULL));
    RETURNS(EINVAL, run(session, add, NULL, NULL, NULL, 0, &nobody, &none, 1, NULL));
    RETURNS(EINVAL, run(session, add, NULL, &x, &none, -1, &y, &none, 1, NULL));
    RETURNS(0, unload(session, add, NULL));

    uint8_t code = 9;
    int (*lite_load)(s, r) = OP(11, s, r), (*lite_unload)(s, r) = OP(12, s, r);
    int (*lite_run)(s, r, struct tflite **, int, struct tflite **, int, uint8_t *) =
        OP(13, s, r, struct tflite **, int, struct tflite **, int, uint8_t *);
    TWO_ROWS(tflite, int32_t, 1, lite_load(session, add), (code = 9, lite_unload(session, add)),
             lite_run(session, add, &in, 1, &out, 1, &code));
    RETURNS(ENOENT, lite_run(session, add, NULL, 0, NULL, 0, &code));
    HOLDS(code == 1);

    int (*torch_load)(s, r) = OP(14, s, r);
    int (*torch_run)(s, r, const void *, struct torch **, int, struct torch **, int) =
        OP(15, s, r, const void *, struct torch **, int, struct torch **, int);
    /* There is no unload in this family. */
    TWO_ROWS(torch, int64_t, 7, torch_load(session, add), 0, torch_run(session, add, NULL, &in, 1, &out, 1));
    struct torch *out[2] = {NULL, NULL};
    int64_t dims[] = {1, 2};
    float numbers[] = {1, 2};
    struct torch tensor = {.data = numbers, .size = 8, .nr_dims = 2, .dims = dims, .data_type = 7}, *in = &tensor;
    RETURNS(EINVAL, torch_run(session, add, NULL, &in, 1, out, 2));
    HOLDS(out[0] == NULL && out[1] == NULL);
}

static void resources(struct session *session, struct session *other, char **add_path, char **echo_path)
{
    const struct info *info = plugin->info;
    struct blob blob, *blobs[1], memory_blob, *memory_blobs[1];
    struct resource add = from_file(MODEL, add_path, &blob, blobs);
    RETURNS(ENOENT, info->resource_unregister(&add, session));
    RETURNS(0, info->resource_register(&add, session));
    int64_t number = add.remote_id;
    HOLDS(number > 0);
    /* Again, which libvaccel counts once, and for another session. */
    RETURNS(0, info->resource_register(&add, session));
    RETURNS(0, info->resource_register(&add, other));
    HOLDS(add.remote_id == number);
    models(session, &add);
    RETURNS(0, info->resource_unregister(&add, session));
    RETURNS(ENOENT, info->resource_unregister(&add, session));
    RETURNS(0, OP(14, struct session *, struct resource *)(other, &add));
    RETURNS(0, info->resource_unregister(&add, other));

    char text[] = "what was registered";
    struct resource data = from_memory("text", text, sizeof text, &memory_blob, memory_blobs);
    RETURNS(0, info->resource_register(&data, session));
    memset(text, 'x', sizeof text);
    RETURNS(0, info->resource_sync(&data, session));
    HOLDS(strcmp(text, "what was registered") == 0);
    memory_blob.size -= 1;
    RETURNS(0, info->resource_sync(&data, session));
    memory_blob.size += 2;
    RETURNS(EINVAL, info->resource_sync(&data, session));
    RETURNS(ENOENT, info->resource_sync(&data, other));
    RETURNS(0, info->resource_unregister(&data, session));

    char folder[PATH_MAX], *folders[] = {folder};
    snprintf(folder, sizeof folder, "file://%s", *echo_path);
    *strrchr(folder, '/') = 0;
    struct resource whole = {.id = 3, .type = DATA, .path_type = LOCAL_DIR, .paths = folders, .nr_paths = 1};
    RETURNS(0, info->resource_register(&whole, session));
    RETURNS(0, info->resource_unregister(&whole, session));
    whole.path_type = REMOTE_FILE;
    RETURNS(EINVAL, info->resource_register(&whole, session));
    whole.type = KINDS;
    RETURNS(EINVAL, info->resource_register(&whole, session));
    RETURNS(EINVAL, info->resource_register(NULL, session));
    RETURNS(ENOENT, info->resource_register(&whole, NULL));
}

/* What was registered is there again when the agent was killed and comes back. */
static void restart(struct session *session, char **add_path)
{
    struct blob blob, *blobs[1];
    struct resource add = from_file(MODEL, add_path, &blob, blobs);
    RETURNS(0, plugin->info->resource_register(&add, session));
    RETURNS(0, OP(14, struct session *, struct resource *)(session, &add));
    printf("restart\n");
    fflush(stdout);
    HOLDS(getchar() == '\n');
    int64_t dims[] = {1, 2};
    float numbers[] = {1, 2};
    struct torch tensor = {.data = numbers, .size = 8, .nr_dims = 2, .dims = dims, .data_type = 7};
    struct torch *in = &tensor, *out = NULL;
    RETURNS(0, OP(15, struct session *, struct resource *, const void *, struct torch **, int, struct torch **,
                  int)(session, &add, NULL, &in, 1, &out, 1));
    HOLDS(((float *)out->data)[0] == 2 && ((float *)out->data)[1] == 4);
    free(out->data);
    free(out->dims);
    free(out);
    RETURNS(0, plugin->info->resource_unregister(&add, session));
}

/* A child has sessions of its own, and its parent's are its parent's. */
static void forked(struct session *session)
{
    fflush(stdout);
    pid_t child = fork();
    HOLDS(child >= 0);
    if (child == 0) {
        struct session own;
        RETURNS(ENOENT, OP(0, struct session *)(session));
        open_session(&own, 0);
        RETURNS(0, OP(0, struct session *)(&own));
        RETURNS(ENOENT, OP(0, struct session *)(session));
        /* Where nobody can read what was wrong. */
        HOLDS(dup2(open("/dev/full", O_WRONLY), STDERR_FILENO) == STDERR_FILENO);
        RETURNS(ENOENT, OP(0, struct session *)(session));
        RETURNS(0, plugin->info->session_release(&own));
        fflush(stdout);
        _exit(0);
    }
    int status = 0;
    HOLDS(waitpid(child, &status, 0) == child && status == 0);
    RETURNS(0, OP(0, struct session *)(session));
}

/* Signals are the program's, whatever threads there are. */
static void signals(void)
{
    sigset_t set;
    struct timespec patience = {.tv_sec = 60};
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    HOLDS(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0 && kill(getpid(), SIGUSR1) == 0);
    HOLDS(sigtimedwait(&set, NULL, &patience) == SIGUSR1);
}

static struct session left;
static struct resource left_resource;

/* What libvaccel does when the program has ended and left something open. */
static void clean_up(void)
{
    RETURNS(0, plugin->info->resource_unregister(&left_resource, &left));
    RETURNS(0, plugin->info->session_release(&left));
    RETURNS(0, plugin->info->fini());
}

/* A program that ends without closing what it opened. */
static int leave(const char *path)
{
    static char text[] = "left";
    static struct blob blob, *blobs[1];
    load(path);
    open_session(&left, 0);
    left_resource = from_memory("text", text, sizeof text, &blob, blobs);
    RETURNS(0, plugin->info->resource_register(&left_resource, &left));
    HOLDS(atexit(clean_up) == 0);
    return 0;
}

int main(int count, char **argument)
{
    static struct session session, debug, preferring, local;
    if (count == 2)
        return leave(argument[1]);
    HOLDS(count == 9);
    load(argument[1]);
    open_session(&session, 0);
    open_session(&debug, DEBUG_HINT);
    HOLDS(session.remote_id != debug.remote_id);
    /* There is none of these: a preference is no demand. */
    open_session(&preferring, FPGA_HINT);
    RETURNS(0, OP(0, struct session *)(&preferring));
    RETURNS(0, plugin->info->session_release(&preferring));
    signals();
    RETURNS(0, OP(0, struct session *)(&session));
    images(&session, &debug, argument[4], argument[5]);
    sights(&argument[7], argument[4], argument[8]);
    execution(&session, &debug);
    libraries(&session, &argument[6]);
    matrices(&session);
    arrays(&session);
    pixels(&session);
    resources(&session, &debug, &argument[2], &argument[3]);
    restart(&session, &argument[2]);
    forked(&session);
    /* One that libvaccel opened for a plugin of this machine. */
    local.remote_id = session.remote_id;
    RETURNS(EINVAL, OP(0, struct session *)(&local));
    RETURNS(ENOENT, OP(0, struct session *)(NULL));
    RETURNS(0, plugin->info->session_release(&debug));
    RETURNS(ENOENT, plugin->info->session_release(&debug));
    RETURNS(ENOENT, OP(0, struct session *)(&debug));
    RETURNS(0, plugin->info->session_release(&session));
    RETURNS(0, plugin->info->fini());
    RETURNS(0, dlclose(plugin->dl_handle));
    printf("everything holds\n");
    return 0;
}
