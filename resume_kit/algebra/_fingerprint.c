/* Sums of w(i) * bits(x_i) mod 2**64, as resume_kit/algebra/fingerprint.py defines them, for memory of this host.
 *
 * The loops are plain C that compilers vectorise; on x86 each is compiled for AVX-512, for AVX2 and for any machine,
 * and the best one is picked when the module is loaded. Weights go through a buffer in the first-level cache, so that
 * all arrays of one box share them and each element size needs only a dot product.
 */

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define STEP 0x9E3779B97F4A7C15ULL
#define MIX 0xD6E8FEB86659FD93ULL

enum { BUFFER = 1024, MAX_ARRAYS = 8, MAX_AXES = 16 };

#if defined(__GNUC__)
#define BODY static inline __attribute__((always_inline))
#define LOOSE __attribute__((aligned(1), may_alias))
#else
#define BODY static inline
#define LOOSE
#endif

/* The elements of an array may lie at any address. */
typedef uint16_t LOOSE loose16;
typedef uint32_t LOOSE loose32;
typedef uint64_t LOOSE loose64;

typedef struct {
    Py_ssize_t arrays;
    const unsigned char *data[MAX_ARRAYS];
    int itemsize[MAX_ARRAYS];
    uint64_t total[MAX_ARRAYS];
    uint64_t first, length; /* of the runs */
    Py_ssize_t axes;
    uint64_t inner[MAX_AXES], count[MAX_AXES], stride[MAX_AXES];
} Job;

BODY void fill(uint64_t *weight, uint64_t index, uint64_t n)
{
    uint64_t first = (index + 1) * STEP;
    for (uint64_t k = 0; k < n; k++) {
        uint64_t z = first + k * STEP;
        z = (z ^ (z >> 32)) * MIX;
        weight[k] = (z ^ (z >> 32)) | 1;
    }
}

#define DOT(TYPE)                                    \
    do {                                             \
        const TYPE *bits = (const TYPE *)data;       \
        for (uint64_t k = 0; k < n; k++)             \
            sum += weight[k] * (uint64_t)bits[k];    \
    } while (0)

BODY uint64_t dot(const uint64_t *weight, const unsigned char *data, int itemsize, uint64_t n)
{
    uint64_t sum = 0;
    switch (itemsize) {
    case 1: DOT(unsigned char); break;
    case 2: DOT(loose16); break;
    case 4: DOT(loose32); break;
    default: DOT(loose64); break;
    }
    return sum;
}

/* Elements begin .. end-1 of the box, in C order. */
BODY void run_body(Job *job, uint64_t begin, uint64_t end)
{
    uint64_t weight[BUFFER];
    while (begin < end) {
        uint64_t filled = 0;
        uint64_t room = end - begin < BUFFER ? end - begin : BUFFER;
        while (filled < room) {
            uint64_t run = (begin + filled) / job->length;
            uint64_t within = (begin + filled) % job->length;
            uint64_t index = job->first + within;
            uint64_t take = job->length - within < room - filled ? job->length - within : room - filled;
            for (Py_ssize_t axis = 0; axis < job->axes; axis++)
                index += run / job->inner[axis] % job->count[axis] * job->stride[axis];
            fill(weight + filled, index, take);
            filled += take;
        }
        for (Py_ssize_t a = 0; a < job->arrays; a++)
            job->total[a] += dot(weight, job->data[a] + begin * job->itemsize[a], job->itemsize[a], room);
        begin += room;
    }
}

static void run_default(Job *job, uint64_t begin, uint64_t end) { run_body(job, begin, end); }

static void (*run)(Job *, uint64_t, uint64_t) = run_default;
static const char *instructions = "baseline";

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
__attribute__((target("avx2"))) static void run_avx2(Job *job, uint64_t begin, uint64_t end)
{
    run_body(job, begin, end);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) static void
run_avx512(Job *job, uint64_t begin, uint64_t end)
{
    run_body(job, begin, end);
}

static void choose(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
        run = run_avx512;
        instructions = "AVX-512";
    } else if (__builtin_cpu_supports("avx2")) {
        run = run_avx2;
        instructions = "AVX2";
    }
}
#else
static void choose(void) {}
#endif

