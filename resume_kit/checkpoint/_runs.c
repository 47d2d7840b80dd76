/* Many short reads of one file in one call, so that threads that read side by side do not queue for the interpreter. */

#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <fcntl.h>
#include <stdint.h>
#include <unistd.h>

typedef struct {
    int64_t start, stop;
} Run;

/* How many runs came whole: all, or those before the first that failed, ended early or has no room in `memory`. */
static Py_ssize_t fill(int file, char *memory, int64_t room, int64_t origin, const Run *runs, Py_ssize_t count)
{
    for (Py_ssize_t done = 0; done < count; done++) {
        int64_t at = runs[done].start, stop = runs[done].stop;
        if (at < origin || stop - origin > room)
            return done;
        while (at < stop) {
            ssize_t came = pread(file, memory + (at - origin), (size_t)(stop - at), at);
            if (came <= 0)
                return done;
            at += came;
        }
    }
    return count;
}

static PyObject *read_runs(PyObject *self, PyObject *args)
{
    int file, ahead;
    long long origin;
    Py_buffer memory, runs;
    Py_ssize_t done, count;
    if (!PyArg_ParseTuple(args, "iw*Ly*p", &file, &memory, &origin, &runs, &ahead))
        return NULL;
    const Run *bounds = runs.buf;
    count = runs.len / (Py_ssize_t)sizeof(Run);
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t k = 0; ahead && k < count; k++)
        posix_fadvise(file, bounds[k].start, bounds[k].stop - bounds[k].start, POSIX_FADV_WILLNEED);
    done = fill(file, memory.buf, memory.len, origin, bounds, count);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&memory);
    PyBuffer_Release(&runs);
    return PyLong_FromSsize_t(done);
}

static PyMethodDef methods[] = {
    {"read_runs", read_runs, METH_VARARGS,
     "read_runs(file, memory, origin, runs, ahead)\n--\n\n"
     "Read bytes [start, stop) of the open file for each pair of int64 in `runs`, each to byte start - origin of\n"
     "`memory`, all of them asked for `ahead` where the disk has to fetch them. Returns how many runs came whole before\n"
     "the first that did not. Lets other threads run."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_runs", "Many short reads in one call.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__runs(void)
{
    return PyModule_Create(&definition);
}
