/* A stand-in for CANN with one device in host memory. Its aclnn entry points log their arguments and compute nothing, so
 * that torch_npu's own host code (argument checks, output allocation, choice of entry point, NZ shapes) really runs.
 * x86-64 System V only: arguments are read by position. Built by standins.py, which adds the names that the wheel asks
 * for. QHAL_NPU_STANDIN_SOC and _CANN say which chip and which version to be. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static char *buf; static size_t cap, len;
static void put(const char *s) {
    size_t n = strlen(s);
    if (len + n + 1 > cap) { cap = (len + n + 1) * 2; buf = realloc(buf, cap); }
    memcpy(buf + len, s, n + 1); len += n;
}
const char *qhal_standin_log(void) { return buf ? buf : ""; }
void qhal_standin_clear(void) { len = 0; if (buf) buf[0] = 0; }
static void note(const char *n) { if (getenv("QHAL_NPU_STANDIN_TRACE")) fprintf(stderr, "[npu-standin] %s\n", n); }

/* ---- runtime: one device, host memory ---- */
static int dev = -1; static long ctx = 1;
int aclrtGetDeviceCount(uint32_t *n) { if (n) *n = 1; return 0; }
int aclrtSetDevice(int d) { dev = d; return 0; }
int aclrtGetDevice(int *d) { if (dev < 0) return 107002; *d = dev; return 0; }
int aclrtGetCurrentContext(void **c) { if (dev < 0) return 107002; *c = &ctx; return 0; }
int aclrtSetCurrentContext(void *c) { return 0; }
const char *aclrtGetSocName(void) { const char *s = getenv("QHAL_NPU_STANDIN_SOC"); return s ? s : "Ascend910B1"; }
const char *aclGetRecentErrMsg(void) { return "stand-in of CANN"; }
static int alloc(void **p, size_t n) { if (posix_memalign(p, 512, n ? n : 512)) return 207001; memset(*p, 0, n); return 0; }
int aclrtMalloc(void **p, size_t n, int policy) { return alloc(p, n); }
int aclrtMallocAlign32(void **p, size_t n, int policy) { return alloc(p, n); }
int aclrtMallocHost(void **p, size_t n) { return alloc(p, n); }
int aclrtFree(void *p) { free(p); return 0; }
int aclrtFreeHost(void *p) { free(p); return 0; }
int aclrtGetMemInfo(int attr, size_t *f, size_t *t) { *f = (size_t)8 << 30; *t = (size_t)16 << 30; return 0; }
int aclrtMemcpy(void *d, size_t dn, const void *s, size_t n, int k) { memcpy(d, s, n); return 0; }
int aclrtMemcpyAsync(void *d, size_t dn, const void *s, size_t n, int k, void *st) { memcpy(d, s, n); return 0; }
int aclrtMemset(void *d, size_t dn, int v, size_t n) { memset(d, v, n); return 0; }
int aclrtMemsetAsync(void *d, size_t dn, int v, size_t n, void *st) { memset(d, v, n); return 0; }
static int handle(void **p) { *p = calloc(1, 64); return 0; }
int aclrtCreateStream(void **s) { return handle(s); }
int aclrtCreateStreamWithConfig(void **s, uint32_t p, uint32_t f) { return handle(s); }
int aclrtCreateEventExWithFlag(void **e, uint32_t f) { return handle(e); }
int aclrtCreateEventWithFlag(void **e, uint32_t f) { return handle(e); }
int aclrtQueryEventStatus(void *e, int *s) { *s = 1; return 0; }
int aclrtStreamQuery(void *s, int *st) { *st = 0; return 0; }
int aclrtPointerGetAttributes(const void *p, void *a) { return 0; }
int aclrtEventElapsedTime(float *ms, void *a, void *b) { *ms = 0; return 0; }
int aclGetDeviceCapability(uint32_t d, int info, int64_t *v) { *v = 20; return 0; }
int aclrtDeviceCanAccessPeer(int *c, int a, int b) { *c = 0; return 0; }
int aclrtGetDeviceInfo(uint32_t d, int attr, int64_t *v) { *v = 20; return 0; }
int aclsysGetCANNVersion(int name, char *v) {
    /* aclCANNPackageVersion: char version[128], ... ; report what the caller asked us to be */
    const char *s = getenv("QHAL_NPU_STANDIN_CANN"); if (!s) return 1; strncpy(v, s, 127); return 0; }
