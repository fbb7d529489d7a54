/* Kills the process at step KILL_AT of writing its first checkpoint; kills.py uses it.

   cc -shared -fPIC -o kill_at.so kill_at.c -ldl
   LD_PRELOAD=./kill_at.so KILL_LOG=steps.log KILL_AT=7 python cifar10_train.py

   A step is a call of the C library that changes a checkpoint's file; the first is the
   first such file that is opened for writing. Each is noted in KILL_LOG before it is
   done, and the one with the number KILL_AT is not done any more. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_OPEN 16

static struct { FILE *file; char path[4096]; } open_files[MAX_OPEN];
static int steps;

static const char *basename_of(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

static int is_checkpoint(const char *path) {
  return strncmp(basename_of(path), "model.ckpt-", 11) == 0 ||
         strncmp(basename_of(path), "checkpoint", 10) == 0;
}

static void step(const char *what, const char *path) {
  const char *at = getenv("KILL_AT"), *log = getenv("KILL_LOG");
  int descriptor = open(log ? log : "/dev/null", O_WRONLY | O_APPEND | O_CREAT, 0666);
  dprintf(descriptor, "%d %s %s\n", ++steps, what, basename_of(path));
  close(descriptor);
  if (at && atoi(at) == steps) kill(getpid(), SIGKILL);
}

/* The C library's own function of this name. */
#define REAL(result, name, ...)                                 \
  static result (*real)(__VA_ARGS__);                           \
  if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static FILE *opened(FILE *(*real)(const char *, const char *), const char *path,
                    const char *mode) {
  int counts = mode[0] != 'r' && is_checkpoint(path);
  if (counts) step("open", path);
  FILE *file = real(path, mode);
  for (int i = 0; counts && file && i < MAX_OPEN; ++i) {
    if (!open_files[i].file) {
      open_files[i].file = file;
      snprintf(open_files[i].path, sizeof open_files[i].path, "%s", path);
      break;
    }
  }
  return file;
}

FILE *fopen(const char *path, const char *mode) {
  REAL(FILE *, fopen, const char *, const char *);
  return opened(real, path, mode);
}

FILE *fopen64(const char *path, const char *mode) {
  REAL(FILE *, fopen64, const char *, const char *);
  return opened(real, path, mode);
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
  REAL(size_t, fwrite, const void *, size_t, size_t, FILE *);
  for (int i = 0; i < MAX_OPEN; ++i)
    if (open_files[i].file == file) step("write", open_files[i].path);
  return real(data, size, count, file);
}

int fclose(FILE *file) {
  REAL(int, fclose, FILE *);
  for (int i = 0; i < MAX_OPEN; ++i) {
    if (open_files[i].file == file) {
      step("close", open_files[i].path);
      open_files[i].file = NULL;
    }
  }
  return real(file);
}

int rename(const char *from, const char *to) {
  REAL(int, rename, const char *, const char *);
  if (steps && is_checkpoint(to)) step("rename to", to);
  return real(from, to);
}

int unlink(const char *path) {
  REAL(int, unlink, const char *);
  if (steps && is_checkpoint(path)) step("remove", path);
  return real(path);
}
