/* A CUDA driver without a GPU, for the calls that faqd makes: device memory is host memory, a stream runs at once, a
 * graph is a list of copies. It counts what is held, so that tests can see what was not given back. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_CONTEXT = 201, CAPTURE_FAULT = 901 };
typedef struct copy { void *to; const void *from; size_t size; struct copy *next; } copy;
typedef struct { copy *first, *last; } graph;

static long held_things;
static int contexts, clock_ms;
static graph *captured;
static int context_object;

long fake_held(void) { return held_things; }
static void *take(size_t size) { held_things++; return calloc(1, size ? size : 1); }
static int give_back(void *thing) { if (!thing) return INVALID; held_things--; free(thing); return OK; }

static int answer(const char **text, const char *value) { *text = value; return OK; }
int cuGetErrorName(int error, const char **text) {
  return answer(text, error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OTHER");
}
int cuGetErrorString(int error, const char **text) {
  return answer(text, error == OUT_OF_MEMORY ? "out of memory" : "another error");
}

int cuInit(unsigned flags) { return OK; }
int cuDriverGetVersion(int *version) { *version = 13000; return OK; }
int cuDeviceGetCount(int *count) { *count = 1; return OK; }
int cuDeviceGet(int *device, int number) { *device = number; return OK; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Fake GPU"); return OK; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)1 << 33; return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 7 : attribute == 18;  /* compute capability 8.7, integrated */
  return OK;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { held_things++; *context = &context_object; return OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { held_things--; return OK; }
int cuCtxPushCurrent_v2(void *context) { contexts++; return OK; }
int cuCtxPopCurrent_v2(void **context) {
  if (!contexts) return NO_CONTEXT;
  contexts--;
  if (context) *context = &context_object;
  return OK;
}
int cuCtxGetCurrent(void **context) { *context = contexts ? &context_object : NULL; return OK; }
int cuCtxSetCurrent(void *context) { contexts = context != NULL; return OK; }
int cuCtxGetDevice(int *device) { *device = 0; return contexts ? OK : NO_CONTEXT; }
int cuCtxSynchronize(void) { return contexts ? OK : NO_CONTEXT; }

int cuMemAlloc_v2(void **address, size_t size) {
  if (!contexts) return NO_CONTEXT;
  if (size >> 33) return OUT_OF_MEMORY;
  *address = take(size);
  return OK;
}
int cuMemFree_v2(void *address) { return give_back(address); }
int cuMemHostAlloc(void **address, size_t size, unsigned flags) { return cuMemAlloc_v2(address, size); }
int cuMemAllocHost_v2(void **address, size_t size) { return cuMemAlloc_v2(address, size); }
int cuMemHostGetDevicePointer_v2(void **address, void *host, unsigned flags) { *address = host; return OK; }
int cuMemFreeHost(void *address) { return give_back(address); }

static int copied(void *to, const void *from, size_t size) {
  if (!captured) { memcpy(to, from, size); clock_ms++; return OK; }
  copy *step = malloc(sizeof *step);
  *step = (copy){to, from, size, NULL};
  if (captured->last) captured->last->next = step; else captured->first = step;
  captured->last = step;
  return OK;
}
int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t size, void *stream) { return copied(to, from, size); }
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t size, void *stream) { return copied(to, from, size); }

int cuStreamCreate(void **stream, unsigned flags) { *stream = take(8); return OK; }
int cuStreamDestroy_v2(void *stream) { return give_back(stream); }
int cuStreamSynchronize(void *stream) { return captured ? CAPTURE_FAULT : OK; }
int cuEventCreate(void **event, unsigned flags) { *event = take(sizeof(int)); return OK; }
int cuEventDestroy_v2(void *event) { return give_back(event); }
int cuEventRecord(void *event, void *stream) { *(int *)event = clock_ms; return OK; }
int cuEventSynchronize(void *event) { return OK; }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return OK; }
int cuEventElapsedTime_v2(float *ms, void *start, void *end) { *ms = *(int *)end - *(int *)start; return OK; }
int cuEventElapsedTime(float *ms, void *start, void *end) { return cuEventElapsedTime_v2(ms, start, end); }

int cuStreamBeginCapture_v2(void *stream, int mode) { captured = take(sizeof *captured); return OK; }
int cuStreamEndCapture(void *stream, void **result) {
  if (!captured) return INVALID;
  *result = captured;
  captured = NULL;
  return OK;
}
/* The executable graph takes the copies over. */
int cuGraphInstantiateWithFlags(void **executable, graph *from, unsigned long long flags) {
  graph *made = take(sizeof *made);
  *made = *from;
  *executable = made;
  return OK;
}
int cuGraphDestroy(graph *thing) { return give_back(thing); }
int cuGraphLaunch(graph *executable, void *stream) {
  for (copy *step = executable->first; step; step = step->next) copied(step->to, step->from, step->size);
  return OK;
}
int cuGraphExecDestroy(graph *executable) {
  for (copy *step = executable->first, *next; step; step = next) { next = step->next; free(step); }
  return give_back(executable);
}

/* cuda-bindings asks for every call by its first name. */
int cuGetProcAddress_v2(const char *name, void **address, int version, unsigned long long flags, int *found) {
  char newer[128];
  const char *suffixes[] = {"WithFlags", "_v2", ""};
  *address = NULL;
  for (int i = 0; i < 3 && !*address; i++) {
    if (!*suffixes[i] || strcmp(name, "cuGetProcAddress")) {
      snprintf(newer, sizeof newer, "%s%s", name, suffixes[i]);
      *address = dlsym(RTLD_DEFAULT, newer);
    }
  }
  if (!*address) *address = dlsym(RTLD_DEFAULT, "cuGetProcAddress_v2");
  if (found) *found = 0;
  return OK;
}
