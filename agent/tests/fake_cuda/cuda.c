/* The symbols of the CUDA driver, cuBLAS and NVML that the agent uses, for tests on machines without any of them.
 *
 * "Device memory" is memory of the process and products are computed by a loop. What makes it worth testing against is
 * that it is stricter than a real driver: what a stream was told to do happens only when somebody waits for it, in the
 * order of that stream and of no other; a copy looks when it happens whether its memory still is what it was; fresh
 * memory is full of NaN; nothing works on a thread that has no context, and memory comes only to
 * threads that would not spoil the capture of a graph. A missing wait gives wrong numbers here,
 * always, and not once in a month.
 *
 * Settings of a build: DEVICES, MEMORY_MIB, WRONG (products are off by one), FAILS_AFTER (products
 * after so many are illegal accesses), BREAKS_AT (when memory of so many bytes is wanted, an illegal access is found
 * that nobody of these made), NO_REGISTERING (only memory that was made here is pinned), CONTEXT_REFUSALS and
 * BLAS_REFUSALS (so many times there is no memory for a context, or for a handle of cuBLAS), BAD_DEVICE (this one has
 * failed before anybody used it), HANGS_AT (a stream that is to copy so many bytes to the device never ends),
 * FREE_HANGS_AT (to free memory of so many bytes never ends),
 * NVML_HANGS_AFTER (asked more often than this for the number of devices, NVML does not answer).
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef DEVICES
#define DEVICES 1
#endif
#ifndef MEMORY_MIB
#define MEMORY_MIB 1024
#endif
#ifndef NO_REGISTERING
#define NO_REGISTERING 0
#endif
#ifndef CONTEXT_REFUSALS
#define CONTEXT_REFUSALS 0
#endif
#ifndef BLAS_REFUSALS
#define BLAS_REFUSALS 0
#endif
#ifndef BAD_DEVICE
#define BAD_DEVICE -1
#endif
#ifndef HANGS_AT
#define HANGS_AT 0
#endif
#ifndef FREE_HANGS_AT
#define FREE_HANGS_AT 0
#endif
#ifndef NVML_HANGS_AFTER
#define NVML_HANGS_AFTER 1000000
#endif

enum {
    OK = 0,
    INVALID = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    NO_CONTEXT = 201,
    ECC_UNCORRECTABLE = 214,
    ILLEGAL_ADDRESS = 700,
    CAPTURING = 900,
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int current = -1, capture_mode;
static int poisoned;
static int contexts[8];

/* Memory, of a device or pinned: made here, or somebody else's that was registered. */
enum kind { FREE, DEVICE, PINNED };
struct memory {
    enum kind kind;
    int device, is_foreign;
    char *address;
    size_t bytes;
};
#define MEMORY_MAX 4096
static struct memory all[MEMORY_MAX];
static uint64_t device_bytes[8];
static int streams_open, events_open;

static int is_inside(enum kind kind, const void *address, size_t bytes) {
    for (int i = 0; i < MEMORY_MAX; i++) {
        struct memory *one = &all[i];
        if (one->kind == kind && (char *)address >= one->address
            && (char *)address + bytes <= one->address + one->bytes)
            return 1;
    }
    return 0;
}

static int reserve(enum kind kind, size_t bytes, void **address) {
    if (bytes == 0)
        return INVALID;
    if (kind == DEVICE && device_bytes[current] + bytes > (uint64_t)MEMORY_MIB << 20)
        return OUT_OF_MEMORY;
    for (int i = 0; i < MEMORY_MAX; i++) {
        if (all[i].kind != FREE)
            continue;
        char *made = malloc(bytes);
        if (!made)
            return OUT_OF_MEMORY;
        memset(made, 0xff, bytes);
        all[i] = (struct memory){kind, current, 0, made, bytes};
        if (kind == DEVICE)
            device_bytes[current] += bytes;
        *address = made;
        return OK;
    }
    return OUT_OF_MEMORY;
}

static int release(enum kind kind, void *address) {
    for (int i = 0; i < MEMORY_MAX; i++) {
        if (all[i].kind != kind || all[i].address != address || all[i].is_foreign)
            continue;
        if (kind == DEVICE)
            device_bytes[all[i].device] -= all[i].bytes;
        all[i].kind = FREE;
        free(address);
        return OK;
    }
    return INVALID;
}

