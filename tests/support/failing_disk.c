/* Loaded before libc: reads of files whose path holds $FAILING_DISK_NAME fail as $FAILING_DISK_SCRIPT says, one digit
 * string a call: "0" goes well but short (at most 70,000 bytes), any other number is the errno. After the last, all
 * goes well. Opens are counted with the reads: "o116" fails an open, and an open that finds no "o" ahead goes well. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *next_word = NULL;

static int is_ours(const char *path) {
    const char *name = getenv("FAILING_DISK_NAME");
    return name != NULL && strstr(path, name) != NULL;
}

static int fd_is_ours(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t count = readlink(link, path, sizeof path - 1);
    if (count < 0) return 0;
    path[count] = 0;
    return is_ours(path);
}

/* The next word's number if it is of this kind ('o' or 'r'); -1 if there is none. */
static int take(char kind) {
    if (next_word == NULL) next_word = getenv("FAILING_DISK_SCRIPT");
    if (next_word == NULL || *next_word == 0) return -1;
    int opens = *next_word == 'o';
    if ((kind == 'o') != opens) return -1;
    char *end;
    long number = strtol(next_word + opens, &end, 10);
    next_word = *end == ',' ? end + 1 : end;
    return (int)number;
}

static ssize_t read_at(const char *symbol, int fd, const struct iovec *views, int count, off_t at, int flags, int flagged) {
    struct iovec first;
    if (fd_is_ours(fd)) {
        int number = take('r');
        if (number > 0) {
            errno = number;
            return -1;
        }
        if (number == 0 && count == 1 && views[0].iov_len > 70000) {
            first = views[0];
            first.iov_len = 70000;
            views = &first;
        }
    }
    if (flagged) {
        ssize_t (*next)(int, const struct iovec *, int, off_t, int) = dlsym(RTLD_NEXT, symbol);
        return next(fd, views, count, at, flags);
    }
    ssize_t (*next)(int, const struct iovec *, int, off_t) = dlsym(RTLD_NEXT, symbol);
    return next(fd, views, count, at);
}

ssize_t preadv(int fd, const struct iovec *v, int n, off_t at) { return read_at("preadv", fd, v, n, at, 0, 0); }
ssize_t preadv64(int fd, const struct iovec *v, int n, off_t at) { return read_at("preadv64", fd, v, n, at, 0, 0); }
ssize_t preadv2(int fd, const struct iovec *v, int n, off_t at, int f) { return read_at("preadv2", fd, v, n, at, f, 1); }
ssize_t preadv64v2(int fd, const struct iovec *v, int n, off_t at, int f) {
    return read_at("preadv64v2", fd, v, n, at, f, 1);
}

static int open_at(const char *symbol, const char *path, int flags, mode_t mode) {
    if (is_ours(path)) {
        int number = take('o');
        if (number > 0) {
            errno = number;
            return -1;
        }
    }
    int (*next)(const char *, int, mode_t) = dlsym(RTLD_NEXT, symbol);
    return next(path, flags, mode);
}

#define OPENER(name)                              \
    int name(const char *path, int flags, ...) {  \
        va_list rest;                             \
        va_start(rest, flags);                    \
        mode_t mode = va_arg(rest, mode_t);       \
        va_end(rest);                             \
        return open_at(#name, path, flags, mode); \
    }

OPENER(open)
OPENER(open64)
