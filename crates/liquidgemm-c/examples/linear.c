/* A linear layer from C: quantize, save, load and multiply on the CPU, and on the GPU if there is one.
 *
 * cc -Icrates/liquidgemm-c/include crates/liquidgemm-c/examples/linear.c -Ltarget/release -lliquidgemm_c -lm -o linear
 * LD_LIBRARY_PATH=target/release ./linear
 *
 * On a GPU all memory is the library's here, except for input and output, which need cudaMalloc or cuMemAlloc;
 * so the GPU part only prints what the library would do. See lg_gpu_linear_forward for the call. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "liquidgemm.h"

enum { M = 4, N = 70, K = 192 };

/* Ends the program with the message of the last error. */
static void check(lg_status status, const char *what) {
    if (status != LG_OK) {
        fprintf(stderr, "%s: %s\n", what, lg_last_error_message());
        exit(1);
    }
}

/* Rounds to bf16, to nearest even. */
static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

static float from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

int main(int count, char **arguments) {
    const char *path = count > 1 ? arguments[1] : "linear-example.safetensors";
    if (lg_abi_version() != LG_ABI_VERSION) {
        fprintf(stderr, "the library has another interface than the header\n");
        return 1;
    }

    static float values[N * K], bias[N];
    static uint16_t x[M * K], y[M * N];
    for (int i = 0; i < N * K; i++) values[i] = sinf((float)i * 0.37f);
    for (int i = 0; i < N; i++) bias[i] = (float)i * 0.125f;
    for (int i = 0; i < M * K; i++) x[i] = to_bf16(cosf((float)i * 0.11f));

    /* Offline: quantize and save. */
    lg_weights *weights = NULL;
    check(lg_weights_quantize(values, LG_TYPE_F32, N, K, 64, &weights), "quantizing");
    check(lg_weights_save(weights, path), "saving");
    lg_weights_free(weights);

    /* In the server: load, and compute bf16 layers. */
    check(lg_weights_load(path, &weights), "loading");
    remove(path);
    lg_linear *linear = NULL;
    check(lg_linear_new(weights, bias, NULL, &linear), "making the layer");
    struct lg_input input = {
        .struct_size = sizeof(input), .m = M, .k = K, .input_type = LG_TYPE_BF16, .input = x,
    };
    struct lg_output output = {.struct_size = sizeof(output), .output = y, .output_type = LG_TYPE_BF16};
    check(lg_cpu_linear_forward(linear, &input, &output), "multiplying");

    double largest = 0;
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) {
            double exact = bias[n];
            for (int k = 0; k < K; k++) exact += (double)from_bf16(x[m * K + k]) * values[n * K + k];
            largest = fmax(largest, fabs(exact - from_bf16(y[m * N + n])));
        }
    }
    printf("liquidgemm %s: [%d, %d] x [%d, %d], largest error %.3f\n", lg_version(), M, K, N, K, largest);

    /* The GPU, if there is one that fits. */
    lg_gpu *gpu = NULL;
    lg_status status = lg_gpu_open(-1, &gpu);
    if (status == LG_ERROR_NO_GPU) {
        printf("no GPU: %s\n", lg_last_error_message());
    } else {
        check(status, "opening the GPU");
        struct lg_gpu_info info = {.struct_size = sizeof(info)};
        check(lg_gpu_get_info(gpu, &info), "asking for the GPU");
        lg_plan *plan = NULL;
        check(lg_gpu_plan(gpu, M, N, K, &plan), "planning");
        printf("%s: %s\n", info.name, lg_plan_text(plan));
        lg_plan_free(plan);
        lg_gpu_free(gpu);
    }
    lg_linear_free(linear);
    lg_weights_free(weights);
    return largest < 2.0 ? 0 : 1;
}