static int enlist(void *address, size_t bytes) {
    for (int i = 0; i < MEMORY_MAX; i++) {
        if (all[i].kind != FREE)
            continue;
        all[i] = (struct memory){PINNED, current, 1, address, bytes};
        return OK;
    }
    return OUT_OF_MEMORY;
}

static int dismiss(void *address) {
    for (int i = 0; i < MEMORY_MAX; i++) {
        if (all[i].kind != PINNED || all[i].address != address || !all[i].is_foreign)
            continue;
        all[i].kind = FREE;
        return OK;
    }
    return INVALID;
}

/* Streams: lists of what is to be done. */
struct stream;
struct event {
    struct stream *stream;
    uint64_t recorded, reached;
};
struct product {
    int m, n, k, lda, ldb, ldc;
    float alpha, beta;
    const float *a, *b;
    float *c;
};
enum what { UP, DOWN, PRODUCT, RECORD, WAIT };
struct step {
    enum what what;
    void *to;
    const void *from;
    size_t bytes;
    struct product product;
    struct event *event;
    uint64_t number;
    struct step *next;
};
struct stream {
    struct step *first, *last;
};

static void multiply(const struct product *p) {
    /* Column-major, as cuBLAS has it. */
    for (int column = 0; column < p->n; column++)
        for (int row = 0; row < p->m; row++) {
            double sum = 0;
            for (int depth = 0; depth < p->k; depth++)
                sum += (double)p->a[(size_t)depth * p->lda + row] * p->b[(size_t)column * p->ldb + depth];
            float *c = &p->c[(size_t)column * p->ldc + row];
            float own = p->beta == 0 ? 0 : p->beta * *c;
            *c = (float)(p->alpha * sum) + own;
#ifdef WRONG
            *c += 1;
#endif
        }
}

/* Until nothing is left, or an event is reached. */
static void run(struct stream *stream, const struct event *until, uint64_t number) {
    while (stream->first && !poisoned && !(until && until->reached >= number)) {
        struct step *step = stream->first;
        int legal = 1;
        switch (step->what) {
        case UP:
            legal = is_inside(DEVICE, step->to, step->bytes) && is_inside(PINNED, step->from, step->bytes);
            break;
        case DOWN:
            legal = is_inside(PINNED, step->to, step->bytes) && is_inside(DEVICE, step->from, step->bytes);
            break;
        case PRODUCT: {
            struct product *p = &step->product;
            size_t a = (size_t)(p->k - 1) * p->lda + p->m, b = (size_t)(p->n - 1) * p->ldb + p->k;
            size_t c = (size_t)(p->n - 1) * p->ldc + p->m;
            legal = is_inside(DEVICE, p->a, a * 4) && is_inside(DEVICE, p->b, b * 4) && is_inside(DEVICE, p->c, c * 4);
#ifdef FAILS_AFTER
            static int products;
            legal = products++ < FAILS_AFTER;
#endif
            break;
        }
        case WAIT:
            if (step->event->reached < step->number)
                run(step->event->stream, step->event, step->number);
            break;
        case RECORD:
            step->event->reached = step->number;
            break;
        }
        if (!legal) {
            poisoned = ILLEGAL_ADDRESS;
            return;
        }
        if (step->what == UP || step->what == DOWN)
            memcpy(step->to, step->from, step->bytes);
        if (step->what == PRODUCT)
            multiply(&step->product);
        stream->first = step->next;
        if (!stream->first)
            stream->last = NULL;
        free(step);
    }
}

static int later(struct stream *stream, struct step step) {
    struct step *kept = malloc(sizeof *kept);
    *kept = step;
    kept->next = NULL;
    if (stream->last)
        stream->last->next = kept;
    else
        stream->first = kept;
    stream->last = kept;
    return OK;
}

static void never(void) {
    for (;;)
        pause();
}

/* Everything below is an entry of the libraries; each begins with the checks of a real one. */
#define ENTER                                                                                                          \
    if (current < 0)                                                                                                   \
        return NO_CONTEXT;                                                                                             \
    if (poisoned)                                                                                                      \
        return poisoned;                                                                                               \
    pthread_mutex_lock(&lock);
