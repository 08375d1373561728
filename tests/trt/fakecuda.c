// SPDX-License-Identifier: Apache-2.0
//
// A stand-in for libcuda.so.1: device memory is the host's, streams do at once what they are told,
// and the rules that a GPU enforces, or would break silently, are enforced loudly.
//
//   - Device memory can be read and written only by the stream's work: it is closed to everything
//     else while a stream is captured, and always after fakecuda_strict(1). It begins as bytes of all
//     ones, and an allocation ends, but for its alignment to 256 bytes, where a closed page begins.
//   - While a stream is captured, allocations and waiting are refused and spoil the capture.
//   - A graph replays exactly what was captured: copies, fills and calls with the values they had.
//   - After fakecuda_late(1) streams do nothing before somebody waits for them, as a busy GPU may:
//     page-locked memory that is written too early arrives as what it was changed to. A copy of any
//     other memory waits, too.
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int Result;
typedef uint64_t Address;
typedef void (*HostFunction)(void*);

enum {
  kOk = 0,
  kInvalid = 1,
  kOutOfMemory = 2,
  kNoContext = 201,
  kNoHandle = 400,
  kLaunchFailed = 719,
  kCaptureUnsupported = 900,
  kCaptureInvalidated = 901,
  kIllegalState = 401
};
enum { kMaxRegions = 4096, kMaxLocked = 64 };
static const int64_t kMemory = (int64_t)32 << 30;

typedef struct Node {
  enum { kCopy, kFill, kCall } kind;
  void *to, *from;
  size_t size;
  int value, off;
  HostFunction call;
  void* data;
  struct Node *next, *before;
} Node;

typedef struct {
  Node *first, **last, *newest;
  int spoilt;
} Graph;

typedef struct {
  Graph* capture;
} Stream;

typedef struct {
  char* start;
  size_t size;
} Region;

static Region regions[kMaxRegions], locks[kMaxLocked];  // of the device, and page-locked
static int regionCount, lockCount, strict, late, depth, device, lost, integrated;
static Node *waiting, **lastWaiting = &waiting;
static Stream* capturing;
static _Thread_local void* current;

// What a test may ask: what happened since the start.
static struct {
  int64_t allocations, waits, copies, calls, launches, bytes, uploaded, downloaded;
} counts;

// From now on as after a kernel's fault: every call that needs the context says so.
void fakecuda_lose(void) { lost = 1; }

// From now on the device's memory is the system's, all of it taken by the page cache.
void fakecuda_integrate(void) { integrated = 1; }

void fakecuda_counts(int64_t* out) { memcpy(out, &counts, sizeof counts); }

static void say(const char* text) {
  if (write(2, text, strlen(text)) < 0) _exit(98);
}

static void onFault(int signal, siginfo_t* info, void* context) {
  for (int i = 0; i < regionCount; ++i) {
    const char* at = info->si_addr;
    if (at >= regions[i].start && at < regions[i].start + regions[i].size) {
      say("[fakecuda] the host touched device memory\n");
      _exit(97);
    }
  }
  struct sigaction plain = {.sa_handler = SIG_DFL};
  sigaction(SIGSEGV, &plain, NULL);
}

static void protect(int how) {
  for (int i = 0; i < regionCount; ++i) mprotect(regions[i].start, regions[i].size, how);
}

static int locked(void) { return strict || capturing; }

// Stream work goes between unlock() and lock().
static void unlock(void) {
  if (depth++ == 0 && locked()) protect(PROT_READ | PROT_WRITE);
}
static void lock(void) {
  if (--depth == 0 && locked()) protect(PROT_NONE);
}

// A test's own look at device memory goes between these.
void fakecuda_unlock(void) { unlock(); }
void fakecuda_lock(void) { lock(); }

void fakecuda_strict(int on) {
  strict = on;
  protect(locked() ? PROT_NONE : PROT_READ | PROT_WRITE);
}

static Result refuse(const char* what) {
  fprintf(stderr, "[fakecuda] %s is not allowed while a stream is captured\n", what);
  capturing->capture->spoilt = 1;
  return kCaptureUnsupported;
}
#define NOT_CAPTURED(what) \
  if (capturing) return refuse(what)
#define NEEDS_CONTEXT                \
  if (!current) return kNoContext; \
  if (lost) return kLaunchFailed

static void perform(const Node* node) {
  if (node->off) return;
  unlock();
  if (node->kind == kCopy) memmove(node->to, node->from, node->size);
  if (node->kind == kFill) memset(node->to, node->value, node->size);
  if (node->kind == kCall) node->call(node->data);
  lock();
}

// What was put off, in its order.
static void catchUp(void) {
  while (waiting) {
    Node* node = waiting;
    waiting = node->next;
    if (!waiting) lastWaiting = &waiting;
    perform(node);
    free(node);
  }
}

void fakecuda_late(int on) {
  catchUp();
  late = on;
}

static int isLocked(const void* at) {
  for (int i = 0; i < lockCount; ++i) {
    if ((const char*)at >= locks[i].start && (const char*)at < locks[i].start + locks[i].size) {
      return 1;
    }
  }
  return 0;
}

