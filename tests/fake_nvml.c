/* An NVML with one GPU, for the calls that faqd makes through nvidia-ml-py. FAKE_NVML=none: no driver is loaded;
 * FAKE_NVML=orin: starts, and answers NotSupported to all but the name. */
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

enum { OK = 0, NOT_SUPPORTED = 3, DRIVER_NOT_LOADED = 9 };
static unsigned long long energy_mj = 1000;
static int is(const char *kind) { const char *set = getenv("FAKE_NVML"); return set && !strcmp(set, kind); }
static int known(unsigned *to, unsigned value) { *to = value; return is("orin") ? NOT_SUPPORTED : OK; }

const char *nvmlErrorString(int error) {
  return error == NOT_SUPPORTED ? "Not Supported" : error == DRIVER_NOT_LOADED ? "Driver Not Loaded" : "Unknown Error";
}
int nvmlInitWithFlags(unsigned flags) { return is("none") ? DRIVER_NOT_LOADED : OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = &energy_mj; return OK; }
int nvmlDeviceGetName(void *device, char *name, unsigned size) { snprintf(name, size, "Some GPU"); return OK; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *mw) { return known(mw, 70000); }
int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *mw) { return known(mw, 72000); }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *c) { return known(c, sensor == 0 ? 61 : 0); }
int nvmlDeviceGetClockInfo(void *device, int clock, unsigned *mhz) {
  return known(mhz, clock == 1 ? 2040 : clock == 2 ? 6251 : 0);
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *mj) {
  *mj = energy_mj += 500;
  return is("orin") ? NOT_SUPPORTED : OK;
}
