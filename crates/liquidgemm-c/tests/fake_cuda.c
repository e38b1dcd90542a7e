/* A libcuda that counts calls. cuInit returns 42, so that callers see that they reached this one. */

static int calls;

int cuInit(unsigned flags) {
    (void)flags;
    calls++;
    return 42;
}

int cuDriverGetVersion(int *version) {
    *version = 12080;
    return 0;
}

int fakeCalls(void) { return calls; }