static Result enqueue(const Node* node) {
  if (!late) {
    perform(node);
    return kOk;
  }
  Node* kept = malloc(sizeof *kept);
  *kept = *node;
  kept->next = NULL;
  *lastWaiting = kept;
  lastWaiting = &kept->next;
  return kOk;
}

static Result submit(Stream* stream, Node node) {
  NEEDS_CONTEXT;
  if (!stream) return kNoHandle;
  if (!capturing) return enqueue(&node);
  if (stream != capturing) return refuse("work on another stream");
  Node* kept = malloc(sizeof node);
  *kept = node;
  kept->next = NULL;
  kept->before = stream->capture->newest;
  *stream->capture->last = stream->capture->newest = kept;
  stream->capture->last = &kept->next;
  return kOk;
}

Result cuInit(unsigned flags) {
  struct sigaction action = {.sa_sigaction = onFault, .sa_flags = SA_SIGINFO};
  sigaction(SIGSEGV, &action, NULL);
  return kOk;
}
Result cuDriverGetVersion(int* out) { return *out = 12060, kOk; }
Result cuDeviceGetCount(int* out) { return *out = 1, kOk; }
Result cuDeviceGet(int* out, int index) { return *out = index, index ? 101 : kOk; }
Result cuDeviceGetName(char* out, int size, int index) {
  snprintf(out, (size_t)size, "host memory");
  return kOk;
}
Result cuDeviceGetAttribute(int* out, int attribute, int index) {
  *out = attribute == 75 ? 8 : attribute == 76 ? 7 : 1;  // compute capability 8.7
  if (attribute == 18) *out = integrated;
  return kOk;
}
Result cuDeviceComputeCapability(int* major, int* minor, int index) {
  *major = 8, *minor = 7;
  return kOk;
}
Result cuDeviceTotalMem_v2(size_t* out, int index) { return *out = (size_t)kMemory, kOk; }
Result cuMemGetInfo_v2(size_t* available, size_t* total) {
  *total = (size_t)kMemory;
  *available = integrated ? 0 : (size_t)(kMemory - counts.bytes);
  return kOk;
}

Result cuDevicePrimaryCtxRetain(void** out, int index) { return *out = &device, kOk; }
Result cuDevicePrimaryCtxRelease_v2(int index) { return kOk; }
Result cuCtxSetCurrent(void* context) { return current = context, kOk; }
Result cuCtxGetCurrent(void** out) { return *out = current, kOk; }
Result cuCtxGetDevice(int* out) { return *out = 0, current ? kOk : kNoContext; }
Result cuCtxPushCurrent_v2(void* context) { return current = context, kOk; }
Result cuCtxPopCurrent_v2(void** out) {
  if (out) *out = current;
  return current = NULL, kOk;
}
Result cuCtxSynchronize(void) {
  NOT_CAPTURED("cuCtxSynchronize");
  catchUp();
  ++counts.waits;
  return kOk;
}

Result cuMemAlloc_v2(Address* out, size_t size) {
  NEEDS_CONTEXT;
  NOT_CAPTURED("cuMemAlloc");
  if ((int64_t)size > kMemory - counts.bytes) return kOutOfMemory;
  const size_t page = 4096, whole = (size + page - 1) / page * page + page;
  char* start = mmap(NULL, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED || regionCount == kMaxRegions) return kOutOfMemory;
  regions[regionCount++] = (Region){start, whole - page};  // the last page stays closed
  mprotect(start, whole - page, PROT_READ | PROT_WRITE);
  memset(start, 0xff, whole - page);
  if (locked()) mprotect(start, whole - page, PROT_NONE);
  ++counts.allocations;
  counts.bytes += (int64_t)whole;
  *out = (Address)start + whole - page - (size + 255) / 256 * 256;
  return kOk;
}
Result cuMemFree_v2(Address address) {
  NEEDS_CONTEXT;
  NOT_CAPTURED("cuMemFree");
  catchUp();
  for (int i = 0; i < regionCount; ++i) {
    if (address - (Address)regions[i].start < regions[i].size) {
      munmap(regions[i].start, regions[i].size + 4096);
      counts.bytes -= (int64_t)regions[i].size + 4096;
      regions[i] = regions[--regionCount];
      return kOk;
    }
  }
  return kInvalid;
}
Result cuMemHostAlloc(void** out, size_t size, unsigned flags) {
  NEEDS_CONTEXT;
  NOT_CAPTURED("cuMemHostAlloc");
  ++counts.allocations;
  if (lockCount == kMaxLocked || posix_memalign(out, 4096, size ? size : 1)) return kOutOfMemory;
  locks[lockCount++] = (Region){*out, size};
  return kOk;
}
Result cuMemFreeHost(void* address) {
  NEEDS_CONTEXT;
  catchUp();
  for (int i = 0; i < lockCount; ++i) {
    if (locks[i].start == address) locks[i] = locks[--lockCount];
  }
  free(address);
  return kOk;
}

