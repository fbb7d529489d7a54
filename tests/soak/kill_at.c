/* Kills the process just before call KILL_AT of the C library that changes a file of a checkpoint.

   cc -shared -fPIC -o kill_at.so kill_at.c -ldl
   LD_PRELOAD=./kill_at.so KILL_LOG=steps.log KILL_AT=7 python cifar10_train.py

   Each call is noted in KILL_LOG first. Nothing simpler does this: TensorFlow writes checkpoints in
   C++, so Python's hooks do not see it; `strace --inject` counts the calls of each thread
   separately; and a kill at a random moment never falls between two renames. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void step(const char *what, const char *path) {
  static int steps;
  const char *name = strrchr(path, '/'), *log = getenv("KILL_LOG"), *at = getenv("KILL_AT");
  name = name ? name + 1 : path;
  if (!log || (strncmp(name, "model.ckpt-", 11) && strncmp(name, "checkpoint", 10))) return;
  int descriptor = open(log, O_WRONLY | O_APPEND | O_CREAT, 0666);
  dprintf(descriptor, "%d %s %s\n", ++steps, what, name);
  close(descriptor);
  if (at && atoi(at) == steps) kill(getpid(), SIGKILL);
}

/* As step(), for a file that is open for writing. */
static void step_of(const char *what, FILE *file) {
  char link[64], path[4096] = "";
  snprintf(link, sizeof link, "/proc/self/fd/%d", fileno(file));
  if ((fcntl(fileno(file), F_GETFL) & O_ACCMODE) != O_RDONLY &&
      readlink(link, path, sizeof path - 1) > 0)
    step(what, path);
}

/* Defines a function of the C library that calls the real one after a step. */
#define WRAP(result, name, parameters, arguments, before)                               \
  result name parameters {                                                              \
    static result(*real) parameters;                                                    \
    if (!real) real = (result(*) parameters)dlsym(RTLD_NEXT, #name);                    \
    before;                                                                             \
    return real arguments;                                                              \
  }

#define OPEN if (mode[0] != 'r') step("open", path)
WRAP(FILE *, fopen, (const char *path, const char *mode), (path, mode), OPEN)
WRAP(FILE *, fopen64, (const char *path, const char *mode), (path, mode), OPEN)
WRAP(size_t, fwrite, (const void *data, size_t size, size_t count, FILE *file),
     (data, size, count, file), step_of("write", file))
WRAP(int, fclose, (FILE *file), (file), step_of("close", file))
WRAP(int, rename, (const char *from, const char *to), (from, to), step("rename", to))
WRAP(int, unlink, (const char *path), (path), step("remove", path))
