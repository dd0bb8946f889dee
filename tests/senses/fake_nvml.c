/* A stand-in for NVIDIA's driver library, for tests: it answers what the file named by FAKE_NVML says.

   Each line of the file is "key value". Keys: "count"; "GPU.what" for a value; "function.error" for the code that a
   function returns; "function.block" makes it block for as long as the line is there. The file is read at each call,
   so a test can change it while the library is loaded. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long long u64;

static int find(const char *key, u64 *value) {
    char line[256], name[128];
    int found = 0;
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return 0;
    while (!found && fgets(line, sizeof line, file))
        found = sscanf(line, "%127s %llu", name, value) == 2 && !strcmp(name, key);
    fclose(file);
    return found;
}

static int begin(const char *function) {
    char key[128];
    u64 value = 0;
    snprintf(key, sizeof key, "%s.block", function);
    while (find(key, &value)) usleep(10000);
    snprintf(key, sizeof key, "%s.error", function);
    return find(key, &value) ? (int)value : 0;
}

static u64 of(void *gpu, const char *what, u64 otherwise) {
    char key[128];
    u64 value;
    snprintf(key, sizeof key, "%llu.%s", (u64)(size_t)gpu - 1, what);
    return find(key, &value) ? value : otherwise;
}

#define BEGIN { int code = begin(__func__); if (code) return code; }
#define BEGIN_GPU(gpu) BEGIN { int code = (int)of(gpu, __func__, 0); if (code) return code; }

int nvmlInitWithFlags(unsigned flags) { (void)flags; BEGIN return 0; }
int nvmlShutdown(void) { BEGIN return 0; }

const char *nvmlErrorString(int code) { (void)code; return "an error of the fake"; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    u64 value = 0;
    BEGIN
    find("count", &value);
    *count = (unsigned)value;
    return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **gpu) { BEGIN *gpu = (void *)(size_t)(index + 1); return 0; }

int nvmlDeviceGetUUID(void *gpu, char *text, unsigned size) {
    BEGIN_GPU(gpu)
    snprintf(text, size, "GPU-fake-%llu", (u64)(size_t)gpu - 1);
    return 0;
}

int nvmlDeviceGetMemoryInfo(void *gpu, u64 *memory) {
    BEGIN_GPU(gpu)
    memory[0] = of(gpu, "total", 80ULL << 30);
    memory[2] = of(gpu, "used", 0);
    memory[1] = memory[0] - memory[2];
    return 0;
}

int nvmlDeviceGetMigMode(void *gpu, unsigned *now, unsigned *pending) {
    BEGIN_GPU(gpu)
    *now = *pending = (unsigned)of(gpu, "mig", 0);
    return 0;
}

int nvmlDeviceGetUtilizationRates(void *gpu, unsigned *rates) {
    BEGIN_GPU(gpu)
    rates[0] = (unsigned)of(gpu, "busy", 0);
    rates[1] = 0;
    return 0;
}

int nvmlDeviceGetTemperature(void *gpu, int sensor, unsigned *celsius) {
    (void)sensor;
    BEGIN_GPU(gpu)
    *celsius = (unsigned)of(gpu, "temperature", 40);
    return 0;
}

int nvmlDeviceGetPowerUsage(void *gpu, unsigned *milliwatts) {
    BEGIN_GPU(gpu)
    *milliwatts = (unsigned)of(gpu, "power", 100000);
    return 0;
}

int nvmlDeviceGetCurrentClocksEventReasons(void *gpu, u64 *reasons) {
    BEGIN_GPU(gpu)
    *reasons = of(gpu, "reasons", 0);
    return 0;
}

int nvmlDeviceGetTotalEccErrors(void *gpu, int type, int counter, u64 *errors) {
    (void)type; (void)counter;
    BEGIN_GPU(gpu)
    *errors = of(gpu, "ecc", 0);
    return 0;
}

typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } process;

int nvmlDeviceGetComputeRunningProcesses_v3(void *gpu, unsigned *count, process *processes) {
    BEGIN_GPU(gpu)
    unsigned room = *count, i;
    char key[64];
    *count = (unsigned)of(gpu, "processes", 0);
    if (*count > room) return 7; /* insufficient size */
    for (i = 0; i < *count; i++) {
        snprintf(key, sizeof key, "pid%u", i);
        processes[i].pid = (unsigned)of(gpu, key, 0);
        snprintf(key, sizeof key, "pid%u.used", i);
        processes[i].used = of(gpu, key, ~0ULL); /* not available */
        processes[i].gpu_instance = processes[i].compute_instance = ~0U;
    }
    return 0;
}

int nvmlEventSetCreate(void **set) { BEGIN *set = (void *)1; return 0; }
int nvmlEventSetFree(void *set) { (void)set; BEGIN return 0; }
int nvmlDeviceGetSupportedEventTypes(void *gpu, u64 *types) { BEGIN_GPU(gpu) *types = 8; return 0; }
int nvmlDeviceRegisterEvents(void *gpu, u64 types, void *set) { (void)types; (void)set; BEGIN_GPU(gpu) return 0; }

typedef struct { void *gpu; u64 type, data; unsigned gpu_instance, compute_instance; } event;

int nvmlEventSetWait_v2(void *set, event *happened, unsigned timeout_ms) {
    static u64 told = 0;
    u64 wanted = 0, gpu = 0;
    (void)set; (void)timeout_ms;
    BEGIN
    if (!find("xid", &wanted) || wanted == told) return 10; /* timeout */
    told = wanted;
    find("xid.gpu", &gpu);
    happened->gpu = (void *)(size_t)(gpu + 1);
    happened->type = 8;
    happened->data = wanted;
    return 0;
}