/* Reads up to `most` unsigned integers from a tuple; their number, or -1 with an exception set. */
static Py_ssize_t integers(PyObject *tuple, uint64_t *into, Py_ssize_t most)
{
    Py_ssize_t n = PyTuple_Size(tuple);
    if (n > most) {
        PyErr_Format(PyExc_ValueError, "at most %zd numbers, not %zd", most, n);
        return -1;
    }
    for (Py_ssize_t k = 0; k < n; k++) {
        into[k] = PyLong_AsUnsignedLongLong(PyTuple_GetItem(tuple, k));
        if (PyErr_Occurred())
            return -1;
    }
    return n;
}

static PyObject *weighted_sums(PyObject *module, PyObject *args)
{
    (void)module;
    Job job = {0};
    PyObject *addresses, *itemsizes, *grid, *sums;
    unsigned long long first, length, begin, end;
    uint64_t numbers[MAX_ARRAYS];
    if (!PyArg_ParseTuple(args, "O!O!KKO!KK", &PyTuple_Type, &addresses, &PyTuple_Type, &itemsizes, &first, &length,
                          &PyTuple_Type, &grid, &begin, &end))
        return NULL;
    if ((job.arrays = integers(addresses, numbers, MAX_ARRAYS)) < 0)
        return NULL;
    for (Py_ssize_t a = 0; a < job.arrays; a++)
        job.data[a] = (const unsigned char *)(uintptr_t)numbers[a];
    if (integers(itemsizes, numbers, MAX_ARRAYS) != job.arrays || PyErr_Occurred()) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "as many itemsizes as addresses");
        return NULL;
    }
    for (Py_ssize_t a = 0; a < job.arrays; a++) {
        if (numbers[a] != 1 && numbers[a] != 2 && numbers[a] != 4 && numbers[a] != 8) {
            PyErr_SetString(PyExc_ValueError, "an itemsize is 1, 2, 4 or 8");
            return NULL;
        }
        job.itemsize[a] = (int)numbers[a];
    }
    job.first = first;
    job.length = length;
    job.axes = PyTuple_Size(grid);
    if (job.axes > MAX_AXES || (length == 0 && begin < end)) {
        PyErr_Format(PyExc_ValueError, "at most %d axes, and runs that are not empty", MAX_AXES);
        return NULL;
    }
    for (Py_ssize_t axis = 0; axis < job.axes; axis++) {
        PyObject *row = PyTuple_GetItem(grid, axis);
        if (!PyTuple_Check(row) || integers(row, numbers, 3) != 3 || !numbers[0] || !numbers[1]) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_ValueError, "an axis is (inner, count, stride), inner and count above zero");
            return NULL;
        }
        job.inner[axis] = numbers[0];
        job.count[axis] = numbers[1];
        job.stride[axis] = numbers[2];
    }
    Py_BEGIN_ALLOW_THREADS
    run(&job, begin, end);
    Py_END_ALLOW_THREADS
    if ((sums = PyTuple_New(job.arrays)) == NULL)
        return NULL;
    for (Py_ssize_t a = 0; a < job.arrays; a++) {
        PyObject *total = PyLong_FromUnsignedLongLong(job.total[a]);
        if (total == NULL || PyTuple_SetItem(sums, a, total) < 0) {
            Py_DECREF(sums);
            return NULL;
        }
    }
    return sums;
}

static PyMethodDef methods[] = {
    {"weighted_sums", weighted_sums, METH_VARARGS,
     "weighted_sums(addresses, itemsizes, first, length, grid, begin, end)\n--\n\n"
     "The sum of w(i) * bits(x_i) mod 2**64 over elements begin .. end-1 of a box, for each of up to 8 arrays that\n"
     "hold the box's elements from the given addresses on. Runs as in resume_kit.algebra.boxes.Runs."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_fingerprint", "Weighted sums at the speed of memory.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__fingerprint(void)
{
    PyObject *module = PyModule_Create(&definition);
    choose();
    if (module != NULL && PyModule_AddStringConstant(module, "INSTRUCTIONS", instructions) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