int aclsysGetVersionStr(char *pkg, char *v) {
    const char *s = getenv("QHAL_NPU_STANDIN_CANN"); if (!s) return 1; strcpy(v, s); return 0; }
int aclGetCannAttribute(int a, int *v) { *v = 0; return 0; }
size_t aclGetCompileoptSize(int o) { return 8; }
int aclGetCompileopt(int o, char *v, size_t n) { if (n) v[0] = 0; return 0; }
/* ---- aclnn argument objects ---- */
#define F(v) ((v) > -1e300 && (v) < 1e300 ? (double)(v) : 0.0) /* JSON has no NaN */
typedef struct { void *p; int id; char kind; } H;
static H hs[65536]; static int nh, seq;
static void *reg(char kind) {
    void *p = calloc(1, 256);
    if (nh >= 65536) nh = 0;
    hs[nh].p = p; hs[nh].id = seq++; hs[nh].kind = kind; nh++;
    return p;
}
static H *find(void *p) { for (int i = nh - 1; i >= 0; i--) if (hs[i].p == p) return &hs[i]; return 0; }
static void dims(char *o, const int64_t *d, uint64_t n) {
    strcat(o, "["); for (uint64_t i = 0; i < n; i++) sprintf(o + strlen(o), i ? ",%ld" : "%ld", d[i]); strcat(o, "]"); }
typedef struct { uint64_t n; int64_t d[24]; int dt; } TI;
void *aclCreateTensor(const int64_t *v, uint64_t nv, int dt, const int64_t *st, int64_t off, int fmt,
                      const int64_t *sd, uint64_t ns, void *data) {
    char o[2048] = "";
    TI *t = reg('T'); t->n = nv; t->dt = dt; for (uint64_t i = 0; i < nv && i < 24; i++) t->d[i] = v[i];
    sprintf(o, "{\"new\":\"T%d\",\"acl_dtype\":%d,\"format\":%d,\"offset\":%ld,\"view\":", seq - 1, dt, fmt, off);
    dims(o, v, nv); strcat(o, ",\"stride\":"); dims(o, st, st ? nv : 0);
    strcat(o, ",\"storage\":"); dims(o, sd, ns); strcat(o, "}\n"); put(o);
    return t;
}
void *aclCreateScalar(void *v, int dt) { char o[128]; void *p = reg('S');
    if (dt == 0) sprintf(o, "{\"new\":\"S%d\",\"acl_dtype\":0,\"value\":%g}\n", seq - 1, F(*(float *)v));
    else if (dt == 11) sprintf(o, "{\"new\":\"S%d\",\"acl_dtype\":11,\"value\":%g}\n", seq - 1, F(*(double *)v));
    else sprintf(o, "{\"new\":\"S%d\",\"acl_dtype\":%d}\n", seq - 1, dt);
    put(o); return p; }
void *aclCreateIntArray(const int64_t *v, uint64_t n) { char o[65536] = ""; void *p = reg('I');
    sprintf(o, "{\"new\":\"I%d\",\"ints\":", seq - 1); dims(o, v, n > 1024 ? 1024 : n); strcat(o, "}\n"); put(o); return p; }
void *aclCreateFloatArray(const float *v, uint64_t n) { char o[64]; void *p = reg('F'); sprintf(o, "{\"new\":\"F%d\",\"n\":%lu}\n", seq - 1, n); put(o); return p; }
void *aclCreateBoolArray(const char *v, uint64_t n) { char o[64]; void *p = reg('B'); sprintf(o, "{\"new\":\"B%d\",\"n\":%lu}\n", seq - 1, n); put(o); return p; }
static void *list(char k, void **v, uint64_t n) { char o[65536] = ""; void *p = reg(k);
    sprintf(o, "{\"new\":\"%c%d\",\"of\":[", k, seq - 1);
    for (uint64_t i = 0; i < n && i < 512; i++) { H *h = find(v[i]); sprintf(o + strlen(o), i ? ",\"%c%d\"" : "\"%c%d\"", h ? h->kind : '?', h ? h->id : -1); }
    strcat(o, "]}\n"); put(o); return p; }