static Result copy(void* to, const void* from, size_t size, Stream* stream) {
  ++counts.copies;
  return submit(stream, (Node){.kind = kCopy, .to = to, .from = (void*)from, .size = size});
}
Result cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t size, Stream* stream) {
  counts.uploaded += (int64_t)size;
  const Result status = copy((void*)to, from, size, stream);
  if (!isLocked(from) && !capturing) catchUp();
  return status;
}
Result cuMemcpyDtoHAsync_v2(void* to, Address from, size_t size, Stream* stream) {
  counts.downloaded += (int64_t)size;
  const Result status = copy(to, (void*)from, size, stream);
  if (!isLocked(to) && !capturing) catchUp();
  return status;
}
Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t size, Stream* stream) {
  return copy((void*)to, (void*)from, size, stream);
}
static Result copyNow(void* to, const void* from, size_t size) {
  NEEDS_CONTEXT;
  NOT_CAPTURED("a copy that waits");
  ++counts.waits;
  catchUp();
  perform(&(Node){.kind = kCopy, .to = to, .from = (void*)from, .size = size});
  return kOk;
}
Result cuMemcpyHtoD_v2(Address to, const void* from, size_t size) {
  return copyNow((void*)to, from, size);
}
Result cuMemcpyDtoH_v2(void* to, Address from, size_t size) {
  return copyNow(to, (void*)from, size);
}
Result cuMemsetD8Async(Address to, unsigned char value, size_t size, Stream* stream) {
  return submit(stream, (Node){.kind = kFill, .to = (void*)to, .value = value, .size = size});
}

Result cuStreamCreate(Stream** out, unsigned flags) {
  NEEDS_CONTEXT;
  return *out = calloc(1, sizeof **out), kOk;
}
Result cuStreamDestroy_v2(Stream* stream) {
  NEEDS_CONTEXT;
  free(stream);
  return kOk;
}
Result cuStreamSynchronize(Stream* stream) {
  NEEDS_CONTEXT;
  NOT_CAPTURED("cuStreamSynchronize");
  catchUp();
  ++counts.waits;
  return kOk;
}
// What a kernel launch is on a GPU: work with its arguments, in the stream's order.
Result cuLaunchHostFunc(Stream* stream, HostFunction call, void* data) {
  ++counts.calls;
  return submit(stream, (Node){.kind = kCall, .call = call, .data = data});
}

Result cuStreamBeginCapture_v2(Stream* stream, int mode) {
  NEEDS_CONTEXT;
  if (!stream) return kCaptureUnsupported;
  if (capturing) return kIllegalState;
  stream->capture = calloc(1, sizeof(Graph));
  stream->capture->last = &stream->capture->first;
  capturing = stream;
  protect(PROT_NONE);
  return kOk;
}
Result cuStreamIsCapturing(Stream* stream, int* out) { return *out = capturing == stream, kOk; }
Result cuStreamEndCapture(Stream* stream, Graph** out) {
  if (!capturing || stream != capturing) return kIllegalState;
  Graph* graph = stream->capture;
  stream->capture = NULL;
  capturing = NULL;
  protect(locked() ? PROT_NONE : PROT_READ | PROT_WRITE);
  *out = graph->spoilt ? NULL : graph;
  return graph->spoilt ? kCaptureInvalidated : kOk;
}
Result cuGraphInstantiateWithFlags(Graph** out, Graph* graph, unsigned long long flags) {
  return *out = graph, kOk;
}
Result cuGraphGetNodes(Graph* graph, Node** nodes, size_t* count) {
  size_t found = 0;
  for (Node* node = graph->first; node; node = node->next, ++found) {
    if (nodes && found < *count) nodes[found] = node;
  }
  if (!nodes || found < *count) *count = found;
  return kOk;
}
Result cuGraphNodeGetDependencies_v2(Node* node, Node** before, void* edges, size_t* count) {
  if (node->before && before && *count) before[0] = node->before;
  return *count = node->before ? 1 : 0, kOk;
}
Result cuGraphDestroyNode(Node* node) { return node->off = 1, kOk; }
// Nodes run in the order of their capture whatever ties them.
Result cuGraphAddDependencies_v2(Graph* graph, Node** from, Node** to, const void* edges,
                                 size_t count) {
  return count == 1 && from[0] && to[0] ? kOk : kInvalid;
}
Result cuGraphLaunch(Graph* graph, Stream* stream) {
  NEEDS_CONTEXT;
  NOT_CAPTURED("cuGraphLaunch");
  ++counts.launches;
  if (!late) unlock();
  for (const Node* node = graph->first; node; node = node->next) enqueue(node);
  if (!late) lock();
  return kOk;
}
Result cuGraphDestroy(Graph* graph) { return kOk; }
Result cuGraphExecDestroy(Graph* graph) { return kOk; }

Result cuGetErrorString(Result error, const char** out) { return *out = "said nowhere", kOk; }
Result cuGetErrorName(Result error, const char** out) {
  *out = error == kCaptureUnsupported   ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
         : error == kCaptureInvalidated ? "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
         : error == kNoContext          ? "CUDA_ERROR_INVALID_CONTEXT"
         : error == kLaunchFailed       ? "CUDA_ERROR_LAUNCH_FAILED"
                                        : "CUDA_ERROR";
  return kOk;
}
