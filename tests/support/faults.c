/* A disk that fails at the n-th call that changes it, to be preloaded (LD_PRELOAD). It counts open-to-write, write,
 * rename, mkdir, fsync and truncate below one folder, whoever makes them: Python, Rust (safetensors) or C++ (torch).
 * What the calls would do otherwise, they do. Not safe for threads that write at the same time.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long calls, failing;
static int error, lasting;

/* Fail call number n below a folder: with an errno, and all after it where it is lasting; by SIGKILL where it is 0. */
void faults_arm(const char *where, long n, int errno_of, int for_ever) {
    strncpy(folder, where, sizeof folder - 1);
    calls = 0, failing = n, error = errno_of, lasting = for_ever;
}

/* A process that is started, not forked, is told by FAULTS_BELOW, FAULTS_AT and FAULTS_ERRNO; its failure lasts. */
__attribute__((constructor)) static void faults_from_environment(void) {
    const char *where = getenv("FAULTS_BELOW"), *at = getenv("FAULTS_AT"), *number = getenv("FAULTS_ERRNO");
    if (where && at && number) faults_arm(where, atol(at), atoi(number), 1);
}

long faults_calls(void) { return calls; }

/* Whether this call is to fail with `error`; a call that is to kill does not return, but for `torn` ones. */
static int strikes(const char *path, int torn) {
    if (!folder[0] || strncmp(path, folder, strlen(folder))) return 0;
    calls++;
    if (!failing || calls < failing || (calls > failing && !lasting)) return 0;
    if (!error && !torn) kill(getpid(), SIGKILL);
    return 1;
}

static int strikes_fd(int fd, int torn) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = folder[0] ? readlink(link, path, sizeof path - 1) : -1;
    if (length < 0) return 0;
    path[length] = 0;
    return strikes(path, torn);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL return errno = error, -1
#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC))
#define MODE mode_t mode = 0; { va_list rest; va_start(rest, flags); mode = va_arg(rest, int); va_end(rest); }

int open(const char *path, int flags, ...) {
    MODE
    if (CHANGES(flags) && strikes(path, 0)) FAIL;
    return REAL(open)(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE
    if (CHANGES(flags) && strikes(path, 0)) FAIL;
    return REAL(open64)(path, flags, mode);
}

FILE *fopen64(const char *path, const char *how) {
    if (how[0] != 'r' && strikes(path, 0)) return errno = error, NULL;
    return REAL(fopen64)(path, how);
}

/* Half of the bytes are written before a process is killed. */
ssize_t write(int fd, const void *bytes, size_t count) {
    if (strikes_fd(fd, 1)) {
        if (error) FAIL;
        REAL(write)(fd, bytes, count / 2);
        kill(getpid(), SIGKILL);
    }
    return REAL(write)(fd, bytes, count);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (strikes_fd(fd, 0)) FAIL;
    return REAL(writev)(fd, parts, count);
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t count) {
    if (strikes_fd(out, 0)) FAIL;
    return REAL(sendfile64)(out, in, offset, count);
}

int rename(const char *from, const char *to) {
    if (strikes(from, 0)) FAIL;
    return REAL(rename)(from, to);
}

int mkdir(const char *path, mode_t mode) {
    if (strikes(path, 0)) FAIL;
    return REAL(mkdir)(path, mode);
}

int fsync(int fd) {
    if (strikes_fd(fd, 0)) FAIL;
    return REAL(fsync)(fd);
}

int ftruncate64(int fd, off64_t length) {
    if (strikes_fd(fd, 0)) FAIL;
    return REAL(ftruncate64)(fd, length);
}