void *aclCreateTensorList(void **v, uint64_t n) { return list('L', v, n); }
void *aclCreateScalarList(void **v, uint64_t n) { return list('M', v, n); }
#define D(n) int n(void *p) { return 0; }
D(aclDestroyTensor) D(aclDestroyScalar) D(aclDestroyIntArray) D(aclDestroyFloatArray) D(aclDestroyBoolArray)
D(aclDestroyTensorList) D(aclDestroyScalarList) D(aclDestroyAclOpExecutor)
int aclGetViewShape(void *t, int64_t **d, uint64_t *n) { TI *x = t; *n = x->n; *d = malloc(8 * (x->n + 1)); memcpy(*d, x->d, 8 * x->n); return 0; }
/* positional log: integer args in registers then stack, doubles in xmm */
#define NA 72
#include <sys/uio.h>
#include <unistd.h>
static int peek(long addr, void *dst, size_t n) {      /* read without faulting */
    struct iovec l = {dst, n}, r = {(void *)addr, n};
    return process_vm_readv(getpid(), &l, 1, &r, 1, 0) == (ssize_t)n;
}
static int near_stack(long v, long *a) { long d = v - (long)a; return d > -(1 << 20) && d < (1 << 20); }
static void log_call(const char *name, long *a, double *x) {
    char o[16384] = ""; int n = NA;
    /* the argument list ends with (uint64_t *workspaceSize, aclOpExecutor **executor), both on the caller's stack, both 0 */
    for (int i = 1; i + 1 < NA; i++) {
        long v0 = 1, v1 = 1;
        if (near_stack(a[i], a) && near_stack(a[i + 1], a) && peek(a[i], &v0, 8) && peek(a[i + 1], &v1, 8) && !v0 && !v1) { n = i; break; }
    }
    sprintf(o, "{\"call\":\"%s\",\"args\":[", name);
    for (int i = 0; i < n; i++) {
        H *h = a[i] ? find((void *)a[i]) : 0; char s[24];
        if (i) strcat(o, ",");
        if (h) sprintf(o + strlen(o), "\"%c%d\"", h->kind, h->id);
        else if (a[i] == 0) strcat(o, "null");
        else if (a[i] > -4294967296L && a[i] < 4294967296L) sprintf(o + strlen(o), "%ld", a[i]);
        else if (peek(a[i], s, sizeof s)) {
            int k = 0; while (k < 23 && s[k] >= 32 && s[k] < 127 && s[k] != '"' && s[k] != '\\') k++;
            if (s[k] == 0 && k > 0) sprintf(o + strlen(o), "\"str:%s\"", s); else strcat(o, "\"ptr\"");
        } else sprintf(o + strlen(o), "%d", (int)a[i]);   /* a narrow int with rubbish above it */
    }
    sprintf(o + strlen(o), "],\"xmm\":[%g,%g,%g,%g]}\n", F(x[0]), F(x[1]), F(x[2]), F(x[3])); put(o);
}
#define WS(n) int n##GetWorkspaceSize(long a0, long a1, long a2, long a3, long a4, long a5, \
    double x0, double x1, double x2, double x3, double x4, double x5, double x6, double x7, \
    long s0, ...) { long a[NA] = {a0, a1, a2, a3, a4, a5}; double x[4] = {x0, x1, x2, x3}; memcpy(a + 6, &s0, sizeof(long) * (NA - 6)); log_call(#n, a, x); return 0; } \
    int n(void *w, uint64_t sz, void *ex, void *st) { return 0; }
/* ND -> FRACTAL_NZ storage shape, C0 = 32 bytes' worth of elements (16 for 2-byte and 4-byte via fp16) */
int aclnnNpuFormatCastCalculateSizeAndFormat(void *t, int fmt, int addl, int64_t **shape, uint64_t *n, int *actual) {
    TI *x = t; *actual = fmt;
    if (fmt == 29 && x->dt == 40) *actual = 51;                  /* E2M1 beside 8-bit activations: FRACTAL_NZ_C0_32 */
    if (fmt != 29) { *shape = malloc(8 * (x->n + 1)); memcpy(*shape, x->d, 8 * x->n); *n = x->n; return 0; }
    int64_t c0 = (addl == 2 || addl == 4) ? 32 : 16;             /* ACL_INT8=2, ACL_UINT8=4 */
    int64_t *s = malloc(8 * (x->n + 3)); uint64_t k = x->n;
    for (uint64_t i = 0; i + 2 < k; i++) s[i] = x->d[i];
    s[k - 2] = (x->d[k - 1] + c0 - 1) / c0; s[k - 1] = (x->d[k - 2] + 15) / 16; s[k] = 16; s[k + 1] = c0;
    *shape = s; *n = k + 2; return 0;
}