#define LEAVE(value)                                                                                                   \
    do {                                                                                                               \
        int result_ = (value);                                                                                         \
        pthread_mutex_unlock(&lock);                                                                                   \
        return result_;                                                                                                \
    } while (0)

int cuInit(unsigned flags) { return flags ? INVALID : DEVICES ? OK : NO_DEVICE; }
int cuDriverGetVersion(int *version) { return *version = 13000, OK; }
int cuDeviceGetCount(int *count) { return *count = DEVICES, OK; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal < DEVICES ? OK : INVALID; }
int cuDeviceGetName(char *name, int length, int device) {
    return snprintf(name, length, "Fake %d", device), OK;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return (void)device, *bytes = (size_t)MEMORY_MIB << 20, OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? 9 : 0;
    return attribute == 75 || attribute == 76 ? OK : INVALID;
}
int cuGetErrorName(int error, const char **name) {
    *name = error == OUT_OF_MEMORY   ? "CUDA_ERROR_OUT_OF_MEMORY"
        : error == ILLEGAL_ADDRESS   ? "CUDA_ERROR_ILLEGAL_ADDRESS"
        : error == ECC_UNCORRECTABLE ? "CUDA_ERROR_ECC_UNCORRECTABLE"
        : error == NO_DEVICE         ? "CUDA_ERROR_NO_DEVICE"
                                     : "CUDA_ERROR_INVALID_VALUE";
    return OK;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    static int refusals;
    if (device == BAD_DEVICE)
        return ECC_UNCORRECTABLE;
    return *context = &contexts[device], refusals++ < CONTEXT_REFUSALS ? OUT_OF_MEMORY : OK;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, OK; }
int cuCtxSetCurrent(void *context) { return current = (int)((int *)context - contexts), OK; }

int cuThreadExchangeStreamCaptureMode(int *mode) {
    int before = capture_mode;
    capture_mode = *mode;
    return *mode = before, OK;
}
/* Somebody may always be capturing a graph: what takes or frees memory must have said that it is no part of it. */
#define UNCAPTURED                                                                                                     \
    if (capture_mode != 2)                                                                                             \
        return CAPTURING;
int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    UNCAPTURED
    ENTER
    int status = reserve(DEVICE, bytes, (void **)address);
#ifdef BREAKS_AT
    if (bytes == BREAKS_AT)
        poisoned = ILLEGAL_ADDRESS;
#endif
    LEAVE(status);
}
int cuMemFree_v2(uint64_t address) {
    UNCAPTURED
    ENTER
    for (int i = 0; FREE_HANGS_AT && i < MEMORY_MAX; i++)
        if (all[i].kind == DEVICE && all[i].address == (char *)address && all[i].bytes == FREE_HANGS_AT) {
            pthread_mutex_unlock(&lock);
            never();
        }
    LEAVE(release(DEVICE, (void *)address));
}
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    ENTER
    *total = (size_t)MEMORY_MIB << 20;
    *free_bytes = *total - device_bytes[current];
    LEAVE(OK);
}
int cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
    UNCAPTURED
    ENTER
    LEAVE(flags > 1 ? INVALID : reserve(PINNED, bytes, address));
}
int cuMemFreeHost(void *address) {
    UNCAPTURED
    ENTER
    LEAVE(release(PINNED, address));
}
int cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags) {
    UNCAPTURED
    ENTER
    LEAVE(NO_REGISTERING || flags > 1 || is_inside(PINNED, address, bytes) ? INVALID : enlist(address, bytes));
}
int cuMemHostUnregister(void *address) {
    UNCAPTURED
    ENTER
    LEAVE(dismiss(address));
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, struct stream *stream) {
    ENTER
    LEAVE(later(stream, (struct step){.what = UP, .to = (void *)to, .from = from, .bytes = bytes}));
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, struct stream *stream) {
    ENTER
    LEAVE(later(stream, (struct step){.what = DOWN, .to = to, .from = (void *)from, .bytes = bytes}));
}
int cuStreamCreate(struct stream **stream, unsigned flags) {
    ENTER
    *stream = calloc(1, sizeof **stream);
    streams_open++;
    LEAVE(flags == 1 ? OK : INVALID);
}
int cuStreamDestroy_v2(struct stream *stream) {
    ENTER
    run(stream, NULL, 0);
    free(stream);
    streams_open--;
    LEAVE(OK);
}
int cuStreamSynchronize(struct stream *stream) {
    ENTER
    for (struct step *step = stream->first; HANGS_AT && step; step = step->next)
        if (step->what == UP && step->bytes == HANGS_AT) {
            pthread_mutex_unlock(&lock);
            never();
        }
    run(stream, NULL, 0);
    LEAVE(poisoned);
}
int cuStreamWaitEvent(struct stream *stream, struct event *event, unsigned flags) {
    ENTER
    LEAVE(flags ? INVALID
                : later(stream, (struct step){.what = WAIT, .event = event, .number = event->recorded}));
}
int cuEventCreate(struct event **event, unsigned flags) {
    ENTER
    *event = calloc(1, sizeof **event);
    events_open++;
    LEAVE(flags == 2 ? OK : INVALID);
}
int cuEventDestroy_v2(struct event *event) {
    ENTER
    free(event);
    events_open--;
    LEAVE(OK);
}
int cuEventRecord(struct event *event, struct stream *stream) {
    ENTER
    event->stream = stream;
    LEAVE(later(stream, (struct step){.what = RECORD, .event = event, .number = ++event->recorded}));
}

