/* A program that links libcuda itself, beside this library. tests/c_program.rs compiles and runs it with fake_cuda.c.
 *
 * Its calls must reach the libcuda that it links, before and after the library has loaded the driver. */

#include <stdio.h>
#include <string.h>

#include "liquidgemm.h"

int cuInit(unsigned flags);
int fakeCalls(void);

#define REQUIRE(condition)                                                   \
    do {                                                                     \
        if (!(condition)) {                                                  \
            fprintf(stderr, "%s: %s\n", #condition, lg_last_error_message()); \
            return 1;                                                        \
        }                                                                    \
    } while (0)

int main(void) {
    REQUIRE(cuInit(0) == 42 && fakeCalls() == 1);
    lg_gpu *gpu = NULL;
    /* The library loads the driver, which is the libcuda.so.1 that is loaded already, and calls it. */
    REQUIRE(lg_gpu_open(0, &gpu) == LG_ERROR_DRIVER && fakeCalls() == 2);
    REQUIRE(cuInit(0) == 42 && fakeCalls() == 3);
    printf("all passed\n");
    return 0;
}