struct blas {
    struct stream *stream;
};
int cublasCreate_v2(struct blas **blas) {
    static int refusals;
    ENTER
    if (refusals++ < BLAS_REFUSALS)
        LEAVE(3);
    *blas = calloc(1, sizeof **blas);
    LEAVE(OK);
}
int cublasDestroy_v2(struct blas *blas) {
    ENTER
    free(blas);
    LEAVE(OK);
}
int cublasGetVersion_v2(struct blas *blas, int *version) { return (void)blas, *version = 130100, OK; }
int cublasSetStream_v2(struct blas *blas, struct stream *stream) {
    ENTER
    blas->stream = stream;
    LEAVE(OK);
}
int cublasSetWorkspace_v2(struct blas *blas, void *address, size_t bytes) {
    ENTER
    LEAVE(blas->stream && is_inside(DEVICE, address, bytes) ? OK : 7);
}
int cublasSgemm_v2(struct blas *blas, int ta, int tb, int m, int n, int k, const float *alpha, const float *a, int lda,
                   const float *b, int ldb, const float *beta, float *c, int ldc) {
    ENTER
    struct product p = {m, n, k, lda, ldb, ldc, *alpha, *beta, a, b, c};
    LEAVE(ta || tb || m < 1 || n < 1 || k < 1 || lda < m || ldb < k || ldc < m
              ? 7
              : later(blas->stream, (struct step){.what = PRODUCT, .product = p}));
}

struct memory_info {
    unsigned long long total, free, used;
};
struct utilization {
    unsigned gpu, memory;
};
int nvmlInit_v2(void) { return OK; }
static int nvml_asked;
int nvmlDeviceGetCount_v2(unsigned *count) {
    if (__atomic_add_fetch(&nvml_asked, 1, __ATOMIC_RELAXED) > NVML_HANGS_AFTER)
        never();
    return *count = DEVICES, OK;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    return *device = &contexts[index], index < DEVICES ? OK : 6;
}
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
    return snprintf(uuid, length, "GPU-fake-%d", (int)((int *)device - contexts)), OK;
}
int nvmlDeviceGetMemoryInfo(void *device, struct memory_info *info) {
    unsigned long long total = (unsigned long long)MEMORY_MIB << 20, used = device_bytes[(int *)device - contexts];
    return *info = (struct memory_info){total, total - used, used}, OK;
}
int nvmlDeviceGetUtilizationRates(void *device, struct utilization *rates) {
    return (void)device, *rates = (struct utilization){37, 11}, OK;
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { return (void)device, *milliwatts = 81500, OK; }
int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *milliwatts) {
    return (void)device, *milliwatts = 700000, OK;
}
/* Not every device counts its energy. */
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    return (void)device, (void)millijoules, 3;
}

/* For tests: how often NVML was asked, and what was made and not given back. */
int fake_asked(void) { return nvml_asked; }

int fake_open(void) {
    int open = streams_open + events_open;
    for (int i = 0; i < MEMORY_MAX; i++)
        open += all[i].kind != FREE;
    return open;
}
